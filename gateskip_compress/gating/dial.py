"""The budget of a gated model: a threshold for each branch, looked up in a calibrated table.

A budget is the share of the ungated model's multiply-adds that really run, gates, surrogates, K/V of skipped tokens and
the output head included. At budget 1 nothing skips, and gates
without a scale are not even evaluated.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import UnsupportedModel
from ..model import BRANCH_KINDS, blocks

Thresholds = tuple[float, ...]
"""One for each branch: attention of layer l at 2l, its MLP at 2l + 1."""
RUN_ALL = float("-inf")
"""Threshold that every score is above."""
How = Literal["compact", "masked", "soft", "off"]


def branch_index(layer: int, kind: str) -> int:
    """A branch's place among all: attention of layer l at 2l, its MLP at 2l + 1."""
    return len(BRANCH_KINDS) * layer + BRANCH_KINDS.index(kind)


@dataclass(frozen=True)
class Setting:
    """One calibrated point: at `thresholds`, shares of multiply-adds (`budget`) and of branch executions that ran."""

    budget: float
    executed: float
    thresholds: Thresholds


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


@dataclass
class Dial:
    """State that all gated blocks of one model share; its numbers are changed only by `budget` and its siblings below.

    Args:
        table: Calibrated settings, highest budget first.
        budget: The share asked for.
        thresholds: Tokens that score at or below their branch's skip; None runs everything.
        how: `compact` computes only what is kept; `masked` everything, and masks; `soft` as masked, with a gradient
            to scores straight through the decision, as wide as `spreads`; `off` runs the model as if it had no gates.
        spreads: Standard deviation of each branch's scores, for `soft`; in the order of thresholds.
        decisions: Where blocks append their decisions, or None.
        below: New keys and values of the block below, while a model that copies them runs.
    """

    table: tuple[Setting, ...] = ()
    budget: float = 1.0
    thresholds: Thresholds | None = None
    how: How = "compact"
    spreads: tuple[float, ...] = field(default=(), repr=False)
    decisions: list[Decision] | None = field(default=None, repr=False)
    below: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    @property
    def floor(self) -> float:
        """The lowest calibrated budget."""
        return self.table[-1].budget if self.table else 1.0

    def set(self, budget: float) -> None:
        """Turn to a budget, for good.

        Raises:
            ValueError: outside the calibrated range, whose floor is named.
        """
        self.thresholds = self.thresholds_of(budget)
        self.budget = budget

    def thresholds_of(self, budget: float) -> Thresholds | None:
        """Thresholds that spend `budget`, straight between the neighbouring settings; None at 1."""
        check_budget(budget)
        if budget == 1:
            return None
        if budget < self.floor:
            raise ValueError(
                f"budget {budget} is below {self.floor:.3f}, the lowest that this model was calibrated for"
            )
        if budget >= self.table[0].budget:
            return self.table[0].thresholds
        above, below = next(pair for pair in pairwise(self.table) if pair[1].budget <= budget)
        share = (above.budget - budget) / (above.budget - below.budget)
        return tuple(a + share * (b - a) for a, b in zip(above.thresholds, below.thresholds, strict=True))


def check_budget(budget: float) -> None:
    """Raise ValueError where a budget is no share."""
    if not 0 < budget <= 1:
        raise ValueError(f"budget {budget} must be above 0 and at most 1: it is the share of multiply-adds that run")


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
