"""The checkpoint format of AutoGPTQ and its successor GPTQModel, without either of them.

Of a linear layer with o outputs and d inputs, codes of `bits` and groups of columns:

    qweight  int32 (d bits / 32, o)  codes of 32 / bits neighbouring inputs to a word, the first in the lowest bits
    scales   float16 (g, o)
    qzeros   int32 (g, o bits / 32)  zero points, packed the same way along the outputs; less 1 in the format `gptq`,
                                     as they are in `gptq_v2`
    g_idx    int32 (d)               group of each input
"""

from typing import Any

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from ..errors import CheckpointError, UnsupportedModel
from ..quantization.groups import GroupWeight

BITS = (4, 8)
PARTS = ("qweight", "scales", "qzeros", "g_idx")


def to_gptq(weight: GroupWeight, symmetric: bool) -> dict[str, Tensor]:
    """A quantized matrix as the four tensors; scales are rounded to float16."""
    d = weight.codes.shape[1]
    less = 1 if symmetric else 0
    return {
        "qweight": _to_words(weight.codes.T, weight.bits),
        "scales": weight.scale.T.to(torch.float16).contiguous(),
        "qzeros": _to_words(weight.zero - less, weight.bits).T.contiguous(),
        "g_idx": torch.arange(d, dtype=torch.int32) // weight.group_size,
    }


def from_gptq(parts: dict[str, Tensor], bits: int, group_size: int, less: int, dtype: torch.dtype) -> GroupWeight:
    """The inverse of `to_gptq`.

    Args:
        parts: The four tensors; `g_idx` may be missing.
        bits: Of a code.
        group_size: Inputs of a group.
        less: What was taken off zero points: 1 in the format `gptq`, 0 in `gptq_v2`.
        dtype: Of the scales.

    Raises:
        CheckpointError: groups are not neighbouring inputs, as `desc_act` leaves them.
    """
    codes = _from_words(parts["qweight"], bits).T.contiguous()
    places = torch.arange(codes.shape[1], device=codes.device) // group_size
    if "g_idx" in parts and not torch.equal(parts["g_idx"].long(), places):
        raise CheckpointError("its groups are not neighbouring columns (desc_act=True): quantize with desc_act=False")
    zero = _from_words(parts["qzeros"].T, bits) + less  # (o, g)
    return GroupWeight(codes, parts["scales"].T.to(dtype).contiguous(), zero, bits, group_size)


def config_of(bits: int, group_size: int, symmetric: bool) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint."""
    form = "gptq" if symmetric else "gptq_v2"
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": False,
        "sym": symmetric,
        "lm_head": False,
        "pack_dtype": "int32",
        "checkpoint_format": form,
        "format": form,
        "meta": {"quantizer": ["gateskip-compress"]},
    }


def check_config(config: dict[str, Any]) -> tuple[int, int, bool, int]:
    """Bits, group size, symmetry and what was taken off zero points, of a foreign checkpoint's config.

    Raises:
        UnsupportedModel: something that our layers cannot hold; the message says what.
    """
    bits, form = config.get("bits"), config.get("checkpoint_format", config.get("format", "gptq"))
    if bits not in BITS:
        raise UnsupportedModel(f"a GPTQ checkpoint of {bits} bits cannot be read; {', '.join(map(str, BITS))} can")
    if form not in ("gptq", "gptq_v2"):
        raise UnsupportedModel(f"a GPTQ checkpoint in the format {form!r} cannot be read; gptq and gptq_v2 can")
    if config.get("dynamic"):
        raise UnsupportedModel("a GPTQ checkpoint with `dynamic` overrides cannot be read")
    return bits, int(config["group_size"]), bool(config.get("sym", True)), 1 if form == "gptq" else 0


def _to_words(codes: UInt8[Tensor, "d o"], bits: int) -> Int[Tensor, "w o"]:
    per_word = 32 // bits
    shifts = bits * torch.arange(per_word, dtype=torch.int64, device=codes.device)
    wide = codes.to(torch.int64).unflatten(0, (-1, per_word)) & (2**bits - 1)
    words = (wide << shifts[None, :, None]).sum(1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _from_words(words: Int[Tensor, "w o"], bits: int) -> UInt8[Tensor, "d o"]:
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    return ((words[:, None] >> shifts[None, :, None]) & (2**bits - 1)).flatten(0, 1).to(torch.uint8)
