"""The Quantize step: projections of blocks to few bits, by GPTQ or to nearest."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import CalibrationError
from ..gram import add_gram, mirrored, no_gram
from ..model import Enough, blocks, family_of, linears, surrogate_linears, vocabulary, walk
from ..names import check_choice
from ..step import Context, Record, Stage
from .allocate import allocate_bits
from .gptq import DAMPING, gptq, output_error
from .groups import BITS, GROUP_SIZES, GroupWeight, check_group_size, check_weight, dequantize, quantize, tabled
from .linear import QuantizedLinear, unpacked
from .vocabulary import quantize_vocabulary, rebuild_vocabulary, whole

Solver = Literal["gptq", "nearest", "nf4", "fp4"]
TABLED = ("nf4", "fp4")
KEEP = 16
"""In `bits_of`, as it is."""


@dataclass(frozen=True)
class Quantize:
    """Store the blocks' projections and `narrow` surrogates in few bits by group; all else keeps its precision.

    GPTQ goes block by block. Each projection is quantized for the inputs that it really gets: from the blocks before it
    as they are by then, quantized ones, and at the budget the model is set to, so a gated branch counts only the tokens
    that run it, and a surrogate those that skip.

    Args:
        bits: 3, 4 or 8.
        group_size: Weights of a row that share a scale: 32, 64 or 128.
        symmetric: No zero points: slightly less disk, slightly more error.
        solver: `gptq`, or round to `nearest`, which looks at no text unless it clips; or `nf4` and `fp4` by
            bitsandbytes, whose 16 levels are not evenly spaced, with no zero points.
        order: GPTQ takes groups, and columns inside them, with the largest inputs first.
        clip: Search each group's range, from all of it down to six tenths, for the least squared error, where a
            column counts as much as the inputs it meets in the text.
        bits_of: Other bits for projections whose full names a regular expression is found in; 16 leaves them as they
            are. The first that is found counts. Embedding and output head (`lm_head` in most families), which keep
            their precision otherwise, are rounded to nearest where they are found; where they are one matrix, naming
            one is enough.
        mean_bits: Mean over all projections' weights, from 3 to 8: each gets 3, 4 or 8 bits by how much its rounding
            moves the loss on calibration text. `bits` then counts for nothing, `bits_of` still does.
        short_groups: A row's last group may be shorter, where `group_size` does not divide it.

    Raises:
        ValueError: A field is out of its range, or `group_size` does not divide a projection's width.
    """

    name: ClassVar[str] = "quantize"
    stage: ClassVar[Stage] = Stage.QUANTIZE

    bits: Literal[3, 4, 8] = 4
    group_size: int = 64
    symmetric: bool = False
    solver: Solver = "gptq"
    order: bool = True
    clip: bool = True
    bits_of: Mapping[str, int] = field(default_factory=dict, hash=False)
    mean_bits: float | None = None
    short_groups: bool = False

    def __post_init__(self) -> None:
        check_choice("bits", self.bits, BITS)
        check_choice("group_size", self.group_size, GROUP_SIZES)
        check_choice("solver", self.solver, get_args(Solver))
        for pattern, bits in self.bits_of.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"bits_of {pattern!r} is no regular expression: {error}") from None
            check_choice(f"bits_of {pattern!r}", bits, (*BITS, KEEP))
        if self.solver in TABLED and (
            self.bits != 4 or self.mean_bits is not None or set(self.bits_of.values()) - {4, KEEP}
        ):
            raise ValueError(f"solver {self.solver!r} has 4 bits: leave bits, bits_of and mean_bits, or choose another")
        if self.mean_bits is not None and not min(BITS) <= self.mean_bits <= max(BITS):
            raise ValueError(f"mean_bits {self.mean_bits} must be from {min(BITS)} to {max(BITS)}")

    def apply(self, model: PreTrainedModel, context: Context) -> Record:
        """Replace the projections in place; the record keeps their errors, and their bits where they differ."""
        found, rows = self._found(model), self.vocabulary_bits(model)
        asked = {name: vocabulary(model).linears[name] for name in rows}
        if not found and not asked:
            raise ValueError(f"bits_of {dict(self.bits_of)} leaves nothing to quantize")
        for name, linear in (found | asked).items():  # before the first one is replaced
            try:
                check_group_size(
                    self.group_size, linear.in_features, short=self.short_groups and self.solver not in TABLED
                )
                check_weight(linear.weight.data)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        if len(context.calibration) == 0 and (self._reads_text or self.mean_bits is not None):
            raise CalibrationError(
                "GPTQ, clip and mean_bits need at least one window of text; without, use solver='nearest', clip=False"
            )
        own = self._own(found)
        if self.mean_bits is None:
            bits = {name: self.bits if given is None else given for name, given in own.items()}
        else:
            bits = allocate_bits(
                model,
                found,
                {name: given for name, given in own.items() if given is not None},
                self.mean_bits,
                partial(quantize, group_size=self.group_size, symmetric=self.symmetric),
                context,
            )
        of_rows = quantize_vocabulary(model, rows, self._nearest, self._empty) if rows else None
        notes: dict[str, dict[str, float]] = {}
        if not self._reads_text:
            for name, linear in context.track(list(found.items()), "quantize"):
                self._replace(model, name, linear, self._nearest(linear.weight.data, bits[name]), notes)
        else:
            by_block: dict[int, dict[str, nn.Linear]] = {}
            for name, linear in found.items():
                by_block.setdefault(_block_of(name), {})[name] = linear

            with ExitStack() as held:  # float matrices of the block at work, or each window would write them out anew

                def visit(index: int, run: Callable[[], None]) -> None:
                    held.close()
                    self._solve(model, index, by_block.get(index, {}), bits, run, notes)
                    held.enter_context(unpacked(blocks(model)[index]))

                walk(model, context.calibration, visit, context.track)
        record = _summary(notes, found, bits)
        return record if of_rows is None else record | {"vocabulary": of_rows}

    def rebuild(self, model: PreTrainedModel, record: Record) -> None:
        """Put empty layers of few bits where projections are."""
        if "vocabulary" in record:
            rebuild_vocabulary(model, record["vocabulary"], self._empty)
        bits: dict[str, int] = record.get("bits", {})
        for name, linear in self._found(model).items():
            model.set_submodule(name, self._empty(linear, bits.get(name, self.bits)))

    def vocabulary_bits(self, model: PreTrainedModel) -> dict[str, int]:
        """Bits of embedding and output head by their full names, of those that are quantized."""
        parts = vocabulary(model)
        own = self._own(parts.linears)
        return whole(parts, {name: bits for name, bits in own.items() if bits not in (None, KEEP)})

    @property
    def _reads_text(self) -> bool:
        """Whether a projection's inputs matter for how it is rounded."""
        return self.solver == "gptq" or (self.solver == "nearest" and self.clip)

    def _found(self, model: PreTrainedModel) -> dict[str, nn.Linear]:
        """What is quantized."""
        found = {**linears(model), **surrogate_linears(model)}
        own = self._own(found)
        return {name: linear for name, linear in found.items() if own[name] != KEEP}

    def _nearest(self, weight: Tensor, bits: int) -> GroupWeight:
        """A matrix rounded to nearest, or to the nearest level."""
        if self.solver in TABLED:
            return tabled(weight, self.solver, self.group_size)
        return quantize(weight, bits, self.group_size, self.symmetric)

    def _empty(self, linear: nn.Linear, bits: int) -> QuantizedLinear:
        """A layer that takes a linear's place."""
        with torch.device(linear.weight.device):
            return QuantizedLinear.like(linear, bits, self.group_size, self.symmetric, tabled=self.solver in TABLED)

    def _own(self, found: dict[str, nn.Linear]) -> dict[str, int | None]:
        """Bits that `bits_of` asks for, None where it asks for none."""
        return {
            name: next((bits for pattern, bits in self.bits_of.items() if re.search(pattern, name)), None)
            for name in found
        }

    def _solve(
        self,
        model: PreTrainedModel,
        index: int,
        found: dict[str, nn.Linear],
        bits: dict[str, int],
        run: Callable[[], None],
        notes: dict[str, dict[str, float]],
    ) -> None:
        """Quantize one block's projections for their inputs, in place; those with the same inputs are one matrix."""
        with _inputs(model, index, found) as seen:
            run()
        while seen:
            name, inputs = next(iter(seen.items()))
            alike = [other for other in seen if bits[other] == bits[name] and inputs.same_as(seen[other])]
            stacked = torch.cat([found[other].weight.data for other in alike])
            weight, damping = self._rounded(stacked, inputs, bits[name])
            parts = zip(*(t.split([found[n].out_features for n in alike]) for t in _parts(weight)), strict=True)
            for other, (codes, scale, zero) in zip(alike, parts, strict=True):
                own = replace(weight, codes=codes, scale=scale, zero=zero)
                missed = output_error(found[other].weight.data, dequantize(own), inputs.hessian)
                self._replace(model, other, found[other], own, notes)
                notes[other] |= {"output_error": missed, "damping": damping, "tokens": inputs.tokens}
                del seen[other]

    def _rounded(self, weight: Tensor, inputs: "_Inputs", bits: int) -> tuple[GroupWeight, float]:
        """A matrix in few bits, and the damping that was needed."""
        if self.solver == "gptq":
            return gptq(weight, inputs.hessian, bits, self.group_size, self.symmetric, order=self.order, clip=self.clip)
        active = inputs.hessian.diagonal() if inputs.tokens else None
        return quantize(weight, bits, self.group_size, self.symmetric, clip=self.clip, importance=active), DAMPING

    def _replace(
        self,
        model: PreTrainedModel,
        name: str,
        linear: nn.Linear,
        weight: GroupWeight,
        notes: dict[str, dict[str, float]],
    ) -> None:
        original = linear.weight.data
        notes[name] = {"relative_error": float((dequantize(weight) - original).norm() / original.norm())}
        replacement = self._empty(linear, weight.bits)
        replacement.load(weight, linear.bias)
        model.set_submodule(name, replacement)


class _Inputs:
    """Second moments of a projection's inputs."""

    def __init__(self, linear: nn.Linear) -> None:
        self.hessian = no_gram(linear.in_features, linear.weight.device)
        self.tokens = 0

    def same_as(self, other: "_Inputs") -> bool:
        """Whether both saw the same."""
        return self.tokens == other.tokens and torch.equal(self.hessian, other.hessian)


class _Moments:
    """Second moments of a call's inputs (see `gram.py`), computed once for projections that share them."""

    def __init__(self) -> None:
        self.of: Tensor | None = None
        self.last = torch.empty(0)

    def add(self, inputs: _Inputs, x: Tensor) -> None:
        """To what a projection has seen so far, in place."""
        rows = x.flatten(0, -2).float()
        if x is not self.of:
            self.of, self.last = x, torch.zeros_like(inputs.hessian)
            add_gram(self.last, rows)
        inputs.hessian += self.last
        inputs.tokens += len(rows)


@contextmanager
def _inputs(model: PreTrainedModel, index: int, found: dict[str, nn.Linear]) -> Iterator[dict[str, _Inputs]]:
    """What the projections of a block see inside the `with`."""
    seen = {name: _Inputs(linear) for name, linear in found.items()}
    family, handles, moments = family_of(model), [], _Moments()
    for name, inputs in seen.items():
        if family.layout.fused is not None and name.endswith(f".{family.layout.fused}"):
            # queries, keys and values of some tokens are read out of its weight; all tokens need keys and values
            norm = getattr(blocks(model)[index], str(family.attention.norm))
            handles.append(norm.register_forward_hook(lambda _m, _a, out, to=inputs: moments.add(to, out)))
        else:
            module = model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(lambda _m, args, to=inputs: moments.add(to, args[0])))
    if seen and not hasattr(blocks(model)[index], "gates"):  # a plain block's last projection is the last to read
        last = [name for name in linears(model) if _block_of(name) == index][-1]
        handles.append(model.get_submodule(last).register_forward_pre_hook(_enough))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        for inputs in seen.values():
            inputs.hessian = mirrored(inputs.hessian)


def _enough(_module: nn.Module, _args: object) -> None:
    raise Enough


def _parts(weight: GroupWeight) -> tuple[Tensor, Tensor, Tensor]:
    return weight.codes, weight.scale, weight.zero


def _block_of(name: str) -> int:
    """The first number in a parameter's path."""
    return next(int(part) for part in name.split(".") if part.isdigit())


def _summary(notes: dict[str, dict[str, float]], found: dict[str, nn.Linear], bits: dict[str, int]) -> Record:
    def mean(key: str) -> float:
        return sum(note[key] for note in notes.values()) / len(notes)

    if not notes:
        return {"quantized": 0}
    sizes = {name: linear.weight.numel() for name, linear in found.items()}
    record: dict[str, Any] = {
        "quantized": len(notes),
        "mean_bits": sum(bits[name] * size for name, size in sizes.items()) / sum(sizes.values()),
    }
    if len(set(bits.values())) > 1:
        record["bits"] = bits
    worst = max(notes, key=lambda name: notes[name]["relative_error"])
    record |= {
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
