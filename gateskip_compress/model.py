"""The one file that knows Hugging Face attribute names: where blocks, branches, norms and projections are.

A block is a pre-norm decoder layer with two branches in sequence,

    h = h + post_a(attention(norm_a(h)))
    h = h + post_m(mlp(norm_m(h)))

where the post-norms exist in some families only (Gemma 3). Parallel branches (GPT-NeoX), learned positions (GPT-2,
OPT), fused projections (Phi-3) and soft-capped attention (Gemma 2) are left out; they raise `UnsupportedModel`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from .errors import UnsupportedModel


@dataclass(frozen=True)
class Branch:
    """Names of one branch's modules inside its block: `h + post(body(norm(h)))`."""

    kind: str
    norm: str
    body: str
    post: str | None = None


_LLAMA = (
    Branch("attention", norm="input_layernorm", body="self_attn"),
    Branch("mlp", norm="post_attention_layernorm", body="mlp"),
)
_GEMMA3 = (
    Branch("attention", norm="input_layernorm", body="self_attn", post="post_attention_layernorm"),
    Branch("mlp", norm="pre_feedforward_layernorm", body="mlp", post="post_feedforward_layernorm"),
)
FAMILIES: dict[str, tuple[Branch, Branch]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma3_text": _GEMMA3,
}
"""`config.model_type` -> the two branches of a block. Add a family here, and to the tests' `FAMILY_CONFIGS`."""

BRANCH_KINDS = ("attention", "mlp")
_ATTENTION_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "scaling")


def branches(model: PreTrainedModel) -> tuple[Branch, Branch]:
    """Names of the two branches in each of the model's blocks.

    Raises:
        UnsupportedModel: the family is unknown, or a block lacks a part; the message says which.
    """
    family = model.config.model_type
    if family not in FAMILIES:
        raise UnsupportedModel(f"model family {family!r} is not supported; supported: {', '.join(sorted(FAMILIES))}")
    names = FAMILIES[family]
    for index, block in enumerate(blocks(model)):
        for branch in names:
            for part in filter(None, (branch.norm, branch.body, branch.post)):
                if not hasattr(block, part):
                    raise UnsupportedModel(f"block {index} of this {family} model has no {part!r}")
        attention = getattr(block, names[0].body)
        missing = [part for part in _ATTENTION_PARTS if not hasattr(attention, part)]
        if missing:
            raise UnsupportedModel(f"attention of block {index} of this {family} model has no {', '.join(missing)}")
    return names


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The model's decoder layers, first to last.

    Raises:
        UnsupportedModel: there is no list of blocks at `model.model.layers`.
    """
    found = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(found, nn.ModuleList) or len(found) == 0:
        raise UnsupportedModel(f"{type(model).__name__} has no blocks at model.layers")
    return found


def width(model: PreTrainedModel) -> int:
    """Size of the residual stream."""
    return model.config.get_text_config().hidden_size


def read_out(model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    """What turns the last block's output into logits: the final norm, then the output head.

    Raises:
        UnsupportedModel: there is no norm at `model.model.norm`, or no head.
    """
    norm, head = getattr(getattr(model, "model", None), "norm", None), model.get_output_embeddings()
    if norm is None or head is None:
        raise UnsupportedModel(f"{type(model).__name__} has no final norm at model.norm, or no output head")
    return norm, head


def linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The projections inside the branches by their full names; embeddings, head and gates are not among them."""
    names = branches(model)
    layers = blocks(model)
    prefix = next(name for name, module in model.named_modules() if module is layers)
    return {
        f"{prefix}.{index}.{branch.body}.{name}": module
        for index, block in enumerate(layers)
        for branch in names
        for name, module in getattr(block, branch.body).named_modules()
        if isinstance(module, nn.Linear)
    }


def remove_blocks(model: PreTrainedModel, removed: list[int]) -> None:
    """Take blocks out of the model in place; its config then describes a plain, smaller model."""
    config = model.config.get_text_config()
    kept = [index for index in range(len(blocks(model))) if index not in set(removed)]
    layers = nn.ModuleList(blocks(model)[index] for index in kept)
    for position, block in enumerate(layers):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = position  # the K/V cache is indexed by it
    model.model.layers = layers
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[index] for index in kept]


def project_kv(
    attention: nn.Module,
    x: Float[Tensor, "b t d"],
    rope: tuple[Tensor, Tensor],
    cache: Cache | None,
) -> tuple[Float[Tensor, "b h s k"], Float[Tensor, "b h s k"]]:
    """Keys and values of every token, written to the cache where there is one; returned with what the cache holds.

    Args:
        attention: A family's attention module.
        x: Normalised input of the branch.
        rope: Cosine and sine of each position, each (1 or b, t, k).
        cache: Grows by t positions.
    """
    shape = (*x.shape[:-1], -1, attention.head_dim)
    keys = attention.k_proj(x).view(shape)
    if hasattr(attention, "k_norm"):
        keys = attention.k_norm(keys)
    keys = _rotate(keys, *rope).transpose(1, 2)  # (b, h, t, k)
    values = attention.v_proj(x).view(shape).transpose(1, 2)
    if cache is not None:
        keys, values = cache.update(keys, values, attention.layer_idx)
    return keys, values


def attend(
    attention: nn.Module,
    x: Float[Tensor, "b t d"],
    keep: Bool[Tensor, "b t"],
    kept: Int[Tensor, " n"],
    keys: Float[Tensor, "b h s k"],
    values: Float[Tensor, "b h s k"],
    rope: tuple[Tensor, Tensor],
    mask: Tensor | None,
    positions: Int[Tensor, "c t"],
) -> Float[Tensor, "n d"]:
    """Attention output of the kept tokens alone, in row-major order of `keep`; the others have no query at all.

    Projections run on exactly the kept tokens. The score-value products of a batch are padded to its fullest row, since
    rows keep different numbers of tokens.

    Args:
        attention: A family's attention module.
        x: Normalised input of the branch.
        keep: Tokens that run.
        kept: Their places in the flattened batch.
        keys: All keys, from `project_kv`.
        values: All values.
        rope: Cosine and sine of each position.
        mask: What the model gave the block: boolean or additive (b or 1, 1, t, s), or None where causal order is all.
        positions: Place of each token in its sequence, one row for all or one each.
    """
    b, t = keep.shape
    cos, sin = (part.expand(b, -1, -1).flatten(0, 1).index_select(0, kept) for part in rope)  # (n, k)
    query = attention.q_proj(x.flatten(0, 1).index_select(0, kept)).view(len(kept), -1, attention.head_dim)
    if hasattr(attention, "q_norm"):
        query = attention.q_norm(query)
    query = _rotate(query, cos, sin)  # (n, h, k)
    if b == 1:
        packed, where, slots = query[None], kept[None], None
    else:
        row, column = kept // t, kept % t
        slots = row, keep.cumsum(dim=1)[row, column] - 1
        longest = int(slots[1].max()) + 1
        packed = query.new_zeros(b, longest, *query.shape[1:])
        packed[slots] = query
        where = torch.zeros(b, longest, dtype=torch.long, device=x.device)
        where[slots] = column
    mixed = F.scaled_dot_product_attention(
        packed.transpose(1, 2),  # (b, h, n, k)
        keys,
        values,
        attn_mask=_mask_rows(mask, where, positions, keys.shape[2], query.dtype),
        scale=attention.scaling,
        enable_gqa=True,
    ).transpose(1, 2)
    mixed = mixed[0] if slots is None else mixed[slots]
    return attention.o_proj(mixed.reshape(len(kept), -1))


def _mask_rows(
    mask: Tensor | None, where: Int[Tensor, "b n"], positions: Int[Tensor, "c t"], s: int, dtype: torch.dtype
) -> Tensor | None:
    """The mask's rows at the columns `where`, (b, 1, n, s); None where every key may be seen."""
    b, t = where.shape[0], positions.shape[1]
    if mask is None:
        if t == 1:
            return None
        absolute = positions.expand(b, -1).gather(1, where)  # a static cache has more keys than tokens so far
        ahead = torch.arange(s, device=where.device) > absolute[..., None]
        return torch.zeros(ahead.shape, dtype=dtype, device=where.device).masked_fill_(ahead, -torch.inf)[:, None]
    if mask.shape[2] == 1:
        return mask[..., :s]
    rows = torch.arange(b, device=where.device)[:, None]
    return mask.expand(b, -1, -1, -1)[rows, 0, where][:, None, :, :s]


def _rotate(x: Float[Tensor, "*b h k"], cos: Float[Tensor, "*c k"], sin: Float[Tensor, "*c k"]) -> Tensor:
    """Rotary position embedding of the half-split kind (arXiv 2104.09864, as the Llama family lays it out)."""
    left, right = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(-2) + torch.cat((-right, left), dim=-1) * sin.unsqueeze(-2)
