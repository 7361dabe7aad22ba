"""Which drafted tokens stand. Pure functions of tensors."""

from jaxtyping import Int
from torch import Tensor


def accepted_tokens(drafted: Int[Tensor, " k"], verified: Int[Tensor, " m"]) -> int:
    """How many drafted tokens, from the first on, the verify pass would have chosen itself.

    Args:
        drafted: Tokens of the draft.
        verified: The verify pass's own choice at each drafted place, and at the one after: m = k + 1.

    Source: speculative decoding with greedy choice (Leviathan et al., arXiv 2211.17192, §2 with temperature 0).
    """
    differs = (drafted != verified[: len(drafted)]).nonzero()
    return len(drafted) if len(differs) == 0 else int(differs[0])
