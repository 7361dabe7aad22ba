"""Weights of a Hugging Face model in the order in which the kernels read them, see `native/kernels.h`."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UnsupportedModel
from ..gating.gate import Gate
from ..model import Branch, Family, NoMlp
from ..quantization.groups import GroupWeight, quantize
from ..quantization.linear import QuantizedEmbedding, QuantizedLinear
from .blueprint import BranchPlan, LayerPlan, MatrixPlan, SurrogatePlan
from .extension import extension

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
    """Packs matrices for one set of kernels, and draws up the blueprint that names them.

    Args:
        kernels: Which.
        floats: How float matrices are kept.
        norm_offset: What the weights of norms are meant to have added.
        arrays: Packed so far.
        widest: Most channels that a branch or surrogate has inside, so far.
        bytes_per_token: Of packed weights that a token reads at full budget, so far.
    """

    kernels: str
    floats: Floats
    norm_offset: float = 0.0
    arrays: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    widest: int = 0
    bytes_per_token: int = 0

    def layer(self, index: int, block: Any, family: Family, rotation: int | None, window: int | None) -> LayerPlan:
        """One block; `rotation` and `window` are as in the plan."""
        attention, mlp = block.self_attn, block.mlp
        projections: dict[str, nn.Module] = {}
        if not isinstance(attention, NoMlp):
            projections |= {name: getattr(attention, f"{name}_proj") for name in "qkvo"}
        if not isinstance(mlp, NoMlp):
            projections |= {name: getattr(mlp, f"{name}_proj") for name in ("gate", "up", "down")}
            self.widest = max(self.widest, mlp.gate_proj.out_features)
        matrices = {name: self.matrix(f"{index}.{name}", module) for name, module in projections.items()}
        norms = {
            name: self.norm(f"{index}.{name}", getattr(attention, name))
            for name in ("q_norm", "k_norm")
            if hasattr(attention, name)
        }
        branches = {}
        for prefix, held in (("", "gates"), ("draft_", "draft_gates")):
            own = dict(block._modules.get(held) or {})
            for branch in family.branches if held in block._modules or not prefix else ():
                name = f"{prefix}{branch.kind}"
                branches[name] = self.branch(f"{index}.{name}", block, branch, own.get(branch.kind))
        copies = bool(getattr(block, "copies", False))
        return {
            "matrices": matrices,
            "norms": norms,
            "branches": branches,
            "rotation": rotation,
            "window": window,
            "copies": copies,
        }

    def branch(self, name: str, block: Any, branch: Branch, gate: Gate | None) -> BranchPlan:
        """A branch's norms, and its gate or what stands in its place since it was taken out."""
        before, after, body = (
            None if part is None else getattr(block, part) for part in (branch.norm, branch.post, branch.body[0])
        )
        plan: BranchPlan = {
            "norm": None if isinstance(before, nn.Identity) else self.norm(f"{name}.norm", before),
            "post": None if after is None or isinstance(after, nn.Identity) else self.norm(f"{name}.post", after),
            "gated": gate is not None,
            "score": None,
            "bias": 0.0,
            "surrogate": {},
        }
        if gate is not None and gate.kind is not None:
            plan["score"] = self.vector(f"{name}.score", gate.score_weight)
            plan["bias"] = float(gate.score_bias.detach())
        if gate is not None:
            read = self.bytes_per_token
            plan["surrogate"] = self.surrogate(name, gate)
            self.bytes_per_token = read  # nobody reads it at full budget
        elif isinstance(body, NoMlp) and body.instead is not None:
            plan["surrogate"] = self.surrogate(name, body.instead)
        return plan

    def surrogate(self, branch: str, gate: Any) -> SurrogatePlan:
        """What a gate puts in the branch's place."""
        plan = SurrogatePlan()
        if gate.surrogate == "mean":
            plan["offset"] = self.vector(f"{branch}.offset", gate.offset)
        elif gate.surrogate == "lowrank":
            plan["gate"] = self.floating(f"{branch}.gate", gate.down, None)
            plan["down"] = self.floating(f"{branch}.down", gate.up, gate.offset)
            self.widest = max(self.widest, len(gate.down))
        elif gate.surrogate == "narrow":
            for name in ("gate", "up", "down"):
                plan[name] = self.matrix(f"{branch}.{name}", getattr(gate.narrow, name))
            self.widest = max(self.widest, gate.narrow.gate.out_features)
        return plan

    def matrix(self, name: str, module: nn.Module) -> MatrixPlan:
        """A projection, quantized or float."""
        if isinstance(module, QuantizedLinear):
            return self.coded(name, module.quantized, module.bias)
        if type(module) is nn.Linear:
            return self.floating(name, module.weight, module.bias)
        raise UnsupportedModel(f"the native runtime knows linear and quantized layers, not {type(module).__name__}")

    def head(self, module: nn.Module, form: Head) -> MatrixPlan:
        """The output head; where it has codes of its own, these."""
        if form == "int8" and is_coded(module):
            return self.matrix("head", module)
        bias = getattr(module, "bias", None)
        if form == "int8":
            return self.rounded("head", module, 8, bias)
        weight: Tensor = module.weight.detach()  # pyright: ignore[reportAssignmentType]
        return self.floating("head", weight, bias, form)

    def quick_head(self, module: Any, head: MatrixPlan) -> MatrixPlan | None:
        """The output head in 4 bits, which finds the few tokens that may be best; None beside one that is no int8."""
        if head["kind"] != "int8" or (is_coded(module) and module.bits < 8):
            return None
        self.bytes_per_token -= self.arrays[head["packed"]].nbytes  # of which a greedy token reads a few rows
        return self.rounded("quick_head", module, 4, None)

    def rounded(self, name: str, module: Any, bits: int, bias: Tensor | None) -> MatrixPlan:
        """An output head to the nearest codes, some rows at a time; symmetric in 8 bits, where that costs nothing."""
        rows = module.rows if isinstance(module, QuantizedLinear) else module.weight.detach().__getitem__
        some = torch.arange(module.out_features).split(_SLICE_ROWS)
        slices = (quantize(rows(places).float(), bits, _HEAD_GROUP, symmetric=bits == 8) for places in some)
        shape, kind = torch.Size((module.out_features, module.in_features)), f"int{bits}"
        return self.keep(name, kind, shape, _HEAD_GROUP, self.pack(kind, slices), bias)

    def embedding(self, module: nn.Module, head: nn.Module, head_plan: MatrixPlan) -> str | MatrixPlan:
        """The embedding: floats, or codes, which are the head's where the two are one matrix."""
        if not isinstance(module, QuantizedEmbedding) or not is_coded(module):
            return self.table("embedding", module)
        if module.matrix is head and head_plan["kind"].startswith("int"):
            return head_plan
        before, rows = self.bytes_per_token, self.matrix("embedding", module.matrix)
        self.bytes_per_token = before  # a token reads one row
        return rows

    def table(self, name: str, module: nn.Module) -> str:
        """A float matrix where it lies, bfloat16 as its bits; other types are copied to float32."""
        weight: Tensor = module.weight.detach().contiguous()  # pyright: ignore[reportAssignmentType]
        self.arrays[name] = (weight.view(torch.uint16) if weight.dtype == torch.bfloat16 else weight.float()).numpy()
        return name

    def coded(self, name: str, weight: GroupWeight, bias: Tensor | None) -> MatrixPlan:
        """A quantized matrix; 3 bits are kept as 4."""
        if weight.levels is not None:
            raise UnsupportedModel("NF4 and FP4 weights are no integers; for the native runtime use solver='gptq'")
        kind = "int8" if weight.bits == 8 else "int4"
        return self.keep(name, kind, weight.codes.shape, weight.group_size, self.pack(kind, [weight]), bias)

    def pack(self, kind: str, slices: Iterable[GroupWeight]) -> np.ndarray:
        """Codes of neighbouring rows, slice by slice, each of whole blocks of rows."""
        parts = []
        for part in slices:
            codes, zero, scale = part.codes.numpy(), part.zero.numpy(), part.scale.detach().float().numpy()
            parts.append(extension().pack_codes(self.kernels, kind, codes, scale, zero, part.group_size))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def floating(self, name: str, weight: Tensor, bias: Tensor | None, form: Floats | None = None) -> MatrixPlan:
        """A float matrix."""
        kind = form or self.floats
        packed = extension().pack_floats(self.kernels, kind, weight.detach().float().contiguous().numpy())
        return self.keep(name, kind, weight.shape, extension().CHUNK, packed, bias)

    def keep(
        self, name: str, kind: str, shape: torch.Size, group: int, packed: np.ndarray, bias: Tensor | None
    ) -> MatrixPlan:
        """A packed matrix."""
        self.arrays[name], (rows, columns) = packed, shape
        self.bytes_per_token += packed.nbytes
        held = None if bias is None else self.vector(f"{name}.bias", bias)
        return {"packed": name, "kind": kind, "rows": rows, "columns": columns, "group": group, "bias": held}

    def norm(self, name: str, module: Any) -> str:
        """A norm's weight."""
        self.arrays[self.vector(name, module.weight)] += np.float32(self.norm_offset)
        return name

    def vector(self, name: str, parameter: Tensor) -> str:
        """A small parameter, float32."""
        self.arrays[name] = parameter.detach().float().flatten().clone().numpy()
        return name
