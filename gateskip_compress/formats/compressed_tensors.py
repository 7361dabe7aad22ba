"""The compressed-tensors format `pack-quantized`, written with that library; vLLM and transformers read it.

Symmetric weights alone: as of version 0.20 transformers cannot load the format's zero points, not even those that the
library itself packed.
"""

from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedModel
from ..quantization.groups import GroupWeight


def to_compressed(weight: GroupWeight) -> dict[str, Tensor]:
    """A symmetric quantized matrix as the format's tensors; codes are signed there, so the middle one is 0."""
    signed = (weight.codes.to(torch.int16) - 2 ** (weight.bits - 1)).to(torch.int8)
    return {
        "weight_packed": _library().pack_to_int32(signed, weight.bits),
        "weight_scale": weight.scale,
        "weight_shape": torch.tensor(weight.codes.shape),
    }


def config_of(bits: dict[str, int], ignored: list[str], group_size: int) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint: one group of layers for each number of bits.

    Args:
        bits: By layer.
        ignored: Linear layers that stay as they are.
        group_size: Weights that share a scale.
    """
    _library()
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    groups = {
        f"group_{i}": QuantizationScheme(
            targets=[name for name, own in bits.items() if own == count],
            weights=QuantizationArgs(
                num_bits=count, symmetric=True, strategy="group", group_size=group_size, dynamic=False
            ),
        )
        for i, count in enumerate(sorted(set(bits.values())))
    }
    config = QuantizationConfig(
        config_groups=groups, format="pack-quantized", quantization_status="compressed", ignore=ignored
    )
    return config.model_dump(mode="json")


def _library() -> Any:
    """The library's packing."""
    try:
        from compressed_tensors.compressors import pack_quantized
    except ImportError as error:
        raise UnsupportedModel(
            f"this format needs compressed-tensors ({error}): pip install 'gateskip-compress[quant]'"
        ) from None
    return pack_quantized
