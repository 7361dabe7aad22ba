"""What a step of a pipeline is: a frozen dataclass that changes a model in place and says what it did."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

Record = dict[str, Any]
"""JSON types only: what a step did, enough to build the same structure again without data or weights."""

T = TypeVar("T")


class Stage(IntEnum):
    """Where a step stands in a stack. Structure first, then gates, then number formats, then how to decode."""

    PRUNE = 1
    GATE = 2
    QUANTIZE = 3
    DECODE = 4


def untracked(items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:  # noqa: ARG001 the protocol of `Context.track`
    """Show no progress."""
    return items


@dataclass(frozen=True)
class Context:
    """What a step may use besides the model.

    Args:
        calibration: Token ids, whole windows without padding.
        seed: For anything random.
        track: Wraps a loop to show its progress; called with the items, a description and perhaps their number.
    """

    calibration: Int[Tensor, "n t"]
    seed: int = 0
    track: Callable[..., Iterable[Any]] = untracked


@runtime_checkable
class Transform(Protocol):
    """A step. Its fields are its whole configuration; its repr is its line in a recipe."""

    name: ClassVar[str]
    stage: ClassVar[Stage]

    def apply(self, model: PreTrainedModel, context: Context) -> Record:
        """Change the model in place and return what was done."""
        ...

    def rebuild(self, model: PreTrainedModel, record: Record) -> None:
        """Give a fresh model the structure that `apply` gave, in place, with weights still to be loaded."""
        ...
