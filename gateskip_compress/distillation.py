"""What is learnt from: the original's distribution at a batch's scored tokens, and these tokens themselves.

    loss = distillation · KL(original ‖ model) + cross_entropy · CE

A whole batch's logits are never there: with Gemma's vocabulary those of 1,024 tokens take a gigabyte, and a loss and
its gradient make a dozen such tensors. Rows of them come a few at a time and go as soon as their gradients are taken,
in the forward pass already; the backward pass hands on what these say of the hidden states and the output head.

Nor is every token of such a vocabulary worth its multiply-adds, which are most of what training a small model takes.
Where passages use few of them, the loss is over those and over as many others, drawn anew for each step; each of these
stands for its share of all others, by a logarithm added to its logit: sampled softmax (arXiv 1412.2007, there for
cross-entropy alone), with the used tokens always in and the others all as likely.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from .losses import distillation_and_gradient
from .model import ReadOut, read_out
from .text import Passage
from .training import Batch

_LOGITS = 2**26
"""That are there at a time, 256 MiB of float32: fewer mean more passes over the head's gradient."""
_MANY = 4
"""A vocabulary so many times as large as what passages use of it is not gone through whole."""

Logits = Callable[..., Tensor]
"""Rows of hidden states and weights of the head -> logits."""
_RowsLoss = Callable[[slice, Tensor], tuple[Tensor, Tensor]]
"""Rows and their logits -> their loss, summed, and its gradient."""


@dataclass(frozen=True)
class Predictions:
    """What a model says of a batch's scored tokens, short of its logits.

    Args:
        hidden: After the final norm, at the token before each.
        end: Turns that into logits.
    """

    hidden: Float[Tensor, "n d"]
    end: ReadOut


def predictions(model: PreTrainedModel, batch: Batch) -> Predictions:
    """Run the model, as it is set, up to its output head."""
    mask = None if bool(batch.real.all()) else batch.real.long()
    hidden = model.base_model(batch.ids, attention_mask=mask, use_cache=False).last_hidden_state
    return Predictions(hidden[:, :-1][batch.scored[:, 1:]], read_out(model))


class Distillation:
    """The loss, of what a model says of some of the passages' tokens.

    Args:
        passages: All that is learnt from.
        seed: Of the tokens that are drawn.
        distillation: Weight of the divergence.
        cross_entropy: Weight of the negative log-likelihood.
    """

    def __init__(self, passages: Sequence[Passage], seed: int, distillation: float, cross_entropy: float) -> None:
        self._used = torch.cat([passage.ids for passage in passages]).unique().cpu()
        self._seed, self._distillation, self._cross_entropy = seed, distillation, cross_entropy

    def __call__(
        self, model: Predictions, original: Predictions | None, targets: Int[Tensor, " n"], step: int
    ) -> Float[Tensor, ""]:
        """Summed over the tokens, in nats.

        Args:
            model: What learns.
            original: What it learns from; None leaves the divergence out.
            targets: The tokens.
            step: Of the training.
        """
        head: Any = model.end.head
        tokens = chosen(self._used, head.out_features, self._seed, step) if type(head) is nn.Linear else None
        if tokens is not None:
            tokens = Tokens(tokens.ids.to(targets.device), tokens.shift.to(targets.device))
            targets = torch.searchsorted(tokens.ids[: len(self._used)], targets)
        logits, weights = _head(model.end, tokens)
        expected = None if original is None else partial(_rows, original.hidden, *_head(original.end, tokens))

        def loss(rows: slice, found: Tensor) -> tuple[Tensor, Tensor]:
            reference = None if expected is None else expected(rows)
            return distillation_and_gradient(reference, found, targets[rows], self._distillation, self._cross_entropy)

        return _ByRows.apply(logits, loss, model.hidden, *weights)


class Tokens(NamedTuple):
    """Some of a vocabulary, and what is added to their logits."""

    ids: Int[Tensor, " m"]
    shift: Float[Tensor, " m"]


def chosen(used: Int[Tensor, " n"], vocabulary: int, seed: int, step: int) -> Tokens | None:
    """Tokens that a step's loss is over: the used ones in their order, then others; None is the whole vocabulary."""
    if vocabulary < _MANY * len(used):
        return None
    generator = torch.Generator().manual_seed(seed * 100_003 + step)
    others = torch.ones(vocabulary, dtype=torch.bool).index_fill_(0, used, False).nonzero().squeeze(1)
    drawn = others[torch.randperm(len(others), generator=generator)[: len(used)]]
    stands_for = torch.tensor([1.0, len(others) / len(drawn)]).repeat_interleave(len(used))
    return Tokens(torch.cat([used, drawn]), stands_for.log())


def _head(end: ReadOut, tokens: Tokens | None) -> tuple[Logits, list[Tensor]]:
    """Logits of some tokens, or all, as a function of what else learns; and that."""
    if tokens is None:
        named = {name: weight for name, weight in end.head.named_parameters() if weight.requires_grad}

        def whole(hidden: Tensor, *weights: Tensor) -> Tensor:
            return end.capped(functional_call(end.head, dict(zip(named, weights, strict=True)), (hidden,)))

        return whole, list(named.values())

    def some(hidden: Tensor, *weights: Tensor) -> Tensor:
        return end.capped(F.linear(hidden, *weights)) + tokens.shift

    return some, [weight[tokens.ids] for weight in end.head.parameters()]


def _rows(hidden: Tensor, logits: Logits, weights: list[Tensor], rows: slice) -> Tensor:
    return logits(hidden[rows], *weights).float()


class _ByRows(torch.autograd.Function):
    """Sum of a loss over rows of logits, whose gradients are taken as they go by."""

    @staticmethod
    def forward(ctx: Any, logits: Logits, loss: _RowsLoss, hidden: Tensor, *weights: Tensor) -> Tensor:
        """Of hidden states, and of the head's weights."""
        learning = [weight.detach().requires_grad_(weight.requires_grad) for weight in weights]
        found: dict[int, Tensor] = {i: torch.zeros_like(w) for i, w in enumerate(weights, 3) if w.requires_grad}
        found[2] = torch.empty_like(hidden)
        total = torch.zeros((), device=hidden.device)
        at_once = max(1, _LOGITS // logits(hidden[:1], *weights).shape[-1])
        for begin in range(0, len(hidden), at_once):
            rows = slice(begin, begin + at_once)
            entering = hidden[rows].detach().requires_grad_()
            with torch.enable_grad():
                out = logits(entering, *learning)
            value, gradient = loss(rows, out.detach().float())
            total += value
            asked = [weight for weight in learning if weight.requires_grad]
            found[2][rows], *parts = torch.autograd.grad(out, [entering, *asked], gradient.to(out.dtype))
            for index, part in zip(found, parts, strict=False):  # the hidden states' own is the last
                found[index] += part
        ctx.places = list(found)
        ctx.save_for_backward(*found.values())
        return total

    @staticmethod
    def backward(ctx: Any, *of_total: Tensor) -> Any:
        """Scaled."""
        found: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        for index, gradient in zip(ctx.places, ctx.saved_tensors, strict=True):
            found[index] = gradient * of_total[0]
        return tuple(found)
