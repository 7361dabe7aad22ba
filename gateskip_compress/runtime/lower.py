"""From a Hugging Face model to the native one: which models it knows, and how their weights are packed.

Codes, scales and zero points of quantized projections are taken over as they are. Float projections become bfloat16 or
stay float32; the output head, which is read whole for every token, becomes 8 bits in groups of 64 unless asked
otherwise. Left out: gates that scale (all kinds but `effect`), NF4 and FP4 weights, rotary positions that change with
the length of the text, windows narrower than the context.
"""

import os
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModel
from ..gating.block import GatedBlock
from ..gating.dial import is_gated
from ..gating.gate import Gate
from ..model import blocks, family_of
from ..names import check_choice
from ..quantization.groups import GroupWeight, quantize
from ..quantization.linear import QuantizedLinear
from .extension import extension
from .session import Session

Floats = Literal["bf16", "f32"]
Half = Literal["f16", "f32"]
Head = Literal["int8", "bf16", "f32"]
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
_HEAD_GROUP = 64
_SLICE_ROWS = 8192
"""Of the head, quantized at a time: vocabularies are long."""
_FIXED_ROPES = ("default", "linear", "llama3", "yarn", "proportional")


def lower(
    model: PreTrainedModel,
    *,
    context_tokens: int = 2048,
    rows: int = 1,
    threads: int | None = None,
    floats: Floats = "bf16",
    head: Head = "int8",
    cache: Half = "f16",
    activation_bits: int = 16,
    kernels: str | None = None,
) -> Session:
    """Pack a model's weights for the native runtime.

    Args:
        model: Of a known family, compressed or not; it stays as it is, and the session reads its embedding and dial.
        context_tokens: Positions of the cache: most tokens of a prompt and its continuation.
        rows: Sequences that decode together at most.
        threads: None is one for each core.
        floats: How projections that are not quantized, and `lowrank` surrogates, are kept.
        head: How the output head is kept. With `int8`, the largest logits are computed again from its float rows.
        cache: How keys and values are kept.
        activation_bits: Of what meets quantized weights: 16 is as exact as the float path and costs one token nothing,
            since the weights must be read all the same; 8 is faster on prompts.
        kernels: Of `kernel_names()`; None is the fastest that fits.

    Raises:
        RuntimeUnavailable: the extension was not built.
        UnsupportedModel: the runtime does not know such a model; the message says which part.
        ValueError: an argument is out of its range.
    """
    native = extension()
    for name, value, known in (("floats", floats, Floats), ("head", head, Head), ("cache", cache, Half)):
        check_choice(name, value, get_args(known))
    check_lowerable(model, context_tokens)
    if context_tokens < 1 or rows < 1:
        raise ValueError(f"context_tokens {context_tokens} and rows {rows} must be at least 1")
    check_choice("activation_bits", activation_bits, (8, 16))
    shape = _shape(native.Shape(), model, context_tokens, rows)
    shape.half_cache, shape.fine = cache == "f16", activation_bits == 16
    pack = _Packer(_fitting(native, kernels, shape.head_dim), floats)
    layers = [pack.layer(block, _copies(block)) for block in blocks(model)]
    shape.inner = pack.widest
    output = pack.head(model.get_output_embeddings(), head)
    cos, sin = _rope(model, context_tokens)
    shape.rotated = cos.shape[1]
    exact = _table(model.get_output_embeddings()) if head == "int8" else None
    built = native.Model(shape, pack.kernels, _checked_threads(threads))
    norm = model.model.norm.weight
    embedding = _table(model.get_input_embeddings())
    built.finish(layers, _vector(norm), output, embedding, exact, cos.numpy(), sin.numpy(), pack.held)
    return Session(model, built, context_tokens, rows, pack.kernels, pack.bytes_per_token)


def check_lowerable(model: PreTrainedModel, context_tokens: int) -> None:
    """Raise UnsupportedModel where the runtime cannot run the model as transformers does; says which part and why."""
    config, name = model.config, model.config.model_type
    if name not in FAMILIES:
        raise UnsupportedModel(f"the native runtime does not know model family {name!r}; it knows {', '.join(FAMILIES)}")
    if model.device.type != "cpu":
        raise UnsupportedModel(f"the native runtime runs on the CPU, and this model is on {model.device}")
    family_of(model)
    if config.hidden_act != "silu":
        raise UnsupportedModel(f"the native runtime does not know activation {config.hidden_act!r}, only 'silu'")
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind not in _FIXED_ROPES:
        raise UnsupportedModel(
            f"rope_type {kind!r} turns positions by the length of the text; the native runtime knows those that do not: "
            + ", ".join(_FIXED_ROPES)
        )
    for index, block in enumerate(blocks(model)):
        window = _window(config, block)
        if window is not None and window < context_tokens:
            raise UnsupportedModel(
                f"block {index} attends to the last {window} tokens only, which the native runtime cannot; "
                f"use context_tokens={window} or less, where it makes no difference"
            )
        if not isinstance(block, GatedBlock):
            continue
        if type(block).decide is not GatedBlock.decide:
            raise UnsupportedModel(f"block {index} is a {type(block).__name__} that decides in another way than its gates")
        scaling = sorted({gate.kind for gate in block.gates.values()} - {"effect", None})
        if scaling:
            raise UnsupportedModel(
                f"block {index} has a {scaling[0]!r} gate, which scales; the native runtime runs gates of kind 'effect'"
            )


def _window(config: Any, block: nn.Module) -> int | None:
    """How far back a block's attention reaches; None is all the way."""
    own = getattr(block.self_attn, "sliding_window", None)
    return getattr(config, "sliding_window", None) if config.model_type == "mistral" else own


def _copies(block: nn.Module) -> bool:
    return bool(getattr(block, "copies", False))


def _shape(shape: Any, model: PreTrainedModel, context_tokens: int, rows: int) -> Any:
    config, attention = model.config, blocks(model)[0].self_attn
    shape.width, shape.head_dim = config.hidden_size, attention.head_dim
    shape.heads = attention.q_proj.out_features // attention.head_dim
    shape.kv_heads = attention.k_proj.out_features // attention.head_dim
    shape.vocabulary = model.get_output_embeddings().weight.shape[0]
    shape.eps, shape.scale = config.rms_norm_eps, attention.scaling
    shape.context, shape.rows = context_tokens, rows
    return shape


def _fitting(native: Any, asked: str | None, head_dim: int) -> str:
    """The kernels asked for, or the fastest whose vectors fit into a head."""
    usable = dict(native.kernels())
    if asked is not None:
        check_choice("kernels", asked, tuple(usable))
    fitting = [name for name, lanes in usable.items() if head_dim % lanes == 0 and asked in (None, name)]
    if not fitting:
        raise UnsupportedModel(f"head width {head_dim} is no multiple of what kernels {asked or 'here'} take at once")
    return fitting[0]


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _checked_threads(threads: int | None) -> int:
    if threads is not None and not 1 <= threads <= cores():
        raise ValueError(f"threads {threads} must be from 1 to {cores()}, the cores here: more would wait for each other")
    return cores() if threads is None else threads


def _rope(model: PreTrainedModel, context_tokens: int) -> tuple[Float[Tensor, "t r"], Float[Tensor, "t r"]]:
    """Cosines and sines of each position, from the model's own module."""
    places = torch.arange(context_tokens)[None]
    with torch.no_grad():
        cos, sin = model.model.rotary_emb(torch.zeros(1, dtype=torch.float32), places)
    return cos[0].float().contiguous(), sin[0].float().contiguous()


def _table(module: nn.Module) -> np.ndarray:
    """A float matrix where it lies, bfloat16 as its bits; other types are copied to float32."""
    weight: Tensor = module.weight.detach().contiguous()  # pyright: ignore[reportAssignmentType]
    return (weight.view(torch.uint16) if weight.dtype == torch.bfloat16 else weight.float()).numpy()


def _vector(parameter: Tensor) -> list[float]:
    return parameter.detach().float().flatten().tolist()


@dataclass
class _Packer:
    """Packs matrices for one set of kernels, and keeps what the native model only points to."""

    kernels: str
    floats: Floats
    widest: int = 0
    bytes_per_token: int = 0
    held: list[Any] = field(default_factory=list, repr=False)

    def layer(self, block: Any, copies: bool) -> Any:
        """One block."""
        layer, attention, mlp = extension().Layer(), block.self_attn, block.mlp
        for name in "qkvo":
            setattr(layer, name, self.matrix(getattr(attention, f"{name}_proj")))
        for name in ("gate", "up", "down"):
            setattr(layer, name, self.matrix(getattr(mlp, f"{name}_proj")))
        self.widest = max(self.widest, mlp.gate_proj.out_features)
        for name in ("q_norm", "k_norm"):
            if hasattr(attention, name):
                setattr(layer, name, _vector(getattr(attention, name).weight))
        layer.rotary, layer.copies = bool(getattr(attention, "use_rope", True)), copies
        gates = dict(getattr(block, "gates", {}))
        layer.attention = self.branch(block.input_layernorm, gates.get("attention"))
        layer.mlp = self.branch(block.post_attention_layernorm, gates.get("mlp"))
        return layer

    def branch(self, norm: nn.Module, gate: Gate | None) -> Any:
        """A branch's norm and gate."""
        branch = extension().Branch()
        branch.norm = _vector(norm.weight)
        if gate is None:
            return branch
        branch.gated, branch.follows = True, gate.kind is None
        if not branch.follows:
            branch.score, branch.bias = _vector(gate.score_weight), float(gate.score_bias)
        branch.surrogate = self.surrogate(gate)
        return branch

    def surrogate(self, gate: Gate) -> Any:
        """What a gate puts in the branch's place. Its bytes are no part of a token's: at full budget nobody reads them."""
        before, surrogate = self.bytes_per_token, extension().Surrogate()
        if gate.surrogate == "mean":
            surrogate.offset = _vector(gate.offset)
        elif gate.surrogate == "lowrank":
            surrogate.gate, surrogate.down = self.floating(gate.down, None), self.floating(gate.up, gate.offset)
            self.widest = max(self.widest, len(gate.down))
        elif gate.surrogate == "narrow":
            for name in ("gate", "up", "down"):
                setattr(surrogate, name, self.matrix(getattr(gate.narrow, name)))
            self.widest = max(self.widest, gate.narrow.gate.out_features)
        self.bytes_per_token = before
        return surrogate

    def matrix(self, module: nn.Module) -> Any:
        """A projection, quantized or float."""
        if isinstance(module, QuantizedLinear):
            return self.coded([module.quantized], module.bias)
        if type(module) is nn.Linear:
            return self.floating(module.weight, module.bias)
        raise UnsupportedModel(f"the native runtime knows linear and quantized projections, not {type(module).__name__}")

    def head(self, module: nn.Module, form: Head) -> Any:
        """The output head."""
        weight: Tensor = module.weight.detach()  # pyright: ignore[reportAssignmentType]
        bias = getattr(module, "bias", None)
        if form != "int8":
            return self.floating(weight, bias, form)
        return self.coded((quantize(part.float(), 8, _HEAD_GROUP, symmetric=True) for part in weight.split(_SLICE_ROWS)), bias)

    def coded(self, slices: Any, bias: Tensor | None) -> Any:
        """Codes of neighbouring rows, slice by slice, each of whole blocks of rows."""
        parts, rows, first = [], 0, None
        for part in slices:
            first = first or part
            if part.levels is not None:
                raise UnsupportedModel("NF4 and FP4 weights are no integers; for the native runtime use solver='gptq'")
            parts.append(self.packed(part))
            rows += len(part.codes)
        kind = "int8" if first.bits == 8 else "int4"
        return self.keep(kind, rows, first.codes.shape[1], first.group_size, np.concatenate(parts), bias)

    def packed(self, part: GroupWeight) -> np.ndarray:
        """One slice of a quantized matrix; 3 bits are kept as 4."""
        kind = "int8" if part.bits == 8 else "int4"
        scale = part.scale.detach().float().numpy()
        return extension().pack_codes(self.kernels, kind, part.codes.numpy(), scale, part.zero.numpy(), part.group_size)

    def floating(self, weight: Tensor, bias: Tensor | None, form: Floats | None = None) -> Any:
        """A float matrix."""
        form = form or self.floats
        packed = extension().pack_floats(self.kernels, form, weight.detach().float().contiguous().numpy())
        return self.keep(form, *weight.shape, extension().CHUNK, packed, bias)

    def keep(self, kind: str, rows: int, columns: int, group: int, packed: np.ndarray, bias: Tensor | None) -> Any:
        """A matrix, kept alive as long as the model."""
        values = None if bias is None else bias.detach().float().numpy()
        matrix = extension().HeldMatrix(self.kernels, kind, rows, columns, group, packed, values)
        self.held.append(matrix)
        self.bytes_per_token += packed.nbytes
        return matrix
