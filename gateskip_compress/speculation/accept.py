"""Which drafted tokens stand, and what follows them. Pure functions of tensors, row by row.

A row drafted `lengths` tokens x_1 .. x_k from distributions q_1 .. q_k, and the verify pass gave p_1 .. p_k+1.

    greedy     x_i stands while it is the verify pass's own choice; that choice follows.
    sampling   x_i stands with probability min(1, p_i(x_i) / q_i(x_i)); after the first that falls, the next token comes
               from max(p_i - q_i, 0), normalised; after k that stand, from p_k+1.

Either way the text is distributed as if the verify pass alone had written it (Leviathan et al., arXiv 2211.17192, §2.3
and appendix A.1), whatever the drafts were, as long as their lengths do not look at the tokens they leave out.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def stand_greedily(
    drafted: Int[Tensor, "b k"], chosen: Int[Tensor, "b m"], lengths: Int[Tensor, " b"]
) -> Int[Tensor, " b"]:
    """How many of each row's drafted tokens, from the first on, the verify pass would have chosen itself.

    Args:
        drafted: Tokens; those from a row's length on are ignored.
        chosen: The verify pass's own choice at each drafted place, and at the one after: m = k + 1.
        lengths: Tokens that each row drafted.
    """
    return _run(drafted == chosen[:, : drafted.shape[1]], lengths)


def stand_by_chance(
    drafted: Int[Tensor, "b k"],
    draft: Float[Tensor, "b k v"],
    target: Float[Tensor, "b m v"],
    lengths: Int[Tensor, " b"],
) -> tuple[Int[Tensor, " b"], Int[Tensor, " b"]]:
    """How many of each row's drafted tokens stand, and the token after them; draws from torch's own generator.

    Args:
        drafted: Tokens; those from a row's length on are ignored.
        draft: The distributions they were drawn from.
        target: The distributions of the verify pass at each drafted place, and at the one after: m = k + 1.
        lengths: Tokens that each row drafted.
    """
    k = drafted.shape[1]
    at = drafted[..., None]
    p, q = target[:, :k].gather(2, at)[..., 0], draft.gather(2, at)[..., 0]
    stands = _run(torch.rand_like(p) * q < p, lengths)
    rows = torch.arange(len(drafted), device=drafted.device)
    after = target[rows, stands]
    if k > 0:
        fell = stands < lengths
        left = (after - draft[rows, stands.clamp(max=k - 1)]).clamp_min(0)
        # a token falls only where p < q, so something is left; but for rounding
        after = torch.where((fell & (left.sum(1) > 0))[:, None], left, after)
    return stands, torch.multinomial(after, 1)[:, 0]


def _run(stands: Bool[Tensor, "b k"], lengths: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
    """How many of each row's first `lengths` are true, up to the first that is not."""
    within = torch.arange(stands.shape[1], device=stands.device) < lengths[:, None]
    return (stands & within).long().cumprod(dim=1).sum(dim=1)
