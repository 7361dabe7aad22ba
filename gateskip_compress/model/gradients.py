"""What the loss says of modules, projections and norms: their inputs, and its gradients at their outputs."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

See = Callable[[str, Tensor, Tensor], None]
"""Gets a module's name, its input, and the gradient at its output."""


@contextmanager
def watch_gradients(model: PreTrainedModel, names: Iterable[str], see: See) -> Iterator[None]:
    """Hand every named module's input and gradient to `see` inside the `with`, in backward passes."""
    embedding = model.get_input_embeddings()
    handles = [embedding.register_forward_hook(lambda _m, _a, out: out.detach().requires_grad_())]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)  # gradients of the stream are enough

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def seen(_module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            x = args[0].detach()
            out.register_hook(lambda gradient: see(name, x, gradient))

        return seen

    handles += [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in learning:
            parameter.requires_grad_(True)
