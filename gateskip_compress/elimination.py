"""Which inputs of a linear map to take away, so that what is left can best make up for them. Pure functions of tensors.

For y = W x with second moments H = E x xᵀ, taking the inputs S away and refitting the map of the others loses

    E |C (W x - W' x')|² = tr(C W_S ([H⁻¹]_SS)⁻¹ W_Sᵀ Cᵀ)

the optimal brain surgeon's saliency (Hassibi 1993) of whole columns. C weighs directions of y: the identity counts
squared error, and a root of the second moments of the loss's gradient at y counts, to second order, twice what is lost
of the loss (the Kronecker-factored Fisher, arXiv 1503.05671).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Elimination:
    """In what order groups of inputs go, and what that costs.

    Args:
        order: Groups, the first to go first.
        lost: What is lost once that group and all before it are gone; between groups that went together, straight.
    """

    order: Int[Tensor, " g"]
    lost: Float[Tensor, " g"]


def eliminate(
    xx: Float[Tensor, "k k"],
    weighed: Float[Tensor, "o k"],
    *,
    group: int = 1,
    share: float = 1 / 8,
    count: int = 0,
) -> Elimination:
    """Take groups of neighbouring inputs away, least salient first, the others refitted each time.

    Args:
        xx: H, positive definite.
        weighed: C W.
        group: Inputs in a group; divides k.
        share: Of the groups that are left, how many go at a time, one at least.
        count: How many groups to leave.
    """
    left, mapped = torch.arange(len(xx) // group, device=xx.device), weighed.double()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(xx.double()))
    order, lost, total = [left[:0]], [], 0.0
    while len(left) > count:
        together = min(max(1, int(len(left) * share)), len(left) - count)
        goes = _saliency(inverse, mapped, group).topk(together, largest=False).indices
        stays = torch.ones_like(left, dtype=torch.bool).index_fill_(0, goes, False)
        inside = (goes[:, None] * group + torch.arange(group, device=xx.device)).flatten()
        others = stays.repeat_interleave(group).nonzero().squeeze(1)
        gone = mapped[:, inside]
        factor = torch.linalg.cholesky(inverse[inside][:, inside])
        refit = torch.cholesky_solve(inverse[inside][:, others], factor)
        step = float((gone.T * torch.cholesky_solve(gone.T, factor)).sum())
        lost += [total + step * part / together for part in range(1, together + 1)]
        total += step
        order.append(left[goes])
        mapped = mapped[:, others] - gone @ refit
        inverse = inverse[others][:, others] - inverse[others][:, inside] @ refit
        left = left[stays]
    return Elimination(torch.cat(order), torch.tensor(lost))


def _saliency(inverse: Float[Tensor, "k k"], mapped: Float[Tensor, "o k"], group: int) -> Float[Tensor, " g"]:
    """What each group alone would lose."""
    if group == 1:
        return mapped.square().sum(0) / inverse.diagonal()
    parts = mapped.T.unflatten(0, (-1, group))  # (g, s, o)
    own = torch.stack([inverse[at : at + group, at : at + group] for at in range(0, len(inverse), group)])
    return (parts * torch.cholesky_solve(parts, torch.linalg.cholesky(own))).sum((1, 2))
