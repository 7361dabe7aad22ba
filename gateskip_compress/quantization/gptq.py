"""GPTQ: round a matrix column by column, and let the columns still to come make up for each rounding error.

Minimises |(W - Q) X|² over the inputs X that were seen, whose second moments are the Hessian H = X Xᵀ (arXiv
2210.17323, algorithm 1). Pure functions of tensors. We differ in two ways: `order` moves whole groups of neighbouring
columns, and columns inside them, so that no index is stored and a group's scale still sees the errors made so far; and
inputs that were never active are rounded to nearest, not set to zero.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .groups import GroupWeight, check_weight, scale_and_zero, steps

DAMPING = 0.01
"""Added to the Hessian's diagonal, as a share of its mean."""


@torch.no_grad()
def gptq(
    weight: Float[Tensor, "o d"],
    hessian: Float[Tensor, "d d"],
    bits: int,
    group_size: int,
    symmetric: bool,
    *,
    order: bool = False,
    clip: bool = False,
    damping: float = DAMPING,
) -> tuple[GroupWeight, float]:
    """Quantize a matrix for the inputs it has.

    Args:
        weight: Finite values.
        hessian: Sum of x xᵀ over inputs; only its proportions matter.
        bits: As in `groups.quantize`.
        group_size: As in `groups.quantize`.
        symmetric: As in `groups.quantize`.
        order: Groups with the largest inputs first, and in a group columns with the largest inputs first.
        clip: As in `groups.quantize`; a column's error counts as its input's second moment.
        damping: As in DAMPING; ten times as much each time the Hessian is still not positive.

    Returns:
        The codes, and the damping that was needed.

    Raises:
        ValueError: as `groups.quantize`, or the Hessian is not finite.
    """
    check_weight(weight)
    if not torch.isfinite(hessian).all():
        raise ValueError("the Hessian has NaN or infinite values: so have the layer's inputs")
    active = hessian.diagonal()
    groups = _groups(active, group_size, order)
    columns = torch.cat(groups)
    inverse, used = _inverse_factor(hessian[columns][:, columns], damping)
    left = weight.T[columns].float()  # (d, o): a column is contiguous
    codes = torch.empty(left.shape, dtype=torch.uint8, device=weight.device)
    shape = (len(weight), len(groups))
    scale, zero = weight.new_empty(shape), torch.empty(shape, dtype=torch.uint8, device=weight.device)
    begin = 0
    for group in groups:
        end = begin + len(group)
        block = left[begin:end]
        one_scale, one_zero = scale_and_zero(
            block.T, bits, len(group), symmetric, weight.dtype, clip=clip, importance=active[group]
        )
        at, around = one_scale[:, 0].float(), one_zero[:, 0].float()
        errors, rounded = torch.empty_like(block), torch.empty_like(block)
        factor = inverse[begin:end, begin:end]
        diagonal = factor.diagonal().tolist()
        for i, (column, error) in enumerate(zip(block, errors, strict=True)):
            rounded[i] = steps(column, at, around, bits)
            torch.sub(column, rounded[i] * at, out=error).div_(diagonal[i])
            block[i + 1 :].addr_(factor[i, i + 1 :], error, alpha=-1)
        codes[group] = rounded.add_(around).to(torch.uint8)
        left[end:].addmm_(inverse[begin:end, end:].T, errors, alpha=-1)
        place = int(group.min()) // group_size
        scale[:, place], zero[:, place] = one_scale[:, 0], one_zero[:, 0].to(torch.uint8)
        begin = end
    return GroupWeight(codes.T.contiguous(), scale, zero, bits, group_size), used


def output_error(weight: Float[Tensor, "o d"], rounded: Float[Tensor, "o d"], hessian: Float[Tensor, "d d"]) -> float:
    """|(W - Q) X|² / |W X|², 0 where there was no input."""
    missed, whole = weight.float() - rounded.float(), weight.float()
    total = ((whole @ hessian) * whole).sum()
    return float(((missed @ hessian) * missed).sum() / total) if total > 0 else 0.0


def _groups(active: Float[Tensor, " d"], group_size: int, order: bool) -> list[Int[Tensor, " _s"]]:
    """Columns of each group, in the order in which they are rounded."""
    groups = list(torch.arange(len(active), device=active.device).split(group_size))
    if not order:
        return groups
    groups = [group[active[group].argsort(descending=True)] for group in groups]
    return sorted(groups, key=lambda group: float(active[group].max()), reverse=True)


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
