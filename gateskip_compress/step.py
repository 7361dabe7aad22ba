"""What a step of a pipeline is: a frozen dataclass that changes a model in place and says what it did."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from .text import Passage
from .track import untracked

Record = dict[str, Any]
"""JSON types only: what a step did, enough to build the same structure again without data or weights."""


class Stage(IntEnum):
    """Where a step stands in a stack. Structure first, then gates, then number formats, then how to decode.

    Recovery has no place of its own: it may follow any step.
    """

    RECOVER = 0
    PRUNE = 1
    GATE = 2
    QUANTIZE = 3
    DECODE = 4


@dataclass(frozen=True)
class Context:
    """What a step may use besides the model.

    Args:
        calibration: Token ids, whole windows without padding.
        seed: For anything random.
        track: Wraps a loop to show its progress, as `untracked` does not.
        passages: What steps that train are trained on; none means the calibration windows.
        scratch: Folder for states of long work, from which an interrupted step goes on; None keeps nothing.
        original: The model before the first step, for steps that learn from it; None where none does.
        cache: Folder that keeps scores, so that another target cuts without scoring anew; None keeps nothing.
    """

    calibration: Int[Tensor, "n t"]
    seed: int = 0
    track: Callable[..., Iterable[Any]] = untracked
    passages: Sequence[Passage] = ()
    scratch: Path | None = None
    original: PreTrainedModel | None = None
    cache: Path | None = None


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
