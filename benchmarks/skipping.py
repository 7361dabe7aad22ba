"""Decoding where tokens skip branches: how much of the multiply-adds saved, net, shows in the native runtime's time.

Timed: steps of a text's tokens after a prompt of its first ones, each a call that finds the next token, so that all
variants run the same tokens. `all` skips nothing. `gates` skips as they decide, by the one threshold at which the timed
steps save the share that is asked for. `fixed` skips as many branches of either kind, the same ones at every step, so
that the processor's caches hold what it reads: it shows what skipping irregularly costs. The variants take turns, so
that drift of the machine hits all alike. Ideal is the ratio of multiply-adds, gates and surrogates counted. One JSON
object a variant goes to --out.

    python benchmarks/skipping.py runs/demo/model --text FILE --saved 0.25 --out benchmarks/results/skipping.jsonl
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median

import numpy as np
import torch
from jaxtyping import Bool, Int
from transformers import PreTrainedModel

import gateskip_compress as g
from gateskip_compress.gating.calibrate import branch_costs, everywhere, ungated_macs_per_token
from gateskip_compress.gating.dial import RUN_ALL, Thresholds
from gateskip_compress.gating.turning import branch_index, dial_of
from gateskip_compress.measure import environment
from gateskip_compress.runtime import Session, lower
from gateskip_compress.text import windows

SKIP = -RUN_ALL
"""A threshold above all scores."""
HALVINGS = 40
"""Of the range that the threshold is looked for in."""


@dataclass(frozen=True)
class Steps:
    """Steps of a text after its first tokens.

    Args:
        session: Lowered from a gated model.
        text: Token ids.
        first: Of those that are stepped through.
    """

    session: Session
    text: Int[np.ndarray, " t"]
    first: int

    def seconds(self, thresholds: Thresholds | None) -> float:
        """Of all steps, at these thresholds."""
        self._begin(thresholds)
        start = time.perf_counter()
        for at in range(self.first, len(self.text)):
            self.session.run_row(self.text[at : at + 1], 0, at, wanted=1)
        return time.perf_counter() - start

    def kept(self, thresholds: Thresholds | None) -> Bool[np.ndarray, "n s"]:
        """Which branches run at which step."""
        self._begin(thresholds)
        places = range(self.first, len(self.text))
        found = [self.session.run_row(self.text[at : at + 1], 0, at, wanted=1, decisions=True).kept for at in places]
        return np.concatenate([kept for kept in found if kept is not None], axis=1)

    def saved(self, kept: Bool[np.ndarray, "n s"]) -> float:
        """The share of an ungated model's multiply-adds, head included."""
        model, context = self.session.model, (self.first + len(self.text)) // 2
        skipped = 1 - kept.mean(axis=1)
        savings = sum(
            skipped[branch_index(*key)] * (cost.kept - cost.skipped) - cost.gate
            for key, cost in branch_costs(model, context).items()
        )
        return float(savings) / ungated_macs_per_token(model, context)

    def threshold(self, saved: float) -> Thresholds:
        """The lowest one for all gates at which steps save that share.

        Raises:
            SystemExit: skipping all saves less.
        """
        most = self.saved(self.kept(everywhere(self.session.model, SKIP)))
        if most < saved:
            raise SystemExit(f"--saved {saved} is out of reach: all skipped, {most:.3f} are saved")
        low, high = -100.0, 100.0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            enough = self.saved(self.kept(everywhere(self.session.model, middle))) >= saved
            low, high = (low, middle) if enough else (middle, high)
        return everywhere(self.session.model, high)

    def _begin(self, thresholds: Thresholds | None) -> None:
        dial_of(self.session.model).thresholds = thresholds
        self.session.prefill(self.text[: self.first])


def fixed(model: PreTrainedModel, kept: Bool[np.ndarray, "n s"], seed: int) -> Thresholds:
    """Thresholds that skip as many branches of either kind as are skipped there a step, the same ones always."""
    found, draw = list(everywhere(model, RUN_ALL)), Random(seed)
    for kind in ("attention", "mlp"):
        of_kind = [branch_index(layer, other) for layer, other in branch_costs(model, 1) if other == kind]
        for index in draw.sample(of_kind, round(float((1 - kept[of_kind]).sum(axis=0).mean()))):
            found[index] = SKIP
    return tuple(found)


@torch.inference_mode()
def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder of a gated, 4-bit checkpoint")
    parser.add_argument("--text", required=True)
    parser.add_argument("--prompts", type=int, nargs="+", default=[32, 512, 2048])
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--saved", type=float, default=0.25, help="share of the steps' multiply-adds, net")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=None, help="default: one a core")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    model, tokenizer = g.load(given.model)
    longest = max(given.prompts) + given.steps
    session = lower(model, context_tokens=longest, threads=given.threads)
    text = windows(given.text, tokenizer, longest, longest)[0].numpy().astype(np.int32)
    given.out.parent.mkdir(exist_ok=True)
    with given.out.open("a", buffering=1) as out:
        for prompt in given.prompts:
            steps = Steps(session, text[: prompt + given.steps], prompt)
            gates = steps.threshold(given.saved)
            variants = {"all": None, "gates": gates, "fixed": fixed(model, steps.kept(gates), seed=prompt)}
            samples = {name: [] for name in variants}
            for run in range(given.runs + 1):
                for name, thresholds in variants.items():
                    seconds = steps.seconds(thresholds)
                    if run > 0:
                        samples[name].append(seconds)
            for name, seconds in samples.items():
                saved = 0.0 if variants[name] is None else steps.saved(steps.kept(variants[name]))
                row = {
                    "benchmark": "skipping",
                    "variant": name,
                    "model": Path(given.model).name,
                    "prompt_tokens": prompt,
                    "steps": given.steps,
                    "saved_share": saved,
                    "tokens_per_s": given.steps / median(seconds),
                    "speedup": median(a / s for a, s in zip(samples["all"], seconds, strict=True)),
                    "ideal_speedup": 1 / (1 - saved),
                    "kernels": session.kernels,
                    "samples_s": seconds,
                    **environment(model),
                }
                out.write(json.dumps(row) + "\n")
                print(
                    f"after {prompt:4}, {name:5} saves {saved:5.1%}: {row['tokens_per_s']:4.0f} tok/s, "
                    f"{row['speedup']:.2f} × as fast, ideal {row['ideal_speedup']:.2f} ×"
                )


if __name__ == "__main__":
    main()
