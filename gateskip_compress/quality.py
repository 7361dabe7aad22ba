"""Quality of a model on held-out text, and what it cost: perplexity, how far it is from the original, multiply-adds.

    perplexity      exp of the mean negative log-likelihood of each scored token
    KL              mean over tokens of KL(original ‖ model), in nats
    top-1 agreement share of tokens where both put the same token first
    multiply-adds   counted over the first passages, see `macs.py`; the logits of all their tokens included

The interval of the perplexity is a bootstrap over passages (tokens of one text are not independent).
"""

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedModel

from .folders import write_whole
from .losses import kl_divergence
from .macs import counted_macs, head_macs
from .model import read_out
from .text import Passage
from .track import untracked

COUNTED_PASSAGES = 32
"""Whose multiply-adds are counted: that makes a pass half as slow again, and gates spend 0.05 more or less on each."""
_RESAMPLES = 1000


@dataclass(frozen=True)
class Quality:
    """What `evaluate` found; None where there was no original to compare with."""

    tokens: int
    macs_per_token: float
    perplexity: float
    perplexity_low: float
    perplexity_high: float
    kl_nats: float | None
    top1_agreement: float | None


@dataclass(frozen=True)
class Samples:
    """Sums over the scored tokens of each passage, of which `Quality` is the mean; with no original, two are empty.

    And multiply-adds of all tokens of each of the first passages.
    """

    tokens: list[int]
    macs: list[int]
    counted_tokens: list[int]
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
            macs_per_token=sum(self.macs) / sum(self.counted_tokens),
            perplexity=math.exp(sum(self.losses_nats) / tokens),
            perplexity_low=math.exp(low),
            perplexity_high=math.exp(high),
            kl_nats=sum(self.divergences_nats) / tokens if self.divergences_nats else None,
            top1_agreement=sum(self.agreements) / tokens if self.agreements else None,
        )


@dataclass(frozen=True)
class Reference:
    """What a model says to some passages, for others to be compared with: kept as what enters its output head.

    Args:
        model: Whose head turns that into logits.
        hidden: At the scored tokens of each passage.
        quality: The model's own.
    """

    model: PreTrainedModel
    hidden: list[Float[Tensor, "_n d"]]
    quality: Quality

    @classmethod
    def of(cls, model: PreTrainedModel, passages: Sequence[Passage], track: Any = untracked) -> "Reference":
        """Run the model over the passages."""
        hidden: list[Tensor] = []

        def hold(_head: nn.Module, entering: tuple[Tensor, ...]) -> None:
            hidden.append(entering[0][0])

        handle = read_out(model).head.register_forward_pre_hook(hold)
        try:
            return cls(model, hidden, evaluate(model, passages, track=track))
        finally:
            handle.remove()

    @classmethod
    def read(cls, path: Path, model: PreTrainedModel) -> "Reference":
        """What `write` wrote of this model."""
        with safe_open(path, framework="pt", device=str(model.device)) as file:
            hidden = [file.get_tensor(str(at)) for at in range(len(file.keys()))]
            return cls(model, hidden, Quality(**json.loads(file.metadata()["quality"])))

    def write(self, path: Path) -> None:
        """Keep it in a file, whole or not at all."""
        tensors = {str(at): hidden.contiguous() for at, hidden in enumerate(self.hidden)}
        write_whole(path, save(tensors, metadata={"quality": json.dumps(asdict(self.quality))}))

    def logits(self, at: int) -> Float[Tensor, "n v"]:
        """At the scored tokens of one passage."""
        return read_out(self.model).logits(self.hidden[at]).float()


def evaluate(
    model: PreTrainedModel,
    passages: Sequence[Passage],
    original: PreTrainedModel | Reference | None = None,
    track: Any = untracked,
) -> Quality:
    """Run passages through a model, and compare with the original where that is given.

    Args:
        model: At the budget it is set to.
        passages: Held-out text, see `text.passages`.
        original: What to compare with; or what it says to these passages, for models to be compared with in turn.
        track: As in `Context`.
    """
    return sample(model, passages, original, track).quality


@torch.inference_mode()
def sample(
    model: PreTrainedModel,
    passages: Sequence[Passage],
    original: PreTrainedModel | Reference | None = None,
    track: Any = untracked,
) -> Samples:
    """As `evaluate`, passage by passage."""
    reference = Reference.of(original, passages, track) if isinstance(original, PreTrainedModel) else original
    samples = Samples([], [], [], [], [], [])
    for at, passage in enumerate(track(passages, "measure quality")):
        targets = passage.ids[passage.scored].to(model.device)
        with counted_macs() if at < COUNTED_PASSAGES else nullcontext() as macs:
            logits = _logits(model, passage)
        if macs is not None:
            samples.macs.append(macs() + (len(passage.ids) - len(targets)) * head_macs(model))
            samples.counted_tokens.append(len(passage.ids))
        samples.tokens.append(len(targets))
        samples.losses_nats.append(F.cross_entropy(logits, targets, reduction="sum").item())
        if reference is not None:
            expected = reference.logits(at).to(logits.device)
            samples.divergences_nats.append(kl_divergence(expected, logits).sum().item())
            samples.agreements.append(int((expected.argmax(-1) == logits.argmax(-1)).sum()))
    return samples


def _logits(model: PreTrainedModel, passage: Passage) -> Float[Tensor, "n v"]:
    """What the model predicts for the scored tokens."""
    ids, before = passage.ids[None].to(model.device), (passage.scored.nonzero().squeeze(1) - 1).to(model.device)
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
