"""Read a GPTQ checkpoint that another library made, into layers of ours."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..checkpoint import Manifest, attach
from ..errors import CheckpointError, UnsupportedModel
from ..model import linears
from ..pipeline import facts, settings
from ..quantization.linear import QuantizedLinear
from ..quantization.transform import Quantize
from . import gptq


def is_gptq(folder: Path) -> bool:
    """Whether a folder holds a GPTQ checkpoint."""
    file = folder / "config.json"
    if not file.is_file():
        return False
    return (json.loads(file.read_text()).get("quantization_config") or {}).get("quant_method") == "gptq"


def read_gptq(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a GPTQ checkpoint; it can be gated, and saves as a checkpoint of ours.

    Args:
        folder: Of the checkpoint.
        dtype: Of scales and all that is not quantized; float32 loses nothing of the scales, which are float16.

    Raises:
        CheckpointError: tensors are missing or there are unknown ones, or groups are not neighbouring columns.
        UnsupportedModel: bits, groups or a format that our layers cannot hold.
    """
    config = AutoConfig.from_pretrained(folder)
    described: Any = config.quantization_config
    described = described if isinstance(described, dict) else described.to_dict()
    bits, group_size, symmetric, less = gptq.check_config(described)
    del config.quantization_config
    step = Quantize(
        bits=bits,  # pyright: ignore[reportArgumentType]
        group_size=group_size,
        symmetric=symmetric,
        solver="gptq",
        short_groups=True,
    )
    tensors = {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
    if not tensors:
        raise CheckpointError(f"{folder} has no .safetensors file")
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    names = list(linears(model))
    for name in names:
        if f"{name}.qweight" not in tensors:
            raise UnsupportedModel(f"{folder}: {name} is not quantized; only checkpoints with all projections are read")
    step.rebuild(model, {})
    for name in names:
        _fill(model.get_submodule(name), name, tensors, bits, group_size, less, symmetric)
    missing, unknown = model.load_state_dict({n: t.to(dtype) for n, t in tensors.items()}, strict=False)
    held = {f"{name}.{part}" for name in names for part in ("codes", "scale", "zero")}
    missing = [n for n in missing if n not in held and not (n == "lm_head.weight" and config.tie_word_embeddings)]
    if missing or unknown:
        what = f"lacks {missing[0]}" if missing else f"has an unknown {unknown[0]}"
        raise CheckpointError(f"{folder} {what}: not a whole checkpoint of this model")
    model.tie_weights()
    record = {"imported": "gptq", "quantized": len(names), "mean_bits": float(bits)}
    steps = [{"name": step.name, "settings": settings(step), "record": record}]
    attach(model, Manifest(steps=steps, original=facts(model, str(folder))))
    return model.eval()


def _fill(
    layer: Any, name: str, tensors: dict[str, Tensor], bits: int, group_size: int, less: int, symmetric: bool
) -> None:
    """Move one layer's tensors out of `tensors` into it."""
    assert isinstance(layer, QuantizedLinear)
    found = {part: tensors.pop(f"{name}.{part}") for part in gptq.PARTS if f"{name}.{part}" in tensors}
    try:
        weight = gptq.from_gptq(found, bits, group_size, less, layer.scale.dtype)
    except (CheckpointError, KeyError) as error:
        raise CheckpointError(f"{name}: {error}") from None
    if symmetric and not (weight.zero == 2 ** (bits - 1)).all():
        raise CheckpointError(f"{name}: the config says sym, and zero points differ from the middle")
    layer.load(weight, tensors.pop(f"{name}.bias", None))
