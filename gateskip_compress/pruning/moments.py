"""Second moments of what an output projection reads, weighed so that no token counts for too much. Pure functions."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

RIDGE = 4.0
"""Added to each input's own second moment, as a share of it for each input and token: a closed form of dropout."""
_MOST = 1.0
_FLOOR = 1e-4
"""The same as a share of the mean, for inputs that were never active."""


def weighed(x: Float[Tensor, "t k"], length: Float[Tensor, "t 1"]) -> Float[Tensor, "t k"]:
    """A window's inputs, each token relative to its stream, the first as much as all others together.

    Args:
        x: Inputs.
        length: Of the stream that the branch's output is added to, with that output.
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
