"""Quality of a model on held-out text: perplexity, and how far it is from the original.

    perplexity      exp of the mean negative log-likelihood of each next token
    KL              mean over tokens of KL(original ‖ model), in nats
    top-1 agreement share of tokens where both put the same token first

The interval of the perplexity is a bootstrap over windows (tokens of one text are not independent).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from .step import untracked

_RESAMPLES = 1000


@dataclass(frozen=True)
class Quality:
    """What `evaluate` found; None where there was no original to compare with."""

    tokens: int
    perplexity: float
    perplexity_low: float
    perplexity_high: float
    kl_nats: float | None
    top1_agreement: float | None


@torch.inference_mode()
def evaluate(
    model: PreTrainedModel,
    windows: Int[Tensor, "n t"],
    original: PreTrainedModel | None = None,
    track: Any = untracked,
) -> Quality:
    """Run the windows through a model, and through the original beside it where that is given.

    Args:
        model: At the budget it is set to.
        windows: Held-out text.
        original: What to compare with.
        track: As in `Context`.
    """
    losses, divergences, agreements = [], [], []
    for window in track(windows, "measure quality"):
        ids = window[None].to(model.device)
        logits = model(ids, use_cache=False).logits[0, :-1].float()
        losses.append(F.cross_entropy(logits, ids[0, 1:]).item())
        if original is not None:
            reference = original(ids, use_cache=False).logits[0, :-1].float()
            divergences.append(kl_divergence(reference, logits).mean().item())
            agreements.append((reference.argmax(-1) == logits.argmax(-1)).float().mean().item())
    low, high = bootstrap_interval(torch.tensor(losses, dtype=torch.float64))
    return Quality(
        tokens=windows.shape[0] * (windows.shape[1] - 1),
        perplexity=math.exp(_mean(losses)),
        perplexity_low=math.exp(low),
        perplexity_high=math.exp(high),
        kl_nats=_mean(divergences) if divergences else None,
        top1_agreement=_mean(agreements) if agreements else None,
    )


def kl_divergence(original: Float[Tensor, "n v"], other: Float[Tensor, "n v"]) -> Float[Tensor, " n"]:
    """KL(softmax(original) ‖ softmax(other)) of each row, in nats."""
    p, q = original.log_softmax(-1), other.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def bootstrap_interval(values: Float[Tensor, " n"]) -> tuple[float, float]:
    """95 % interval of the mean, by resampling values with replacement; always the same draw."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(values), (_RESAMPLES, len(values)), generator=generator)
    low, high = values[draws].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
