"""The parts of a model that the transforms work on: blocks, branches, projections, and what flows through them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import UnsupportedModel
from .family import FAMILIES, PER_BLOCK, Branch, Family
from .removed import NoAttention, NoMlp

See = Callable[[int, str, Tensor, Tensor, Tensor], None]
"""Gets layer, branch kind, and the branch's input, output and residual, each (b, t, d)."""


def keep_softcap(model: PreTrainedModel) -> None:
    """Let a family that bounds its attention scores compute them eagerly, in place.

    transformers before 5.21 gives it fused kernels, which leave the bound out without a word.
    """
    family = FAMILIES.get(model.config.model_type)
    if family is not None and family.layout.softcap is not None and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")


def family_of(model: PreTrainedModel) -> Family:
    """Where the model's parts are, after all of them were found.

    Raises:
        UnsupportedModel: the family is unknown, its config asks for something left out, or a block lacks a part; the
            message says which.
    """
    name = model.config.model_type
    if name not in FAMILIES:
        raise UnsupportedModel(f"model family {name!r} is not supported; supported: {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[name]
    reason = family.refusal(model.config)
    if reason is not None:
        raise UnsupportedModel(f"this {name} model is not supported: {reason}")
    for index, block in enumerate(blocks(model)):
        for branch in family.branches:
            for part in filter(None, (branch.norm, *branch.body, branch.post)):
                if not hasattr(block, part):
                    raise UnsupportedModel(f"block {index} of this {name} model has no {part!r}")
        attention = getattr(block, family.attention.body[0])
        if isinstance(attention, NoAttention):
            continue
        missing = [part for part in family.layout.parts if not hasattr(attention, part)]
        if missing:
            raise UnsupportedModel(f"attention of block {index} of this {name} model has no {', '.join(missing)}")
    return family


def branches(model: PreTrainedModel) -> tuple[Branch, Branch]:
    """Names of the two branches in each of the model's blocks; raises as `family_of` does."""
    return family_of(model).branches


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The model's decoder layers, first to last.

    Raises:
        UnsupportedModel: there is no list of blocks where the family has it.
    """
    path = _path(model)
    found = _find(model, path)
    if not isinstance(found, nn.ModuleList) or len(found) == 0:
        raise UnsupportedModel(f"{type(model).__name__} has no blocks at {path}")
    return found


def has_branch(model: PreTrainedModel, layer: int, kind: str) -> bool:
    """Whether a block still has a branch, or it was taken out."""
    branch = next(branch for branch in branches(model) if branch.kind == kind)
    return not isinstance(getattr(blocks(model)[layer], branch.body[0]), NoMlp)


def width(model: PreTrainedModel) -> int:
    """Size of the residual stream."""
    return model.config.get_text_config().hidden_size


@dataclass(frozen=True)
class ReadOut:
    """What turns the last block's output into logits.

    Args:
        norm: The final norm.
        head: Output head.
        softcap: Bound c on logits, c tanh(logit / c), or None.
    """

    norm: nn.Module
    head: nn.Module
    softcap: float | None

    def __call__(self, hidden: Float[Tensor, "*n d"]) -> Float[Tensor, "*n v"]:
        """Logits."""
        return self.logits(self.norm(hidden))

    def logits(self, normed: Float[Tensor, "*n d"]) -> Float[Tensor, "*n v"]:
        """Logits, of what the final norm gives."""
        return self.capped(self.head(normed))

    def capped(self, logits: Float[Tensor, "*n v"]) -> Float[Tensor, "*n v"]:
        """Logits, of what the head gives."""
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()


def read_out(model: PreTrainedModel) -> ReadOut:
    """The model's own read-out, at any block.

    Raises:
        UnsupportedModel: the model has no output head, or no final norm where the family has it.
    """
    family = family_of(model)
    norm = _find(model, family.norm)
    if not isinstance(norm, nn.Module):  # OPT may be without, and then holds None
        raise UnsupportedModel(f"{type(model).__name__} has no final norm at {family.norm}")
    head = model.get_output_embeddings()
    if head is None:
        raise UnsupportedModel(f"{type(model).__name__} has no output head")
    return ReadOut(norm, head, None if family.softcap is None else getattr(model.config, family.softcap))


def features(module: nn.Module) -> tuple[int, int] | None:
    """Widths of a projection's input and output; None of any other module."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    sizes: Any = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return None if None in sizes else sizes


def projections(block: nn.Module, branch: Branch) -> dict[str, nn.Module]:
    """The matrix products of a branch by their names in the block; what a projection is made of itself stays out."""
    found: dict[str, nn.Module] = {}

    def search(name: str, module: nn.Module) -> None:
        if features(module) is not None:
            found[name] = module
            return
        for child, inner in module.named_children():
            search(f"{name}.{child}", inner)

    for name in branch.body:
        search(name, getattr(block, name))
    return found


def key_value_features(family: Family, block: nn.Module) -> int:
    """How many keys and values a token has in all heads; what is neither queries nor output, fused or not."""
    sizes = {name: features(module) for name, module in projections(block, family.attention).items()}
    heads, _ = sizes.pop(f"{family.attention.body[0]}.{family.layout.out}", None) or (0, 0)
    return sum(size[1] for size in sizes.values() if size) - heads


def check_copying(model: PreTrainedModel) -> None:
    """Refuse a model whose blocks cannot take over keys and values from the block below.

    Raises:
        UnsupportedModel: two neighbours lay out or turn their keys in different ways; the message says how.
    """
    family, ropes = family_of(model), getattr(model.config, "rope_parameters", None) or {}
    before: dict[str, Any] = {}
    for index, block in enumerate(blocks(model)):
        attention = getattr(block, family.attention.body[0])
        form = {
            "keys and values": key_value_features(family, block),
            "head width": getattr(attention, family.layout.head_dim),
            "rotary positions": bool(getattr(attention, "use_rope", True)),
            "rotary parameters": ropes.get(getattr(attention, "layer_type", None), ropes),
        }
        for what, value in form.items():
            if before and value != before[what]:
                raise UnsupportedModel(
                    f"kv='copy' cannot give block {index} the keys of block {index - 1}: {what} {value} there, "
                    f"{before[what]} here; use kv='dense'"
                )
        before = form


def linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The float projections inside the branches by their full names; embeddings, head and gates are not among them.

    A `Conv1D` (GPT-2), whose matrix lies the other way around, comes as a linear layer that shares its memory.
    """
    return {
        f"{_path(model)}.{index}.{name}": _as_linear(module)
        for index, block in enumerate(blocks(model))
        for branch in branches(model)
        for name, module in projections(block, branch).items()
        if isinstance(module, nn.Linear | Conv1D)
    }


def surrogate_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The float projections of `narrow` surrogates by their full names."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(f"{_path(model)}.") and ".narrow." in name
    }


@dataclass(frozen=True)
class Vocabulary:
    """The two matrices with a row a token, as linear layers that share their memory.

    Args:
        embedding: Full name of the input embedding.
        head: Full name of the output head.
        linears: Both by these names.
        tied: They are one matrix.
        factor: What rows of the embedding are multiplied by: Gemma scales them.
    """

    embedding: str
    head: str
    linears: dict[str, nn.Linear]
    tied: bool
    factor: float


def vocabulary(model: PreTrainedModel) -> Vocabulary:
    """What a model knows of each token.

    Raises:
        UnsupportedModel: it has no output head.
    """
    parts: tuple[Any, Any] = model.get_input_embeddings(), read_out(model).head
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = (names[id(part)] for part in parts)
    return Vocabulary(
        embedding,
        head,
        linears={embedding: _as_linear(parts[0]), head: _as_linear(parts[1])},
        tied=parts[0].weight is parts[1].weight,
        factor=float(getattr(parts[0], "scalar_embed_scale", 1.0)),
    )


@dataclass(frozen=True)
class GatedMlp:
    """A gated linear unit, down(activation(gate x) * up x): its weights, and its activation."""

    gate: Float[Tensor, "m d"]
    up: Float[Tensor, "m d"]
    down: Float[Tensor, "d m"]
    activation: nn.Module

    def inner(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n m"]:
        """The channels' values."""
        return self.activation(F.linear(x, self.gate)) * F.linear(x, self.up)


def gated_mlp(model: PreTrainedModel, layer: int) -> GatedMlp:
    """The MLP of a block as a gated linear unit.

    Raises:
        UnsupportedModel: it is none, its gate and up projections are one, or it has biases.
    """
    branch = branches(model)[1]
    mlp = getattr(blocks(model)[layer], branch.body[0])
    parts = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    plain = all(part is not None and hasattr(part, "weight") and part.bias is None for part in parts)
    if not plain or not hasattr(mlp, "act_fn"):
        raise UnsupportedModel(
            f"the MLP of block {layer} of this {model.config.model_type} model has no gate_proj, up_proj and down_proj "
            "without biases: use surrogate='lowrank'"
        )
    return GatedMlp(*(part.weight for part in parts), mlp.act_fn)  # pyright: ignore[reportOptionalMemberAccess]


def remove_blocks(model: PreTrainedModel, removed: list[int]) -> None:
    """Take blocks out of the model in place; its config then describes a plain, smaller model.

    Raises:
        UnsupportedModel: what a block computes depends on its place, so that the smaller model would be another.
    """
    config = model.config.get_text_config()
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise UnsupportedModel("cannot drop blocks: scale_attn_by_inverse_layer_idx is True, scales follow places")
    kept = [index for index in range(len(blocks(model))) if index not in set(removed)]
    layers = nn.ModuleList(blocks(model)[index] for index in kept)
    for position, block in enumerate(layers):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = position  # the K/V cache is indexed by it
    model.set_submodule(_path(model), layers)
    config.num_hidden_layers = len(kept)
    for name in PER_BLOCK:
        if getattr(config, name, None) is not None:
            setattr(config, name, [getattr(config, name)[index] for index in kept])


@contextmanager
def watch(model: PreTrainedModel, see: See) -> Iterator[None]:
    """Hand every branch's input, output (after its post-norm) and residual to `see`, while the model runs as it is."""
    handles = []
    for layer, block in enumerate(blocks(model)):
        for branch in branches(model):
            held: dict[str, Tensor] = {}
            last = getattr(block, branch.post or branch.body[-1])
            handles += [
                # all hold the same where a part is missing; the later, inner one wins
                block.register_forward_pre_hook(partial(_hold, held, "hidden"), with_kwargs=True),
                getattr(block, branch.norm or branch.body[0]).register_forward_pre_hook(
                    partial(_hold, held, "residual"), with_kwargs=True
                ),
                getattr(block, branch.body[0]).register_forward_pre_hook(partial(_hold, held, "x"), with_kwargs=True),
                last.register_forward_hook(partial(_pass_on, held, see, layer, branch.kind)),
            ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hold(
    held: dict[str, Tensor], name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    held[name] = args[0] if args else kwargs["hidden_states"]


def _pass_on(
    held: dict[str, Tensor], see: See, layer: int, kind: str, _module: nn.Module, _args: object, out: Tensor | tuple
) -> None:
    y = out[0] if isinstance(out, tuple) else out
    shape = held["hidden"].shape  # OPT flattens tokens inside its MLP
    see(layer, kind, *(part.view(shape) for part in (held["x"], y, held["residual"])))


def _find(model: PreTrainedModel, path: str) -> object:
    """What lies at a path, None where nothing does."""
    found: Any = model
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def _path(model: PreTrainedModel) -> str:
    family = FAMILIES.get(model.config.model_type)
    return "model.layers" if family is None else family.blocks


def _as_linear(module: nn.Linear | Conv1D | nn.Embedding) -> nn.Linear:
    if isinstance(module, nn.Linear):
        return module
    if isinstance(module, nn.Embedding):
        linear = nn.Linear(module.embedding_dim, module.num_embeddings, bias=False, device="meta")
        linear.weight = module.weight
        return linear
    linear = nn.Linear(module.nx, module.nf, device="meta")
    with torch.no_grad():
        linear.weight, linear.bias = nn.Parameter(module.weight.T, requires_grad=False), module.bias
    return linear
