"""The SelfSpeculation step: how the model decodes from now on, and gates of its own to draft with, if asked."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, get_args

from transformers import PreTrainedModel

from ..gating.dial import Dial
from ..gating.fit import Gates
from ..gating.transform import GateSkip, put_in_draft
from ..gating.turning import dial_of, drafting, is_gated
from ..model import blocks
from ..names import check_choice
from ..step import Context, Record, Stage
from .control import DRAFT_TOKENS, Control, Drafts, draft_budgets


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
        gates: Gates that are there for drafting alone, beside the model's own, which verify: fitted, trained and
            calibrated at their own budget as a GateSkip step says, on the calibration text, which the model wrote
            itself unless told otherwise. They learn from the model as it verifies. None drafts with the model's own.

    Raises:
        ValueError: A field is out of its range, or `draft_budget` below what the gates can reach.
        UnsupportedModel: The model has no gates.
    """

    name: ClassVar[str] = "self_speculation"
    stage: ClassVar[Stage] = Stage.DECODE

    draft_budget: float | None = None
    draft_tokens: int = DRAFT_TOKENS
    drafts: Drafts = "both"
    adapt: bool = True
    gates: GateSkip | None = None

    def __post_init__(self) -> None:
        if self.draft_budget is not None and not 0 < self.draft_budget < 1:
            raise ValueError(
                f"draft_budget {self.draft_budget} must be between 0 and 1, and below the model's own budget"
            )
        if self.draft_tokens < 1:
            raise ValueError(f"draft_tokens {self.draft_tokens} must be at least 1")
        check_choice("drafts", self.drafts, get_args(Drafts))
        if self.gates is None:
            return
        if self.drafts == "look-up":
            raise ValueError("drafts 'look-up' uses no gates: leave out gates, or use drafts='both'")
        if self.draft_budget is not None:
            raise ValueError(
                f"draft_budget {self.draft_budget} and gates are given: draft gates have their budget, "
                f"{self.gates.budget}; leave out draft_budget"
            )
        training = self.gates.training
        if training is not None and training.train in ("lora", "all"):
            raise ValueError(
                f"gates.training.train {training.train!r} would change the model that verifies: use 'surrogates'"
            )

    def apply(self, model: PreTrainedModel, context: Context) -> Record:
        """Make `self_speculative` decode so by default; put in draft gates, fitted, where the step has some."""
        record: Record = {}
        if self.gates is not None:
            gates = self._neutral(model, self.gates, context.seed)
            put_in_draft(model, gates, Dial())
            with drafting(model):  # the teacher runs the gates that verify
                record["gates"] = self.gates.fit(model, gates, replace(context, passages=()), drafting)
        if self.drafts != "look-up":
            self.budgets(model)
        model.self_speculation = self
        return record

    def rebuild(self, model: PreTrainedModel, record: Record) -> None:
        """The same, with empty draft gates."""
        if self.gates is not None:
            put_in_draft(model, self._neutral(model, self.gates), self.gates.dial(record["gates"]))
        model.self_speculation = self

    def _neutral(self, model: PreTrainedModel, step: GateSkip, seed: int = 0) -> Gates:
        """Draft gates; how a block runs is settled by the gates that verify."""
        dial_of(model)
        has = [("before" if block.before else "after", block.copies) for block in blocks(model)]
        copies = any(copied for _, copied in has)
        if (step.placement, step.kv == "copy") != (has[0][0], copies):
            raise ValueError(
                f"draft gates with placement {step.placement!r} and kv {step.kv!r} must be like the model's own: "
                f"placement={has[0][0]!r}, kv={'copy' if copies else 'dense'!r}"
            )
        return step.neutral(model, seed)

    def budgets(self, model: PreTrainedModel) -> list[float]:
        """Budgets that gates are to draft at.

        Raises:
            ValueError: as `draft_budgets` says.
            UnsupportedModel: the model has no gates.
        """
        dial, given = dial_of(model), self.gates.budget if self.gates is not None else self.draft_budget
        with drafting(model):
            return draft_budgets(dial, dial_of(model), given)


def settings_of(model: PreTrainedModel, given: dict[str, Any]) -> SelfSpeculation:
    """The model's own step with what is given instead; without a step `both`, or `look-up` where there are no gates."""
    step = getattr(model, "self_speculation", None)
    if step is None:
        step = SelfSpeculation() if is_gated(model) else SelfSpeculation(drafts="look-up")
    return replace(step, **{name: value for name, value in given.items() if value is not None})


def control_of(
    model: PreTrainedModel, settings: SelfSpeculation, rows: int, *, sampled: bool, runtime: str = "torch"
) -> Control:
    """What the model's earlier texts taught, greedy ones or sampled ones, for as many rows at the same settings.

    It stays with the model.
    """
    gated = settings.drafts != "look-up"
    budgets = tuple(settings.budgets(model)) if gated else ()
    key = (settings, budgets, dial_of(model).budget if gated else None, rows, sampled, runtime)
    known: dict[Any, Control] | None = getattr(model, "speculation_controls", None)
    if known is None:
        known = model.speculation_controls = {}
    if key not in known:
        known[key] = Control.over(settings.drafts, budgets, settings.draft_tokens, adapt=settings.adapt)
    return known[key]
