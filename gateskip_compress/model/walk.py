"""Block by block over a text: what one block gives is kept for all windows before the next one runs.

And passes from a block on, for those that ask again and again what later blocks make of what enters it.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from .blocks import blocks

Visit = Callable[[int, Callable[[], None]], None]
"""Gets a block's index, and what runs the block over all windows; may change the block."""


class Enough(Exception):
    """Raised by a hook that has seen what it was for: ends the pass that called it, of one window through a block."""


@torch.no_grad()  # not inference mode: parameters that a visit makes may be trained later
def walk(
    model: PreTrainedModel, windows: Int[Tensor, "n t"], visit: Visit, track: Callable[..., Iterable[Any]]
) -> None:
    """Visit every block with the inputs that the blocks before it give, as visits have left those.

    Args:
        model: At the budget it is set to; without a cache.
        windows: One length, so that masks and positions are the same for all.
        visit: Called for the first block first. What it is given to run may be cut short by hooks, see `Enough`.
        track: As in `Context`.
    """
    given = _arguments(model, windows[:1])
    hidden = [_embedded(model, window[None]) for window in windows]
    below: list[Any] = [None] * len(windows)

    def run_one(block: nn.Module, index: int, at: int) -> Tensor:
        args, kwargs = given[index]
        dial = getattr(block, "dial", None)
        if dial is not None:  # keys and values that blocks hand on are those of the window
            dial.below = below[at]
        out = block(hidden[at], *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    for index, block in enumerate(track(blocks(model), "block by block")):

        def run(block: nn.Module = block, index: int = index) -> None:
            for at in range(len(windows)):
                with suppress(Enough):
                    run_one(block, index, at)

        visit(index, run)
        for at in range(len(windows)):
            hidden[at] = run_one(block, index, at)
            dial = getattr(block, "dial", None)
            if dial is not None:
                below[at], dial.below = dial.below, None


@contextmanager
def entering(model: PreTrainedModel) -> Iterator[list[list[Tensor]]]:
    """What enters each block in each call inside the `with`: by block, then by call."""
    found: list[list[Tensor]] = [[] for _ in blocks(model)]

    def hold(index: int, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found[index].append(stream_of(args, kwargs))

    handles = [
        block.register_forward_pre_hook(partial(hold, index), with_kwargs=True)
        for index, block in enumerate(blocks(model))
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def resumed(model: PreTrainedModel, index: int, hidden: Tensor) -> Iterator[None]:
    """Calls inside the `with` run no block before the one at `index`, which `hidden` enters.

    A block that copies keys and values from the one below cannot be the first to run, see `resumable`.
    """

    def take(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return (hidden, *args[1:]), {name: value for name, value in kwargs.items() if name != "hidden_states"}

    idle = blocks(model)[:index]
    for block in idle:
        block.forward = _passed_on
    handle = blocks(model)[index].register_forward_pre_hook(take, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        for block in idle:
            del block.forward  # the class's own again


def resumable(model: PreTrainedModel, layer: int) -> int:
    """The last block up to a layer from which a pass can go on: one that copies needs those below."""
    return max(at for at, block in enumerate(blocks(model)[: layer + 1]) if not getattr(block, "copies", False))


def stream_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What enters a block, out of its arguments."""
    return args[0] if args else kwargs["hidden_states"]


def _passed_on(hidden_states: Tensor, *_args: object, **_kwargs: object) -> Tensor:
    return hidden_states


def _arguments(model: PreTrainedModel, window: Int[Tensor, "1 t"]) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What the model gives each block besides the stream."""
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def hold(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        found.append((args[1:], named))

    handles = [block.register_forward_pre_hook(hold, with_kwargs=True) for block in blocks(model)]
    try:
        model(window.to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _embedded(model: PreTrainedModel, window: Int[Tensor, "1 t"]) -> Tensor:
    """What enters the first block."""
    found: list[Tensor] = []

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(stream_of(args, kwargs))
        raise Enough

    handle = blocks(model)[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with suppress(Enough):
            model(window.to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        handle.remove()
    return found[0]
