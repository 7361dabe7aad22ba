"""Speculative decoding in the native runtime: guess a few tokens, verify them in one call, keep what stands.

Guesses come from where torch's come from, and what is tried, how far, and when not at all, is decided alike
(`speculation/control.py`): a passage that is found again, or the model's own best tokens under a lower budget of its
gates. A call of k tokens gives the bits of k calls of one, so the text is plain decoding's: greedy, or sampled from the
same seed. There a guess stands if it is the token that plain decoding draws: as likely as by speculative sampling
(arXiv 2211.17192), since a guess is certain to be guessed. What was guessed wrong stays in the cache beyond the text's
end, where nobody looks before it is written over.
"""

from collections.abc import Hashable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessorList

from ..gating.dial import budget, drafting
from ..speculation.acceptance import Acceptance
from ..speculation.control import Clock, Control, Drafter, sure, take_in
from ..speculation.draft import draft_passages, look_up
from ..text import drawn
from .pack import vocabulary_size

if TYPE_CHECKING:
    from .session import Session, Step

Guess = tuple[Drafter | None, list[Hashable]]
"""Who guessed, and the evidence of each token; nobody is a plain step. The tokens stand behind the text."""


class Speculator:
    """Decodes one text.

    Args:
        session: Its cache's first row holds all of the text but the last token.
        text: The prompt.
        processors: Applied alike to every choice.
        sampled: Draw tokens, by torch's global generator.
        control: Says what to guess, and learns how it fared.
        counts: Are added to.
    """

    def __init__(
        self,
        session: "Session",
        text: Int[np.ndarray, " t"],
        processors: LogitsProcessorList,
        control: Control,
        counts: Acceptance,
        *,
        sampled: bool,
    ) -> None:
        self.session, self.processors, self.control, self.counts = session, processors, control, counts
        self.sampled, self.length = sampled, len(text)
        self._ids = np.empty(session.context_tokens + 1, dtype=np.int64)
        self._ids[: self.length] = text

    def decode(self) -> Iterator[int]:
        """Tokens as they stand, without end; never past the cache."""
        while True:
            clock = Clock()
            drafter, evidence = self._guess(min(self.control.most_tokens, self.session.context_tokens - self.length))
            guess, draft_s = self._ids[self.length :][: len(evidence)].tolist(), clock.lap()
            step, found = self._run(self.length - 1, len(guess) + 1), []
            for place in range(len(guess) + 1):  # as many draws as tokens that stand
                found.append(self._choice(step, place))
                if place < len(guess) and found[place] != guess[place]:
                    break
            take_in(self.control, self.counts, drafter, [evidence], [len(found) - 1], draft_s, clock.lap())
            for token in found:
                self._ids[self.length] = token
                self.length += 1
                yield token

    def _guess(self, most: int) -> Guess:
        """By whom the control chooses."""
        if most < 1:
            return None, []
        looks = any(drafter.budget is None for drafter in self.control.drafters)
        passage = look_up(self._text(0)[0], most) if looks else None
        drafter = self.control.choose(passage.found if passage is not None else 0)
        if drafter is None:
            return None, []
        if drafter.budget is not None:
            return drafter, self._guess_by_gates(drafter, drafter.budget, most)
        assert passage is not None  # it alone lets this one be chosen
        draft = draft_passages([passage], self.control, most)
        evidence = draft.evidence[0]
        self._ids[self.length : self.length + len(evidence)] = draft.tokens[0].numpy()
        return (drafter if evidence else None), evidence

    def _guess_by_gates(self, drafter: Drafter, share: float, most: int) -> list[Hashable]:
        """The model's likeliest tokens under a lower budget, as long as they pay."""
        evidence: list[Hashable] = []
        chance = 1.0
        with drafting(self.session.model), budget(self.session.model, share):
            while len(evidence) < most:
                end = self.length + len(evidence)
                scores = self.session.draft_row(self._ids[end - 1 : end], 0, end - 1).logits
                assert scores is not None  # a drafting step gives them
                if len(self.processors) > 0:  # they know tokens by their place in the whole vocabulary
                    rest = vocabulary_size(self.session.model) - scores.shape[1]
                    scores = F.pad(scores, (0, rest), value=-torch.inf)
                    scores = self.processors(self._text(len(evidence)), scores)
                top = scores.max(dim=-1)
                self._ids[end] = int(top.indices)
                evidence.append(sure(share, float(1 / (scores - top.values).exp().sum())))  # its share
                chance *= self.control.odds.of(evidence[-1])
                if not self.control.goes_on(drafter, chance):
                    break
        return evidence

    def _text(self, guessed: int) -> Int[Tensor, "1 t"]:
        """The text and some guessed tokens, where they lie."""
        return torch.from_numpy(self._ids[None, : self.length + guessed])

    def _run(self, first: int, count: int) -> "Step":
        """What tokens at and after a place give."""
        logits = self.sampled or len(self.processors) > 0
        return self.session.run_row(self._ids[first : first + count], 0, first, wanted=count, logits=logits)

    def _choice(self, step: "Step", place: int) -> int:
        """The token after the text and `place` guessed ones."""
        if step.logits is None:
            return int(step.best[place])
        return int(choose(self._text(place), step.logits[place : place + 1], self.processors, self.sampled))


def choose(
    ids: Int[Tensor, "b t"], logits: Float[Tensor, "b v"], processors: LogitsProcessorList, sampled: bool
) -> Int[Tensor, " b"]:
    """The next token of each sequence, as transformers chooses it."""
    scores = processors(ids, logits)
    if not sampled:
        return scores.argmax(dim=-1)
    return drawn(scores.softmax(dim=-1, dtype=torch.float64))[:, 0]
