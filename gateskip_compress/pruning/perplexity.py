"""Log perplexity of a model that is changed one block at a time: blocks before the change run only once."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..model import BRANCH_KINDS, blocks, branches, entering, resumable, resumed, stream_of


@torch.inference_mode()
def log_perplexity(model: PreTrainedModel, windows: Int[Tensor, "n t"]) -> float:
    """Mean negative log-likelihood of the windows' tokens, in nats."""
    return float(torch.stack([_loss(model, window) for window in windows]).mean())


class Tries:
    """What changes of a model would do to its log perplexity of some windows, each for itself.

    Args:
        model: As it is between the tries; what enters its blocks is held, that is blocks × tokens × width numbers.
        windows: Tokens.
    """

    whole: float
    """Without any change."""

    def __init__(self, model: PreTrainedModel, windows: Int[Tensor, "n t"]) -> None:
        self._model, self._windows = model, windows
        with entering(model) as self._streams:
            self.whole = log_perplexity(model, windows)

    @torch.inference_mode()
    def changed(self, layer: int) -> float:
        """With the block at `layer` as it is now, or later ones."""
        begin, losses = resumable(self._model, layer), []
        for window, stream in zip(self._windows, self._streams[begin], strict=True):
            with resumed(self._model, begin, stream):
                losses.append(_loss(self._model, window))
        return float(torch.stack(losses).mean())

    def without_block(self, layer: int) -> float:
        """With the block at `layer` left out."""

        def pass_by(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
            hidden = stream_of(args, kwargs)
            return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

        with _hooked(blocks(self._model)[layer], pass_by):
            return self.changed(layer)

    def without_branch(self, layer: int, kind: str) -> float:
        """With a branch that adds nothing."""
        branch = branches(self._model)[BRANCH_KINDS.index(kind)]
        last = getattr(blocks(self._model)[layer], branch.post or branch.body[-1])

        def nothing(_module: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], out: Any) -> Any:
            return (torch.zeros_like(out[0]), *out[1:]) if isinstance(out, tuple) else torch.zeros_like(out)

        with _hooked(last, nothing):
            return self.changed(layer)


def _loss(model: PreTrainedModel, window: Int[Tensor, " t"]) -> Tensor:
    return F.cross_entropy(model(window[None], use_cache=False).logits[0, :-1].float(), window[1:])


@contextmanager
def _hooked(module: nn.Module, hook: Any) -> Iterator[None]:
    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
