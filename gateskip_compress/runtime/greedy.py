"""Greedy decoding, some steps to a call of the native model."""

from collections.abc import Sequence

import numpy as np

from ..speculation.control import Clock
from .lowered import Lowered
from .texts import Ends, Text, lasts

CALL_S = 0.05
"""Of steps in one call: streamed text still flows, and Ctrl-C is heard."""


class Greedy:
    """Decodes texts.

    After each call, all that Python needs comes back into the processor's caches, out of which the weights drove it:
    a tenth of a small model's step. What was decoded behind a text's end is dropped.

    Args:
        session: Its cache holds what `Text` says.
        ends: Steps stop at its tokens.
    """

    def __init__(self, session: Lowered, ends: Ends) -> None:
        self.session, self.step_s = session, CALL_S
        self.ends = np.array(sorted(ends.tokens), dtype=np.int32)

    @property
    def together(self) -> int:
        """Steps that go into one call."""
        return max(1, int(CALL_S / self.step_s))

    def round(self, texts: Sequence[Text]) -> list[int]:
        """One call."""
        return self.steps(texts, self.together)

    def steps(self, texts: Sequence[Text], most: int) -> list[int]:
        """Some steps, at most; how many were made, for each text."""
        clock, most = Clock(), min(most, *(text.room for text in texts))
        found = self.session.follow(*lasts(texts), most, self.ends)
        self.step_s = clock.lap() / len(found)
        for text, tokens in zip(texts, found.T.tolist(), strict=True):
            text.append(tokens)
        return [len(found)] * len(texts)
