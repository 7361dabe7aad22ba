"""From a Hugging Face model to the native one: which models it knows, and how their weights are packed.

Codes, scales and zero points of quantized projections are taken over as they are. Float projections become bfloat16 or
stay float32; the output head, which is read whole for every token, becomes 8 bits in groups of 64 unless asked
otherwise. Left out: gates that scale (all kinds but `effect`), NF4 and FP4 weights, rotary positions that change with
the length of the text, windows narrower than the context.
"""

from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn
from transformers import PreTrainedModel

from ..checkpoint import manifest_of
from ..errors import UnsupportedModel
from ..gating.block import GatedBlock
from ..model import NoMlp, blocks, family_of
from ..names import check_choice
from ..processor import checked_threads
from ..text import chat_prompt
from .blueprint import Blueprint, Builder
from .extension import extension, fitting_kernels
from .pack import Floats, Head, Packer, is_coded
from .packed import Packed, PackedFile, Sample
from .prompt import SAMPLE
from .release import check_weights, free, own_what_is_left, refuse_without_weights
from .session import Session

Cache = Literal["f16", "f32", "int8"]
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
_FIXED_ROPES = ("default", "linear", "llama3", "yarn", "proportional")


def lower(
    model: PreTrainedModel,
    *,
    context_tokens: int = 2048,
    rows: int = 1,
    threads: int | None = None,
    floats: Floats = "bf16",
    head: Head = "int8",
    cache: Cache = "f16",
    activation_bits: int = 16,
    kernels: str | None = None,
    beside: Path | None = None,
    release: bool = False,
) -> Session:
    """Pack a model's weights for the native runtime.

    Args:
        model: Of a known family, compressed or not; the session reads its dial.
        context_tokens: Positions of the cache: most tokens of a prompt and its continuation.
        rows: Sequences that decode together at most.
        threads: None is one for each core.
        floats: How projections that are not quantized, and `lowrank` surrogates, are kept.
        head: How the output head is kept. With `int8`, greedy decoding reads a copy of 4 bits, and computes the largest
            logits again from the head's own rows; where logits are asked for, its float rows correct the largest.
        cache: How keys and values are kept. `int8`, with a scale for each position and head, halves a long cache and
            what is read of it.
        activation_bits: Of what meets quantized weights: 16 is as exact as the float path and costs one token nothing,
            since the weights must be read all the same; 8 is faster on prompts.
        kernels: Of `kernel_names()`; None is the fastest that fits.
        beside: The checkpoint that the model was loaded from and still equals: packed weights are kept there, and
            mapped the next time. None packs into memory.
        release: Free the model's matrices once they are packed, for about half the memory: from then on the session
            alone runs it, and the model itself refuses to run or to be saved. False leaves the model as it is.

    Raises:
        RuntimeUnavailable: the extension was not built.
        UnsupportedModel: the runtime does not know such a model, and the message says which part; or another session
            has its weights.
        ValueError: an argument is out of its range.
    """
    extension()
    for name, value, known in (("floats", floats, Floats), ("head", head, Head), ("cache", cache, Cache)):
        check_choice(name, value, get_args(known))
    check_weights(model)
    check_lowerable(model, context_tokens)
    if context_tokens < 1 or rows < 1:
        raise ValueError(f"context_tokens {context_tokens} and rows {rows} must be at least 1")
    check_choice("activation_bits", activation_bits, (8, 16))
    used, fitting = checked_threads(threads), fitting_kernels(blocks(model)[0].self_attn.head_dim, kernels)
    file = None if beside is None else PackedFile.beside(beside, fitting, floats=floats, head=head)
    found = None if file is None else file.read()
    if found is None:
        packer = Packer(fitting, floats)
        found = Packed(draw_up(model, packer, head, release=release), packer.arrays, sample_of(model))
        if file is not None:
            file.write(found)
    if release:
        _release(model)
    built = Builder(found.plan, found.arrays, fitting).model(
        context_tokens=context_tokens, rows=rows, threads=used, cache=cache, fine=activation_bits == 16
    )
    return Session(
        native=built,
        context_tokens=context_tokens,
        rows=rows,
        kernels=fitting,
        vocabulary=found.plan["sizes"]["vocabulary"],
        bytes_per_token=found.plan["bytes_per_token"],
        drafts=found.plan["drafts"],
        model=model,
    )


def draw_up(model: PreTrainedModel, pack: Packer, head: Head, *, release: bool) -> Blueprint:
    """A model's blueprint; its arrays are the packer's. `release` frees blocks as soon as they are packed."""
    config: Any = model.config
    attention: Any = blocks(model)[0].self_attn
    layers = [pack.layer(index, block, _copies(block)) for index, block in enumerate(blocks(model))]
    if release:  # not before: a block may still be refused, and torch then runs the model
        _free_blocks(model)
    entries: Any = model.get_output_embeddings()
    output = pack.head(entries, head)
    quick = pack.quick_head(entries, output)
    embedding = pack.embedding(model.get_input_embeddings(), entries, output)
    exact = None if quick is None else output
    if head == "int8" and not is_coded(entries):
        exact = embedding if embedding_is_head(model) else pack.table("exact_head", entries)
    rotary: Any = model.model.rotary_emb
    windows = [window for block in blocks(model) if (window := _window(config, block)) is not None]
    return {
        "sizes": {
            "width": config.hidden_size,
            "head_dim": attention.head_dim,
            "heads": attention.q_proj.out_features // attention.head_dim,
            "kv_heads": attention.k_proj.out_features // attention.head_dim,
            "vocabulary": entries.out_features,
            "inner": pack.widest,
        },
        "eps": config.rms_norm_eps,
        "scale": attention.scaling,
        "layers": layers,
        "norm": pack.vector("norm", model.model.norm.weight),
        "head": output,
        "quick_head": quick,
        "embedding": embedding,
        "exact_head": exact,
        "frequencies": pack.vector("frequencies", rotary.inv_freq),
        "rope_scale": float(rotary.attention_scaling),
        "window": min(windows, default=None),
        "bytes_per_token": pack.bytes_per_token,
        "drafts": any("draft_gates" in block._modules for block in blocks(model)),
    }


def _free_blocks(model: PreTrainedModel) -> None:
    """Free the matrices of blocks, and the file that the rest is mapped from."""
    for block in blocks(model):
        free(block)
    own_what_is_left(model)


def _release(model: PreTrainedModel) -> None:
    """Free what the session holds, or has packed."""
    for vocabulary in (model.get_output_embeddings(), model.get_input_embeddings()):
        free(vocabulary)
    _free_blocks(model)
    refuse_without_weights(model)


def check_lowerable(model: PreTrainedModel, context_tokens: int) -> None:
    """Raise UnsupportedModel where the runtime cannot run the model as transformers does; says which part and why."""
    config, name = model.config, model.config.model_type
    if name not in FAMILIES:
        raise UnsupportedModel(f"the native runtime does not know family {name!r}; it knows {', '.join(FAMILIES)}")
    if model.device.type != "cpu":
        raise UnsupportedModel(f"the native runtime runs on the CPU, and this model is on {model.device}")
    family_of(model)
    if config.hidden_act != "silu":
        raise UnsupportedModel(f"the native runtime does not know activation {config.hidden_act!r}, only 'silu'")
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind not in _FIXED_ROPES:
        raise UnsupportedModel(
            f"rope_type {kind!r} turns positions by the length of the text; the native runtime knows those that do "
            f"not: {', '.join(_FIXED_ROPES)}"
        )
    _check_blocks(model)
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
            raise UnsupportedModel(f"block {index}, a {type(block).__name__}, decides in another way than by its gates")
        gates = [*block.gates.values(), *getattr(block, "draft_gates", {}).values()]
        scaling = sorted({gate.kind for gate in gates} - {"effect", None})
        if scaling:
            raise UnsupportedModel(
                f"block {index} has a {scaling[0]!r} gate, which scales; the native runtime runs gates of kind 'effect'"
            )


def _check_blocks(model: PreTrainedModel) -> None:
    """Refuse blocks that pruning left without a branch, or with other heads than their neighbours have."""
    parts: list[Any] = list(blocks(model))
    for index, block in enumerate(parts):
        if isinstance(block.mlp, NoMlp) or isinstance(block.self_attn, NoMlp):
            raise UnsupportedModel(f"block {index} has no attention or no MLP; the native runtime knows whole blocks")
    heads = [(block.self_attn.q_proj.out_features, block.self_attn.k_proj.out_features) for block in parts]
    odd = next((index for index, found in enumerate(heads) if found != heads[0]), None)
    if odd is not None:
        raise UnsupportedModel(
            f"queries and keys of block {odd} have {heads[odd]} features, those of block 0 {heads[0]}; the native "
            "runtime knows blocks that are alike in this: prune attention with shape='uniform'"
        )


def _window(config: Any, block: nn.Module) -> int | None:
    """How far back a block's attention reaches; None is all the way."""
    own = getattr(block.self_attn, "sliding_window", None)
    return getattr(config, "sliding_window", None) if config.model_type == "mistral" else own


def _copies(block: nn.Module) -> bool:
    return bool(getattr(block, "copies", False))


def sample_of(model: PreTrainedModel) -> Sample | None:
    """What the tokenizer that a compressed model carries makes of `prompt.SAMPLE`."""
    manifest = manifest_of(model)
    if manifest is None or manifest.tokenizer is None:
        return None
    ids = chat_prompt(manifest.tokenizer, SAMPLE)[0].tolist()
    return {"ids": ids, "text": str(manifest.tokenizer.decode(ids, skip_special_tokens=True))}


def embedding_is_head(model: PreTrainedModel) -> bool:
    """Whether the two are one float matrix."""
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    return getattr(embedding, "weight", None) is head.weight
