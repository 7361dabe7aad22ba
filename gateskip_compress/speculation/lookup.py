"""Passages of the text that are found again, and what followed them."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from .control import Control, looked_up

LONGEST = 3
"""Tokens of the longest passage that is searched for."""


@dataclass(frozen=True)
class Passage:
    """What followed when the text's last `found` tokens stood there before; empty where they never did."""

    found: int
    tokens: Int[np.ndarray, " k"]


def look_up(text: Int[np.ndarray, " t"], most: int) -> Passage:
    """Search a text for its own last tokens, three, two or one, the latest place first (prompt lookup).

    A passage that runs into the end of the text goes on with itself, so that a loop is drafted whole.

    Args:
        text: Without padding.
        most: Tokens to return.
    """
    whole, size = text.tobytes(), text.itemsize  # bytes are searched in microseconds
    for found in range(min(LONGEST, len(text) - 1), 0, -1):
        passage, end = whole[-found * size :], len(whole) - size
        while (at := whole.rfind(passage, 0, end)) % size and at > 0:  # across tokens
            end = at + len(passage) - 1
        if at >= 0:
            behind = text[at // size + found :]
            return Passage(found, behind[:most] if len(behind) >= most else np.resize(behind, most))
    return Passage(0, text[:0])


def worth_taking(passages: Sequence[Passage], control: Control, most: int) -> list[list[Hashable]]:
    """As many tokens of each row's passage as are worth it: their evidence."""
    lengths = [control.look_up_length(p.found, min(most, len(p.tokens)))[0] if p.found else 0 for p in passages]
    return [[looked_up(p.found, i) for i in range(n)] for p, n in zip(passages, lengths, strict=True)]
