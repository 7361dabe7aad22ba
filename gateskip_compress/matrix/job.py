"""One node of the matrix, in a process of its own: make its checkpoint, and measure the quality of its cells.

Nothing of the process's past is in its peak memory, and its end, however it comes, ends nothing else.
"""

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import CalibrationError, GateSkipError
from ..folders import disk_bytes, write_whole
from ..gating.transform import GateSkip
from ..gating.turning import budget
from ..measure import environment, peak_bytes
from ..pipeline import apply, set_budget, start
from ..quality import Reference, sample
from ..quantization.linear import unpacked
from ..run import calibration_text, evaluation_text, training_text
from ..source import load
from ..step import Context, Stage
from ..tasks import TASKS, read_items
from ..text import Passage
from ..track import untracked
from ..transforms import build
from .cells import Cell, Node, digest
from .harness import hub_answers
from .spec import Questions, Spec
from .store import Row, new_row

Facts = dict[str, Any]
"""Of a node: seconds and peak bytes of its steps, and their records."""


@dataclass(frozen=True)
class Job:
    """What a process needs to know.

    Args:
        spec: The matrix.
        cache: Folder of all nodes.
        node: The one to make.
        cells: Those of its cells that are to be measured.
        settings: Hash that their rows carry.
        same: Row of the parent's cell, for a step that changes only how the model decodes.
        threads: Of torch.
    """

    spec: Spec
    cache: Path
    node: Node
    cells: tuple[Cell, ...]
    settings: str
    same: Row | None = None
    threads: int = 1


def run_job(job: Job) -> Iterator[Row]:
    """Make the node, then yield a row a cell as each is measured; a node that is refused gives one row about itself.

    Any error that is not a refusal of ours ends the job.
    """
    torch.set_num_threads(job.threads)
    folder = job.cache / job.node.key
    try:
        if not (folder / "facts.json").is_file():
            make_node(job, folder)
    except (GateSkipError, ValueError) as error:
        yield {"part": "node", "status": "refused", "reason": str(error)}
        return
    if not job.cells:
        return
    facts = json.loads((folder / "facts.json").read_text())
    model, tokenizer = load(str(folder / "model"), device="auto")
    held_out, beside = ([], None) if job.same else _held_out(job, model, tokenizer)
    for cell in job.cells:
        found = {"compression": facts, "disk_bytes": disk_bytes(folder / "model"), "environment": environment(model)}
        try:
            measured = job.same or _quality(job.spec.tasks, cell, model, held_out, beside, tokenizer)
        except (GateSkipError, ValueError) as error:
            yield row_of(job, cell, "refused", reason=str(error))
            continue
        yield row_of(job, cell, "done", **found, **{key: measured[key] for key in _MEASURED})


_MEASURED = ("samples", "quality", "answers")


def row_of(job: Job, cell: Cell, status: str, **content: Any) -> Row:
    """A row about the quality of a cell."""
    return new_row(cell, "quality", job.settings, status, job.spec.seed, **content)


def make_node(job: Job, folder: Path) -> None:
    """Write a node's checkpoint from its parent's, and then what that took.

    Gates that another node fitted already, for another budget, are taken from there with the seconds that they took.
    """
    torch.manual_seed(job.spec.seed)
    if job.node.parent is None:
        model, tokenizer = load(job.node.model, job.spec.dtype, "auto")
        calibration = calibration_text(job.spec.recipe(job.node.model, []), model, tokenizer, untracked)
        start(model, tokenizer, source=job.node.model)
        write_whole(_made(folder) / "calibration.json", json.dumps(calibration.tolist()))
        facts: Facts = {"seconds": 0.0, "peak_bytes": None, "steps": []}
    elif (twin := _same_fit(job)) is not None:
        facts = json.loads((twin / "facts.json").read_text())
        model, _ = _loaded(twin)
        set_budget(model, job.node.steps[-1][1]["budget"])
    else:
        model, facts = _stepped(job, job.cache / job.node.parent, folder)
    model.save_pretrained(_made(folder) / "model")
    write_whole(folder / "facts.json", json.dumps(facts) + "\n")


def fit_of(node: Node) -> str | None:
    """Hash of what a node's last step fits, which other nodes share; None where there is no more to it than the node.

    Gates that are not trained are fitted and calibrated for all budgets alike.
    """
    name, fields = node.steps[-1]
    if name != GateSkip.name or fields["training"] is not None:
        return None
    return digest([node.parent, {**fields, "budget": None}])


def _same_fit(job: Job) -> Path | None:
    """Folder of a node that holds the fit already."""
    fit = fit_of(job.node)
    known = sorted(job.cache.glob("*/facts.json")) if fit is not None else []
    return next((path.parent for path in known if json.loads(path.read_text()).get("fit") == fit), None)


def _stepped(job: Job, parent: Path, folder: Path) -> tuple[PreTrainedModel, Facts]:
    """A node's model, out of its parent's by the last step; seconds and peak bytes are sums and maxima of all steps."""
    if not (parent / "facts.json").is_file():
        raise CalibrationError(f"no {parent}: all machines of a cluster must see the results folder in one place")
    before = json.loads((parent / "facts.json").read_text())
    ids = json.loads((job.cache / job.node.original / "calibration.json").read_text())
    model, tokenizer = _loaded(parent)
    step, lessons = build(*job.node.steps[-1]), training_text(job.spec.recipe(job.node.model, []), tokenizer)
    context = Context(torch.tensor(ids), job.spec.seed, untracked, lessons, scratch=folder / "scratch")
    began = time.perf_counter()
    record = apply(step, model, context)
    own = {"step": step.name, "seconds": time.perf_counter() - began, "peak_bytes": peak_bytes(model.device)}
    return model, {
        "seconds": before["seconds"] + own["seconds"],
        "peak_bytes": max(before["peak_bytes"] or 0, own["peak_bytes"]),
        "steps": [*before["steps"], {**own, "record": record}],
        "fit": fit_of(job.node),
    }


def _loaded(node: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A node's model, which will save its tokenizer with it."""
    model, tokenizer = load(str(node / "model"), device="auto")
    model.gateskip.tokenizer = tokenizer
    return model, tokenizer


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _held_out(
    job: Job, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Passage], Reference | None]:
    """What quality is measured on, and what the original says to it, which runs once for all other nodes."""
    place, recipe = job.cache / job.node.original, job.spec.recipe(job.node.model, [])
    original = load(str(place / "model"), device="auto")[0] if job.node.steps else model
    held_out = evaluation_text(recipe, original, tokenizer, untracked)
    if not job.node.steps:
        return held_out, None
    path = place / f"reference-{job.settings}.safetensors"
    if not path.is_file():
        Reference.of(original, held_out).write(path)
    return held_out, Reference.read(path, original)


@torch.inference_mode()
def _quality(
    tasks: Questions | None,
    cell: Cell,
    model: PreTrainedModel,
    held_out: Sequence[Passage],
    beside: Reference | None,
    tokenizer: PreTrainedTokenizerBase,
) -> Row:
    """Of one cell, with raw samples; decoding as usual, since a verified draft changes no token."""
    with ExitStack() as turned:
        if cell.budget is not None:
            turned.enter_context(budget(model, cell.budget))
        turned.enter_context(unpacked(model))
        samples = sample(model, held_out, beside)
        if not all(map(math.isfinite, samples.losses_nats)):
            raise ValueError("the loss on held-out text is not finite: these steps broke the model")
        answers = _answers(tasks, model, tokenizer) if tasks else {}
    quality = asdict(samples.quality)
    return {"samples": asdict(samples), "quality": quality, "answers": answers}


def _answers(
    tasks: Questions, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Mapping[str, Sequence[tuple[bool, bool]]]:
    if tasks.folder is None:
        return hub_answers(model, tokenizer, tasks.names, tasks.items)
    folder = Path(tasks.folder)
    return {
        name: [TASKS[name].answer(model, tokenizer, item) for item in read_items(folder, name, tasks.items)]
        for name in tasks.names
    }


def changes_only_decoding(node: Node) -> bool:
    """Whether the last step leaves quality as it is."""
    return bool(node.steps) and build(*node.steps[-1]).stage == Stage.DECODE
