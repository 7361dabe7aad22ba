"""Passages of the text that are found again, and what followed them."""

from bisect import bisect_left
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from .control import Control, looked_up

LONGEST = 16
"""Tokens of the longest passage that is searched for."""


@dataclass(frozen=True)
class Passage:
    """What followed when the text's last `found` tokens stood there before; empty where they never did."""

    found: int
    tokens: Int[np.ndarray, " k"]


def look_up(text: Int[np.ndarray, " t"], most: int) -> Passage:
    """Search a text for its own last tokens, as many as are found again, the latest place first (prompt lookup).

    A passage that runs into the end of the text goes on with itself, so that a loop is drafted whole.

    Args:
        text: Without padding.
        most: Tokens to return.
    """
    whole, size = text.tobytes(), text.itemsize  # bytes are searched in microseconds

    def behind(found: int) -> int:
        """The token after the latest place of the last `found` ones; 0 is nowhere."""
        passage, end = whole[-found * size :], len(whole) - size
        while (at := whole.rfind(passage, 0, end)) % size and at > 0:  # across tokens
            end = at + len(passage) - 1
        return at // size + found if at >= 0 else 0

    longest = range(1, 1 + min(LONGEST, len(text) - 1))
    found = bisect_left(longest, True, key=lambda count: not behind(count))  # where few are not found, more are not
    if not found:
        return Passage(0, text[:0])
    after = text[behind(found) :]
    return Passage(found, after[:most] if len(after) >= most else np.resize(after, most))


def worth_taking(passages: Sequence[Passage], control: Control, most: int) -> list[list[Hashable]]:
    """As many tokens of each row's passage as are worth it: their evidence."""
    lengths = [control.look_up_length(p.found, min(most, len(p.tokens)))[0] if p.found else 0 for p in passages]
    return [[looked_up(p.found + i) for i in range(n)] for p, n in zip(passages, lengths, strict=True)]
