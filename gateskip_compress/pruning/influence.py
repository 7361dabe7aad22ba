"""Block influence: how much a block turns the residual stream. Pure functions of tensors."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def influence(before: Float[Tensor, "n d"], after: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """1 - cos(before, after) of each token: 0 where a block leaves the stream's direction alone.

    Args:
        before: Residual stream that enters a block.
        after: Residual stream that leaves it.
    Source: ShortGPT, arXiv 2403.03853, eq. 1.
    """
    return 1 - F.cosine_similarity(before.float(), after.float(), dim=-1)
