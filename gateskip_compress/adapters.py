"""LoRA adapters, by peft: small matrices trained beside frozen ones, added to them in the end (arXiv 2106.09685)."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import GateSkipError
from .model import linears

LORA_RANK = 8


def add_adapters(model: PreTrainedModel, seed: int) -> None:
    """LoRA on every projection of the blocks, in place."""
    try:
        from peft import LoraConfig, inject_adapter_in_model  # pyright: ignore[reportMissingImports] an extra
    except ImportError as error:
        raise GateSkipError("LoRA needs the package peft: pip install 'gateskip-compress[train]'") from error
    torch.manual_seed(seed)
    inject_adapter_in_model(
        LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=list(linears(model))), model
    )


def adapters(model: PreTrainedModel) -> Iterator[tuple[Tensor, list[nn.Parameter]]]:
    """Each weight that is adapted, and what adapts it."""
    from peft.tuners.lora import LoraLayer  # pyright: ignore[reportMissingImports] an extra

    for module in model.modules():
        if isinstance(module, LoraLayer):
            base: Any = module.get_base_layer()
            yield base.weight, [p for name, p in module.named_parameters() if name.startswith("lora_")]


def merge_adapters(model: PreTrainedModel) -> None:
    """Add adapters to the weights that they adapt, and take them away, in place."""
    from peft.tuners.lora import LoraLayer  # pyright: ignore[reportMissingImports] an extra

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.get_base_layer())
