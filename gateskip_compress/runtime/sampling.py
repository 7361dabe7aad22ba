"""Tokens drawn without torch: those that torch's generator would draw from the same seed."""

import numpy as np
from jaxtyping import Float, Int

from .extension import extension
from .lowered import Draws, Lowered
from .texts import Chooser

SEEDS = 2**32
"""That both generators take."""


class Drawn(Chooser, Draws):
    """Draws a text's tokens by the softmax of its logits, within limits.

    Chances are those of `torch.manual_seed(seed)` and then `torch.rand(1, dtype=torch.float64)` for each token: both
    take them from MT19937 seeded in the same way, 53 bits out of two of its numbers.

    Args:
        session: For its kernels.
        limits: As `draw` takes them.
        seed: From 0 to below `SEEDS`.
    """

    def __init__(self, session: Lowered, limits: dict[str, float], seed: int) -> None:
        self._session, self.limits, self._numbers = session, limits, np.random.RandomState(seed)

    @property
    def processes(self) -> bool:
        """Whether drafts are to ask it too: for shares at this temperature."""
        return self.limits["temperature"] != 1

    @property
    def draws(self) -> Draws:
        """Itself."""
        return self

    def ahead(self, count: int) -> Float[np.ndarray, " c"]:
        """The next chances."""
        state = self._numbers.get_state()
        found = self._next(count)
        self._numbers.set_state(state)
        return found

    def spend(self, count: int) -> None:
        """Go on behind them."""
        self._next(count)

    def _next(self, count: int) -> Float[np.ndarray, " c"]:
        high, low = self._numbers.randint(0, 2**32, (count, 2), dtype=np.uint32).T.astype(np.uint64)
        return ((high << np.uint64(32) | low) & np.uint64(2**53 - 1)) / 2**53

    def choose(self, ids: Int[np.ndarray, " t"], logits: Float[np.ndarray, " v"]) -> int:
        """The token after a text."""
        del ids
        return extension().draw(self._session.kernels, logits, float(self._next(1)[0]), **self.limits)

    def likeliest(self, ids: Int[np.ndarray, " t"], logits: Float[np.ndarray, " u"]) -> tuple[int, float]:
        """A draft's best token, and its share of the softmax."""
        del ids
        best = int(logits.argmax())
        return best, float(1 / np.exp((logits - logits[best]) / self.limits["temperature"]).sum())
