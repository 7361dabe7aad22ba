"""Thresholds as GateSkip's reference code sets them (arXiv 2510.13876): a quantile over the tokens of the call itself.

    threshold of a branch = quantile(scores of this call's tokens, share to skip);   skip where score <= threshold

NOT deployable. A token's decision depends on whatever else is in the batch and on later tokens; a prompt and the same
prompt decoded token by token give different text; a call of one token never skips. It is here to be measured.

We differ from the reference code, in its favour: the first token of a sequence never skips and is no part of the
quantile. And the budget is a share of multiply-adds, gates included, instead of executions.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from ..gating.block import GatedBlock
from ..gating.calibrate import CALIBRATION_TOKENS, everywhere, first_tokens, observe, spent
from ..gating.dial import Setting
from ..gating.transform import GateSkip
from ..gating.turning import Decision, dial_of
from ..model import Branch, blocks
from ..model.attention import Sight
from ..step import Context, Record


@dataclass(frozen=True)
class BatchQuantile:
    """Gates of any kind, decided by the quantile of the call instead of a calibrated threshold; not deployable.

    Args:
        gates: What is fitted, trained and then decided anew, at the same budget.
    """

    gates: GateSkip

    def apply(self, model: PreTrainedModel, context: Context) -> Record:
        """Put gates in, in place, and let the call decide; the dial's thresholds are then shares that skip."""
        record = self.gates.apply(model, context)
        dial = dial_of(model)
        for block in blocks(model):
            form = type(block)
            block.__class__ = type(f"Quantile{form.__name__}", (_QuantileBlock, form), {"__module__": __name__})
        used = first_tokens(context.calibration, CALIBRATION_TOKENS)
        # what is spent is a straight line in the share that skips, so its two ends are the whole table
        ends = []
        for share in (0.0, 1.0):
            shares = everywhere(model, share)
            at = spent(model, observe(model, used, shares), context.calibration.shape[1])
            ends.append(Setting(at.budget, at.executed, shares))
        dial.table = tuple(ends)
        dial.set(self.gates.budget)
        return {**record, "table": [asdict(setting) for setting in dial.table]}


class _QuantileBlock(GatedBlock):
    """A block whose thresholds are shares of the call's tokens."""

    def decide(
        self, branch: Branch, x: Float[Tensor, "b t d"], earlier: Decision | None, seen: Sight, given: dict[str, Any]
    ) -> Decision:
        decision, share = super().decide(branch, x, earlier, seen, given), self._threshold(branch)
        others = decision.score[seen.real & ~seen.first].float()
        if share <= 0 or decision.tokens == 1 or len(others) == 0:
            return replace(decision, keep=seen.real)
        return replace(decision, keep=seen.first | (seen.real & (decision.score > others.quantile(share))))
