"""Does a budget hold on text that its thresholds have not seen? By how much text they were calibrated on.

Of each text, every second passage is calibrated on and the others are run: multiply-adds counted there, over those of
the ungated model. What passages spend differs, so the mean of few says little,
and `standard_error` is that of the mean over the passages that ran.

    python benchmarks/budgets.py runs/demo/steps/2-gateskip --text FILES --out benchmarks/results/budgets.jsonl
"""

import argparse
import json
from pathlib import Path
from statistics import mean, stdev

import torch

import gateskip_compress as g
from gateskip_compress.gating.calibrate import BUDGETS, calibrate
from gateskip_compress.gating.turning import dial_of
from gateskip_compress.macs import count_macs, ungated_macs_per_token
from gateskip_compress.measure import environment
from gateskip_compress.processor import cores
from gateskip_compress.text import passages

BESIDE = 0.1
"""How far below the least budget settings go: a budget lies between two of them."""


@torch.inference_mode()
def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a gated checkpoint")
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--passages", nargs="+", type=int, default=[8, 100], help="to calibrate on, 512 tokens at most")
    parser.add_argument("--measured", type=int, default=100, help="passages that are run")
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.85, 0.75, 0.6])
    parser.add_argument("--settings", nargs="+", type=float, help="to calibrate, from above; default: a step's own")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    model, tokenizer = g.load(given.model)
    dial = dial_of(model)
    settings = given.settings or [share for share in BUDGETS if share > min(given.budgets) - BESIDE]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    for text in given.text:
        found = passages(text, tokenizer, 512, 1024 * max(*given.passages, given.measured))
        alike, unseen = [passage.ids for passage in found[1::2]], [passage.ids for passage in found[::2]]
        unseen = unseen[: given.measured]
        whole = [len(ids) * ungated_macs_per_token(model, len(ids)) for ids in unseen]
        for count in given.passages:
            own = alike[:count]
            dial.table = calibrate(model, own, budgets=settings)
            for share in given.budgets:
                dial.set(share)
                ran = [count_macs(model, ids[None]) for ids in unseen]
                each = [a / b for a, b in zip(ran, whole, strict=True)]
                row = {
                    "benchmark": "budgets",
                    "model": Path(given.model).name,
                    "text": Path(text).name,
                    "calibration_passages": len(own),
                    "calibration_tokens": sum(map(len, own)),
                    "tokens": sum(map(len, unseen)),
                    "settings": settings,
                    "budget": share,
                    "macs_share": sum(ran) / sum(whole),
                    "passage_mean": mean(each),
                    "standard_error": stdev(each) / len(each) ** 0.5,
                    "passages": each,
                    **environment(model),
                }
                with given.out.open("a") as out:
                    out.write(json.dumps(row) + "\n")
                print(
                    f"{row['text']:24} calibrated on {row['calibration_tokens']:6} tokens, asked {share:.2f}: ran "
                    f"{row['macs_share']:.4f} of {row['tokens']} others (± {row['standard_error']:.4f})",
                    flush=True,
                )


if __name__ == "__main__":
    torch.set_num_threads(cores())
    main()
