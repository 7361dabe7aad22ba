"""The tensors of one branch's gate: a scale and a score per token, and a surrogate for the tokens that skip.

With x the branch's normalised input, a gate gives the branch's output a scale and the token a score,

    vector   scale = s(W x + b)                  W (d, d)                              the paper's default
    scalar   scale = s(w x + b)                  w (1, d)
    shared   as vector, one W for all attention branches and one for all MLP branches
    mlp      scale = s(W₂ relu(W₁ x + b₁) + b₂)  W₁ (2d, d)
    lowrank  scale = s(U D x + b)                D (r, d)
    hybrid   scale = s(shared W x + b) · s(w x + c)                                    the paper's future work
    effect   scale = 1, score = w x + c          fitted in closed form, see `fit.py`

where s(z) = sigmoid(z + 5) / sigmoid(5): the paper's start at bias 5, divided so that an unfitted gate is 1 exactly.
The score of a gate with a scale is the mean of its scale over d (arXiv 2510.13876, eq. 3).
"""

from contextlib import AbstractContextManager, ExitStack
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..precision import exact_products

Kind = Literal["effect", "vector", "scalar", "shared", "mlp", "lowrank", "hybrid"]
Surrogate = Literal["zero", "mean", "lowrank", "narrow"]
KINDS: tuple[str, ...] = get_args(Kind)
SURROGATES: tuple[str, ...] = get_args(Surrogate)
SHARING: tuple[str, ...] = ("shared", "hybrid")
"""Kinds whose full matrix belongs to all branches of a kind."""
_BIAS = 5.0


class NarrowMlp(nn.Module):
    """A gated linear unit of few channels, copied from a wide one; its output projection is fitted, see `fit.py`.

    Args:
        width: Size of the residual stream.
        channels: Inner width.
        activation: The wide one's.
    """

    def __init__(self, width: int, channels: int, activation: nn.Module) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, channels, bias=False), nn.Linear(width, channels, bias=False)
        self.down, self.activation = nn.Linear(channels, width), activation

    def inner(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n k"]:
        """The channels' values."""
        return self.activation(self.gate(x)) * self.up(x)

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """What the wide one would give, about."""
        return self.down(self.inner(x))


class Gate(nn.Module):
    """Scale, score and surrogate of one branch.

    Args:
        width: Size of the residual stream.
        kind: One of the table above; None neither scales nor scores, where another branch decides.
        surrogate: What a skipped token adds instead of the branch's output: nothing (`zero`, the paper's choice), the
            mean output (`mean`), a linear map of the branch's input (`lowrank`), or a narrower MLP (`narrow`).
        rank: Inner width of a `lowrank` surrogate and of a `lowrank` gate.
        narrow: The narrower MLP of a `narrow` surrogate.
        shared: The matrix of a `shared` or `hybrid` gate, where another branch owns it; None makes it here.
    """

    def __init__(
        self,
        width: int,
        kind: Kind | None,
        surrogate: Surrogate,
        rank: int,
        *,
        narrow: NarrowMlp | None = None,
        shared: nn.Linear | None = None,
    ) -> None:
        super().__init__()
        self.kind: Kind | None = kind
        self.surrogate: Surrogate = surrogate
        if kind in ("vector", "shared", "hybrid"):
            matrix = nn.Linear(width, width) if shared is None else shared
            if shared is None:
                self.matrix = matrix
            self._matrix = (matrix,)  # in a tuple, so that what is shared is stored once
        if kind in ("scalar", "hybrid"):
            self.line = nn.Linear(width, 1)
        if kind in ("mlp", "lowrank"):
            inner = 2 * width if kind == "mlp" else rank
            self.inner, self.outer = nn.Linear(width, inner, bias=kind == "mlp"), nn.Linear(inner, width)
        if kind == "effect":
            self.score_weight = nn.Parameter(torch.zeros(width))
            self.score_bias = nn.Parameter(torch.zeros(1))
        for name in ("matrix", "line", "outer"):
            if hasattr(self, name):  # neutral
                nn.init.zeros_(getattr(self, name).weight)
                nn.init.zeros_(getattr(self, name).bias)
        if narrow is not None:
            self.narrow = narrow
        if surrogate in ("mean", "lowrank"):
            self.offset = nn.Parameter(torch.zeros(width))
        if surrogate == "lowrank":
            self.down = nn.Parameter(torch.zeros(rank, width))
            self.up = nn.Parameter(torch.zeros(width, rank))
        self.requires_grad_(False)

    def scale(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"] | Float[Tensor, "*n 1"] | None:
        """What the branch's output is multiplied by; None is 1."""
        if self.kind in ("effect", None):
            return None
        with _exactly(x.device):
            if self.kind == "scalar":
                return _opening(self.line(x))
            if self.kind in ("mlp", "lowrank"):
                inner = self.inner(x)
                return _opening(self.outer(inner.relu() if self.kind == "mlp" else inner))
            scale = _opening(self._matrix[0](x))
            return scale * _opening(self.line(x)) if self.kind == "hybrid" else scale

    def score(self, x: Float[Tensor, "*n d"], scale: Tensor | None) -> Float[Tensor, "*n"]:
        """How much each token needs the branch; low scores skip.

        Args:
            x: Normalised input.
            scale: From `scale`, which is not computed twice.
        """
        if scale is not None:
            return scale.float().mean(-1)
        with _exactly(x.device):
            return F.linear(x.float(), self.score_weight.float()[None], self.score_bias.float()).squeeze(-1)

    def replace(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"] | None:
        """What each token adds to the stream when it skips; None is nothing."""
        if self.surrogate == "zero":
            return None
        if self.surrogate == "mean":
            return self.offset.expand_as(x)
        if self.surrogate == "narrow":
            return self.narrow(x)
        return F.linear(F.linear(x, self.down), self.up, self.offset)

    @property
    def score_macs(self) -> int:
        """Multiply-adds of one token's scale and score."""
        if self.kind == "effect":
            return self.score_weight.numel()
        own = [getattr(self, name) for name in ("line", "inner", "outer") if hasattr(self, name)]
        return sum(part.weight.numel() for part in (*own, *getattr(self, "_matrix", ())))

    @property
    def replace_macs(self) -> int:
        """Multiply-adds of one token's surrogate."""
        if self.surrogate == "narrow":  # its projections may be quantized, and are no parameters then
            return sum(
                part.in_features * part.out_features for part in (self.narrow.gate, self.narrow.up, self.narrow.down)
            )
        return sum(p.numel() for p in self.surrogate_parameters if p.dim() == 2)

    @property
    def surrogate_parameters(self) -> list[nn.Parameter]:
        """What belongs to the surrogate."""
        own = [getattr(self, name) for name in ("offset", "down", "up") if hasattr(self, name)]
        return [*own, *(self.narrow.parameters() if hasattr(self, "narrow") else ())]


def _exactly(device: torch.device) -> AbstractContextManager[object]:
    """No bfloat16 inside: scores differ by less than it tells apart, and rounding them costs quality."""
    inside = ExitStack()
    if torch.backends.mkldnn.matmul.fp32_precision not in ("none", "ieee"):
        inside.enter_context(exact_products())
    if torch.is_autocast_enabled(device.type):
        inside.enter_context(torch.autocast(device.type, enabled=False))
    return inside


def _opening(z: Tensor) -> Tensor:
    """Sigmoid around bias 5, 1 exactly at 0."""
    return (z + _BIAS).sigmoid() / z.new_full((), _BIAS).sigmoid()
