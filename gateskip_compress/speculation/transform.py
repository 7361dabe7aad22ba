"""The SelfSpeculation step: how the model decodes from now on. It changes no weight."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from transformers import PreTrainedModel

from ..gating.dial import dial_of
from ..names import check_choice
from ..step import Context, Record, Stage

Drafts = Literal["both", "gates", "look-up"]


@dataclass(frozen=True)
class SelfSpeculation:
    """Draft with the model's own gates under a low budget, verify at its full one (arXiv 2510.13876 names the idea).

    The paper's code keeps drafts unverified; ours are verified, so the text does not change.

    Args:
        draft_budget: Budget of the draft, below the GateSkip step's; None tries a few while decoding, and stays with
            the one whose acceptance is best for its cost.
        draft_tokens: The longest draft.
        drafts: By `gates`, by `look-up` of a passage that the text's last tokens stood in before (prompt lookup, which
            needs no gates), or by `both`: passages where one is found, else gates.
        adapt: Draft as far as it pays by the clock, and not at all where it loses; False drafts `draft_tokens` always.

    Raises:
        ValueError: A field is out of its range, or `draft_budget` below what the gates can reach.
        UnsupportedModel: The model has no gates.
    """

    name: ClassVar[str] = "self_speculation"
    stage: ClassVar[Stage] = Stage.DECODE

    draft_budget: float | None = None
    draft_tokens: int = 8
    drafts: Drafts = "both"
    adapt: bool = True

    def __post_init__(self) -> None:
        if self.draft_budget is not None and not 0 < self.draft_budget < 1:
            raise ValueError(
                f"draft_budget {self.draft_budget} must be between 0 and 1, and below the model's own budget"
            )
        if self.draft_tokens < 1:
            raise ValueError(f"draft_tokens {self.draft_tokens} must be at least 1")
        check_choice("drafts", self.drafts, get_args(Drafts))

    def apply(self, model: PreTrainedModel, context: Context) -> Record:
        """Make `self_speculative` decode so by default."""
        del context
        if self.drafts != "look-up":
            self.budgets(model)
        model.self_speculation = self
        return {}

    def rebuild(self, model: PreTrainedModel, record: Record) -> None:
        """The same: nothing is stored in weights."""
        del record
        model.self_speculation = self

    def budgets(self, model: PreTrainedModel) -> list[float]:
        """Budgets that gates are to draft at.

        Raises:
            ValueError: there is none below the budget that the model runs at.
            UnsupportedModel: the model has no gates.
        """
        dial = dial_of(model)
        if self.draft_budget is not None:
            if self.draft_budget >= dial.budget:
                raise ValueError(
                    f"draft_budget {self.draft_budget} must be below the budget that verifies, {dial.budget}"
                )
            dial.thresholds_of(self.draft_budget)  # raises where the gates cannot go so low
            return [self.draft_budget]
        below = [setting.budget for setting in dial.table if setting.budget < dial.budget - _APART]
        if not below:
            raise ValueError(
                f"no budget was calibrated more than {_APART} below {dial.budget}, which the model runs at: "
                "use drafts='look-up'"
            )
        return below if len(below) <= _CANDIDATES else [below[0], below[len(below) // 2], below[-1]]


_CANDIDATES, _APART = 3, 0.05
