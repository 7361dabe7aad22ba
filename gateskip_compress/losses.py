"""What training minimises: distance from the original's distribution, and how open gates are. Pure functions."""

import torch
from jaxtyping import Float
from torch import Tensor

_EDGE = 1e-6


def kl_divergence(original: Float[Tensor, "n v"], other: Float[Tensor, "n v"]) -> Float[Tensor, " n"]:
    """KL(softmax(original) ‖ softmax(other)) of each row, in nats."""
    p, q = original.log_softmax(-1), other.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def gate_l1(opening: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Mean absolute opening."""
    return opening.abs().mean()


def gate_l2(opening: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Mean squared opening (arXiv 2510.13876: the norm of all gates; its code takes the mean of squares, as we do)."""
    return opening.square().mean()


def gate_kl(opening: Float[Tensor, "n d"], target: float) -> Float[Tensor, ""]:
    """Mean KL(Bernoulli(opening) ‖ Bernoulli(target)), which pulls gates to be open a given share of the time.

    Args:
        opening: Between 0 and 1; what is outside counts as the edge.
        target: In (0, 1), edges excluded.
    """
    p = opening.clamp(_EDGE, 1 - _EDGE)
    q = min(max(target, _EDGE), 1 - _EDGE)
    return (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()


def cross_entropy(logits: Float[Tensor, "n v"], targets: torch.Tensor) -> Float[Tensor, " n"]:
    """Negative log-likelihood of each target, in nats."""
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")
