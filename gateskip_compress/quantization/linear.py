"""Linear layers and embeddings that keep their weights in few bits and dequantize them when they run."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .groups import GroupWeight, dequantize, pack, unpack


class QuantizedLinear(nn.Module):
    """`y = x dequantize(W)ᵀ + b` with W as packed codes, scales and zero points.

    Saves memory and disk, not time: torch has no fast float32 × int4 product for CPUs, so each call writes the float
    matrix out anew. `unpacked` trades the memory back for speed. Symmetric weights store no zero points.

    Args:
        in_features: Width of x.
        out_features: Width of y.
        bits: Of a code: 3, 4 or 8.
        group_size: Weights that share a scale.
        symmetric: No zero points.
        tabled: Codes are places in a table of levels, which the layer holds.
        bias: Whether there is a bias.
        dtype: Of scales and bias, and so of the products.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group_size: int,
        symmetric: bool,
        *,
        bias: bool,
        dtype: torch.dtype,
        tabled: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size = bits, group_size
        groups = -(-in_features // group_size)
        self.codes = nn.Buffer(torch.empty(out_features, in_features * bits // 8, dtype=torch.uint8))
        self.scale = nn.Buffer(torch.empty(out_features, groups, dtype=dtype))
        self.levels = nn.Buffer(torch.empty(2**bits, dtype=dtype)) if tabled else None
        self.zero = None if symmetric or tabled else nn.Buffer(torch.empty(out_features, groups, dtype=torch.uint8))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False) if bias else None
        self._held: Tensor | None = None

    @classmethod
    def like(
        cls, linear: nn.Linear, bits: int, group_size: int, symmetric: bool, *, tabled: bool = False
    ) -> "QuantizedLinear":
        """An empty layer of a linear's shape, dtype and device."""
        empty = cls(
            linear.in_features,
            linear.out_features,
            bits,
            group_size,
            symmetric,
            bias=linear.bias is not None,
            dtype=linear.weight.dtype,
            tabled=tabled,
        )
        return empty.to(linear.weight.device)

    def load(self, weight: GroupWeight, bias: Tensor | None) -> None:
        """Take over a quantized weight, in place."""
        self.codes.copy_(pack(weight.codes, self.bits))
        self.scale.copy_(weight.scale)
        if self.levels is not None and weight.levels is not None:
            self.levels.copy_(weight.levels)
        if self.zero is not None:
            self.zero.copy_(weight.zero)
        if self.bias is not None and bias is not None:
            self.bias.data.copy_(bias)

    @property
    def quantized(self) -> GroupWeight:
        """Codes, scales and zero points as one value."""
        return self._quantized(slice(None))

    @property
    def weight(self) -> Float[Tensor, "o d"]:
        """The float matrix, written out anew at each call unless `unpacked` holds it."""
        return dequantize(self.quantized) if self._held is None else self._held

    def rows(self, places: Int[Tensor, "*n"]) -> Float[Tensor, "*n d"]:
        """Some rows of the float matrix; the others are not written out."""
        if self._held is not None:
            return self._held[places]
        return dequantize(self._quantized(places.flatten())).unflatten(0, places.shape)

    def _quantized(self, rows: slice | Tensor) -> GroupWeight:
        scale = self.scale[rows]
        middle = torch.full_like(scale, 2 ** (self.bits - 1), dtype=torch.uint8)
        zero = middle if self.zero is None else self.zero[rows]
        return GroupWeight(unpack(self.codes[rows], self.bits), scale, zero, self.bits, self.group_size, self.levels)

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n o"]:
        """Dequantize, multiply."""
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Shape, bits and grouping, for print(model)."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}"
        )


class QuantizedEmbedding(nn.Module):
    """Rows of a quantized matrix by token id.

    Args:
        table: Holds the matrix, a row a token.
        factor: What rows are multiplied by: Gemma scales its embeddings.
        tied: The output head is `table`, and stores it.
    """

    def __init__(self, table: QuantizedLinear, factor: float, *, tied: bool) -> None:
        super().__init__()
        if not tied:
            self.table = table
        self._table = (table,)  # in a tuple, so that what is tied is stored once
        self.factor, self.tied = factor, tied

    @property
    def matrix(self) -> QuantizedLinear:
        """What holds the rows."""
        return self._table[0]

    @property
    def weight(self) -> Float[Tensor, "v d"]:
        """The float matrix, before the factor."""
        return self.matrix.weight

    def forward(self, ids: Int[Tensor, "*n"]) -> Float[Tensor, "*n d"]:
        """Dequantize the rows of these tokens."""
        rows = self.matrix.rows(ids)
        return rows if self.factor == 1 else rows * rows.new_tensor(self.factor)


@contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """Hold the float matrix of every quantized layer inside the `with`: same numbers, float's speed, float's memory."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    try:
        for layer in layers:
            layer._held = layer.weight
        yield
    finally:
        for layer in layers:
            layer._held = None
