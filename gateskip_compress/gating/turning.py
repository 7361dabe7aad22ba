"""A model's dial: turned for good or for a while, and what its branches decide."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import UnsupportedModel
from ..model import BRANCH_KINDS, blocks
from .dial import Dial, How, Thresholds


def branch_index(layer: int, kind: str) -> int:
    """A branch's place among all: attention of layer l at 2l, its MLP at 2l + 1."""
    return len(BRANCH_KINDS) * layer + BRANCH_KINDS.index(kind)


@dataclass(frozen=True)
class Decision:
    """What one branch decided in one call; collected where a caller asks for it.

    Args:
        layer: Of the block.
        kind: Of the branch.
        score: (b, t).
        keep: (b, t); padding is never kept.
        scale: (b, t, d or 1); None is 1.
        real: Tokens that are no padding, (b, t); None is all.
    """

    layer: int
    kind: str
    score: Tensor
    keep: Tensor
    scale: Tensor | None = None
    real: Tensor | None = None

    @property
    def tokens(self) -> int:
        """How many it decided about, padding left out."""
        return self.keep.numel() if self.real is None else int(self.real.sum())

    @property
    def free(self) -> Tensor:
        """Tokens that may skip: real, and not the first of their sequence; of whole sequences only."""
        real = torch.ones_like(self.keep) if self.real is None else self.real
        return real & (real.cumsum(1) > 1)

    @property
    def movable(self) -> Tensor:
        """Their scores."""
        return self.score[self.free]


def is_gated(model: PreTrainedModel) -> bool:
    """Whether the model's blocks carry gates."""
    return hasattr(blocks(model)[0], "dial")


def dial_of(model: PreTrainedModel) -> Dial:
    """The dial of a gated model.

    Raises:
        UnsupportedModel: the model has no gates.
    """
    if not is_gated(model):
        raise UnsupportedModel("this model has no gates; put a GateSkip step into its pipeline first")
    return blocks(model)[0].dial  # pyright: ignore[reportReturnType]


@contextmanager
def budget(model: PreTrainedModel, share: float) -> Iterator[Dial]:
    """Run the model under another budget inside the `with`, then go back.

    Args:
        model: A gated model.
        share: Share of the ungated model's multiply-adds, from the calibrated floor to 1.

    Raises:
        ValueError: `share` is out of range.
        UnsupportedModel: the model has no gates.
    """
    dial = dial_of(model)
    before = dial.budget, dial.thresholds
    dial.set(share)
    try:
        yield dial
    finally:
        dial.budget, dial.thresholds = before


@contextmanager
def drafting(model: PreTrainedModel) -> Iterator[None]:
    """Run the model with its draft gates and their dial inside the `with`, where it has some of their own.

    A second `drafting` inside goes back to the first gates. What works on a gated model works on its draft gates here.
    """
    _swap(model)
    try:
        yield
    finally:
        _swap(model)


def _swap(model: PreTrainedModel) -> None:
    """Exchange gates and draft gates, in place; nothing where the model has none of the latter."""
    for block in blocks(model):
        if "draft_gates" not in block._modules:
            return
        parts = block._modules  # not by setattr, which costs more than a block of a small model
        parts["gates"], parts["draft_gates"] = parts["draft_gates"], parts["gates"]
        block.dial, block.draft_dial = block.draft_dial, block.dial


@contextmanager
def masked(model: PreTrainedModel) -> Iterator[None]:
    """Compute every branch for every token and mask afterwards: the slow reference that compact skipping must equal."""
    with skipping(model, "masked"):
        yield


@contextmanager
def skipping(model: PreTrainedModel, how: How) -> Iterator[None]:
    """Skip in another form inside the `with`, see `Dial.how`."""
    dial = dial_of(model)
    before, dial.how = dial.how, how
    try:
        yield
    finally:
        dial.how = before


@contextmanager
def decisions(model: PreTrainedModel, thresholds: Thresholds | None = None) -> Iterator[list[Decision]]:
    """Collect what every branch decides inside the `with`, at the current thresholds or at given ones."""
    dial = dial_of(model)
    before, dial.decisions = (dial.decisions, dial.thresholds), []
    if thresholds is not None:
        dial.thresholds = thresholds
    try:
        yield dial.decisions
    finally:
        dial.decisions, dial.thresholds = before
