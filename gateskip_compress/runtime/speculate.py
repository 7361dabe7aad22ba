"""Speculative decoding in the native runtime: guess a few tokens, verify them in one call, keep what stands.

A guess is what followed the last two or three tokens where they stood before in the text, if they did (prompt lookup);
else the model's own under a lower budget of its gates, if it has any. A call of k tokens gives the bits of k calls of
one, so the text is plain greedy decoding's. What was guessed wrong stays in the cache beyond the text's end, where
nobody looks before it is written over. Each kind of guess is measured against plain decoding as it goes, and rests
where it loses.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import LogitsProcessorList

from ..gating.dial import budget
from ..speculation.acceptance import Acceptance

if TYPE_CHECKING:
    from .session import Session

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
        tokens: Guessed at a time.
        draft_budget: Of gate drafts; None drafts by looking up alone.
        counts: Are added to.
    """

    session: "Session"
    text: list[int]
    processors: LogitsProcessorList
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
            found = self.choices(guess)
            stands = 0
            while stands < len(guess) and guess[stands] == found[stands]:
                stands += 1
            ended = perf_counter()
            rate.measure(stands + 1, ended - began)
            if rate is not self.plain and rate.tokens_per_s < self.plain.tokens_per_s:
                rate.rests_until, rate.tokens_per_s = len(self.text) + _REST_TOKENS, 0.0
            self._count(len(guess), stands, drafted - began, ended - drafted)
            for token in found[: stands + 1]:
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
                guess += self.choices([], guess)
        return self.gates, guess

    def choices(self, guess: list[int], before: list[int] | None = None) -> list[int]:
        """The next token after the text and `before`, and after each guessed one on top of them."""
        text = self.text + (before or [])
        ids, wanted = np.array([text[-1], *guess]), len(guess) + 1
        step = self.session.run_row(ids, 0, len(text) - 1, wanted=wanted, logits=len(self.processors) > 0)
        if step.logits is None:
            return step.best.tolist()
        whole = torch.tensor([text + guess])
        return [int(self.processors(whole[:, : len(text) + i], step.logits[i : i + 1]).argmax()) for i in range(wanted)]
