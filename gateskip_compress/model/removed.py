"""What stands where a whole branch was taken out: modules that add nothing to the stream, or a surrogate's output."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


class NoMlp(nn.Module):
    """Adds nothing, or what a surrogate gives.

    Args:
        instead: Has `replace`, see `gating/gate.py`; None adds nothing.
    """

    def __init__(self, instead: nn.Module | None = None) -> None:
        super().__init__()
        self.instead = instead

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """Zeros, or the surrogate's output."""
        replaced = None if self.instead is None else self.instead.replace(x)
        return torch.zeros_like(x) if replaced is None else replaced


class NoAttention(NoMlp):
    """As NoMlp, and leaves a mark for each token in the K/V cache, whose length the model asks for by layer.

    Args:
        layer_idx: Place in the cache.
        cache: What the argument with the cache is called.
        head_dim: What the family calls the width of a head; here it is 0.
        instead: As in NoMlp.
    """

    def __init__(self, layer_idx: int, cache: str, head_dim: str, instead: nn.Module | None = None) -> None:
        super().__init__(instead)
        self.layer_idx, self.cache = layer_idx, cache
        setattr(self, head_dim, 0)

    def forward(self, hidden_states: Float[Tensor, "b t d"], **given: Any) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As NoMlp's, and no attention weights."""
        if given.get(self.cache) is not None:
            mark = hidden_states.new_zeros(len(hidden_states), 1, hidden_states.shape[1], 1)
            given[self.cache].update(mark, mark, self.layer_idx)
        return super().forward(hidden_states), None
