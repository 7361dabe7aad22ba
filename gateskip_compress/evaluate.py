"""Quality of a model on held-out text: perplexity, and how far it is from the original.

    perplexity      exp of the mean negative log-likelihood of each scored token
    KL              mean over tokens of KL(original ‖ model), in nats
    top-1 agreement share of tokens where both put the same token first

The interval of the perplexity is a bootstrap over passages (tokens of one text are not independent).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from .losses import kl_divergence
from .text import Passage
from .track import untracked

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


@dataclass(frozen=True)
class Samples:
    """Sums over the scored tokens of each passage, of which `Quality` is the mean; with no original, two are empty."""

    tokens: list[int]
    losses_nats: list[float]
    divergences_nats: list[float]
    agreements: list[int]

    @property
    def quality(self) -> Quality:
        """The means, with their intervals."""
        tokens = sum(self.tokens)
        losses = torch.tensor(self.losses_nats, dtype=torch.float64)
        low, high = bootstrap_interval(losses, torch.tensor(self.tokens))
        return Quality(
            tokens=tokens,
            perplexity=math.exp(sum(self.losses_nats) / tokens),
            perplexity_low=math.exp(low),
            perplexity_high=math.exp(high),
            kl_nats=sum(self.divergences_nats) / tokens if self.divergences_nats else None,
            top1_agreement=sum(self.agreements) / tokens if self.agreements else None,
        )


def evaluate(
    model: PreTrainedModel,
    passages: Sequence[Passage],
    original: PreTrainedModel | None = None,
    track: Any = untracked,
) -> Quality:
    """Run passages through a model, and through the original beside it where that is given.

    Args:
        model: At the budget it is set to.
        passages: Held-out text, see `text.passages`.
        original: What to compare with.
        track: As in `Context`.
    """
    return sample(model, passages, original, track).quality


@torch.inference_mode()
def sample(
    model: PreTrainedModel,
    passages: Sequence[Passage],
    original: PreTrainedModel | None = None,
    track: Any = untracked,
) -> Samples:
    """As `evaluate`, passage by passage."""
    samples = Samples([], [], [], [])
    for passage in track(passages, "measure quality"):
        places = passage.scored.nonzero().squeeze(1)
        targets = passage.ids[places].to(model.device)
        logits = _logits(model, passage, places)
        samples.tokens.append(len(places))
        samples.losses_nats.append(F.cross_entropy(logits, targets, reduction="sum").item())
        if original is not None:
            reference = _logits(original, passage, places)
            samples.divergences_nats.append(kl_divergence(reference, logits).sum().item())
            samples.agreements.append(int((reference.argmax(-1) == logits.argmax(-1)).sum()))
    return samples


def _logits(model: PreTrainedModel, passage: Passage, places: Int[Tensor, " n"]) -> Float[Tensor, "n v"]:
    """What the model predicts for the tokens at `places`."""
    ids, before = passage.ids[None].to(model.device), (places - 1).to(model.device)
    return model(ids, use_cache=False, logits_to_keep=before).logits[0].float()


def bootstrap_interval(sums: Float[Tensor, " n"], counts: Int[Tensor, " n"]) -> tuple[float, float]:
    """95 % interval of a mean over all tokens, by resampling passages with replacement; always the same draw.

    Args:
        sums: Of each passage.
        counts: Tokens of each passage.
    """
    return interval(bootstrap_means(sums, counts))


def bootstrap_means(sums: Float[Tensor, "*k n"], counts: Int[Tensor, " n"]) -> Float[Tensor, "*k r"]:
    """The means in each of many resamplings of the passages; rows share the draws, so they can be compared pairwise."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(counts), (_RESAMPLES, len(counts)), generator=generator)
    return sums[..., draws].sum(-1) / counts[draws].sum(1)


def interval(values: Float[Tensor, " r"]) -> tuple[float, float]:
    """What 95 % of resampled values lie between."""
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high
