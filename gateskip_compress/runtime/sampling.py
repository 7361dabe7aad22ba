"""Tokens drawn at a temperature without torch: those that torch's generator would draw from the same seed."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from .extension import extension
from .lowered import Lowered
from .texts import Chooser, Text, choice, lasts

SEEDS = 2**32
"""That both generators take."""


class Tempered(Chooser):
    """Draws a text's tokens by the softmax of its logits over a temperature.

    Chances are those of `torch.manual_seed(seed)` and then `torch.rand(1, dtype=torch.float64)` for each token: both
    take them from MT19937 seeded in the same way, 53 bits out of two of its numbers.

    Args:
        session: For its kernels.
        temperature: Above 0.
        seed: From 0 to below `SEEDS`.
    """

    def __init__(self, session: Lowered, temperature: float, seed: int) -> None:
        self._session, self._temperature = session, np.float32(temperature)
        self._numbers = np.random.RandomState(seed)

    @property
    def processes(self) -> bool:
        """Whether drafts are to ask it too: for shares at this temperature."""
        return bool(self._temperature != 1)

    def choose(self, ids: Int[np.ndarray, " t"], logits: Float[np.ndarray, " v"]) -> int:
        """The token after a text."""
        del ids
        high, low = self._numbers.randint(0, 2**32, 2, dtype=np.uint32).tolist()
        chance = ((high << 32 | low) & (2**53 - 1)) / 2**53
        return extension().draw(self._session.kernels, logits, chance, temperature=self._temperature)

    def likeliest(self, ids: Int[np.ndarray, " t"], logits: Float[np.ndarray, " u"]) -> tuple[int, float]:
        """A draft's best token, and its share of the softmax."""
        del ids
        best = int(logits.argmax())
        return best, float(1 / np.exp((logits - logits[best]) / self._temperature).sum())


def draw_round(session: Lowered, texts: Sequence[Text]) -> list[int]:
    """A plain step of texts with choosers."""
    want = np.arange(len(texts), dtype=np.int32)
    step = session.run(*lasts(texts), want, logits=True)
    for at, text in enumerate(texts):
        text.append([choice(step, at, text, 0)])
    return [1] * len(texts)
