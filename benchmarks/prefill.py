"""Prefill at skipped branch executions: compact against masked against the ungated model, with the ideal beside it.

Timed: one forward pass over the prompt with a fresh cache, last logits only; the three variants in turn, so that
drift of the machine hits all alike. Not timed: loading, tokenizing. Ideal is the ratio of multiply-adds, counted while
running, less the logits that this pass does not compute. One JSON object a variant goes to --out.

    python benchmarks/prefill.py runs/demo/steps/2-gateskip --text FILE --out benchmarks/results/prefill.jsonl

With --saved 0.25 it is a quarter of the multiply-adds, net, instead of half of the branch executions. With --native
the native runtime runs the prompt, which has no masked path.
"""

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from statistics import median

import torch

import gateskip_compress as g
from gateskip_compress.gating.calibrate import everywhere, floor, observe, thresholds_for
from gateskip_compress.gating.dial import RUN_ALL
from gateskip_compress.gating.turning import dial_of
from gateskip_compress.macs import head_macs
from gateskip_compress.measure import Stopwatch, environment
from gateskip_compress.runtime import lower
from gateskip_compress.runtime.watch import SessionWatch
from gateskip_compress.text import windows


@torch.inference_mode()
def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder of a gated checkpoint; without --native, not a quantized one")
    parser.add_argument("--text", required=True)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--skipped", type=float, help="share of branch executions that are skipped; default 0.5")
    parser.add_argument("--saved", type=float, help="instead: share of the prompt's multiply-adds that are saved, net")
    parser.add_argument("--native", action="store_true", help="time the native runtime instead of torch")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if given.skipped is not None and given.saved is not None:
        raise SystemExit("--skipped and --saved are two ways to say how much: give one")
    skipped = 0.5 if given.skipped is None else given.skipped
    model, tokenizer = g.load(given.model)
    ids = windows(given.text, tokenizer, given.tokens, given.tokens)
    dial = dial_of(model)
    thresholds = everywhere(model, RUN_ALL)
    for _ in range(4):  # skipping moves later scores, so the threshold is found in a few passes
        seen = observe(model, ids, thresholds)
        if given.saved is None:
            thresholds = everywhere(model, float(torch.cat([d.score.flatten() for d in seen]).quantile(skipped)))
            continue
        found = thresholds_for(model, seen, 1 - given.saved, given.tokens)
        if found is None:
            raise SystemExit(
                f"--saved {given.saved} is out of reach: all skipped, {floor(model, seen, given.tokens)} run"
            )
        thresholds = found
    kept = torch.cat([d.keep.flatten() for d in observe(model, ids, thresholds)]).float().mean().item()
    variants = {
        "ungated": (None, nullcontext),
        "masked": (thresholds, lambda: g.masked(model)),
        "compact": (thresholds, nullcontext),
    }
    if given.native:
        del variants["masked"]
        watch = SessionWatch(ids, 1, lower(model, context_tokens=given.tokens))
    else:
        watch = Stopwatch(ids, 1, model)
    samples: dict[str, list[float]] = {name: [] for name in variants}
    macs: dict[str, int] = {}
    for run in range(given.runs + 1):
        for name, (at, how) in variants.items():
            dial.thresholds = at
            with how():
                if run == 0:  # the warm-up counts
                    macs[name] = g.count_macs(model, ids) - (given.tokens - 1) * head_macs(model)
                seconds = watch.prefill()
                if run > 0:
                    samples[name].append(seconds)
    given.out.parent.mkdir(exist_ok=True)
    with given.out.open("a", buffering=1) as out:
        for name, seconds in samples.items():
            row = {
                "benchmark": "prefill",
                "variant": name,
                "tokens": given.tokens,
                "batch": 1,
                "runtime": "native" if given.native else "torch",
                "model": Path(given.model).name,
                "executed_share": 1.0 if name == "ungated" else kept,
                "median_s": median(seconds),
                "tokens_per_s": given.tokens / median(seconds),
                "compact_speedup": median(s / c for s, c in zip(seconds, samples["compact"], strict=True)),
                "ideal_compact_speedup": macs[name] / macs["compact"],
                "samples_s": seconds,
                **environment(model),
            }
            out.write(json.dumps(row) + "\n")
            pace, ideal = row["compact_speedup"], row["ideal_compact_speedup"]
            print(f"{name:8} {row['tokens_per_s']:7.0f} tok/s; compact is {pace:.2f} × as fast, ideal {ideal:.2f} ×")


if __name__ == "__main__":
    main()
