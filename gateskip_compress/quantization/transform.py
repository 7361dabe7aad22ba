"""The Quantize step: every projection of every block to 4 bits, round to nearest."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from transformers import PreTrainedModel

from ..model import linears
from ..step import Context, Record, Stage
from .int4 import GROUP_SIZES, check_group_size, dequantize, quantize
from .linear import Int4Linear


@dataclass(frozen=True)
class Quantize:
    """Store the blocks' projections in 4 bits by group; embeddings, head, norms and gates keep their precision.

    Args:
        bits: 4.
        group_size: Weights of a row that share a scale: 32, 64 or 128.
        symmetric: No zero points: slightly less disk, slightly more error.

    Raises:
        ValueError: A field is out of its range, or `group_size` does not divide a projection's width.
    """

    name: ClassVar[str] = "quantize"
    stage: ClassVar[Stage] = Stage.QUANTIZE

    bits: Literal[4] = 4
    group_size: int = 64
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.bits != 4:
            raise ValueError(f"bits {self.bits} must be 4")
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"group_size {self.group_size} must be one of {', '.join(map(str, GROUP_SIZES))}")

    def apply(self, model: PreTrainedModel, context: Context) -> Record:
        """Replace the projections in place, one at a time; the record keeps the worst relative error."""
        found = linears(model)
        for linear in found.values():
            check_group_size(self.group_size, linear.in_features)  # before the first one is replaced
        errors = {}
        for name, linear in context.track(list(found.items()), "quantize"):
            weight = quantize(linear.weight.data, self.group_size, self.symmetric)
            errors[name] = float((dequantize(weight) - linear.weight.data).norm() / linear.weight.data.norm())
            replacement = Int4Linear.like(linear, self.group_size, self.symmetric)
            replacement.load(weight, linear.bias)
            model.set_submodule(name, replacement)
        worst = max(errors, key=errors.__getitem__)
        return {
            "quantized": len(errors),
            "mean_relative_error": sum(errors.values()) / len(errors),
            "worst_relative_error": errors[worst],
            "worst": worst,
        }

    def rebuild(self, model: PreTrainedModel, record: Record) -> None:
        """Put empty 4-bit layers where projections are."""
        del record
        for name, linear in linears(model).items():
            with torch.device(linear.weight.device):
                model.set_submodule(name, Int4Linear.like(linear, self.group_size, self.symmetric))
