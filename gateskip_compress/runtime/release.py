"""Models whose matrices a session has taken over: freed, and refusing what cannot be done without them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModel


def free(module: nn.Module) -> None:
    """Free the matrices of a module, in place; vectors and scalars stay."""
    _replace(module, lambda tensor: tensor.new_empty(0) if tensor.dim() == 2 else tensor)


def own_what_is_left(model: PreTrainedModel) -> None:
    """Copy tensors, in place: as long as one is left that is mapped from a file, all of the file stays mapped."""
    _replace(model, torch.clone)


def _replace(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Put other tensors in the place of a module's; new objects, since views keep what they view alive."""
    seen: dict[Tensor, Tensor] = {}
    for part in module.modules():
        for kept in (part._parameters, part._buffers):
            for name, tensor in kept.items():
                if tensor is None:
                    continue
                if tensor not in seen:
                    new = change(tensor.detach())
                    seen[tensor] = nn.Parameter(new, tensor.requires_grad) if kept is part._parameters else new
                kept[name] = seen[tensor]  # pyright: ignore[reportArgumentType]


def refuse_without_weights(model: PreTrainedModel) -> None:
    """Let a model whose matrices are freed raise when it is to run on torch, to be saved, or to be lowered again."""
    model.register_forward_pre_hook(_refuse)
    model.register_state_dict_pre_hook(_refuse)
    model.released = True


def check_weights(model: PreTrainedModel) -> None:
    """Raise UnsupportedModel where a session has a model's weights."""
    if getattr(model, "released", False):
        _refuse()


def _refuse(*_: Any) -> None:
    raise UnsupportedModel(
        "a native session has taken this model's weights over (release=True): run the session, or load the model again"
    )
