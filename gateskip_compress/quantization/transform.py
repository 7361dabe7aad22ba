"""The Quantize step: every projection of every block to 4 bits, by GPTQ or to nearest."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import CalibrationError
from ..model import blocks, family_of, linears, surrogate_linears, walk
from ..names import check_choice
from ..step import Context, Record, Stage
from .gptq import DAMPING, gptq, output_error
from .int4 import GROUP_SIZES, Int4Weight, check_group_size, check_weight, dequantize, quantize
from .linear import Int4Linear

Solver = Literal["gptq", "nearest"]


@dataclass(frozen=True)
class Quantize:
    """Store the blocks' projections and `narrow` surrogates in 4 bits by group; all else keeps its precision.

    GPTQ goes block by block. Each projection is quantized for the inputs that it really gets: from the blocks before it
    as they are by then, 4-bit ones, and at the budget the model is set to, so a gated branch counts only the tokens
    that run it, and a surrogate those that skip.

    Args:
        bits: 4.
        group_size: Weights of a row that share a scale: 32, 64 or 128.
        symmetric: No zero points: slightly less disk, slightly more error.
        solver: `gptq`, or round to `nearest`, which looks at no text.
        order: GPTQ quantizes the columns with the largest inputs first.

    Raises:
        ValueError: A field is out of its range, or `group_size` does not divide a projection's width.
    """

    name: ClassVar[str] = "quantize"
    stage: ClassVar[Stage] = Stage.QUANTIZE

    bits: Literal[4] = 4
    group_size: int = 64
    symmetric: bool = False
    solver: Solver = "gptq"
    order: bool = False

    def __post_init__(self) -> None:
        if self.bits != 4:
            raise ValueError(f"bits {self.bits} must be 4")
        check_choice("group_size", self.group_size, GROUP_SIZES)
        check_choice("solver", self.solver, get_args(Solver))
        if self.order and self.solver != "gptq":
            raise ValueError("order is GPTQ's: use solver='gptq'")

    def apply(self, model: PreTrainedModel, context: Context) -> Record:
        """Replace the projections in place; the record keeps their errors."""
        found = _found(model)
        for name, linear in found.items():  # before the first one is replaced
            check_group_size(self.group_size, linear.in_features)
            try:
                check_weight(linear.weight.data)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        notes: dict[str, dict[str, float]] = {}
        if self.solver == "nearest":
            for name, linear in context.track(list(found.items()), "quantize"):
                self._replace(model, name, linear, quantize(linear.weight.data, self.group_size, self.symmetric), notes)
        else:
            if len(context.calibration) == 0:
                raise CalibrationError("GPTQ needs at least one window of text; use solver='nearest' without")
            by_block: dict[int, dict[str, nn.Linear]] = {}
            for name, linear in found.items():
                by_block.setdefault(_block_of(name), {})[name] = linear

            def visit(index: int, run: Callable[[], None]) -> None:
                self._solve(model, index, by_block.get(index, {}), run, notes)

            walk(model, context.calibration, visit, context.track)
        return _summary(notes)

    def rebuild(self, model: PreTrainedModel, record: Record) -> None:
        """Put empty 4-bit layers where projections are."""
        del record
        for name, linear in _found(model).items():
            with torch.device(linear.weight.device):
                model.set_submodule(name, Int4Linear.like(linear, self.group_size, self.symmetric))

    def _solve(
        self,
        model: PreTrainedModel,
        index: int,
        found: dict[str, nn.Linear],
        run: Callable[[], None],
        notes: dict[str, dict[str, float]],
    ) -> None:
        """GPTQ of one block's projections, in place."""
        hessians = {name: _Inputs(linear) for name, linear in found.items()}
        family, handles = family_of(model), []
        for name, inputs in hessians.items():
            if family.layout.fused is not None and name.endswith(f".{family.layout.fused}"):
                # queries, keys and values of some tokens are read out of its weight; all tokens need keys and values
                norm = getattr(blocks(model)[index], str(family.attention.norm))
                handles.append(norm.register_forward_hook(partial(_see_output, inputs)))
            else:
                handles.append(model.get_submodule(name).register_forward_pre_hook(partial(_see, inputs)))
        try:
            run()
        finally:
            for handle in handles:
                handle.remove()
        for name, linear in found.items():
            seen = hessians.pop(name)
            weight, damping = gptq(linear.weight.data, seen.hessian, self.group_size, self.symmetric, order=self.order)
            missed = output_error(linear.weight.data, dequantize(weight), seen.hessian)
            self._replace(model, name, linear, weight, notes)
            notes[name] |= {"output_error": missed, "damping": damping, "tokens": seen.tokens}

    def _replace(
        self,
        model: PreTrainedModel,
        name: str,
        linear: nn.Linear,
        weight: Int4Weight,
        notes: dict[str, dict[str, float]],
    ) -> None:
        original = linear.weight.data
        notes[name] = {"relative_error": float((dequantize(weight) - original).norm() / original.norm())}
        replacement = Int4Linear.like(linear, self.group_size, self.symmetric)
        replacement.load(weight, linear.bias)
        model.set_submodule(name, replacement)


class _Inputs:
    """Second moments of a projection's inputs."""

    def __init__(self, linear: nn.Linear) -> None:
        self.hessian = torch.zeros(linear.in_features, linear.in_features, device=linear.weight.device)
        self.tokens = 0


def _see(inputs: _Inputs, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
    x = args[0].flatten(0, -2).float()
    inputs.hessian.addmm_(x.T, x)
    inputs.tokens += len(x)


def _see_output(inputs: _Inputs, module: nn.Module, _args: object, out: Tensor) -> None:
    _see(inputs, module, (out,))


def _found(model: PreTrainedModel) -> dict[str, nn.Linear]:
    return {**linears(model), **surrogate_linears(model)}


def _block_of(name: str) -> int:
    """The first number in a parameter's path."""
    return next(int(part) for part in name.split(".") if part.isdigit())


def _summary(notes: dict[str, dict[str, float]]) -> Record:
    def mean(key: str) -> float:
        return sum(note[key] for note in notes.values()) / len(notes)

    worst = max(notes, key=lambda name: notes[name]["relative_error"])
    record: dict[str, Any] = {
        "quantized": len(notes),
        "mean_relative_error": mean("relative_error"),
        "worst_relative_error": notes[worst]["relative_error"],
        "worst": worst,
    }
    if "output_error" in notes[worst]:
        hardest = max(notes, key=lambda name: notes[name]["output_error"])
        record |= {
            "mean_output_error": mean("output_error"),
            "worst_output_error": notes[hardest]["output_error"],
            "worst_output": hardest,
            "without_input": [name for name, note in notes.items() if note["tokens"] == 0],
            "damped_more": [name for name, note in notes.items() if note["damping"] > DAMPING],
        }
    return record
