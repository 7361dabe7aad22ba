"""The budget of a gated model: a threshold for each branch, looked up in a calibrated table.

A budget is the share of the ungated model's multiply-adds that really run, gates, surrogates, K/V of skipped tokens and
the output head included. At budget 1 nothing skips, and gates without a scale are not even evaluated.

Numbers alone: `turning.py` has what works on a model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

Thresholds = tuple[float, ...]
"""One for each branch: attention of layer l at 2l, its MLP at 2l + 1."""
RUN_ALL = float("-inf")
"""Threshold that every score is above."""
How = Literal["compact", "masked", "soft", "off"]


@dataclass(frozen=True)
class Setting:
    """One calibrated point: at `thresholds`, shares of multiply-adds (`budget`) and of branch executions that ran."""

    budget: float
    executed: float
    thresholds: Thresholds


@dataclass
class Dial:
    """State that all gated blocks of one model share; its numbers are changed only by `set` and what `turning` has.

    Args:
        table: Calibrated settings, highest budget first.
        budget: The share asked for.
        thresholds: Tokens that score at or below their branch's skip; None runs everything.
        how: `compact` computes only what is kept; `masked` everything, and masks; `soft` as masked, with a gradient
            to scores straight through the decision, as wide as `spreads`; `off` runs the model as if it had no gates.
        spreads: Standard deviation of each branch's scores, for `soft`; in the order of thresholds.
        decisions: Where blocks append their decisions, see `turning.Decision`, or None.
        below: New keys and values of the block below, tensors, while a model that copies them runs.
    """

    table: tuple[Setting, ...] = ()
    budget: float = 1.0
    thresholds: Thresholds | None = None
    how: How = "compact"
    spreads: tuple[float, ...] = field(default=(), repr=False)
    decisions: list[Any] | None = field(default=None, repr=False)
    below: tuple[Any, Any] | None = field(default=None, repr=False)

    @classmethod
    def calibrated(cls, rows: Sequence[Mapping[str, Any]], budget: float) -> "Dial":
        """One with a table as records have it, turned to a budget."""
        dial = cls(table=tuple(Setting(r["budget"], r["executed"], tuple(r["thresholds"])) for r in rows))
        dial.set(budget)
        return dial

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
