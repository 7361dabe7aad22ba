"""The Prune step: whole blocks out, least influential first."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..model import blocks, branches, remove_blocks
from ..step import Context, Record, Stage
from .influence import influence

SCORING_TOKENS = 4096
"""Calibration tokens that influence is averaged over, again for each block that is dropped."""


@dataclass(frozen=True)
class Prune:
    """Drop whole blocks by block influence (ShortGPT, arXiv 2403.03853); what is left is a plain, smaller model.

    We differ from the paper: influence is measured again after each removal, since blocks that are redundant one by one
    are not redundant together.

    Args:
        blocks: How many to drop: 0 up to all but one.

    Raises:
        ValueError: `blocks` is negative, or leaves no block.
    """

    name: ClassVar[str] = "prune"
    stage: ClassVar[Stage] = Stage.PRUNE

    blocks: int = 2

    def __post_init__(self) -> None:
        if self.blocks < 0:
            raise ValueError(f"blocks {self.blocks} must be at least 0")

    def apply(self, model: PreTrainedModel, context: Context) -> Record:
        """Remove blocks in place, one at a time; the record names them by their original indices."""
        branches(model)
        left = list(range(len(blocks(model))))
        if self.blocks >= len(left):
            raise ValueError(f"cannot drop {self.blocks} of {len(left)} blocks; at most {len(left) - 1}")
        windows = context.calibration[: max(1, SCORING_TOKENS // context.calibration.shape[1])]
        removed = []
        for _ in context.track(range(self.blocks), "drop blocks"):
            scores = block_influence(model, windows)
            weakest = int(scores.argmin())
            remove_blocks(model, [weakest])
            removed.append({"block": left.pop(weakest), "influence": float(scores[weakest])})
        return {"removed": removed, "left": len(left)}

    def rebuild(self, model: PreTrainedModel, record: Record) -> None:
        """Nothing: the saved config already describes the smaller model."""


@torch.inference_mode()
def block_influence(model: PreTrainedModel, windows: Int[Tensor, "n t"]) -> Tensor:
    """Mean influence of each block over the windows' tokens, (blocks,); first tokens are left out, as sinks."""
    totals = torch.zeros(len(blocks(model)), dtype=torch.float64)

    def see(index: int, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        del module
        totals[index] += influence(args[0][:, 1:].flatten(0, 1), out[:, 1:].flatten(0, 1)).double().mean().cpu()

    handles = [
        block.register_forward_hook(lambda *seen, index=index: see(index, *seen))
        for index, block in enumerate(blocks(model))
    ]
    try:
        for window in windows:
            model(window[None].to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return totals / len(windows)
