"""Skipping at random: what any score must beat.

    score(position, branch) = hash(position + hash(branch + 2 · blocks · seed))     uniform in [0, 1]

So a decision depends on the place alone: the same in every batch, cached or not, and again in the next run.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from ..gating.block import GatedBlock
from ..gating.calibrate import CALIBRATION_TOKENS, calibrate, first_tokens
from ..gating.dial import Dial, check_budget
from ..gating.fit import Gates, fit_gates
from ..gating.gate import Gate
from ..gating.transform import check_attention, put_in
from ..gating.turning import Decision
from ..model import BRANCH_KINDS, Branch, blocks, branches, width
from ..model.attention import Sight
from ..names import check_choice
from ..step import Context, Record

Surrogate = Literal["zero", "mean", "lowrank"]
_BITS = 0xFFFFFFFF


@dataclass(frozen=True)
class RandomSkip:
    """Every branch skips the same share of tokens, at random places.

    Args:
        budget: As in `GateSkip`.
        surrogate: What a skipped token adds; another than `zero` tells apart what scores and what surrogates are worth.
        rank: Of a `lowrank` surrogate.

    Raises:
        ValueError: A field is out of its range, or `budget` below what can be reached.
    """

    budget: float = 0.85
    surrogate: Surrogate = "zero"
    rank: int = 32

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_choice("surrogate", self.surrogate, get_args(Surrogate))

    def apply(self, model: PreTrainedModel, context: Context) -> Record:
        """Put it in, in place, calibrate thresholds and turn the dial to `budget`."""
        check_attention(model)
        branches(model)
        parameter, dial = next(model.parameters()), Dial()
        gates: Gates = {
            (layer, kind): Gate(width(model), None, self.surrogate, self.rank).to(parameter.device, parameter.dtype)
            for layer in range(len(blocks(model)))
            for kind in BRANCH_KINDS
        }
        fit_gates(model, gates, context)
        put_in(model, gates, dial, form=_RandomBlock)
        for layer, block in enumerate(blocks(model)):
            block.offset = len(BRANCH_KINDS) * (layer + len(blocks(model)) * context.seed)
        dial.table = calibrate(model, first_tokens(context.calibration, CALIBRATION_TOKENS), track=context.track)
        dial.set(self.budget)
        return {"table": [asdict(setting) for setting in dial.table]}


class _RandomBlock(GatedBlock):
    """A block whose scores are hashes."""

    offset: int

    def decide(
        self, branch: Branch, x: Float[Tensor, "b t d"], earlier: Decision | None, seen: Sight, given: dict[str, Any]
    ) -> Decision:
        del earlier
        positions = given["position_ids"]
        score = random_score(positions, self.offset + BRANCH_KINDS.index(branch.kind))
        score = score.expand(x.shape[:2])
        return Decision(self.layer, branch.kind, score, self._keep(branch, score, seen), real=seen.real)


def random_score(positions: Int[Tensor, "b t"], stream: int) -> Float[Tensor, "b t"]:
    """A number in [0, 1] for each position, uniform and independent to the eye; each `stream` has its own."""
    start = _hash(torch.full_like(positions, stream & _BITS))
    return _hash((positions + start) & _BITS).float() / _BITS


def _hash(x: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """32 bits to 32 bits, one to one: xorshift and multiply, twice (the constants are C. Wellons' `lowbias32`)."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _BITS
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _BITS
    return x ^ (x >> 16)
