"""Model families: where their blocks, branches, norms and projections are. Names alone; nothing runs here.

A block has two branches, attention and MLP, each

    h <- h + post(body(norm(h)))

where the norm or the post-norm may be missing. The MLP reads what attention wrote, except in parallel blocks
(GPT-NeoX), where both read the h that enters the block. Encoders, cross-attention and mixtures of experts are left out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedConfig

BRANCH_KINDS = ("attention", "mlp")


@dataclass(frozen=True)
class Branch:
    """Names of one branch's modules inside its block.

    Args:
        kind: `attention` or `mlp`.
        norm: Before the body; None where the body reads the stream itself.
        body: Run one after another; attention is one module.
        post: Norm after the body, before the sum.
    """

    kind: str
    norm: str | None
    body: tuple[str, ...]
    post: str | None = None


@dataclass(frozen=True)
class Layout:
    """How an attention module is laid out.

    Args:
        separate: Projections of queries, keys and values, where each has its own.
        fused: The one projection of all three, where there is one; its rows are queries, keys, values.
        by_head: The rows of `fused` are so ordered within each head (GPT-NeoX).
        out: Projection of the heads' outputs.
        head_dim: Attribute with the width of a head.
        softcap: Attribute with the bound c on scores, c tanh(score / c); None where the family has none.
        cache: What the block's argument with the K/V cache is called.
    """

    separate: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    fused: str | None = None
    by_head: bool = False
    out: str = "o_proj"
    head_dim: str = "head_dim"
    softcap: str | None = None
    cache: str = "past_key_values"

    @property
    def parts(self) -> tuple[str, ...]:
        """Attributes that the attention module must have."""
        projections = self.separate if self.fused is None else (self.fused,)
        return (*projections, self.out, self.head_dim, "scaling", "layer_idx", *filter(None, (self.softcap,)))


def _accept(_config: PreTrainedConfig) -> None:
    """Nothing stands in the way."""


@dataclass(frozen=True)
class Family:
    """One family.

    Args:
        attention: The first branch.
        mlp: The second.
        blocks: Path of the list of blocks.
        norm: Path of the final norm.
        softcap: Config attribute with the bound c on logits, c tanh(logit / c); None where the family has none.
        layout: Of the attention module.
        parallel: Config attribute that says whether both branches read the same h; None is no.
        dropout: Attribute of a block with the rate that its own forward drops out at, in training mode; None drops
            nothing, or in modules of their own.
        refusal: Why a model of this config is not supported, or None.
    """

    attention: Branch
    mlp: Branch
    blocks: str = "model.layers"
    norm: str = "model.norm"
    softcap: str | None = None
    layout: Layout = Layout()
    parallel: str | None = None
    dropout: str | None = None
    refusal: Callable[[PreTrainedConfig], str | None] = _accept

    @property
    def branches(self) -> tuple[Branch, Branch]:
        """Both, in the order they run."""
        return self.attention, self.mlp


def _refuse_opt(config: PreTrainedConfig) -> str | None:
    if not config.do_layer_norm_before:
        return "do_layer_norm_before is False: its norms act on the stream itself, so no branch can be skipped alone"
    if config.word_embed_proj_dim != config.hidden_size:
        return f"word_embed_proj_dim {config.word_embed_proj_dim} is not hidden_size {config.hidden_size}"
    return None


def _refuse_gpt2(config: PreTrainedConfig) -> str | None:
    return "add_cross_attention is True: its blocks have a third branch" if config.add_cross_attention else None


def _refuse_gemma3(config: PreTrainedConfig) -> str | None:
    return "use_bidirectional_attention is True" if config.use_bidirectional_attention else None


_attention = partial(Branch, "attention")
_mlp = partial(Branch, "mlp")
_LLAMA = Family(
    _attention("input_layernorm", ("self_attn",)),
    _mlp("post_attention_layernorm", ("mlp",)),
)
_GEMMA = partial(
    Family,
    _attention("input_layernorm", ("self_attn",), "post_attention_layernorm"),
    _mlp("pre_feedforward_layernorm", ("mlp",), "post_feedforward_layernorm"),
    softcap="final_logit_softcapping",
)
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
    "gemma2": _GEMMA(layout=Layout(softcap="attn_logit_softcapping")),
    "gemma3_text": _GEMMA(refusal=_refuse_gemma3),
    "olmo2": Family(
        _attention(None, ("self_attn",), "post_attention_layernorm"),
        _mlp(None, ("mlp",), "post_feedforward_layernorm"),
    ),
    "phi3": Family(_LLAMA.attention, _LLAMA.mlp, layout=Layout(fused="qkv_proj")),
    "gpt_neox": Family(
        _attention("input_layernorm", ("attention",)),
        _mlp("post_attention_layernorm", ("mlp",)),
        blocks="gpt_neox.layers",
        norm="gpt_neox.final_layer_norm",
        layout=Layout(fused="query_key_value", by_head=True, out="dense", head_dim="head_size", cache="layer_past"),
        parallel="use_parallel_residual",
    ),
    "gpt2": Family(
        _attention("ln_1", ("attn",)),
        _mlp("ln_2", ("mlp",)),
        blocks="transformer.h",
        norm="transformer.ln_f",
        layout=Layout(fused="c_attn", out="c_proj"),
        refusal=_refuse_gpt2,
    ),
    "opt": Family(
        _attention("self_attn_layer_norm", ("self_attn",)),
        _mlp("final_layer_norm", ("fc1", "activation_fn", "fc2")),
        blocks="model.decoder.layers",
        norm="model.decoder.final_layer_norm",
        layout=Layout(out="out_proj"),
        dropout="dropout",
        refusal=_refuse_opt,
    ),
}
"""`config.model_type` -> its family. Add one here, and to the tests' `FAMILY_CONFIGS`."""

PER_BLOCK = ("layer_types", "no_rope_layers")
"""Config attributes that have one entry for each block."""
