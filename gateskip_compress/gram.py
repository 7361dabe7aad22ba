"""Sums of x xᵀ over many x, at little more than half a product's cost, since they are symmetric. Pure functions."""

import torch
from jaxtyping import Float
from torch import Tensor

_BAND = 192
"""Rows of the sum that are found together, from the diagonal on."""


def no_gram(inputs: int, device: torch.device) -> Float[Tensor, "k k"]:
    """What `add_gram` adds to, for so many inputs."""
    return torch.zeros(inputs, inputs, device=device)


def add_gram(total: Float[Tensor, "k k"], x: Float[Tensor, "t k"]) -> None:
    """Add xᵀ x, in place, on the diagonal and right of it; what is left of it is `mirrored`'s."""
    for at in range(0, len(total), _BAND):
        total[at : at + _BAND, at:] += x[:, at : at + _BAND].T @ x[:, at:]


def mirrored(total: Float[Tensor, "k k"]) -> Float[Tensor, "k k"]:
    """The whole sum that `add_gram` found the upper triangle of."""
    return total.triu() + total.triu(1).T
