"""The budget of a gated model: one threshold over all branches, looked up in a calibrated table.

A budget is the share of the ungated model's multiply-adds that really run, gates, surrogates, K/V of skipped tokens and
the output head included. Budget 1 means no gate is even evaluated.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

from torch import Tensor
from transformers import PreTrainedModel

from ..errors import UnsupportedModel
from ..model import blocks


@dataclass(frozen=True)
class Setting:
    """One calibrated point: at `threshold`, shares of multiply-adds (`budget`) and of branch executions that ran."""

    budget: float
    executed: float
    threshold: float


@dataclass(frozen=True)
class Decision:
    """What one branch decided in one call; collected where a caller asks for it."""

    layer: int
    kind: str
    score: Tensor
    keep: Tensor


@dataclass
class Dial:
    """State that all gated blocks of one model share; plain numbers, changed only by `budget` and its siblings below.

    Args:
        table: Calibrated settings, highest budget first.
        budget: The share asked for.
        threshold: Tokens that score at or below it skip; None runs everything, without gates.
        masked: Compute everything and mask, the reference for tests; otherwise compute only what is kept.
        decisions: Where blocks append their decisions, or None.
    """

    table: tuple[Setting, ...] = ()
    budget: float = 1.0
    threshold: float | None = None
    masked: bool = False
    decisions: list[Decision] | None = field(default=None, repr=False)

    @property
    def floor(self) -> float:
        """The lowest calibrated budget."""
        return self.table[-1].budget if self.table else 1.0

    def set(self, budget: float) -> None:
        """Turn to a budget, for good.

        Raises:
            ValueError: outside the calibrated range, whose floor is named.
        """
        self.threshold = self.threshold_of(budget)
        self.budget = budget

    def threshold_of(self, budget: float) -> float | None:
        """The threshold that spends `budget`, straight between the neighbouring settings; None at 1."""
        if not 0 < budget <= 1:
            raise ValueError(
                f"budget {budget} must be above 0 and at most 1: it is the share of multiply-adds that run"
            )
        if budget == 1:
            return None
        if budget < self.floor:
            raise ValueError(
                f"budget {budget} is below {self.floor:.3f}, the lowest that this model was calibrated for"
            )
        if budget >= self.table[0].budget:
            return self.table[0].threshold
        above, below = next(pair for pair in pairwise(self.table) if pair[1].budget <= budget)
        share = (above.budget - budget) / (above.budget - below.budget)
        return above.threshold + share * (below.threshold - above.threshold)


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
    before = dial.budget, dial.threshold
    dial.set(share)
    try:
        yield dial
    finally:
        dial.budget, dial.threshold = before


@contextmanager
def masked(model: PreTrainedModel) -> Iterator[None]:
    """Compute every branch for every token and mask afterwards: the slow reference that compact skipping must equal."""
    dial = dial_of(model)
    before, dial.masked = dial.masked, True
    try:
        yield
    finally:
        dial.masked = before


@contextmanager
def decisions(model: PreTrainedModel, threshold: float | None = None) -> Iterator[list[Decision]]:
    """Collect what every branch decides inside the `with`, at the current threshold or at a given one."""
    dial = dial_of(model)
    before, dial.decisions = (dial.decisions, dial.threshold), []
    if threshold is not None:
        dial.threshold = threshold
    try:
        yield dial.decisions
    finally:
        dial.decisions, dial.threshold = before
