"""Group-wise integer weights: quantize, dequantize, pack, unpack. Pure functions of tensors.

A group is `group_size` neighbouring weights of one output row; a row's last group may be shorter. With `bits` 3, 4 or 8
and codes q in 0..n, n = 2^bits - 1,

    w ≈ (q - zero) * scale
    symmetric:   zero = (n + 1) / 2            scale = 2 max|w| / n
    asymmetric:  zero = round(-min(w) / scale) scale = (max(w) - min(w)) / n     the range always contains 0

Scales are float16 numbers, whatever dtype holds them, where they lie among its normal ones: formats of others keep them
so, and those that decoding reads take two bytes.

With a table of 16 levels in -1..1, as NF4 (arXiv 2305.14314) and FP4 have it, w ≈ level[q] * scale, scale = max|w|.

Rounding is to nearest. Clipping shrinks a group's range where that lowers its squared error: the few largest weights
lose, all others gain.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from ..errors import UnsupportedModel

GROUP_SIZES = (32, 64, 128)
BITS = (3, 4, 8)
_SHRUNK = tuple(1 - step / 20 for step in range(1, 9))
"""Shares of the full range that clipping tries, besides all of it."""


@dataclass(frozen=True)
class GroupWeight:
    """A quantized matrix.

    Args:
        codes: One byte each.
        scale: Of each group.
        zero: Code of each group that stands for 0; all the middle one when symmetric.
        bits: Of a code.
        group_size: Weights of a group.
        levels: What codes stand for, times the scale; None is the equations above.
    """

    codes: UInt8[Tensor, "o d"]
    scale: Float[Tensor, "o g"]
    zero: UInt8[Tensor, "o g"]
    bits: int
    group_size: int
    levels: Float[Tensor, " n"] | None = None


def quantize(
    weight: Float[Tensor, "o d"],
    bits: int,
    group_size: int,
    symmetric: bool,
    *,
    clip: bool = False,
    importance: Float[Tensor, " d"] | None = None,
) -> GroupWeight:
    """Round a matrix group by group.

    Args:
        weight: Finite values.
        bits: 3, 4 or 8.
        group_size: Weights of a group.
        symmetric: One code of each group stands for 0, so that no zero points need storing.
        clip: Search for the range of least squared error.
        importance: What a column's squared error counts in that search; None counts all alike.

    Raises:
        ValueError: the weight has NaN or infinite values.
    """
    check_weight(weight)
    scale, zero = scale_and_zero(weight, bits, group_size, symmetric, weight.dtype, clip=clip, importance=importance)
    at, around = (spread(part.float(), group_size, weight.shape[1]) for part in (scale, zero))
    return GroupWeight(encode(weight.float(), at, around, bits), scale, zero.to(torch.uint8), bits, group_size)


def tabled(weight: Float[Tensor, "o d"], kind: str, group_size: int) -> GroupWeight:
    """Round a matrix to NF4 or FP4 by bitsandbytes.

    Args:
        weight: Finite values.
        kind: `nf4` or `fp4`.
        group_size: Divides d.

    Raises:
        UnsupportedModel: bitsandbytes is not installed.
        ValueError: the weight has NaN or infinite values.
    """
    try:
        from bitsandbytes.functional import quantize_4bit
    except ImportError as error:
        mend = "pip install 'gateskip-compress[quant]'"
        raise UnsupportedModel(f"solver={kind!r} needs bitsandbytes ({error}): {mend}") from None
    check_weight(weight)
    packed, state = quantize_4bit(weight.float().contiguous(), blocksize=group_size, quant_type=kind)
    assert state.code is not None
    pairs = packed.flatten()  # the first of two in the high half, rows end to end
    codes = torch.stack((pairs >> 4, pairs & 15), dim=-1).view(weight.shape)
    scale = state.absmax.view(len(weight), -1).to(weight.dtype)
    zero = torch.zeros_like(scale, dtype=torch.uint8)
    return GroupWeight(codes, scale, zero, 4, group_size, state.code.to(weight.dtype))


def scale_and_zero(
    weight: Float[Tensor, "o d"],
    bits: int,
    group_size: int,
    symmetric: bool,
    dtype: torch.dtype,
    *,
    clip: bool = False,
    importance: Float[Tensor, " d"] | None = None,
) -> tuple[Float[Tensor, "o g"], Float[Tensor, "o g"]]:
    """Scales, rounded as they are kept, and codes of zero that fit them.

    Args:
        weight: The matrix.
        bits: As in `quantize`.
        group_size: As in `quantize`.
        symmetric: As in `quantize`.
        dtype: Of the scales.
        clip: As in `quantize`.
        importance: As in `quantize`.
    """
    groups = _by_group(weight.float(), group_size)
    scale, zero = _range(groups, bits, symmetric, dtype, 1.0)
    if not clip:
        return scale, zero
    counts = 1 if importance is None else _by_group(importance[None], group_size)
    least = _squared_error(groups, scale, zero, bits, counts)
    for share in _SHRUNK:
        tried = _range(groups, bits, symmetric, dtype, share)
        error = _squared_error(groups, *tried, bits, counts)
        better = error < least
        scale, zero = torch.where(better, tried[0], scale), torch.where(better, tried[1], zero)
        least = torch.where(better, error, least)
    return scale, zero


def _range(
    groups: Float[Tensor, "o g s"], bits: int, symmetric: bool, dtype: torch.dtype, share: float
) -> tuple[Float[Tensor, "o g"], Float[Tensor, "o g"]]:
    """Scale and zero for a share of each group's range."""
    most = 2**bits - 1
    low, high = share * groups.amin(-1).clamp_max(0), share * groups.amax(-1).clamp_min(0)
    scale = 2 * torch.maximum(-low, high) / most if symmetric else (high - low) / most
    # a group of zeros, and one so small that its scale vanishes, are stored as zeros
    scale = scale.to(dtype)
    half = scale.half()
    scale = torch.where((half >= torch.finfo(half.dtype).tiny) & half.isfinite(), half.to(dtype), scale)
    scale = torch.where(scale > torch.finfo(dtype).tiny, scale, torch.ones_like(scale))
    zero = torch.full_like(scale, (most + 1) // 2) if symmetric else (-low / scale.float()).round().clamp(0, most)
    return scale, zero


def _squared_error(groups: Tensor, scale: Tensor, zero: Tensor, bits: int, counts: Tensor | int) -> Tensor:
    at, around = scale.float()[..., None], zero.float()[..., None]
    missed = steps(groups, at, around, bits).mul_(at).sub_(groups)
    return missed.square_().mul_(counts).sum(-1)


def steps(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Nearest codes less zero, as floats; the three tensors broadcast."""
    return (weight / scale).round_().clamp_(-zero, 2**bits - 1 - zero)


def encode(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> UInt8[Tensor, "..."]:
    """Nearest codes; the three tensors broadcast."""
    return steps(weight, scale, zero, bits).add_(zero).to(torch.uint8)


def check_weight(weight: Tensor) -> None:
    """Refuse a weight that is not finite."""
    if not torch.isfinite(weight).all():
        raise ValueError(
            f"weight {tuple(weight.shape)} has {int((~torch.isfinite(weight)).sum())} NaN or infinite values"
        )


def dequantize(weight: GroupWeight) -> Float[Tensor, "o d"]:
    """The matrix that the codes stand for, in the dtype of the scales."""
    groups = _by_group(weight.codes, weight.group_size)
    if weight.levels is not None:
        centred = weight.levels[groups.long()]
    else:
        centred = groups.to(weight.scale.dtype) - weight.zero.to(weight.scale.dtype)[..., None]
    return (centred * weight.scale[..., None]).flatten(1)[:, : weight.codes.shape[1]]


def spread(per_group: Tensor, group_size: int, d: int) -> Tensor:
    """(o, g) to (o, d): to every weight what its group has."""
    return per_group.repeat_interleave(group_size, dim=1)[:, :d]


def _by_group(weight: Tensor, group_size: int) -> Tensor:
    """(o, d) to (o, g, group_size); a short last group ends in zeros, which change no range and no error."""
    short = -weight.shape[1] % group_size
    return (F.pad(weight, (0, short)) if short else weight).unflatten(1, (-1, group_size))


def pack(codes: UInt8[Tensor, "o d"], bits: int) -> UInt8[Tensor, "o e"]:
    """Codes end to end in a stream of bits, low bits and low columns first; d is a multiple of 8, e = d bits / 8."""
    if bits == 8:
        return codes
    if bits == 4:
        return codes[:, 0::2] | (codes[:, 1::2] << 4)
    shifts = 3 * torch.arange(8, device=codes.device, dtype=torch.int32)
    word = (codes.unflatten(1, (-1, 8)).to(torch.int32) << shifts).sum(-1, dtype=torch.int32)
    return torch.stack([(word >> shift) & 255 for shift in (0, 8, 16)], dim=-1).to(torch.uint8).flatten(1)


def unpack(packed: UInt8[Tensor, "o e"], bits: int) -> UInt8[Tensor, "o d"]:
    """Inverse of `pack`."""
    if bits == 8:
        return packed
    if bits == 4:
        return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)
    low, middle, high = packed.to(torch.int32).unflatten(1, (-1, 3)).unbind(-1)
    word = low | (middle << 8) | (high << 16)
    return torch.stack([(word >> shift) & 7 for shift in range(0, 24, 3)], dim=-1).to(torch.uint8).flatten(1)


def check_group_size(group_size: int, in_features: int, *, short: bool = False) -> None:
    """Refuse a group size that does not fit a row, and name those that do.

    Args:
        group_size: Of GROUP_SIZES.
        in_features: Width of a row.
        short: The last group may be shorter.
    """
    if in_features % 8:
        raise ValueError(f"in_features {in_features} is no multiple of 8: such a projection cannot be packed")
    if in_features % group_size and not short:
        fitting = [size for size in GROUP_SIZES if in_features % size == 0]
        raise ValueError(
            f"group_size {group_size} must divide in_features {in_features}; of {', '.join(map(str, GROUP_SIZES))} "
            f"these do: {', '.join(map(str, fitting)) or 'none'}; or let a row's last group be shorter: "
            "short_groups=True"
        )
