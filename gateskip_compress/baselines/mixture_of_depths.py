"""Mixture-of-Depths (arXiv 2404.02258), its routers put into a trained model and tuned.

A router before every second block gives each token a weight r, and tokens with a low r skip the block:

    h <- h + r · attention,  then  h <- h + r · mlp           where r > threshold, else h

with r = s(w x + b), x the normalised input of the block and s the opening of our gates, 1 exactly for a router that is
untrained: so we start from the model as it is. The same r weighs the block in training, at inference, and at budget 1.

We differ from the paper, sec. 3: its tokens compete for the top k places of a sequence, which looks ahead; ours meet a
threshold, calibrated so that each routed block keeps the same share, which needs no predictor to decode. Its r is not
squashed, and reads the input before the norm, whose size varies a hundredfold between tokens of a trained model. It
weighs attention and MLP once, together; here the MLP reads a stream to which r · attention was added. Its skipped
tokens have no keys and values in the block; ours have them, as in all our blocks. And beside the gradient through r,
training has ours straight through the decision. All of these keep a trained model nearer to itself.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from ..gating.block import GatedBlock
from ..gating.calibrate import CALIBRATION_TOKENS, calibrate, first_tokens
from ..gating.dial import Dial, check_budget
from ..gating.fit import Gates
from ..gating.gate import Gate
from ..gating.train import Training, train_gates
from ..gating.transform import check_attention, check_dropout, put_in
from ..gating.turning import Decision
from ..model import Branch, blocks, branches, width
from ..model.attention import Sight
from ..step import Context, Record


@dataclass(frozen=True)
class MixtureOfDepths:
    """Routers decide which tokens enter a block.

    Args:
        training: How routers are trained; its `train` may add adapters or all weights.
        budget: As in `GateSkip`.
        every: Routers before every n-th block, the n-th first.

    Raises:
        ValueError: A field is out of its range, or `budget` below what can be reached.
    """

    training: Training
    budget: float = 0.85
    every: int = 2

    def __post_init__(self) -> None:
        check_budget(self.budget)
        if self.every < 1:
            raise ValueError(f"every {self.every} must be at least 1")

    def apply(self, model: PreTrainedModel, context: Context) -> Record:
        """Put routers in, in place, train them, calibrate thresholds and turn the dial to `budget`."""
        check_attention(model)
        check_dropout(model, self.training)
        branches(model)
        if self.every > len(blocks(model)):
            raise ValueError(f"every {self.every} must be at most {len(blocks(model))}, the number of blocks")
        parameter, gates, dial = next(model.parameters()), Gates(), Dial()
        for layer in range(self.every - 1, len(blocks(model)), self.every):
            gates[layer, "attention"] = Gate(width(model), "scalar", "zero", 1).to(parameter.device, parameter.dtype)
            gates[layer, "mlp"] = Gate(width(model), None, "zero", 1)
        put_in(model, gates, dial, form=_RoutedBlock)
        record = {"training": train_gates(model, self.training, self.budget, "uniform", context)}
        dial.table = calibrate(model, first_tokens(context.calibration, CALIBRATION_TOKENS), "uniform", context.track)
        dial.set(self.budget)
        return {"table": [asdict(setting) for setting in dial.table], **record}


class _RoutedBlock(GatedBlock):
    """A block whose router, on its attention, decides for the whole of it and weighs the whole of it."""

    def decide(
        self, branch: Branch, x: Float[Tensor, "b t d"], earlier: Decision | None, seen: Sight, given: dict[str, Any]
    ) -> Decision:
        return super().decide(branch, x, None, seen, given) if earlier is None else replace(earlier, kind=branch.kind)
