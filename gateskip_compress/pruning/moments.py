"""Second moments of what an output projection reads, weighed so that no token counts for too much. Pure functions.

Where a post-norm stands between the projection's y and the stream, z = post(y), errors of y are seen as the stream sees
them: the norm makes those of tokens whose y is short the longer for it.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

RIDGE = 4.0
"""Added to each input's own second moment, as a share of it for each input and token: a closed form of dropout."""
_MOST = 1.0
_FLOOR = 1e-4
"""The same as a share of the mean, for inputs that were never active."""


def length_before(
    stream: Float[Tensor, "t d"], y: Float[Tensor, "t d"], z: Float[Tensor, "t d"]
) -> Float[Tensor, "t 1"]:
    """How long a stream is in the unit of y: its length times |y| / |z|, that is as it is without a post-norm.

    Args:
        stream: With z added.
        y: What the output projection gives.
        z: The same behind the post-norm; y itself where there is none.
    """
    before, behind, both = (part.float().norm(dim=-1, keepdim=True) for part in (y, z, stream))
    tiny = torch.finfo(before.dtype).tiny
    return both * (before.clamp_min(tiny) / behind.clamp_min(tiny))


def fixed_scale(
    at_y: Float[Tensor, "t d"], y: Float[Tensor, "t d"], at_z: Float[Tensor, "t d"], z: Float[Tensor, "t d"]
) -> Float[Tensor, "t d"]:
    """The gradient at y if its post-norm, z = post(y), had a scale that does not depend on y.

    A norm gives back what y loses of its length, so the gradient along y is 0, and a branch that is gone altogether
    would be no loss. Along y the gradient becomes what it is along z: g + y (g_z·z - g·y) / |y|².

    Args:
        at_y: The gradient at y.
        y: What the output projection gives.
        at_z: The gradient at z.
        z: y behind the norm.
    """
    missing = (at_z * z).sum(-1, keepdim=True) - (at_y * y).sum(-1, keepdim=True)
    return at_y + y * (missing / y.square().sum(-1, keepdim=True).clamp_min(torch.finfo(y.dtype).tiny))


def weighed(x: Float[Tensor, "t k"], length: Float[Tensor, "t 1"]) -> Float[Tensor, "t k"]:
    """A window's inputs, each token relative to its stream, the first as much as all others together.

    Args:
        x: Inputs.
        length: From `length_before`.
    """
    weight = torch.ones_like(length)
    weight[0] = math.sqrt(len(x))
    return x * (weight / length.clamp_min(torch.finfo(length.dtype).tiny))


def damped(xx: Float[Tensor, "k k"], tokens: int) -> Float[Tensor, "k k"]:
    """Second moments that can be inverted, in float64, and with which a fit leans the less on text the less there is.

    Args:
        xx: Sums, or means, over tokens.
        tokens: How many these are.
    """
    own, share = xx.diagonal().double(), min(_MOST, RIDGE * len(xx) / tokens)
    floor = (_FLOOR * own.mean()).clamp_min(torch.finfo(torch.float32).tiny)
    return xx.double() + torch.diag(share * own + floor)


def refitted(xx: Float[Tensor, "k k"], weight: Float[Tensor, "o k"], inputs: Int[Tensor, " m"]) -> Float[Tensor, "o m"]:
    """The map from some inputs that best gives what the weight gives from all: least squares.

    Args:
        xx: From `damped`.
        weight: Of the whole map.
        inputs: Which stay.
    """
    factor = torch.linalg.cholesky(xx[inputs][:, inputs])
    return torch.cholesky_solve(xx[inputs] @ weight.double().T, factor).T.to(weight.dtype)
