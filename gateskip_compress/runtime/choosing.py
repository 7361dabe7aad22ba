"""How transformers chooses tokens, and when it stops, for texts that grow in a session."""

import sys
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from ..speculation.scores import of_rows
from .extension import extension
from .lowered import Draws, Lowered
from .texts import Chooser, Ends

_LIMITS = {
    TemperatureLogitsWarper: "temperature",
    TopKLogitsWarper: "top_k",
    TopPLogitsWarper: "top_p",
    MinPLogitsWarper: "min_p",
}
"""What `draw` limits itself by, in its order, which is transformers'."""


@dataclass(frozen=True)
class _ByTorch(Draws):
    """By torch's global generator."""

    limits: dict[str, float]

    def ahead(self, count: int) -> Float[np.ndarray, " c"]:
        """The next chances."""
        state = torch.get_rng_state()
        found = np.array(_chances(count))
        torch.set_rng_state(state)
        return found

    def spend(self, count: int) -> None:
        """Go on behind them."""
        _chances(count)


@dataclass(frozen=True)
class Processed(Chooser):
    """Chooses a text's tokens after its logits processors, which know them by their place in the whole vocabulary.

    Args:
        session: For its kernels.
        processors: The text's own, applied alike to every choice.
        sampled: Tokens are drawn, by torch's global generator; else the best are taken.
    """

    session: Lowered
    processors: LogitsProcessorList
    sampled: bool

    @property
    def processes(self) -> bool:
        """Whether there are any."""
        return len(self.processors) > 0

    @cached_property
    def _apart(self) -> tuple[LogitsProcessorList, dict[str, float]]:
        return apart(self.processors)

    @property
    def draws(self) -> Draws | None:
        """Where processors do no more than `draw` can."""
        others, limits = self._apart
        return _ByTorch(limits) if self.sampled and not others else None

    def choose(self, ids: Int[np.ndarray, " t"], logits: Float[np.ndarray, " v"]) -> int:
        """The token after a text."""
        rows = torch.from_numpy(ids[None]), torch.from_numpy(logits[None])
        return int(choose(self.session, *rows, self.processors, sampled=self.sampled))

    def likeliest(self, ids: Int[np.ndarray, " t"], logits: Float[np.ndarray, " u"]) -> tuple[int, float]:
        """A draft's best token, out of the first entries of the vocabulary, and its share of the softmax."""
        beyond = (0, self.session.vocabulary - len(logits))
        others, limits = self._apart
        scores = others(
            torch.from_numpy(ids[None]), F.pad(torch.from_numpy(logits[None]), beyond, value=-torch.inf)
        ) / limits.get("temperature", 1.0)
        top = scores.softmax(dim=-1)[0].max(dim=-1)
        return int(top.indices), float(top.values.nan_to_num(0.0))


def choosers(
    session: Lowered, processors: LogitsProcessorList, rows: int, *, sampled: bool
) -> list[Processed] | list[None]:
    """One for each text; None where the best token is taken as it is."""
    if not sampled and not processors:
        return [None] * rows
    return [Processed(session, own, sampled) for own in of_rows(processors, rows)]


def ends_of(criteria: StoppingCriteriaList) -> Ends:
    """Stopping criteria, of which the two that nearly always are there are asked without tensors."""
    lengths = [c.max_length for c in criteria if type(c) is MaxLengthCriteria]
    tokens = frozenset(id for c in criteria if type(c) is EosTokenCriteria for id in c.eos_token_id.tolist())
    others = StoppingCriteriaList([c for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)])

    def asked(ids: Int[np.ndarray, " t"]) -> bool:
        return bool(others(torch.from_numpy(ids[None]), None)[0])  # pyright: ignore[reportArgumentType] as transformers does

    return Ends(min(lengths, default=sys.maxsize), tokens, asked if others else None)


def choose(
    session: Lowered,
    ids: Int[Tensor, "b t"],
    logits: Float[Tensor, "b v"],
    processors: LogitsProcessorList,
    *,
    sampled: bool,
) -> Int[Tensor, " b"]:
    """The next token of each sequence, as transformers chooses it; drawn by torch's global generator."""
    if not sampled:
        return processors(ids, logits).argmax(dim=-1)
    others, limits = apart(processors)
    rows = others(ids, logits).float().numpy()
    draw = partial(extension().draw, session.kernels, **limits)
    return torch.tensor([draw(row, chance) for row, chance in zip(rows, _chances(len(rows)), strict=True)])


def _chances(count: int) -> list[float]:
    """By torch's global generator."""
    return torch.rand(count, dtype=torch.float64).tolist()


def apart(processors: LogitsProcessorList) -> tuple[LogitsProcessorList, dict[str, float]]:
    """Processors, and what `draw` does in place of the last of them: transformers' own sort all the vocabulary."""
    names = [_LIMITS.get(type(one)) if _usual(one) else None for one in processors]
    first, before = len(names), list(_LIMITS.values())
    while first and (name := names[first - 1]) in before:
        first, before = first - 1, before[: before.index(name)]
    limits = {name: getattr(one, name) for one, name in zip(processors[first:], names[first:], strict=True) if name}
    return LogitsProcessorList(processors[:first]), limits


def _usual(processor: Any) -> bool:
    """Whether it leaves one token at least, and others no chance."""
    least, filled = getattr(processor, "min_tokens_to_keep", 1), getattr(processor, "filter_value", -torch.inf)
    return least == 1 and filled == -torch.inf
