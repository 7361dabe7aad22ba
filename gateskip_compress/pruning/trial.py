"""Curves against what cuts really lose.

The second order is that of small changes, and of each branch by itself. A third of one branch of SmolLM2-135M, cut and
refitted, lost some tenth of what its curve says in the first half of the model and up to twice as much in the last
blocks: allocations by curves alone cut deepest where most is lost. So one cut of each branch is tried. A single trial
is half noise; those of neighbouring blocks, of both kinds, are pooled, and leave curves their shape.
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..model import Width
from .cut import Curve, Key, Scores
from .moments import refitted

Trials = Mapping[Key, tuple[int, float]]
"""By branch, how many units were gone and what was lost."""
TRIAL_TOKENS = 2048
_PART = 3
_NEIGHBOURS = 2
_LEAST = 0.02
"""What is said to be lost, of what the curve says, where less than that was measured."""


def trial(
    out: nn.Linear, curve: Curve, width: Width, moments: Float[Tensor, "k k"], measure: Callable[[], float]
) -> tuple[int, float]:
    """A third of a branch's units goes, and what remains is refitted, for as long as it takes to measure.

    Args:
        out: The branch's output projection.
        curve: Says which units go.
        width: Of the branch.
        moments: Of what the projection reads, from `damped`.
        measure: Of the model.

    Returns:
        How many units went, and the measure then.
    """
    gone, whole = max(1, width.units // _PART), out.weight.data
    inputs = width.columns(curve.left(gone)).to(whole.device)
    out.weight.data = torch.zeros_like(whole)
    try:
        if len(inputs):
            out.weight.data[:, inputs] = refitted(moments, whole, inputs)
        return gone, measure()
    finally:
        out.weight.data = whole


def corrected(curves: Scores, tried: Trials) -> dict[Key, Curve]:
    """Curves times what was lost in trials by what they say of these, over each block and two on either side."""

    def factor(layer: int) -> float:
        near = [(key, gone, lost) for key, (gone, lost) in tried.items() if abs(key[0] - layer) <= _NEIGHBOURS]
        said = sum(curves[key].after(gone) for key, gone, _ in near)
        return max(_LEAST, sum(lost for *_, lost in near) / said) if said > 0 else 1.0

    factors = {layer: factor(layer) for layer, _ in curves}
    return {
        key: Curve(curve.order, tuple(factors[key[0]] * lost for lost in curve.lost)) for key, curve in curves.items()
    }
