"""Plain decoding, some steps to a call of the native model."""

from collections.abc import Sequence

import numpy as np

from ..speculation.control import Clock
from .lowered import Lowered
from .texts import Ends, Text, choice, chosen_inside, lasts

CALL_S = 0.05
"""Of steps in one call: streamed text still flows, and Ctrl-C is heard."""
_NO_GUESSES = np.zeros(1, dtype=np.int32)


class Plain:
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
        clock, text, most = Clock(), texts[0], min(most, *(text.room for text in texts))
        if not chosen_inside(texts):
            step = self.session.run(*lasts(texts), np.arange(len(texts), dtype=np.int32), logits=True)
            for at, own in enumerate(texts):
                own.append([choice(step, at, own, 0)])
            made = 1
        elif text.chooser is None:
            found = self.session.follow(*lasts(texts), most, self.ends)
            for own, tokens in zip(texts, found.T.tolist(), strict=True):
                own.append(tokens)
            made = len(found)
        else:
            passes = self.session.speculate(
                text.known, text.row, _NO_GUESSES, True, most, CALL_S, self.ends, text.chooser.draws
            )
            text.append(passes.tokens.tolist())
            made = len(passes.tokens)
        self.step_s = clock.lap() / made
        return [made] * len(texts)
