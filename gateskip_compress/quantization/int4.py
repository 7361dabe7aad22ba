"""Group-wise 4-bit weights: quantize, dequantize, pack, unpack. Pure functions of tensors.

A group is `group_size` neighbouring weights of one output row. With codes q in 0..15,

    w ≈ (q - zero) * scale
    symmetric:   zero = 8                      scale = 2 max|w| / 15
    asymmetric:  zero = round(-min(w) / scale) scale = (max(w) - min(w)) / 15     the range always contains 0

Rounding is to nearest. Two codes share a byte, the even column in the low half.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

GROUP_SIZES = (32, 64, 128)
_LEVELS = 15


@dataclass(frozen=True)
class Int4Weight:
    """A quantized matrix.

    Args:
        codes: 0..15, one byte each.
        scale: Of each group.
        zero: Code of each group that stands for 0; all 8 when symmetric.
    """

    codes: UInt8[Tensor, "o d"]
    scale: Float[Tensor, "o g"]
    zero: UInt8[Tensor, "o g"]


def quantize(weight: Float[Tensor, "o d"], group_size: int, symmetric: bool) -> Int4Weight:
    """Round a matrix to 4 bits, group by group.

    Args:
        weight: Finite values.
        group_size: Divides d.
        symmetric: One code of each group is 8 for 0, so that no zero points need storing.

    Raises:
        ValueError: `group_size` does not divide d, or the weight has NaN or infinite values.
    """
    check_group_size(group_size, weight.shape[1])
    check_weight(weight)
    scale, zero = scale_and_zero(weight, group_size, symmetric, weight.dtype)
    groups = weight.float().unflatten(1, (-1, group_size))
    codes = encode(groups, scale.float()[..., None], zero.float()[..., None])
    return Int4Weight(codes.flatten(1), scale, zero.to(torch.uint8))


def scale_and_zero(
    weight: Float[Tensor, "o d"], group_size: int, symmetric: bool, dtype: torch.dtype
) -> tuple[Float[Tensor, "o g"], Float[Tensor, "o g"]]:
    """Scales, rounded to the dtype that keeps them, and codes of zero that fit them."""
    groups = weight.float().unflatten(1, (-1, group_size))  # (o, g, group_size)
    low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    scale = 2 * groups.abs().amax(-1) / _LEVELS if symmetric else (high - low) / _LEVELS
    # a group of zeros, and one so small that its scale vanishes, are stored as zeros
    scale = scale.to(dtype)
    scale = torch.where(scale > torch.finfo(dtype).tiny, scale, torch.ones_like(scale))
    zero = torch.full_like(scale, 8) if symmetric else (-low / scale.float()).round().clamp(0, _LEVELS)
    return scale, zero


def encode(weight: Tensor, scale: Tensor, zero: Tensor) -> UInt8[Tensor, "..."]:
    """Nearest codes; the three broadcast."""
    return ((weight / scale).round() + zero).clamp(0, _LEVELS).to(torch.uint8)


def check_weight(weight: Tensor) -> None:
    """Refuse a weight that is not finite."""
    if not torch.isfinite(weight).all():
        raise ValueError(
            f"weight {tuple(weight.shape)} has {int((~torch.isfinite(weight)).sum())} NaN or infinite values"
        )


def dequantize(weight: Int4Weight) -> Float[Tensor, "o d"]:
    """The matrix that the codes stand for, in the dtype of the scales."""
    groups = weight.codes.unflatten(1, (weight.scale.shape[1], -1))
    centred = groups.to(weight.scale.dtype) - weight.zero.to(weight.scale.dtype)[..., None]
    return (centred * weight.scale[..., None]).flatten(1)


def pack(codes: UInt8[Tensor, "o d"]) -> UInt8[Tensor, "o e"]:
    """Two codes to a byte; d is even and e = d / 2."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack(packed: UInt8[Tensor, "o e"]) -> UInt8[Tensor, "o d"]:
    """Inverse of `pack`."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)


def check_group_size(group_size: int, in_features: int) -> None:
    """Refuse a group size that does not divide a row, and name those that do."""
    if group_size < 2 or group_size % 2 or in_features % group_size:
        fitting = [size for size in GROUP_SIZES if in_features % size == 0]
        hint = f"; of {', '.join(map(str, GROUP_SIZES))} these do: {', '.join(map(str, fitting)) or 'none'}"
        raise ValueError(f"group_size {group_size} must be even and divide in_features {in_features}{hint}")
