"""The transforms by the names they have in recipes, checkpoints and reports."""

from dataclasses import fields, is_dataclass
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError

from .errors import PipelineError
from .gating.transform import GateSkip
from .names import nearest
from .pruning.transform import Prune
from .quantization.transform import Quantize
from .recovery import Recover
from .speculation.transform import SelfSpeculation

AnyTransform = Prune | GateSkip | Quantize | SelfSpeculation | Recover
TRANSFORMS: dict[str, type[AnyTransform]] = {t.name: t for t in (Prune, GateSkip, Quantize, SelfSpeculation, Recover)}


def transform_named(name: str) -> type[AnyTransform]:
    """The transform of a name.

    Raises:
        PipelineError: there is none; the nearest name is told.
    """
    if name not in TRANSFORMS:
        raise PipelineError(f"unknown step {name!r}{nearest(name, TRANSFORMS)}; steps: {', '.join(TRANSFORMS)}")
    return TRANSFORMS[name]


def build(name: str, given: dict[str, Any]) -> AnyTransform:
    """A transform from its name and its fields as JSON types, as recipes and manifests have them.

    Raises:
        PipelineError: an unknown step or field, with the nearest, or a value of the wrong type.
        ValueError: a value out of its range.
    """
    return _build(transform_named(name), given, name)


def _build(kind: type[Any], given: dict[str, Any], where: str) -> Any:
    known = {field.name: field.type for field in fields(kind)}
    values = {}
    for key, value in given.items():
        if key not in known:
            raise PipelineError(f"{where} has no field {key!r}{nearest(key, known)}; fields: {', '.join(known)}")
        parts = [part for part in (known[key], *get_args(known[key])) if is_dataclass(part)]
        if parts and isinstance(value, dict):
            values[key] = _build(parts[0], value, f"{where}.{key}")  # pyright: ignore[reportArgumentType]
            continue
        try:
            values[key] = TypeAdapter(known[key]).validate_python(value, strict=not isinstance(value, int | list))
        except ValidationError as error:
            raise PipelineError(f"{where}.{key} = {value!r}: {error.errors()[0]['msg']}") from None
    return kind(**values)
