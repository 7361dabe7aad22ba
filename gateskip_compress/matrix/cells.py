"""From a matrix to its cells, each under a name made of all that its numbers depend on.

A *node* is a model after some steps: it has a checkpoint, and its key is a hash of the model's content, the texts, the
seed and the steps, so that stacks share the nodes that they begin with, and a changed matrix finds what it left. A
*cell* is a node at a budget. What has no checkpoint because the pipeline refuses it is a cell too.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import permutations, product
from pathlib import Path
from typing import Any, Literal

from ..errors import GateSkipError
from ..pipeline import Pipeline, settings
from ..recipe import Calibration, Evaluation, TrainingText
from ..source import resolve
from ..step import Stage
from ..tasks import TASKS
from ..transforms import build
from .spec import Spec, Step

TIMED = 1
"""Of what a timed row says; raised, cells of older folders are timed anew."""
FORMAT = 3
"""Of a results folder; goes up when old rows would be read wrongly."""
Kind = Literal["original", "stack", "baseline", "order"]


@dataclass(frozen=True)
class Node:
    """A model after some steps.

    Args:
        key: Hash, and folder name.
        parent: Key of the node without the last step; None is the original.
        original: Key of the node without steps.
        model: As the matrix names it.
        steps: All of them.
    """

    key: str
    parent: str | None
    original: str
    model: str
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Cell:
    """One line of the matrix.

    Args:
        id: Hash of node and budget.
        node: Key of the node.
        kind: Why it is in the matrix: a strength of a stack, a baseline, or an order of the same parts.
        model: As the matrix names it.
        strength: Of a stack; of a baseline its name; empty for the original.
        steps: Each with all its fields, defaults too.
        budget: Of the dial; None leaves it where the GateSkip step set it.
        refusal: Why the pipeline does not build; None where it does.
    """

    id: str
    node: str
    kind: Kind
    model: str
    strength: str
    steps: tuple[Step, ...]
    budget: float | None = None
    refusal: str | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the steps."""
        return tuple(name for name, _ in self.steps)


def list_cells(spec: Spec) -> list[Cell]:
    """All cells of a matrix, each once: the original, stacks, their budgets, baselines, orders."""
    found: dict[str, Cell] = {}
    for model in spec.models:
        base = digest(_base(spec, model))
        for kind, strength, steps in _asked(spec):
            refusal = _refusal(steps)
            if refusal is not None and kind == "order" and len(steps) > 2:
                continue  # a pair in it says why
            dial = spec.budgets if kind == "stack" and refusal is None and _turns(steps) else []
            for budget in (None, *dial):
                full = tuple((name, settings(build(name, fields))) for name, fields in steps)
                node = _key(base, full)
                cell = Cell(digest([node, budget]), node, kind, model, strength, full, budget, refusal)
                found.setdefault(cell.id, cell)
    return list(found.values())


def nodes_of(cells: Iterable[Cell], spec: Spec) -> dict[str, Node]:
    """The nodes that cells stand on, parents first."""
    found: dict[str, Node] = {}
    for cell in cells:
        if cell.refusal is not None:
            continue
        base = digest(_base(spec, cell.model))
        for count in range(len(cell.steps) + 1):
            steps = cell.steps[:count]
            key, parent = _key(base, steps), _key(base, steps[:-1]) if steps else None
            found.setdefault(key, Node(key, parent, base, cell.model, steps))
    return found


def quality_settings(spec: Spec) -> str:
    """Hash of all that a quality depends on beside the node."""
    tasks = spec.tasks
    files = [_content(Path(tasks.folder) / TASKS[name].file) for name in tasks.names] if tasks and tasks.folder else []
    return digest([_told(spec.evaluation), tasks and [tasks.names, tasks.items], files])


def timing_settings(spec: Spec) -> str:
    """Hash of all that a timing depends on beside the node and the machine."""
    return digest([TIMED, spec.timing and spec.timing.model_dump(), _told(spec.evaluation)])


def digest(value: Any) -> str:
    """Sixteen hex digits of JSON types."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _asked(spec: Spec) -> Iterator[tuple[Kind, str, list[Step]]]:
    yield "original", "", []
    for strength, steps in spec.stack_steps():
        yield "stack", strength, steps
    for name, steps in spec.baselines.items():
        yield "baseline", name, [next(iter(step.items())) for step in steps]
    if spec.orders is not None:
        pairs = [list(pair) for pair in product(spec.parts, repeat=2)]
        longer = [list(o) for n in range(3, len(spec.parts) + 1) for o in permutations(spec.parts, n)]
        for order in [*pairs, *longer]:
            yield "order", spec.orders, [(part, spec.fields(part, spec.orders)) for part in order]


def _refusal(steps: list[Step]) -> str | None:
    try:
        Pipeline(*(build(name, fields) for name, fields in steps))
    except (GateSkipError, ValueError) as error:
        return str(error)
    return None


def _turns(steps: list[Step]) -> bool:
    """Whether a stack has a dial, and nothing that decodes by it."""
    stages = {build(name, fields).stage for name, fields in steps}
    return Stage.GATE in stages and Stage.DECODE not in stages


def _base(spec: Spec, model: str) -> list[Any]:
    texts = [_told(spec.calibration), spec.training and _told(spec.training)]
    return [FORMAT, _content(resolve(model)), *texts, spec.dtype, spec.seed]


def _told(part: Evaluation | Calibration | TrainingText) -> dict[str, Any]:
    """A part of a recipe with the content of its text in place of the name."""
    texts = part.text if isinstance(part.text, list) else [part.text]
    return {**part.model_dump(), "text": [_content(text) for text in texts]}


def _key(base: str, steps: Iterable[Step]) -> str:
    key = base
    for step in steps:
        key = digest([key, *step])
    return key


_known: dict[tuple[str, int, int], str] = {}


def _content(place: str | Path) -> Any:
    """What a file or a folder of weights holds, as hashes; of anything else its name."""
    path = Path(place)
    if path.is_dir():
        files = [f for f in sorted(path.iterdir()) if f.suffix in (".json", ".safetensors")]
        return [[file.name, _content(file)] for file in files]
    if not path.is_file():
        return str(place)
    stat = path.stat()
    at = (str(path), stat.st_mtime_ns, stat.st_size)
    if at not in _known:
        with path.open("rb") as file:
            _known[at] = hashlib.file_digest(file, "sha256").hexdigest()
    return _known[at]
