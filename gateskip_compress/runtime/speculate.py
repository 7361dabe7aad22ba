"""Speculative decoding in the native runtime: guess a few tokens, verify them in one call, keep what stands.

Guesses come from where torch's come from, and what is tried, how far, and when not at all, is decided alike
(`speculation/control.py`): a passage that is found again, or the model's own best tokens under a lower budget of its
gates. A call of k tokens gives the bits of k calls of one, so the text is plain decoding's: greedy, or sampled from the
same seed. There a guess stands if it is the token that plain decoding draws: as likely as by speculative sampling
(arXiv 2211.17192), since a guess is certain to be guessed. What was guessed wrong stays in the cache beyond the text's
end, where nobody looks before it is written over.
"""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessorList

from ..gating.dial import budget, drafting
from ..speculation.acceptance import Acceptance
from ..speculation.control import Clock, Control, Drafter, looked_up, sure
from ..speculation.draft import look_up
from ..text import drawn

if TYPE_CHECKING:
    from .session import Session, Step

Guess = tuple[Drafter | None, list[int], list[Hashable]]
"""Who guessed, the tokens, and the evidence of each; nobody is a plain step."""


@dataclass
class Speculator:
    """Decodes one text.

    Args:
        session: Its cache's first row holds all of the text but the last token.
        text: Prompt and tokens so far; grows.
        processors: Applied alike to every choice.
        sampled: Draw tokens, by torch's global generator.
        control: Says what to guess, and learns how it fared.
        counts: Are added to.
    """

    session: "Session"
    text: list[int]
    processors: LogitsProcessorList
    sampled: bool
    control: Control
    counts: Acceptance

    def __post_init__(self) -> None:
        self._ids = np.empty(self.session.context_tokens + 1, dtype=np.int64)
        self._ids[: len(self.text)] = self.text

    def decode(self) -> Iterator[int]:
        """Tokens as they stand, without end; never past the cache."""
        while True:
            clock = Clock()
            most = min(self.control.most_tokens, self.session.context_tokens - len(self.text))
            drafter, guess, evidence = self._guess(most)
            draft_s = clock.lap()
            step, found = self._run(self.text, guess), []
            for place in range(len(guess) + 1):  # as many draws as tokens that stand
                found.append(self._choice(step, place, self.text + guess[:place], sampled=self.sampled))
                if place < len(guess) and found[place] != guess[place]:
                    break
            self._learn(drafter, evidence, len(found) - 1, draft_s, clock.lap())
            for token in found:
                self._ids[len(self.text)] = token
                self.text.append(token)
                yield token

    def _learn(
        self, drafter: Drafter | None, evidence: list[Hashable], stands: int, draft_s: float, verify_s: float
    ) -> None:
        """Count, and tell the control."""
        counts = self.counts
        if drafter is None:
            counts.plain_steps += 1
            counts.plain_s += draft_s + verify_s
            self.control.plain(draft_s + verify_s)
            return
        self.control.learn(drafter, [evidence], [stands], draft_s, verify_s)
        counts.verifies += 1
        counts.drafted += len(evidence)
        counts.accepted += stands
        counts.draft_s += draft_s
        counts.verify_s += verify_s

    def _guess(self, most: int) -> Guess:
        """By whom the control chooses."""
        if most < 1:
            return None, [], []
        looks = any(drafter.budget is None for drafter in self.control.drafters)
        passage = look_up(torch.from_numpy(self._ids[: len(self.text)]), most) if looks else None
        found = passage.found if passage is not None else 0
        drafter = self.control.choose(found)
        if drafter is None:
            return None, [], []
        if drafter.budget is not None:
            return self._guess_by_gates(drafter, drafter.budget, most)
        length = self.control.look_up_length(found, most)[0]
        tokens = passage.tokens[:length].tolist() if passage is not None else []
        return (drafter if tokens else None), tokens, [looked_up(found, place) for place in range(len(tokens))]

    def _guess_by_gates(self, drafter: Drafter, share: float, most: int) -> Guess:
        """The model's likeliest tokens under a lower budget, as long as they pay."""
        guess: list[int] = []
        evidence: list[Hashable] = []
        chance = 1.0
        with drafting(self.session.model), budget(self.session.model, share):
            while len(guess) < most:
                text = self.text + guess
                step = self._run(text, [], draft=True)
                scores = self.processors(torch.tensor([text]), step.logits)
                top = scores.max(dim=-1)
                guess.append(int(top.indices))
                # the largest share, without a distribution: the rest of the sum is of values at most 1
                evidence.append(sure(share, float(1 / (scores - top.values).exp().sum())))
                chance *= self.control.odds.of(evidence[-1])
                if not self.control.goes_on(drafter, chance):
                    break
        return drafter, guess, evidence

    def _run(self, text: list[int], guess: list[int], *, draft: bool = False) -> "Step":
        """What the text's last token and each guessed one after it give."""
        ids, wanted = np.array([text[-1], *guess]), len(guess) + 1
        logits = draft or self.sampled or len(self.processors) > 0
        own = draft and self.session.drafts
        return self.session.run_row(ids, 0, len(text) - 1, wanted=wanted, logits=logits, draft=own)

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
    return drawn(scores.softmax(dim=-1, dtype=torch.float64))[:, 0]
