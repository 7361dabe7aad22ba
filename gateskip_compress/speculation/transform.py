"""The SelfSpeculation step: how the model decodes from now on. It changes no weight."""

from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedModel

from ..gating.dial import dial_of
from ..step import Context, Record, Stage


@dataclass(frozen=True)
class SelfSpeculation:
    """Draft with the model's own gates under a low budget, verify at its full one (arXiv 2510.13876 names the idea).

    The paper's code keeps drafts unverified; ours are verified, so the text does not change.

    Args:
        draft_budget: Budget of the draft, below the GateSkip step's.
        draft_tokens: Tokens drafted before each verify pass.

    Raises:
        ValueError: A field is out of its range, or `draft_budget` below what the gates can reach.
        UnsupportedModel: The model has no gates.
    """

    name: ClassVar[str] = "self_speculation"
    stage: ClassVar[Stage] = Stage.DECODE

    draft_budget: float = 0.6
    draft_tokens: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.draft_budget < 1:
            raise ValueError(
                f"draft_budget {self.draft_budget} must be between 0 and 1, and below the model's own budget"
            )
        if self.draft_tokens < 1:
            raise ValueError(f"draft_tokens {self.draft_tokens} must be at least 1")

    def apply(self, model: PreTrainedModel, context: Context) -> Record:
        """Make `self_speculative` decode so by default."""
        del context
        dial_of(model).thresholds_of(self.draft_budget)  # raises where the gates cannot go so low
        model.self_speculation = self
        return {}

    def rebuild(self, model: PreTrainedModel, record: Record) -> None:
        """The same: nothing is stored in weights."""
        del record
        model.self_speculation = self
