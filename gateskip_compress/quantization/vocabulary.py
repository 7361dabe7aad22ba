"""Embedding and output head in few bits, where `bits_of` names them. A model that ties them keeps one matrix."""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..model import Vocabulary, vocabulary
from ..step import Record
from .groups import GroupWeight, dequantize
from .linear import QuantizedEmbedding, QuantizedLinear

Bits = dict[str, int]
"""By full name: of embedding, head or both."""


def whole(parts: Vocabulary, bits: Bits) -> Bits:
    """Bits of everything that is quantized: what is asked of one of a tied pair holds for both.

    Raises:
        ValueError: two numbers of bits are asked for one matrix.
    """
    if not parts.tied or not bits:
        return bits
    if len(set(bits.values())) > 1:
        raise ValueError(f"{parts.embedding} and {parts.head} are one matrix: bits_of {bits} must be equal")
    return dict.fromkeys((parts.embedding, parts.head), next(iter(bits.values())))


def quantize_vocabulary(
    model: PreTrainedModel,
    bits: Bits,
    rounded: Callable[[Tensor, int], GroupWeight],
    empty: Callable[[nn.Linear, int], QuantizedLinear],
) -> Record:
    """Replace embedding and head, in place; the record says whether they are one.

    Args:
        model: In float.
        bits: From `whole`, not empty.
        rounded: Quantizes a weight to some bits.
        empty: A layer of a linear's shape to keep it.
    """
    parts, tables, errors = vocabulary(model), {}, {}
    for name in bits if not parts.tied else (parts.head,):
        linear = parts.linears[name]
        weight = rounded(linear.weight.data, bits[name])
        tables[name] = empty(linear, bits[name])
        tables[name].load(weight, linear.bias)
        errors[name] = float((dequantize(weight) - linear.weight.data).norm() / linear.weight.data.norm())
    _place(model, parts, tables)
    return {"bits": bits, "tied": parts.tied, "relative_error": errors}


def rebuild_vocabulary(
    model: PreTrainedModel, record: Record, empty: Callable[[nn.Linear, int], QuantizedLinear]
) -> None:
    """Put empty layers where embedding and head are, in place."""
    parts = replace(vocabulary(model), tied=record["tied"])
    names = [parts.head] if parts.tied else list(record["bits"])
    _place(model, parts, {name: empty(parts.linears[name], record["bits"][name]) for name in names})


def _place(model: PreTrainedModel, parts: Vocabulary, tables: dict[str, QuantizedLinear]) -> None:
    if parts.head in tables:
        model.set_submodule(parts.head, tables[parts.head])
    table = tables[parts.head] if parts.tied else tables.get(parts.embedding)
    if table is not None:
        model.set_submodule(parts.embedding, QuantizedEmbedding(table, parts.factor, tied=parts.tied))
    if parts.tied:  # what is tied from now on is no parameter, and transformers must not look for one
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}
