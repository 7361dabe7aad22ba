"""Early exit by confidence, token by token (CALM, arXiv 2207.07061, sec. 3).

Before block l, a token with hidden state h_l leaves for good once its confidence reaches a threshold λ,

    softmax      c_l = p₁ - p₂      the two largest of softmax(logits(h_l)), with the final norm and the output head
    saturation   c_l = cos(h_l, h_(l-1))

and h_l goes unchanged to the output head. Later tokens may attend to it, so its keys and values are computed in all
blocks above, from h_l (the paper's state propagation). One λ serves all blocks. Scores are low where we skip, so

    score_l = -max(c_1 … c_l) until the exit, and stays what it was from there on; exit where score_l <= -λ.

The first block always runs, since there is nothing before it, and so does the first token of a sequence, as under all
our gates. The confidence of a token that has left is not measured again; that of padding is, once.

We differ from the paper: nothing is trained here (it trains all layers to predict), and λ is calibrated for a share of
multiply-adds instead of a bound on the loss of quality.

The budget leaves out what measuring costs. Saturation needs no matrix product; `softmax` runs the output head once for
each token and block, which on a small model is several times all that it could save. `count_macs` counts it.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from ..gating.block import GatedBlock
from ..gating.calibrate import CALIBRATION_TOKENS, calibrate, first_tokens
from ..gating.dial import Dial, check_budget
from ..gating.fit import Gates
from ..gating.gate import Gate
from ..gating.transform import check_attention, put_in
from ..gating.turning import Decision
from ..model import BRANCH_KINDS, Branch, ReadOut, blocks, branches, read_out, width
from ..model.attention import Sight
from ..names import check_choice
from ..step import Context, Record

Confidence = Literal["softmax", "saturation"]


@dataclass(frozen=True)
class EarlyExit:
    """Confident tokens skip all blocks that are left.

    Args:
        budget: As in `GateSkip`, but without what measuring confidence costs.
        confidence: `softmax` or `saturation`.

    Raises:
        ValueError: A field is out of its range, or `budget` below what can be reached.
    """

    budget: float = 0.85
    confidence: Confidence = "saturation"

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_choice("confidence", self.confidence, get_args(Confidence))

    def apply(self, model: PreTrainedModel, context: Context) -> Record:
        """Put it in, in place, calibrate thresholds and turn the dial to `budget`."""
        check_attention(model)
        branches(model)
        dial = Dial()
        gates: Gates = {
            (layer, kind): Gate(width(model), None, "zero", 1)
            for layer in range(1, len(blocks(model)))
            for kind in BRANCH_KINDS
        }
        put_in(model, gates, dial, form=_ExitBlock)
        state = _State(read_out(model) if self.confidence == "softmax" else None)
        for block in blocks(model):
            block.state = state
        dial.table = calibrate(model, first_tokens(context.calibration, CALIBRATION_TOKENS), track=context.track)
        dial.set(self.budget)
        return {"table": [asdict(setting) for setting in dial.table]}


class _State:
    """What the blocks of one model hand upwards during one call.

    Args:
        read_out: For softmax; None measures saturation.
    """

    score: Float[Tensor, "b t"]
    running: Bool[Tensor, "b t"]
    hidden: Float[Tensor, "b t d"]

    def __init__(self, read_out: ReadOut | None) -> None:
        self.read_out = read_out

    def enter(self, layer: int, hidden: Float[Tensor, "b t d"]) -> None:
        """Measure the tokens that are still running, before a block."""
        if layer == 0:
            self.score = hidden.new_full(hidden.shape[:2], torch.inf, dtype=torch.float32)
            self.running = torch.ones_like(self.score, dtype=torch.bool)
        else:
            now = hidden[self.running]
            if self.read_out is None:
                sure = saturation(self.hidden[self.running], now)
            else:
                sure = softmax_gap(self.read_out(now))
            self.score = self.score.masked_scatter(self.running, torch.minimum(self.score[self.running], -sure))
        self.hidden = hidden


class _ExitBlock(GatedBlock):
    """A block that confident tokens do not enter."""

    state: _State

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.dial.thresholds is not None and self.dial.how != "off":
            self.state.enter(self.layer, hidden_states)
        return super().forward(hidden_states, *args, **kwargs)

    def decide(
        self, branch: Branch, x: Float[Tensor, "b t d"], earlier: Decision | None, seen: Sight, given: dict[str, Any]
    ) -> Decision:
        del x, given
        if earlier is not None:
            return replace(earlier, kind=branch.kind)
        score = self.state.score
        self.state.running = self._keep(branch, score, seen)
        return Decision(self.layer, branch.kind, score, self.state.running, real=seen.real)


def saturation(before: Float[Tensor, "n d"], after: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """cos(before, after): near 1 where a block no longer turns the stream."""
    return F.cosine_similarity(before.float(), after.float(), dim=-1)


def softmax_gap(logits: Float[Tensor, "n v"]) -> Float[Tensor, " n"]:
    """Largest probability less the second largest."""
    top = logits.float().softmax(-1).topk(2).values
    return top[:, 0] - top[:, 1]
