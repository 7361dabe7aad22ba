"""Weights of a Hugging Face model in the order in which the kernels read them, see `native/kernels.h`."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModel
from ..gating.gate import Gate
from ..quantization.groups import GroupWeight, quantize
from ..quantization.linear import QuantizedEmbedding, QuantizedLinear
from .extension import extension
from .packed import Bytes, PackedFile

Floats = Literal["bf16", "f32"]
Head = Literal["int8", "bf16", "f32"]
_HEAD_GROUP = 64
_SLICE_ROWS = 8192
"""Of the head, quantized at a time: vocabularies are long."""


def is_coded(vocabulary: nn.Module) -> bool:
    """Whether an output head or an embedding is quantized already, to integers."""
    matrix = vocabulary.matrix if isinstance(vocabulary, QuantizedEmbedding) else vocabulary
    return isinstance(matrix, QuantizedLinear) and matrix.levels is None


@dataclass
class Packer:
    """Packs matrices for one set of kernels.

    Args:
        kernels: Which.
        floats: How float matrices are kept.
        file: Where packed matrices are kept.
        widest: Most channels that a branch or surrogate has inside, so far.
        bytes_per_token: Of packed weights that a token reads at full budget, so far.
        held: What the native model only points to.
    """

    kernels: str
    floats: Floats
    file: PackedFile
    widest: int = 0
    bytes_per_token: int = 0
    held: list[Any] = field(default_factory=list, repr=False)

    def layer(self, index: int, block: Any, copies: bool) -> Any:
        """One block."""
        layer, attention, mlp = extension().Layer(), block.self_attn, block.mlp
        for name in "qkvo":
            setattr(layer, name, self.matrix(f"{index}.{name}", getattr(attention, f"{name}_proj")))
        for name in ("gate", "up", "down"):
            setattr(layer, name, self.matrix(f"{index}.{name}", getattr(mlp, f"{name}_proj")))
        self.widest = max(self.widest, mlp.gate_proj.out_features)
        for name in ("q_norm", "k_norm"):
            if hasattr(attention, name):
                setattr(layer, name, vector(getattr(attention, name).weight))
        layer.rotary, layer.copies = bool(getattr(attention, "use_rope", True)), copies
        for prefix, gates in (("", getattr(block, "gates", {})), ("draft_", getattr(block, "draft_gates", {}))):
            own = dict(gates)
            for part, norm in (("attention", block.input_layernorm), ("mlp", block.post_attention_layernorm)):
                name = f"{prefix}{part}"
                setattr(layer, name, self.branch(f"{index}.{name}", norm, own.get(part)))
        return layer

    def branch(self, name: str, norm: nn.Module, gate: Gate | None) -> Any:
        """A branch's norm and gate."""
        branch = extension().Branch()
        branch.norm = vector(norm.weight)
        if gate is None:
            return branch
        branch.gated, branch.follows = True, gate.kind is None
        if not branch.follows:
            branch.score, branch.bias = vector(gate.score_weight), float(gate.score_bias.detach())
        branch.surrogate = self.surrogate(name, gate)
        return branch

    def surrogate(self, branch: str, gate: Gate) -> Any:
        """What a gate puts in the branch's place; nobody reads it at full budget, so its bytes are not counted."""
        before, surrogate = self.bytes_per_token, extension().Surrogate()
        if gate.surrogate == "mean":
            surrogate.offset = vector(gate.offset)
        elif gate.surrogate == "lowrank":
            surrogate.gate = self.floating(f"{branch}.gate", gate.down, None)
            surrogate.down = self.floating(f"{branch}.down", gate.up, gate.offset)
            self.widest = max(self.widest, len(gate.down))
        elif gate.surrogate == "narrow":
            for name in ("gate", "up", "down"):
                setattr(surrogate, name, self.matrix(f"{branch}.{name}", getattr(gate.narrow, name)))
            self.widest = max(self.widest, gate.narrow.gate.out_features)
        self.bytes_per_token = before
        return surrogate

    def matrix(self, name: str, module: nn.Module) -> Any:
        """A projection, quantized or float."""
        if isinstance(module, QuantizedLinear):
            return self.coded(name, module.quantized, module.bias)
        if type(module) is nn.Linear:
            return self.floating(name, module.weight, module.bias)
        raise UnsupportedModel(f"the native runtime knows linear and quantized layers, not {type(module).__name__}")

    def head(self, module: nn.Module, form: Head) -> Any:
        """The output head; where it has codes of its own, these."""
        if form == "int8" and is_coded(module):
            return self.matrix("head", module)
        bias = getattr(module, "bias", None)
        if form == "int8":
            return self.rounded("head", module, 8, bias)
        weight: Tensor = module.weight.detach()  # pyright: ignore[reportAssignmentType]
        return self.floating("head", weight, bias, form)

    def quick_head(self, module: Any, head: Any) -> Any:
        """The output head in 4 bits, which finds the few tokens that may be best; None beside one that is no int8."""
        if not head.coded or (is_coded(module) and module.bits < 8):
            return None
        self.bytes_per_token -= head.nbytes  # of which a greedy token reads a few rows
        return self.rounded("quick_head", module, 4, None)

    def rounded(self, name: str, module: Any, bits: int, bias: Tensor | None) -> Any:
        """An output head to the nearest codes, some rows at a time; symmetric in 8 bits, where that costs nothing."""
        rows = module.rows if isinstance(module, QuantizedLinear) else module.weight.detach().__getitem__
        some = torch.arange(module.out_features).split(_SLICE_ROWS)
        slices = (quantize(rows(places).float(), bits, _HEAD_GROUP, symmetric=bits == 8) for places in some)
        shape, kind = torch.Size((module.out_features, module.in_features)), f"int{bits}"
        return self.keep(name, kind, shape, _HEAD_GROUP, lambda: self.pack(kind, slices), bias)

    def embedding(self, module: nn.Module, head: nn.Module, packed_head: Any) -> Any:
        """The embedding: floats where they lie, or codes, which are the head's where the two are one matrix."""
        if not isinstance(module, QuantizedEmbedding) or not is_coded(module):
            return table(module)
        if module.matrix is head and packed_head.coded:
            return packed_head
        before, rows = self.bytes_per_token, self.matrix("embedding", module.matrix)
        self.bytes_per_token = before  # a token reads one row
        return rows

    def coded(self, name: str, weight: GroupWeight, bias: Tensor | None) -> Any:
        """A quantized matrix; 3 bits are kept as 4."""
        if weight.levels is not None:
            raise UnsupportedModel("NF4 and FP4 weights are no integers; for the native runtime use solver='gptq'")
        kind = "int8" if weight.bits == 8 else "int4"
        return self.keep(name, kind, weight.codes.shape, weight.group_size, lambda: self.pack(kind, [weight]), bias)

    def pack(self, kind: str, slices: Iterable[GroupWeight]) -> Bytes:
        """Codes of neighbouring rows, slice by slice, each of whole blocks of rows."""
        parts = []
        for part in slices:
            codes, zero, scale = part.codes.numpy(), part.zero.numpy(), part.scale.detach().float().numpy()
            parts.append(extension().pack_codes(self.kernels, kind, codes, scale, zero, part.group_size))
        return np.concatenate(parts)

    def floating(self, name: str, weight: Tensor, bias: Tensor | None, form: Floats | None = None) -> Any:
        """A float matrix."""
        kind = form or self.floats
        pack = lambda: extension().pack_floats(self.kernels, kind, weight.detach().float().contiguous().numpy())  # noqa: E731
        return self.keep(name, kind, weight.shape, extension().CHUNK, pack, bias)

    def keep(
        self, name: str, kind: str, shape: torch.Size, group: int, pack: Callable[[], Bytes], bias: Tensor | None
    ) -> Any:
        """A matrix, kept alive as long as the model."""
        values = None if bias is None else bias.detach().float().numpy()
        packed = self.file.get(name, pack)
        matrix = extension().HeldMatrix(self.kernels, kind, *shape, group, packed, values)
        self.held.append(matrix)
        self.bytes_per_token += packed.nbytes
        return matrix


def table(module: nn.Module) -> np.ndarray:
    """A float matrix where it lies, bfloat16 as its bits; other types are copied to float32."""
    weight: Tensor = module.weight.detach().contiguous()  # pyright: ignore[reportAssignmentType]
    return (weight.view(torch.uint16) if weight.dtype == torch.bfloat16 else weight.float()).numpy()


def vector(parameter: Tensor) -> list[float]:
    """A small parameter as numbers."""
    return parameter.detach().float().flatten().tolist()


def vocabulary_size(model: PreTrainedModel) -> int:
    """How many tokens the output head knows; its weight, which may have to be dequantized, is not looked at."""
    head: Any = model.get_output_embeddings()
    return head.out_features
