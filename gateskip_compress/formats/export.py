"""Write a compressed model so that libraries without ours can load it, or say what that would lose."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..checkpoint import manifest_of
from ..errors import CheckpointError, UnsupportedModel
from ..folders import written_whole
from ..model import blocks, linears
from ..names import check_choice
from ..quantization.linear import QuantizedEmbedding, QuantizedLinear
from . import compressed_tensors, gptq

Layers = dict[str, QuantizedLinear]
"""By name."""
FORMATS = ("gptq", "compressed-tensors")
_GATES = "gates."
"""In the names of all that belongs to gates, to draft gates, and to surrogates."""


def losses(model: PreTrainedModel) -> list[str]:
    """What a compressed model has that no foreign format holds, in words."""
    manifest = manifest_of(model)
    found = []
    for step in [] if manifest is None else manifest.steps:
        if step["name"] == "gateskip":
            kind = step["settings"].get("kind", "effect")
            scales = "" if kind == "effect" else f", and the scales that {kind} gates give to outputs"
            found.append(f"gates and surrogates: every token runs every branch{scales}")
        if step["name"] == "self_speculation":
            found.append("self-speculation: it drafts with the gates")
    return found


def export(model: PreTrainedModel, folder: str | os.PathLike[str], form: str, *, drop: bool = False) -> list[str]:
    """Write a model whose projections are quantized in a format of other libraries, whole or not at all.

    Embedding and output head are written as the floats that their codes stand for.

    Args:
        model: Quantized by a `Quantize` step.
        folder: New or empty.
        form: `gptq`, which transformers with GPTQModel, vLLM and others load, or `compressed-tensors`.
        drop: Write it although something is lost.

    Returns:
        What was lost.

    Raises:
        UnsupportedModel: the model is not quantized, something would be lost and `drop` is not set, or the format
            cannot hold these bits or groups.
        CheckpointError: the folder is not empty.
    """
    check_choice("format", form, FORMATS)
    lost = losses(model)
    if lost and not drop:
        raise UnsupportedModel(
            f"a checkpoint in the format {form} would lose {'; '.join(lost)}; drop=True, or --drop, writes it"
        )
    inside = set(blocks(model).modules())
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear) and module in inside and _GATES not in name
    }
    if not layers:
        raise UnsupportedModel("this model is not quantized: put a Quantize step into its pipeline first")
    if any(layer.levels is not None for layer in layers.values()):
        raise UnsupportedModel(f"the format {form} has no NF4 or FP4: use solver='gptq' or 'nearest'")
    tensors = _plain(model, layers)
    write = _gptq if form == "gptq" else _compressed
    config = write(model, layers, tensors)
    _save(model, Path(folder), tensors, config)
    return lost


def _plain(model: PreTrainedModel, layers: Layers) -> dict[str, Tensor]:
    """Every tensor that is neither a gate's nor a layer's; of tied ones the first; embedding and head as floats."""
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    quantized = {
        name: module
        for name, module in model.named_modules()
        if module in tables and isinstance(module, QuantizedEmbedding | QuantizedLinear)
    }
    found, seen = {}, set()
    for name, tensor in model.state_dict().items():
        inside = any(name.startswith(f"{part}.") for part in (*layers, *quantized)) and not name.endswith(".bias")
        if _GATES in name or inside or tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        found[name] = tensor.contiguous()
    tied = any(isinstance(table, QuantizedEmbedding) and table.tied for table in quantized.values())
    for name, table in quantized.items():
        if not tied or isinstance(table, QuantizedEmbedding):
            found[f"{name}.weight"] = table.weight
    return found


def _gptq(model: PreTrainedModel, layers: Layers, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Add the layers' tensors; the config."""
    left = list(linears(model))
    if left:
        raise UnsupportedModel(f"the format gptq needs every projection quantized, and {left[0]} is not")
    bits, sizes, symmetric = _settings(layers)
    if len(bits) > 1 or not bits <= set(gptq.BITS):
        raise UnsupportedModel(
            f"the format gptq holds one of {', '.join(map(str, gptq.BITS))} bits for all projections, and these have "
            f"{', '.join(map(str, sorted(bits)))}; use compressed-tensors"
        )
    for name, layer in layers.items():
        if layer.out_features * layer.bits % 32:
            raise UnsupportedModel(f"the format gptq packs outputs by words, and {name} has {layer.out_features}")
        parts = gptq.to_gptq(layer.quantized, symmetric)
        if not torch.isfinite(parts["scales"]).all():
            raise UnsupportedModel(f"scales of {name} are beyond float16, which the format gptq stores")
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    return gptq.config_of(bits.pop(), sizes.pop(), symmetric)


def _compressed(model: PreTrainedModel, layers: Layers, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Add the layers' tensors; the config."""
    _, (size,), symmetric = _settings(layers)
    if not symmetric:
        raise UnsupportedModel("compressed-tensors' zero points cannot be loaded by transformers: use symmetric=True")
    for name, layer in layers.items():
        if layer.in_features % size:
            raise UnsupportedModel(
                f"compressed-tensors has no shorter last groups, and {name} has one: {layer.in_features} / {size}"
            )
        tensors |= {f"{name}.{part}": t for part, t in compressed_tensors.to_compressed(layer.quantized).items()}
    ignored = [*linears(model), "lm_head"]
    return compressed_tensors.config_of({n: layer.bits for n, layer in layers.items()}, ignored, size)


def _settings(layers: Layers) -> tuple[set[int], set[int], bool]:
    """Bits and group sizes that there are, and whether zero points are fixed."""
    first = next(iter(layers.values()))
    return (
        {layer.bits for layer in layers.values()},
        {layer.group_size for layer in layers.values()},
        first.zero is None,
    )


def _save(model: PreTrainedModel, target: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """The folder, through a hidden one beside it."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists and is not empty; choose another folder")
    with written_whole(target) as folder:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        described = model.config.to_dict()
        described |= {"quantization_config": config, "architectures": [type(model).__name__]}
        if getattr(model.get_input_embeddings(), "tied", False):  # ours unties what it keeps in few bits
            described["tie_word_embeddings"] = True
        (folder / "config.json").write_text(json.dumps(described, indent=2, default=str) + "\n")
        if config["quant_method"] == "gptq":
            (folder / "quantize_config.json").write_text(json.dumps(config, indent=2) + "\n")
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
        manifest = manifest_of(model)
        if manifest is not None and manifest.tokenizer is not None:
            manifest.tokenizer.save_pretrained(folder)
