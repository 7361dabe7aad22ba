"""What training minimises: distance from the original's distribution, and how open gates are. Pure functions."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

_EDGE = 1e-6


def kl_divergence(original: Float[Tensor, "n v"], other: Float[Tensor, "n v"]) -> Float[Tensor, " n"]:
    """KL(softmax(original) ‖ softmax(other)) of each row, in nats."""
    p, q = original.log_softmax(-1), other.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def distillation_and_gradient(
    original: Float[Tensor, "n v"] | None,
    other: Float[Tensor, "n v"],
    targets: Int[Tensor, " n"],
    distillation: float,
    cross_entropy: float,
) -> tuple[Float[Tensor, ""], Float[Tensor, "n v"]]:
    """Sum of distillation · KL(softmax(original) ‖ softmax(other)) + cross_entropy · CE, and its gradient at `other`.

    The gradient is (distillation + cross_entropy) q - distillation p - cross_entropy 1[target], p and q being the two
    distributions: in closed form it takes a few tensors of this size, where autograd makes a dozen.

    Args:
        original: None leaves the divergence out.
        other: What learns.
        targets: Of the cross-entropy.
        distillation: Weight of the divergence, in nats.
        cross_entropy: Weight of the negative log-likelihood, in nats.
    """
    q = other.log_softmax(-1)
    own = targets[:, None]
    total = -cross_entropy * q.gather(1, own).sum()
    if original is None:
        gradient = q.exp_().mul_(cross_entropy)
    else:
        log_p = original.log_softmax(-1)
        p = log_p.exp()
        total += distillation * log_p.sub_(q).mul_(p).sum(-1).sum()
        gradient = q.exp_().mul_(distillation + cross_entropy).sub_(p, alpha=distillation)
    return total, gradient.scatter_add_(1, own, torch.full_like(own, -cross_entropy, dtype=gradient.dtype))


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
