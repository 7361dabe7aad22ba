"""Where drafted tokens come from: a passage of the text that is found again, or the model itself under a low budget."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .control import Control, Drafter, sure
from .lookup import Passage, worth_taking
from .rows import Rows


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
