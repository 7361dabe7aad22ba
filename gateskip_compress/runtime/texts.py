"""Texts that grow side by side in one session: how they begin, how tokens are chosen, and when they end."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

from ..speculation.scores import of_rows
from .extension import extension
from .lowered import Lowered, Step


@dataclass
class Text:
    """A sequence that grows.

    Args:
        row: Of the cache, which holds all of it but the padding and the last token.
        ids: Room for the longest text there may be; as long for all texts.
        length: Of what stands.
        padding: Tokens before the first real one.
        processors: Its own, applied alike to every choice.
        sampled: Tokens are drawn, by torch's global generator; else the best are taken.
    """

    row: int
    ids: Int[np.ndarray, " most"]
    length: int
    padding: int
    processors: LogitsProcessorList
    sampled: bool

    @property
    def wants_logits(self) -> bool:
        """Whether the best token alone does not say what comes next."""
        return self.sampled or len(self.processors) > 0

    @property
    def room(self) -> int:
        """Tokens that may still come."""
        return len(self.ids) - self.length

    def upto(self, guessed: int) -> Int[Tensor, "1 t"]:
        """The text and some guessed tokens, where they lie."""
        return torch.from_numpy(self.ids[None, : self.length + guessed])

    def guess(self, count: int) -> list[int]:
        """The tokens behind it."""
        return self.ids[self.length :][:count].tolist()

    def append(self, tokens: list[int]) -> None:
        """Tokens that stand."""
        self.ids[self.length : self.length + len(tokens)] = tokens
        self.length += len(tokens)


def prompts(
    ids: Int[Tensor, "b t"], padding: list[int], processors: LogitsProcessorList, longest: int, *, sampled: bool
) -> list[Text]:
    """Texts that are to grow from prompts, to a length."""
    texts, own = [], of_rows(processors, len(ids))
    for row, (prompt, hidden) in enumerate(zip(ids.numpy(), padding, strict=True)):
        room = np.empty(longest, dtype=np.int64)
        room[: len(prompt)] = prompt
        texts.append(Text(row, room, len(prompt), hidden, own[row], sampled))
    return texts


def lasts(
    texts: Sequence[Text], guessed: int = 0
) -> tuple[Int[np.ndarray, " b"], Int[np.ndarray, " b"], Int[np.ndarray, " b"]]:
    """The last token of each text and of some guessed behind it, its row of the cache, and its position there."""
    at = [text.length + guessed - 1 for text in texts]
    ids = np.array([text.ids[place] for text, place in zip(texts, at, strict=True)])
    rows = np.array([text.row for text in texts], dtype=np.int32)
    return ids, rows, np.array([place - t.padding for t, place in zip(texts, at, strict=True)], dtype=np.int32)


def grow(
    session: Lowered,
    texts: list[Text],
    decode: Callable[[list[Text]], list[int]],
    ends: "Ends",
    streamer: BaseStreamer | None,
) -> list[Int[Tensor, " _"]]:
    """Texts as they end; those that have ended wait for nobody.

    Args:
        session: Its cache is written over.
        texts: Prompts.
        decode: Lets each text grow, by one token at least and no further than it has room; by how many it did.
        ends: Asked after every token.
        streamer: Gets tokens as they stand.
    """
    going, new = texts, [1] * len(texts)
    for text in texts:
        step = session.prefill(text.ids[text.padding : text.length], text.row, logits=text.wants_logits)
        text.append([choice(session, step, 0, text, 0)])
    while going := [text for text, count in zip(going, new, strict=True) if not ends.within(text, count, streamer)]:
        new = decode(going)
    if streamer is not None:
        streamer.end()
    return [text.upto(0)[0] for text in texts]


class Ends:
    """Stopping criteria, of which the two that nearly always are there are asked without tensors."""

    def __init__(self, criteria: StoppingCriteriaList) -> None:
        lengths = [c.max_length for c in criteria if type(c) is MaxLengthCriteria]
        self.length = min(lengths, default=sys.maxsize)
        self.tokens = {id for c in criteria if type(c) is EosTokenCriteria for id in c.eos_token_id.tolist()}
        known = (MaxLengthCriteria, EosTokenCriteria)
        self.others = StoppingCriteriaList([c for c in criteria if type(c) not in known])

    def within(self, text: Text, new: int, streamer: BaseStreamer | None) -> bool:
        """Whether one of a text's last tokens ends it; what comes after that one goes."""
        for length in range(text.length - new + 1, text.length + 1):
            text.length = length
            if streamer is not None:
                streamer.put(text.upto(0)[0, -1:])
            if self.after(text):
                return True
        return False

    def after(self, text: Text) -> bool:
        """Whether its last token ends it."""
        if text.length >= self.length or int(text.ids[text.length - 1]) in self.tokens:
            return True
        return len(self.others) > 0 and bool(self.others(text.upto(0), None)[0])  # pyright: ignore[reportArgumentType] as transformers does


def choice(session: Lowered, step: Step, at: int, text: Text, guessed: int) -> int:
    """The token after a text and some guessed ones, out of place `at` of a call."""
    if step.logits is None:
        return int(step.best[at])
    return int(choose(session, text.upto(guessed), step.logits[at : at + 1], text.processors, sampled=text.sampled))


def choose(
    session: Lowered,
    ids: Int[Tensor, "b t"],
    logits: Float[Tensor, "b v"],
    processors: LogitsProcessorList,
    *,
    sampled: bool,
) -> Int[Tensor, " b"]:
    """The next token of each sequence, as transformers chooses it; drawn by torch's global generator."""
    scores = processors(ids, logits)
    if not sampled:
        return scores.argmax(dim=-1)
    chances = torch.rand(len(scores), dtype=torch.float64).tolist()
    draw, rows = extension().draw, scores.float().numpy()
    return torch.tensor([draw(session.kernels, row, chance) for row, chance in zip(rows, chances, strict=True)])
