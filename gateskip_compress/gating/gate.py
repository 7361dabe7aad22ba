"""The tensors of one branch's gate: a score per token and a surrogate for the tokens that skip."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Surrogate = Literal["zero", "mean", "lowrank"]
SURROGATES: tuple[str, ...] = get_args(Surrogate)


class Gate(nn.Module):
    """Score and surrogate of one branch; kind `effect`: the branch's own output keeps scale 1.

    Args:
        width: Size of the residual stream.
        surrogate: What a skipped token adds instead of the branch's output: nothing (`zero`, the paper's choice), the
            mean output (`mean`), or a linear map of the branch's input (`lowrank`).
        rank: Inner width of that map; used by `lowrank` alone.
    """

    def __init__(self, width: int, surrogate: Surrogate, rank: int) -> None:
        super().__init__()
        self.surrogate: Surrogate = surrogate
        self.score_weight = nn.Parameter(torch.zeros(width), requires_grad=False)
        self.score_bias = nn.Parameter(torch.zeros(1), requires_grad=False)
        if surrogate != "zero":
            self.offset = nn.Parameter(torch.zeros(width), requires_grad=False)
        if surrogate == "lowrank":
            self.down = nn.Parameter(torch.zeros(rank, width), requires_grad=False)
            self.up = nn.Parameter(torch.zeros(width, rank), requires_grad=False)

    def score(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n"]:
        """How much each token needs the branch: what a skip is predicted to lose for what it saves; low scores skip."""
        return F.linear(x.float(), self.score_weight.float()[None], self.score_bias.float()).squeeze(-1)

    def replace(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"] | None:
        """What each token adds to the stream when it skips; None is nothing."""
        if self.surrogate == "zero":
            return None
        if self.surrogate == "mean":
            return self.offset.expand_as(x)
        return F.linear(F.linear(x, self.down), self.up, self.offset)

    @property
    def score_macs(self) -> int:
        """Multiply-adds of one token's score."""
        return self.score_weight.numel()

    @property
    def replace_macs(self) -> int:
        """Multiply-adds of one token's surrogate."""
        return 0 if self.surrogate != "lowrank" else self.down.numel() + self.up.numel()
