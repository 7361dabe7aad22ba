"""GPTQ: round a matrix column by column, and let the columns still to come make up for each rounding error.

Minimises |(W - Q) X|² over the inputs X that were seen, whose second moments are the Hessian H = X Xᵀ (arXiv
2210.17323, algorithm 1). Pure functions of tensors. We differ in two ways: with `order` groups stay those of
neighbouring columns, so that no index is stored, and inputs that were never active are rounded to nearest, not set to
zero.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from .int4 import Int4Weight, check_group_size, check_weight, encode, scale_and_zero

DAMPING = 0.01
"""Added to the Hessian's diagonal, as a share of its mean."""
_COLUMNS = 128
"""Columns that are updated one by one; the rest is updated once for all of them. Whole groups of every size."""


def gptq(
    weight: Float[Tensor, "o d"],
    hessian: Float[Tensor, "d d"],
    group_size: int,
    symmetric: bool,
    *,
    order: bool = False,
    damping: float = DAMPING,
) -> tuple[Int4Weight, float]:
    """Quantize a matrix for the inputs it has.

    Args:
        weight: Finite values.
        hessian: Sum of x xᵀ over inputs; only its proportions matter.
        group_size: Divides d.
        symmetric: As in `int4.quantize`.
        order: Columns with the largest inputs first.
        damping: As in DAMPING; ten times as much each time the Hessian is still not positive.

    Returns:
        The codes, and the damping that was needed.

    Raises:
        ValueError: as `int4.quantize`, or the Hessian is not finite.
    """
    check_group_size(group_size, weight.shape[1])
    check_weight(weight)
    if not torch.isfinite(hessian).all():
        raise ValueError("the Hessian has NaN or infinite values: so have the layer's inputs")
    d = weight.shape[1]
    left = weight.float()
    columns = hessian.diagonal().argsort(descending=True) if order else torch.arange(d, device=weight.device)
    inverse, used = _inverse_factor(hessian[columns][:, columns], damping)
    scale, zero = scale_and_zero(left, group_size, symmetric, weight.dtype)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    left = left[:, columns]
    for begin in range(0, d, _COLUMNS):
        end = min(begin + _COLUMNS, d)
        block, errors = left[:, begin:end].clone(), torch.empty_like(left[:, begin:end])
        for i in range(end - begin):
            column = int(columns[begin + i])
            group = column // group_size
            if not order and column % group_size == 0:  # as errors so far have left it
                one_scale, one_zero = scale_and_zero(block[:, i : i + group_size], group_size, symmetric, weight.dtype)
                scale[:, group], zero[:, group] = one_scale[:, 0], one_zero[:, 0]
            at, around = scale[:, group].float(), zero[:, group].float()
            code = encode(block[:, i], at, around)
            codes[:, column] = code
            errors[:, i] = (block[:, i] - (code.float() - around) * at) / inverse[begin + i, begin + i]
            block[:, i + 1 :] -= errors[:, i, None] * inverse[begin + i, begin + i + 1 : end]
        left[:, end:] -= errors @ inverse[begin:end, end:]
    return Int4Weight(codes, scale, zero.to(torch.uint8)), used


def output_error(weight: Float[Tensor, "o d"], rounded: Float[Tensor, "o d"], hessian: Float[Tensor, "d d"]) -> float:
    """|(W - Q) X|² / |W X|², 0 where there was no input."""
    missed, whole = weight.float() - rounded.float(), weight.float()
    total = ((whole @ hessian) * whole).sum()
    return float(((missed @ hessian) * missed).sum() / total) if total > 0 else 0.0


def _inverse_factor(hessian: Float[Tensor, "d d"], damping: float) -> tuple[Float[Tensor, "d d"], float]:
    """Upper Cholesky factor of the damped Hessian's inverse, and the damping."""
    mean = hessian.diagonal().mean()
    if mean == 0:
        return torch.eye(len(hessian), device=hessian.device), damping
    while True:
        damped = hessian.float().clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper, damping
        damping *= 10
