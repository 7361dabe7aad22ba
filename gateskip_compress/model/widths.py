"""How wide branches are, and making them narrower: KV groups with their query heads, and MLP channels.

    attention    heads of queries in order, each group of them sharing one head of keys and values; o_proj reads them
    MLP          down(activation(gate x) * up x): channel j is row j of gate and up, and column j of down

Gate and up may be one projection, and so may queries, keys and values. A branch of which nothing is left becomes a
module that adds nothing. GPT-NeoX, GPT-2 and OPT, whose MLPs are no gated linear units, are left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModel
from .blocks import blocks, family_of
from .family import Family
from .removed import NoAttention, NoMlp

_FUSED_MLP = "gate_up_proj"
_HEAD_COUNTS = ("num_heads", "num_attention_heads")
_GROUP_COUNTS = ("num_key_value_heads",)


@dataclass(frozen=True)
class Width:
    """How wide a branch is.

    Args:
        units: KV groups, or channels.
        inputs: What the output projection reads of each: values of its query heads, or 1.
    """

    units: int
    inputs: int

    def columns(self, kept: Sequence[int]) -> Int[Tensor, " m"]:
        """Of the output projection, those that read some units."""
        return _spread(torch.tensor(kept, dtype=torch.long), self.inputs)


Kept = Mapping[tuple[int, str], Sequence[int]]
"""By layer and branch kind: the KV groups or channels that stay, ascending."""


def check_widths(model: PreTrainedModel) -> Family:
    """The family of a model whose branches can be made narrower.

    Raises:
        UnsupportedModel: they cannot; the message says why.
    """
    family = family_of(model)
    first, *others = family.mlp.body
    for layer, block in enumerate(blocks(model)):
        mlp: Any = getattr(block, first)
        if isinstance(mlp, NoMlp):
            continue
        into = [_FUSED_MLP] if hasattr(mlp, _FUSED_MLP) else ["gate_proj", "up_proj"]
        if others or not all(hasattr(mlp, part) for part in (*into, "down_proj")):
            raise UnsupportedModel(
                f"the MLP of block {layer} of this {model.config.model_type} model is no gated linear unit, whose "
                "channels could be cut: use cut='blocks'"
            )
    return family


def branch_width(model: PreTrainedModel, layer: int, kind: str) -> Width:
    """Units of a branch, 0 where it was removed.

    Raises:
        UnsupportedModel: its query heads do not fall into its KV groups.
    """
    family, out = family_of(model), out_projection(model, layer, kind)
    if out is None:
        return Width(0, 1)
    inside: int = out.in_features  # pyright: ignore[reportAssignmentType]
    if kind == "mlp":
        return Width(inside, 1)
    attention = getattr(blocks(model)[layer], family.attention.body[0])
    head = getattr(attention, family.layout.head_dim)
    if family.layout.fused is None:
        groups = getattr(attention, family.layout.separate[1]).out_features // head
    else:
        groups = (getattr(attention, family.layout.fused).out_features - inside) // (2 * head)
    if inside // head % groups:
        raise UnsupportedModel(
            f"block {layer} has {inside // head} query heads for {groups} key/value heads: they form no equal groups"
        )
    return Width(groups, inside // groups)


def out_projection(model: PreTrainedModel, layer: int, kind: str) -> nn.Linear | None:
    """What writes a branch's output, None where the branch was removed."""
    family = family_of(model)
    branch = family.attention if kind == "attention" else family.mlp
    body = getattr(blocks(model)[layer], branch.body[0])
    if isinstance(body, NoMlp):
        return None
    return getattr(body, family.layout.out if kind == "attention" else "down_proj")


def narrow(model: PreTrainedModel, layer: int, kind: str, kept: Sequence[int]) -> None:
    """Leave a branch only some KV groups or channels, in place; none takes the branch out, with its norm.

    The config stays as it was: see `describe`.
    """
    family, block, width = family_of(model), blocks(model)[layer], branch_width(model, layer, kind)
    if len(kept) == width.units:
        return
    branch = family.attention if kind == "attention" else family.mlp
    body = getattr(block, branch.body[0])
    if len(kept) == 0:
        remove(model, layer, kind)
        return
    rows: dict[nn.Linear, list[Tensor]] = {}
    for linear, part in rows_of(model, layer, kind, kept):
        rows.setdefault(linear, []).append(part)
    for linear, parts in rows.items():
        _keep_rows(linear, torch.cat(parts))
    out = out_projection(model, layer, kind)
    assert out is not None
    _keep_columns(out, width.columns(kept))
    if kind == "mlp":
        _tell(body, ("intermediate_size",), len(kept))
    else:
        _tell(body, _HEAD_COUNTS, out.in_features // getattr(body, family.layout.head_dim))
        _tell(body, _GROUP_COUNTS, len(kept))


def rows_of(
    model: PreTrainedModel, layer: int, kind: str, units: Sequence[int]
) -> list[tuple[nn.Linear, Int[Tensor, " n"]]]:
    """Rows that make some units of a branch, unit by unit: of each projection but the output's, fused ones by parts.

    Raises:
        UnsupportedModel: queries and keys are normed over all heads together.
    """
    family, block, width = family_of(model), blocks(model)[layer], branch_width(model, layer, kind)
    which = torch.tensor(units)
    if kind == "mlp":
        body = getattr(block, family.mlp.body[0])
        if hasattr(body, _FUSED_MLP):
            fused = getattr(body, _FUSED_MLP)
            return [(fused, which), (fused, which + width.units)]
        return [(body.gate_proj, which), (body.up_proj, which)]
    layout, attention = family.layout, getattr(block, family.attention.body[0])
    head = getattr(attention, layout.head_dim)
    for norm in ("q_norm", "k_norm"):
        if hasattr(attention, norm) and getattr(attention, norm).weight.numel() != head:
            raise UnsupportedModel("queries and keys are normed over all heads together: use cut='channels'")
    queries, shared = _spread(which, width.inputs), _spread(which, head)
    if layout.fused is None:
        names = zip(layout.separate, (queries, shared, shared), strict=True)
        return [(getattr(attention, name), rows) for name, rows in names]
    fused, keys = getattr(attention, layout.fused), width.units * width.inputs
    return [(fused, queries), (fused, shared + keys), (fused, shared + keys + width.units * head)]


def describe(model: PreTrainedModel, groups: int, inputs: int, channels: int) -> None:
    """Write one width of all blocks into the config, in place: a plain, narrower model.

    Raises:
        ValueError: transformers refuses such a config.
    """
    config = model.config.get_text_config()
    changes = plain_config(model, groups, inputs, channels)
    for name, value in changes.items():
        setattr(config, name, value)


def plain_config(model: PreTrainedModel, groups: int, inputs: int, channels: int) -> dict[str, int]:
    """The config's entries for one width of all blocks.

    Raises:
        ValueError: transformers refuses such a config.
    """
    family, config = family_of(model), model.config.get_text_config()
    attention = getattr(blocks(model)[0], family.attention.body[0])
    head = getattr(attention, family.layout.head_dim)
    changes = {
        "num_attention_heads": groups * inputs // head,
        "num_key_value_heads": groups,
        "head_dim": head,
        "intermediate_size": channels,
    }
    try:
        type(config)(**{**config.to_dict(), **changes})
    except Exception as error:
        reason = str(error).strip().splitlines()[-1].strip()
        shown = ", ".join(f"{name} {value}" for name, value in changes.items())
        raise ValueError(f"a plain config cannot have {shown} ({reason}): use shape='uneven'") from error
    return changes


def check_unshared(model: PreTrainedModel) -> None:
    """Refuse a model two of whose parts share a weight that cutting would change.

    Raises:
        UnsupportedModel: names both.
    """
    inside = {id(p) for block in blocks(model) for p in block.parameters()}
    seen: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = seen.setdefault(id(parameter), name)
        if other != name and id(parameter) in inside:
            raise UnsupportedModel(
                f"{name} and {other} are one weight: cutting one would cut the other; give each block its own first"
            )


def remove(model: PreTrainedModel, layer: int, kind: str, instead: nn.Module | None = None) -> None:
    """Take a branch out, in place.

    Without norms, as they have nothing to norm; with something instead, the norm before it stays.

    Args:
        model: The model.
        layer: Of the block.
        kind: Of the branch.
        instead: What gives the branch's output from its input from now on, by its `replace`.
    """
    family, block = family_of(model), blocks(model)[layer]
    branch = family.attention if kind == "attention" else family.mlp
    body = getattr(block, branch.body[0])
    if kind == "attention":
        new = NoAttention(body.layer_idx, family.layout.cache, family.layout.head_dim, instead)
    else:
        new = NoMlp(instead)
    setattr(block, branch.body[0], new)
    for norm in filter(None, (branch.post, branch.norm if instead is None else None)):
        setattr(block, norm, nn.Identity())


def _spread(units: Int[Tensor, " n"], size: int) -> Int[Tensor, " m"]:
    """Places of units of `size` places each."""
    return (units[:, None] * size + torch.arange(size)).flatten()


def _keep_rows(linear: nn.Linear, rows: Int[Tensor, " n"]) -> None:
    rows = rows.to(linear.weight.device)
    linear.weight = nn.Parameter(linear.weight.data[rows], requires_grad=linear.weight.requires_grad)
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.data[rows], requires_grad=linear.bias.requires_grad)
    linear.out_features = len(rows)


def _keep_columns(linear: nn.Linear, columns: Int[Tensor, " n"]) -> None:
    columns = columns.to(linear.weight.device)
    linear.weight = nn.Parameter(linear.weight.data[:, columns], requires_grad=linear.weight.requires_grad)
    linear.in_features = len(columns)


def _tell(module: Any, names: Sequence[str], value: int) -> None:
    """A module's own notes of its size, where it keeps any."""
    for name in names:
        if hasattr(module, name):
            setattr(module, name, value)
