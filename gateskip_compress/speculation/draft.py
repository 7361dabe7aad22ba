"""Where drafted tokens come from: a passage of the text that is found again, or the model itself under a low budget."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from .control import Control, Drafter, looked_up, sure
from .rows import Rows

LONGEST = 3
"""Tokens of the longest passage that is searched for."""


@dataclass(frozen=True)
class Draft:
    """Drafted tokens of all rows.

    Args:
        tokens: A row's own end at its length.
        lengths: How many each row has.
        shares: The distributions that they were drawn from; None where each was certain.
        evidence: Of each token of each row, see `control.py`.
    """

    tokens: Int[Tensor, "b k"]
    lengths: Int[Tensor, " b"]
    shares: Float[Tensor, "b k v"] | None
    evidence: list[list[Hashable]]


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


def draft_passages(passages: Sequence[Passage], control: Control, most: int, device: torch.device) -> Draft:
    """Take from each row's passage what is worth it."""
    evidence = worth_taking(passages, control, most)
    lengths = torch.tensor([len(own) for own in evidence], device=device)
    tokens = lengths.new_zeros(len(passages), int(lengths.max()))
    for row, (passage, own) in enumerate(zip(passages, evidence, strict=True)):
        tokens[row, : len(own)] = torch.from_numpy(passage.tokens[: len(own)])
    return Draft(tokens, lengths, None, evidence)


def draft_by_gates(
    rows: Rows,
    last: Int[Tensor, "b 1"],
    most: int,
    drafter: Drafter,
    control: Control,
    score: Callable[[Int[Tensor, "b k"], Tensor], Float[Tensor, "b 1 v"]],
    *,
    sample: bool,
) -> Draft:
    """Draft up to `most` tokens with the model as it is set now; `rows` is left as it was.

    Args:
        rows: At work under the draft's budget.
        last: The texts' last tokens, which the cache does not hold.
        most: Tokens; fewer where the draft is not sure enough.
        drafter: For its costs and chances.
        control: Says when to stop, by tokens that are drafted already.
        score: Tokens drafted so far and logits after them -> processed scores.
        sample: Draw tokens; else take the likeliest.
    """
    tokens, shares, evidence, chance = last[:, :0], [], [[] for _ in last], 1.0
    while tokens.shape[1] < most:
        scores = score(tokens, rows.feed(torch.cat((last, tokens), dim=1)[:, -1:], full=False))[:, 0]
        share = scores.softmax(dim=-1)
        chosen = torch.multinomial(share, 1) if sample else scores.argmax(dim=-1, keepdim=True)
        tokens = torch.cat((tokens, chosen), dim=1)
        shares.append(share)
        keys = [sure(drafter.budget or 0.0, top) for top in share.amax(dim=-1).nan_to_num(0.0).tolist()]
        for row, key in zip(evidence, keys, strict=True):
            row.append(key)
        chance *= sum(map(control.odds.of, keys)) / len(keys)
        if not control.goes_on(drafter, chance):
            break
    drafted = tokens.new_full((len(tokens),), tokens.shape[1])
    rows.take_back(drafted)
    return Draft(tokens, drafted, torch.stack(shares, dim=1) if sample else None, evidence)
