import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import compress, tiny, tokens

import gateskip_compress as g
from gateskip_compress.quantization.int4 import dequantize, pack, quantize, unpack
from gateskip_compress.quantization.linear import Int4Linear, unpacked


def naive(weight, group_size, symmetric):
    """The docstring's equations, one weight after another."""
    out = torch.empty_like(weight)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], group_size):
            group = weight[row, start : start + group_size]
            if symmetric:
                scale, zero = 2 * group.abs().max() / 15, torch.tensor(8.0)
            else:
                low, high = group.min().clamp(max=0), group.max().clamp(min=0)
                scale = (high - low) / 15
                zero = (-low / scale).round() if scale > 0 else torch.tensor(0.0)
            for i, value in enumerate(group):
                code = 0 if scale == 0 else ((value / scale).round() + zero).clamp(0, 15)
                out[row, start + i] = 0 if scale == 0 else (code - zero) * scale
    return out


@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 3),
    group_size=st.sampled_from([32, 64]),
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
    size=st.sampled_from([1e-6, 1.0, 1e4]),
)
def test_quantize_equals_the_naive_loop(rows, groups, group_size, symmetric, seed, size):
    weight = size * torch.randn(rows, groups * group_size, generator=torch.Generator().manual_seed(seed))
    weight[0, :group_size] = 0
    found = dequantize(quantize(weight, group_size, symmetric))
    torch.testing.assert_close(found, naive(weight, group_size, symmetric), atol=0, rtol=1e-5)


@settings(deadline=None)
@given(rows=st.integers(1, 7), pairs=st.integers(1, 40), seed=st.integers(0, 99))
def test_packing_loses_nothing(rows, pairs, seed):
    codes = torch.randint(16, (rows, 2 * pairs), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes)), codes)


def test_error_is_at_most_half_a_step():
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    packed = quantize(weight, 64, symmetric=False)
    error = (dequantize(packed) - weight).abs().unflatten(1, (2, 64)).amax(-1)
    # rounding of the zero point can push an end of the range out by half a step more
    assert (error <= 1.01 * packed.scale).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value):
    weight = torch.ones(4, 64)
    weight[1, 3] = value
    with pytest.raises(ValueError, match="1 NaN or infinite"):
        quantize(weight, 64, symmetric=True)


def test_a_group_size_that_does_not_divide_names_those_that_do():
    model = tiny(intermediate_size=96)
    with pytest.raises(ValueError, match=r"group_size 64 .* divide in_features 96; .* these do: 32"):
        compress(model, g.Quantize(group_size=64))
    assert not any(isinstance(module, Int4Linear) for module in model.modules())


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_layer_multiplies_by_the_dequantized_weight(symmetric):
    linear = torch.nn.Linear(64, 24)
    weight = quantize(linear.weight.data, 32, symmetric)
    layer = Int4Linear.like(linear, 32, symmetric)
    layer.load(weight, linear.bias)
    x = torch.randn(3, 5, 64)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, dequantize(weight), linear.bias))


def test_only_projections_in_blocks_are_quantized():
    model = compress(tiny(), g.GateSkip(rank=4), g.Quantize(group_size=32))
    names = [name for name, module in model.named_modules() if isinstance(module, Int4Linear)]
    assert len(names) == 4 * 7
    assert not any("gates" in name or "lm_head" in name for name in names)
    assert torch.isfinite(model(tokens(1, 8)).logits).all()


def test_unpacking_changes_speed_alone():
    model = compress(tiny(), g.Quantize(group_size=32))
    ids = tokens(1, 8)
    packed = model(ids).logits
    with unpacked(model):
        assert torch.equal(model(ids).logits, packed)
        held = [module._held for module in model.modules() if isinstance(module, Int4Linear)]
        assert all(matrix is not None for matrix in held)
    assert all(module._held is None for module in model.modules() if isinstance(module, Int4Linear))
