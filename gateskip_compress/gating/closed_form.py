"""Least squares for gates: what a skipped branch should add, and how much that loses. Pure functions of tensors.

For a branch with normalised input x, output y and residual h we fit, from calibration tokens,

    surrogate(x) = b + U D x        rank r, minimises  E |y - surrogate(x)|^2            (reduced-rank regression)
    score(x)     = w x + c          minimises  E (effect - score(x))^2                   (ridge regression)
    effect       = log(|y - surrogate(x)| / |h|)                                         how much skipping loses

The reduced-rank solution projects the full least-squares solution on the leading directions of what it predicts
(Izenman 1975). Everything is computed from second moments, so tokens stream through and are never stored.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..elimination import eliminate
from ..precision import exact_products


@dataclass
class Moments:
    """Sums over tokens of x, y, x xᵀ and x yᵀ; `add` grows them in place."""

    count: int
    x: Float[Tensor, " d"]
    y: Float[Tensor, " o"]
    xx: Float[Tensor, "d d"]
    xy: Float[Tensor, "d o"]

    @classmethod
    def zeros(cls, d: int, o: int, device: torch.device) -> "Moments":
        """Sums over no tokens yet, kept in float32 on the model's device."""
        shapes = ((d,), (o,), (d, d), (d, o))
        return cls(0, *(torch.zeros(shape, device=device) for shape in shapes))

    @exact_products()  # rounded sums of squares are no covariance
    def add(self, x: Float[Tensor, "n d"], y: Float[Tensor, "n o"]) -> None:
        """Add n tokens."""
        x, y = x.float(), y.float()
        self.count += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xx.addmm_(x.T, x)
        self.xy.addmm_(x.T, y)


def regress(moments: Moments, ridge: float) -> tuple[Float[Tensor, "d o"], Float[Tensor, " o"]]:
    """Ridge regression of y on x with a free intercept.

    Args:
        moments: Sums over the tokens.
        ridge: Penalty on the slope, as a share of the mean variance of x.

    Returns:
        Slope and intercept: y ≈ x @ slope + intercept.
    """
    covariance, cross, x_mean, y_mean = _centred(moments)
    penalty = ridge * covariance.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    covariance.diagonal().add_(penalty)
    slope = torch.cholesky_solve(cross, torch.linalg.cholesky(covariance))
    return slope.float(), (y_mean - x_mean @ slope).float()


def reduced_rank(
    moments: Moments, rank: int, ridge: float
) -> tuple[Float[Tensor, "d r"], Float[Tensor, "r o"], Float[Tensor, " o"]]:
    """Best linear map of a given rank from x to y, with an intercept.

    Args:
        moments: Sums over the tokens.
        rank: Inner width r, at most the width of x and of y.
        ridge: As in `regress`.

    Returns:
        down, up, intercept: y ≈ x @ down @ up + intercept.

    Raises:
        ValueError: `rank` is not in 1..min(d, o).
    """
    most = min(moments.xy.shape)
    if not 1 <= rank <= most:
        raise ValueError(f"surrogate rank {rank} must be in 1..{most}, the width of the residual stream")
    slope, _ = regress(moments, ridge)
    covariance, _, x_mean, y_mean = _centred(moments)
    predicted = slope.T.double() @ covariance @ slope.double()
    _, directions = torch.linalg.eigh(predicted)  # ascending
    up = directions[:, -rank:].T
    down = slope.double() @ up.T
    return down.float(), up.float(), (y_mean - x_mean @ down @ up).float()


def backward_elimination(
    xx: Float[Tensor, "k k"], weight: Float[Tensor, "o k"], count: int, ridge: float
) -> Int[Tensor, " _count"]:
    """Which inputs of a linear map to keep, so that the others can best be made up for.

    The least salient go, an eighth of what is left at a time, and the rest is refitted: see `elimination.py`.

    Args:
        xx: Sums of x xᵀ over tokens.
        weight: W.
        count: How many to keep, 1..k.
        ridge: As in `regress`.

    Returns:
        Kept inputs, ascending.
    """
    left = torch.ones(len(xx), dtype=torch.bool, device=xx.device)
    damped = xx.double()
    damped = damped + ridge * damped.diagonal().mean() * torch.eye(len(xx), device=xx.device, dtype=torch.float64)
    left[eliminate(damped, weight, count=count).order] = False
    return left.nonzero().squeeze(1)


def effect(missed: Float[Tensor, "n d"], residual: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """log(|missed| / |residual|) of each token: what a skip would lose, relative to the stream it is added to."""
    tiny = torch.finfo(torch.float32).tiny
    return missed.float().norm(dim=-1).clamp_min(tiny).log() - residual.float().norm(dim=-1).clamp_min(tiny).log()


def _centred(moments: Moments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Covariance of x, cross-covariance with y, and both means, in float64: sums of squares cancel."""
    x_mean, y_mean = moments.x.double() / moments.count, moments.y.double() / moments.count
    covariance = moments.xx.double() / moments.count - torch.outer(x_mean, x_mean)
    cross = moments.xy.double() / moments.count - torch.outer(x_mean, y_mean)
    return covariance, cross, x_mean, y_mean
