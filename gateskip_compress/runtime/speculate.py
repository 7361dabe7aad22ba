"""Speculative decoding in the native runtime: guess a few tokens, verify them in one call, keep what stands.

A guess is what followed the last two or three tokens where they stood before in the text, if they did (prompt lookup);
else the model's own best tokens under a lower budget of its gates, if it has any. A call of k tokens gives the bits of
k calls of one, so the text is plain decoding's: greedy, or sampled from the same seed. There a guess stands if it is
the token that plain decoding draws: as likely as by speculative sampling (arXiv 2211.17192), since a guess is certain
to be guessed. What was guessed wrong stays in the cache beyond the text's end, where
nobody looks before it is written over. Each kind of guess is measured against plain decoding as it goes, and rests
where it loses.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessorList

from ..gating.dial import budget
from ..speculation.acceptance import Acceptance

if TYPE_CHECKING:
    from .session import Session, Step

_NGRAMS = (3, 2)
"""Lengths of what is looked up, the first first."""
_REST_TOKENS = 32
"""Decoded before a kind of guess that lost is tried again."""
_MEMORY = 0.8
"""Share of a measured rate that the next measurement keeps."""


@dataclass
class Rate:
    """Tokens per second of one way to decode, and until which length of the text it rests."""

    tokens_per_s: float = 0.0
    rests_until: int = 0

    def measure(self, tokens: int, seconds: float) -> None:
        """Take a measurement in."""
        found = tokens / seconds
        old = self.tokens_per_s or found
        self.tokens_per_s = _MEMORY * old + (1 - _MEMORY) * found


class Lookup:
    """Where each run of two or three tokens of a growing text was last followed by another token."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, ...], int] = {}
        self._known = 0

    def follow(self, text: list[int], count: int) -> list[int]:
        """What followed the text's last tokens where they stood before; empty where they did not."""
        for end in range(max(self._known, 1), len(text)):  # the last tokens themselves are not yet followed by any
            for n in _NGRAMS:
                if end >= n:
                    self._seen[tuple(text[end - n : end])] = end
        self._known = len(text)
        for n in _NGRAMS:
            at = self._seen.get(tuple(text[-n:]))
            if at is not None and len(text) >= n:
                return text[at : at + count]
        return []


@dataclass
class Speculator:
    """Decodes one text.

    Args:
        session: Its cache's first row holds all of the text but the last token.
        text: Prompt and tokens so far; grows.
        processors: Applied alike to every choice.
        sampled: Draw tokens, by torch's global generator.
        tokens: Guessed at a time.
        draft_budget: Of gate drafts; None drafts by looking up alone.
        counts: Are added to.
    """

    session: "Session"
    text: list[int]
    processors: LogitsProcessorList
    sampled: bool
    tokens: int
    draft_budget: float | None
    counts: Acceptance
    plain: Rate = field(default_factory=Rate)
    lookup: Rate = field(default_factory=Rate)
    gates: Rate = field(default_factory=Rate)
    seen: Lookup = field(default_factory=Lookup)

    def decode(self) -> Iterator[int]:
        """Tokens as they stand, without end; never past the cache."""
        while True:
            began = perf_counter()
            rate, guess = self._guess(min(self.tokens, self.session.context_tokens - len(self.text)))
            drafted = perf_counter()
            step, found = self._run(self.text, guess), []
            for place in range(len(guess) + 1):  # as many draws as tokens that stand
                found.append(self._choice(step, place, self.text + guess[:place], sampled=self.sampled))
                if place < len(guess) and found[place] != guess[place]:
                    break
            stands = len(found) - 1
            ended = perf_counter()
            rate.measure(stands + 1, ended - began)
            if rate is not self.plain and rate.tokens_per_s < self.plain.tokens_per_s:
                rate.rests_until, rate.tokens_per_s = len(self.text) + _REST_TOKENS, 0.0
            self._count(len(guess), stands, drafted - began, ended - drafted)
            for token in found:
                self.text.append(token)
                yield token

    def _count(self, guessed: int, stands: int, draft_s: float, verify_s: float) -> None:
        self.counts.drafted += guessed
        self.counts.accepted += stands
        self.counts.draft_s += draft_s
        if guessed:
            self.counts.verifies += 1
            self.counts.verify_s += verify_s
        else:
            self.counts.plain_steps += 1
            self.counts.plain_s += verify_s

    def _guess(self, count: int) -> tuple[Rate, list[int]]:
        """Which way to take, and what it guesses; nothing is plain decoding, which comes first, to be measured."""
        if count < 1 or self.plain.tokens_per_s == 0:
            return self.plain, []
        if len(self.text) >= self.lookup.rests_until:
            found = self.seen.follow(self.text, count)
            if found:
                return self.lookup, found
        if self.draft_budget is None or len(self.text) < self.gates.rests_until:
            return self.plain, []
        with budget(self.session.model, self.draft_budget):
            guess: list[int] = []
            for _ in range(count):
                text = self.text + guess
                guess.append(self._choice(self._run(text, []), 0, text, sampled=False))
        return self.gates, guess

    def _run(self, text: list[int], guess: list[int]) -> "Step":
        """What the text's last token and each guessed one after it give."""
        ids, wanted = np.array([text[-1], *guess]), len(guess) + 1
        logits = self.sampled or len(self.processors) > 0
        return self.session.run_row(ids, 0, len(text) - 1, wanted=wanted, logits=logits)

    def _choice(self, step: "Step", place: int, text: list[int], *, sampled: bool) -> int:
        """The token after a text, by one place of a call."""
        if step.logits is None:
            return int(step.best[place])
        return int(choose(torch.tensor([text]), step.logits[place : place + 1], self.processors, sampled))


def choose(
    ids: Int[Tensor, "b t"], logits: Float[Tensor, "b v"], processors: LogitsProcessorList, sampled: bool
) -> Int[Tensor, " b"]:
    """The next token of each sequence, as transformers chooses it."""
    scores = processors(ids, logits)
    if not sampled:
        return scores.argmax(dim=-1)
    return torch.multinomial(scores.softmax(dim=-1), num_samples=1)[:, 0]
