"""The kernels that a compressed model spends its time in, by pytest-benchmark; not part of the tests.

    python -m pytest -o addopts= benchmarks/kernel_speed.py --benchmark-autosave

Timed: one call on tensors of SmolLM2's and of a larger model's size, after a warm-up. The plain matrix product beside
them is what a kernel has to beat, or to come close to. Not timed: loading, a whole model.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

import gateskip_compress as g
from gateskip_compress.gating.calibrate import everywhere
from gateskip_compress.gating.turning import dial_of
from gateskip_compress.quantization.groups import dequantize, pack, quantize, unpack
from gateskip_compress.quantization.linear import QuantizedLinear, unpacked
from gateskip_compress.step import Context

SIZES = {"576x1536": (576, 1536), "2048x8192": (2048, 8192)}


@pytest.fixture(params=SIZES.values(), ids=SIZES)
def weight(request: Any) -> torch.Tensor:
    """A seeded matrix, (out, in)."""
    rows, columns = request.param
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def quantized(weight: torch.Tensor, bits: int) -> QuantizedLinear:
    """A layer of few bits with that matrix."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer = QuantizedLinear.like(linear, bits, 64, symmetric=False)
    layer.load(quantize(weight, bits, 64, symmetric=False), None)
    return layer


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_quantize(benchmark: Any, weight: torch.Tensor, bits: int) -> None:
    """To nearest, by groups of 64."""
    benchmark(quantize, weight, bits, 64, symmetric=False)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_dequantize(benchmark: Any, weight: torch.Tensor, bits: int) -> None:
    """Packed codes to the float matrix: what every call of a packed layer pays."""
    layer = quantized(weight, bits)
    benchmark(lambda: dequantize(layer.quantized))


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_pack_and_unpack(benchmark: Any, weight: torch.Tensor, bits: int) -> None:
    """Codes into bytes and back."""
    codes = quantize(weight, bits, 64, symmetric=False).codes
    benchmark(lambda: unpack(pack(codes, bits), bits))


@pytest.mark.parametrize("tokens", [1, 128])
@pytest.mark.parametrize("form", ["float", "packed", "unpacked"])
def test_linear(benchmark: Any, weight: torch.Tensor, form: str, tokens: int) -> None:
    """A product with a float matrix, with 4 bits, and with 4 bits held as float."""
    x, layer = torch.randn(tokens, weight.shape[1]), quantized(weight, 4)
    with torch.inference_mode():
        if form == "float":
            benchmark(F.linear, x, weight)
        elif form == "packed":
            benchmark(layer, x)
        else:
            with unpacked(layer):
                benchmark(layer, x)


@pytest.mark.parametrize("kept", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("how", ["compact", "masked"])
def test_gated_block(benchmark: Any, how: str, kept: float) -> None:
    """A block of SmolLM2's size over 256 tokens: rows gathered, attention over what is kept, rows put back."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=1,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=512,
        bos_token_id=1,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(2, 64, (1, 256), generator=torch.Generator().manual_seed(1))
    g.GateSkip(budget=1.0, rank=8, surrogate="zero").apply(model, Context(ids.expand(4, -1)))
    dial = dial_of(model)
    with torch.inference_mode(), g.budget(model, 1.0):
        if kept < 1:
            scores = _scores(model, ids) if kept else torch.tensor([1e9])
            dial.thresholds = everywhere(model, float(scores.quantile(1 - kept)))
        dial.how = "masked" if how == "masked" else "compact"
        benchmark(lambda: model(ids, use_cache=False, logits_to_keep=1))


def _scores(model: Any, ids: torch.Tensor) -> torch.Tensor:
    from gateskip_compress.gating.calibrate import observe

    seen = observe(model, ids, everywhere(model, float("-inf")))
    return torch.cat([decision.score.flatten() for decision in seen])
