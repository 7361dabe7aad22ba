"""Attention for a part of the tokens: queries of those that run, keys and values of those that have them."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import Cache
from transformers.pytorch_utils import Conv1D

from .family import Layout

Rope = tuple[Tensor, Tensor]
"""Cosine and sine of each position."""
KeysValues = tuple[Tensor, Tensor]
"""Each (b, h, t, k)."""

_strip: ContextVar[int] = ContextVar("strip", default=64)
"""Queries at a time: they are causal, so the first of many tokens need few of the keys."""


@contextmanager
def whole_rectangles() -> Iterator[None]:
    """Inside the `with`, all queries meet all keys, as multiply-adds are counted: see `macs.py`."""
    token = _strip.set(1 << 62)
    try:
        yield
    finally:
        _strip.reset(token)


@dataclass(frozen=True)
class Sight:
    """What the tokens of one call may see.

    Args:
        mask: What the model gave the block: boolean or additive (b or 1, 1, t, s), or None where causal order is all.
        own: Each token's place among the keys.
        real: Tokens that are no padding.
        first: Tokens that see none but themselves: the first of their sequence.
    """

    mask: Tensor | None
    own: Int[Tensor, " t"]
    real: Bool[Tensor, "b t"]
    first: Bool[Tensor, "b t"]


def sight(mask: Tensor | None, cache: Cache | None, layer: int, hidden: Float[Tensor, "b t d"]) -> Sight:
    """Read the mask, before the cache grows.

    Position ids are no guide to the first token: they count padding where a caller gives none.
    """
    b, t = hidden.shape[:2]
    past = 0 if cache is None else cache.get_seq_length(layer)
    dropped = 0 if cache is None else cache.get_mask_sizes(t, layer)[1]  # keys that left a sliding window
    place = torch.arange(t, device=hidden.device)
    own = place + past - dropped
    if mask is None:  # transformers leaves it out where nothing is padded
        return Sight(None, own, own.new_ones(b, t, dtype=torch.bool), (place + past == 0).expand(b, t))
    visible = (mask if mask.dtype == torch.bool else mask == 0)[:, 0].expand(b, -1, -1)
    real = visible[:, place, own]
    return Sight(mask, own, real, real & (visible.sum(-1) == 1))


def queries(layout: Layout, attention: nn.Module, x: Float[Tensor, "n d"], rope: Rope | None) -> Float[Tensor, "n h k"]:
    """Queries of some tokens, rotated."""
    if layout.fused is None:
        query = getattr(attention, layout.separate[0])(x)
    else:
        query = _fused(layout, attention, x, 0)
    return _finish(layout, attention, "q_norm", query, rope)


def keys_values(
    layout: Layout, attention: nn.Module, x: Float[Tensor, "*n d"], rope: Rope | None
) -> tuple[Float[Tensor, "*n h k"], Float[Tensor, "*n h k"]]:
    """Keys, rotated, and values of some tokens."""
    if layout.fused is None:
        key, value = (getattr(attention, name)(x) for name in layout.separate[1:])
    else:
        key, value = _fused(layout, attention, x, 1).chunk(2, dim=-1)
    heads = value.reshape(*x.shape[:-1], -1, getattr(attention, layout.head_dim))
    return _finish(layout, attention, "k_norm", key, rope), heads


def rope_of(rope: Rope | None, rows: int, kept: Int[Tensor, " n"]) -> Rope | None:
    """The kept tokens' cosines and sines."""
    if rope is None:
        return None
    cos, sin = (part.expand(rows, -1, -1).flatten(0, 1).index_select(0, kept) for part in rope)
    return cos, sin


def overlay(below: Float[Tensor, "b h t k"], kept: Int[Tensor, " n"], new: Float[Tensor, "n h k"]) -> Tensor:
    """Keys or values of the block below, with the kept tokens' own in their places, (b, h, t, k)."""
    rows = below.transpose(1, 2)
    return rows.flatten(0, 1).index_copy(0, kept, new).view(rows.shape).transpose(1, 2)


class Overlay:
    """Stands in for the cache in one call of an attention module, and sees its new keys and values.

    Args:
        cache: Grows by them, if there is one.
        below: Keys and values of the block below, which skipped tokens take instead of their own; None takes none.
        keep: Tokens that have their own.
    """

    def __init__(self, cache: Cache | None, below: KeysValues | None, keep: Bool[Tensor, "b t"] | None) -> None:
        self.cache, self.below, self.keep = cache, below, keep
        self.new: KeysValues | None = None

    def update(self, keys: Tensor, values: Tensor, layer: int) -> KeysValues:
        """Called by the attention module, as the cache's own is; returns all that the queries may attend to."""
        if self.below is not None and self.keep is not None:
            own = self.keep[:, None, :, None]
            keys, values = torch.where(own, keys, self.below[0]), torch.where(own, values, self.below[1])
        self.new = keys, values
        return self.new if self.cache is None else self.cache.update(keys, values, layer)


def attend(
    layout: Layout,
    attention: nn.Module,
    query: Float[Tensor, "n h k"],
    keep: Bool[Tensor, "b t"],
    kept: Int[Tensor, " n"],
    keys: Float[Tensor, "b g s k"],
    values: Float[Tensor, "b g s k"],
    seen: Sight,
) -> Float[Tensor, "n d"]:
    """Attention output of the kept tokens alone, in row-major order of `keep`; the others have no query at all.

    The score-value products of a batch are padded to its fullest row, since rows keep different numbers of tokens.

    Args:
        layout: Of the family.
        attention: A family's attention module.
        query: Of the kept tokens, from `queries`.
        keep: Tokens that run.
        kept: Their places in the flattened batch.
        keys: All keys.
        values: All values.
        seen: From `sight`.
    """
    b, t = keep.shape
    if b == 1:
        packed, where, slots = query[None], kept[None], None
    else:
        row, column = kept // t, kept % t
        slots = row, keep.cumsum(dim=1)[row, column] - 1
        longest = int(slots[1].max()) + 1
        packed = query.new_zeros(b, longest, *query.shape[1:])
        packed[slots] = query
        where = torch.zeros(b, longest, dtype=torch.long, device=query.device)
        where[slots] = column
    packed = packed.transpose(1, 2)  # (b, h, n, k)
    cap = getattr(attention, layout.softcap) if layout.softcap is not None else None
    own, places = seen.own[where], torch.arange(keys.shape[2], device=keys.device)
    strips = []
    for begin, end, most in _strips(own, keys.shape[2]):
        mask = _mask_rows(seen, where[:, begin:end], own[:, begin:end, None], places[:most], query.dtype)
        part, k, v = packed.narrow(2, begin, end - begin), keys.narrow(2, 0, most), values.narrow(2, 0, most)
        if cap is not None:
            strips.append(_capped(part, k, v, mask, attention.scaling, cap))
        else:
            strips.append(
                F.scaled_dot_product_attention(part, k, v, attn_mask=mask, scale=attention.scaling, enable_gqa=True)
            )
    mixed = strips[0] if len(strips) == 1 else torch.cat(strips, dim=2)
    mixed = mixed.transpose(1, 2)
    mixed = mixed[0] if slots is None else mixed[slots]
    return getattr(attention, layout.out)(mixed.reshape(len(kept), -1))


def _fused(layout: Layout, attention: nn.Module, x: Float[Tensor, "*n d"], part: int) -> Float[Tensor, "*n _"]:
    """Queries (part 0) or keys and values (part 1) out of a fused projection, by its rows; the rest is not computed.

    Rows ordered by head are one product a head, since taking them together would copy the matrix.
    """
    assert layout.fused is not None
    projection, out = getattr(attention, layout.fused), getattr(attention, layout.out)
    size = getattr(attention, layout.head_dim)
    weight = _matrix(projection)
    per_query = size if layout.by_head else _matrix(out).shape[1]
    groups = weight.shape[0] // (3 * size) if layout.by_head else 1
    rows = slice(per_query) if part == 0 else slice(per_query, None)
    flat = x.reshape(1, -1, x.shape[-1])
    y = flat.expand(groups, -1, -1) @ weight.view(groups, -1, weight.shape[1])[:, rows].transpose(1, 2)
    if projection.bias is not None:
        y = y + projection.bias.view(groups, 1, -1)[..., rows]
    return y.unflatten(-1, (1 + part, -1)).permute(1, 2, 0, 3).reshape(*x.shape[:-1], -1)  # keys of all heads, values


def _matrix(projection: nn.Module) -> Float[Tensor, "o d"]:
    weight: Tensor = projection.weight  # pyright: ignore[reportAssignmentType]
    return weight.T if isinstance(projection, Conv1D) else weight


def _finish(layout: Layout, attention: nn.Module, norm: str, flat: Tensor, rope: Rope | None) -> Tensor:
    """Norm of queries or keys, over a head's width or over all, as wide as it is; heads; rotary positions."""
    if hasattr(attention, norm):
        module = getattr(attention, norm)
        flat = module(flat.unflatten(-1, (-1, module.weight.numel()))).flatten(-2)
    heads = flat.unflatten(-1, (-1, getattr(attention, layout.head_dim)))
    # SmolLM3 has blocks without positions, and says so here
    return heads if rope is None or not getattr(attention, "use_rope", True) else _rotate(heads, *rope)


def _capped(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, cap: float) -> Tensor:
    """Attention whose scores are bounded by `cap` (arXiv 2408.00118, sec. 2), which fused kernels do not know."""
    keys, values = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (keys, values))
    scores = cap * (query @ keys.transpose(2, 3) * scale / cap).tanh()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype) @ values


def _strips(own: Int[Tensor, "b n"], s: int) -> list[tuple[int, int, int]]:
    """Queries from begin to end, and how many keys from the first on hold all that these may see."""
    n, size = own.shape[1], _strip.get()
    ends = [*range(size, n, size), n]
    if len(ends) == 1:
        return [(0, n, s)]
    reach = own.amax(0).cummax(0).values.tolist()
    return [(begin, end, reach[end - 1] + 1) for begin, end in zip([0, *ends], ends, strict=False)]


def _mask_rows(
    seen: Sight, where: Int[Tensor, "b n"], own: Int[Tensor, "b n 1"], places: Int[Tensor, " s"], dtype: torch.dtype
) -> Tensor | None:
    """The mask's rows at the columns `where`, (b, 1, n, s); None where every key may be seen."""
    b, s = len(where), len(places)
    if seen.mask is None:
        if len(seen.own) == 1:
            return None
        # a static cache has more keys than tokens so far
        return torch.where(places > own, own.new_full((), -torch.inf, dtype=dtype), 0)[:, None]
    if len(seen.own) == 1:
        return seen.mask[..., :s]
    rows = torch.arange(b, device=where.device)[:, None]
    return seen.mask.expand(b, -1, -1, -1)[rows, 0, where][:, None, :, :s]


def _rotate(x: Float[Tensor, "*b h k"], cos: Float[Tensor, "*c r"], sin: Float[Tensor, "*c r"]) -> Tensor:
    """Rotary position embedding of the half-split kind (arXiv 2104.09864), of the first r of k channels."""
    half = cos.shape[-1] // 2
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    left, right, passed = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    left, right = (
        (left * cos[..., :half]).addcmul(right, sin[..., :half], value=-1),
        (right * cos[..., half:]).addcmul(left, sin[..., half:]),
    )
    return torch.cat((left.to(x.dtype), right.to(x.dtype), passed), dim=-1)
