"""Pruning a gated model: a branch's surrogate takes its place, and what is left keeps its gates."""

from dataclasses import replace

from transformers import PreTrainedModel

from ..gating.dial import Thresholds
from ..gating.turning import dial_of, is_gated
from ..model import BRANCH_KINDS, blocks, remove


def replace_by_surrogate(model: PreTrainedModel, layer: int, kind: str) -> None:
    """Take a gated branch out, in place; what skipped tokens had, its surrogate, all have from now on."""
    gate = blocks(model)[layer].gates.pop(kind)
    for name in ("score_weight", "score_bias"):
        delattr(gate, name)
    gate.kind = None
    remove(model, layer, kind, None if gate.surrogate == "zero" else gate)


def forget_block(model: PreTrainedModel, removed: int) -> None:
    """Let the gates of a model from which a block was taken, in place, know their new places; nothing without gates."""
    if not is_gated(model):
        return
    dial = dial_of(model)
    for layer, block in enumerate(blocks(model)):
        block.layer = layer
    first = len(BRANCH_KINDS) * removed

    def without(thresholds: Thresholds) -> Thresholds:
        return thresholds[:first] + thresholds[first + len(BRANCH_KINDS) :]

    dial.table = tuple(replace(setting, thresholds=without(setting.thresholds)) for setting in dial.table)
    if dial.thresholds is not None:
        dial.thresholds = without(dial.thresholds)
