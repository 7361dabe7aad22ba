"""From a Hugging Face model to the native one: which models it knows, and how their weights are packed.

Codes, scales and zero points of quantized projections are taken over as they are. Float projections become bfloat16 or
stay float32; the output head, which is read whole for every token, becomes 8 bits in groups of 64 unless asked
otherwise. Left out: gates that scale (all kinds but `effect`), NF4 and FP4 weights, rotary positions that change with
the length of the text, logits or scores with a soft cap.
"""

from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checkpoint import manifest_of
from ..errors import UnsupportedModel
from ..gating.block import GatedBlock
from ..model import blocks, family_of, has_branch
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
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma3_text")
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu"}
"""Of MLPs, and what they are called natively."""
_NORM_OFFSETS = {"gemma3_text": 1.0}
"""By family: what is added to a norm's weight."""
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
        cache: How keys and values are kept. `int8`, with a scale for 32 channels of a key and for a head's value,
            nearly halves a long cache and what is read of it.
        activation_bits: Of what meets quantized weights: 16 is as exact as the float path and costs one token nothing,
            since the weights must be read all the same; 8 is faster on prompts.
        kernels: Of `kernel_names()`; None is the fastest that fits.
        beside: The checkpoint that the model was loaded from and still equals: packed weights are kept there, and
            read the next time. None packs into memory.
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
    check_lowerable(model)
    if context_tokens < 1 or rows < 1:
        raise ValueError(f"context_tokens {context_tokens} and rows {rows} must be at least 1")
    check_choice("activation_bits", activation_bits, (8, 16))
    used, fitting = checked_threads(threads), fitting_kernels(_attention(model).head_dim, kernels)
    file = None if beside is None else PackedFile.beside(beside, fitting, floats=floats, head=head)
    found = None if file is None else file.read()
    if found is None:
        packer = Packer(fitting, floats, _NORM_OFFSETS.get(model.config.model_type, 0.0))
        found = Packed(draw_up(model, packer, head, release=release), packer.arrays, sample_of(model))
        if file is not None:
            file.write(found)
        found = found.in_one_piece()
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
    attention, turned, family = _attention(model), _rotations(model), family_of(model)
    layers = [
        pack.layer(index, block, family, _rotation(block, list(turned)), _window(config, block))
        for index, block in enumerate(blocks(model))
    ]
    if release:  # not before: a block may still be refused, and torch then runs the model
        _free_blocks(model)
    entries: Any = model.get_output_embeddings()
    output = pack.head(entries, head)
    quick = pack.quick_head(entries, output)
    embedding = pack.embedding(model.get_input_embeddings(), entries, output)
    exact = None if quick is None else output
    if head == "int8" and not is_coded(entries):
        exact = embedding if embedding_is_head(model) else pack.table("exact_head", entries)
    words: Any = model.get_input_embeddings()
    return {
        "sizes": {
            "width": config.hidden_size,
            "head_dim": attention.head_dim,
            "vocabulary": entries.out_features,
            "inner": pack.widest,
        },
        "eps": config.rms_norm_eps,
        "scale": attention.scaling,
        "enlarged": float(words.embed_scale.to(words.weight.dtype)) if hasattr(words, "embed_scale") else 1.0,
        "activation": _ACTIVATIONS[_activation(config)],
        "layers": layers,
        "norm": pack.norm("norm", model.model.norm),
        "head": output,
        "quick_head": quick,
        "embedding": embedding,
        "exact_head": exact,
        "rotations": [
            {"frequencies": pack.vector(f"frequencies.{name}", frequencies), "scale": scale}
            for name, (frequencies, scale) in turned.items()
        ],
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


def check_lowerable(model: PreTrainedModel) -> None:
    """Raise UnsupportedModel where the runtime cannot run the model as transformers does; says which part and why."""
    config, name = model.config, model.config.model_type
    if name not in FAMILIES:
        raise UnsupportedModel(f"the native runtime does not know family {name!r}; it knows {', '.join(FAMILIES)}")
    if model.device.type != "cpu":
        raise UnsupportedModel(f"the native runtime runs on the CPU, and this model is on {model.device}")
    family_of(model)
    if _activation(config) not in _ACTIVATIONS:
        raise UnsupportedModel(
            f"the native runtime does not know activation {_activation(config)!r}, only {', '.join(_ACTIVATIONS)}"
        )
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name, None) is not None:
            raise UnsupportedModel(f"{name} is {getattr(config, name)}; the native runtime knows no soft caps")
    ropes = getattr(config, "rope_parameters", None) or {}
    for each in [part for part in ropes.values() if isinstance(part, dict)] or [ropes]:
        kind = each.get("rope_type", "default")
        if kind not in _FIXED_ROPES:
            raise UnsupportedModel(
                f"rope_type {kind!r} turns positions by the length of the text; the native runtime knows those that "
                f"do not: {', '.join(_FIXED_ROPES)}"
            )
    _attention(model)
    for index, block in enumerate(blocks(model)):
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


def _attention(model: PreTrainedModel) -> Any:
    """The first attention that is there; heads of all are equally wide."""
    for layer, block in enumerate(blocks(model)):
        if has_branch(model, layer, "attention"):
            return block.self_attn
    raise UnsupportedModel("no block has attention; the native runtime knows models of which at least one has")


def _activation(config: Any) -> str:
    """Of MLPs."""
    return getattr(config, "hidden_activation", None) or config.hidden_act


def _rotations(model: PreTrainedModel) -> dict[str, tuple[Tensor, float]]:
    """Frequencies of rotary positions, and what they are scaled with, by the kinds of attention that have their own."""
    rotary: Any = model.model.rotary_emb
    if hasattr(rotary, "inv_freq"):
        return {"all": (rotary.inv_freq, float(rotary.attention_scaling))}
    found = ((kind, f"{kind}_inv_freq", f"{kind}_attention_scaling") for kind in rotary.layer_types)
    return {kind: (getattr(rotary, name), float(getattr(rotary, scale))) for kind, name, scale in found}


def _rotation(block: nn.Module, known: list[str]) -> int | None:
    """Which of the model's a block's attention turns by; any will do where there is none."""
    attention: Any = block.self_attn
    if not getattr(attention, "use_rope", True):
        return None
    kind = getattr(attention, "layer_type", None)
    return known.index(kind) if kind in known else 0


def _window(config: Any, block: nn.Module) -> int | None:
    """How many positions a token of a block sees; None is all."""
    own = getattr(block.self_attn, "sliding_window", None)
    return getattr(config, "sliding_window", None) if config.model_type == "mistral" else own


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
