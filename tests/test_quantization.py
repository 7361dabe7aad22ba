from copy import deepcopy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tiny_models import CALIBRATION, DEVICE, compress, tiny, tokens
from transformers import AutoModelForCausalLM

import gateskip_compress as g
from gateskip_compress.formats import export
from gateskip_compress.gram import add_gram, mirrored
from gateskip_compress.model import FAMILIES, blocks, linears, walk
from gateskip_compress.pipeline import apply
from gateskip_compress.precision import quick_products
from gateskip_compress.quantization.allocate import allocate_bits
from gateskip_compress.quantization.gptq import gptq, output_error
from gateskip_compress.quantization.groups import dequantize, pack, quantize, unpack
from gateskip_compress.quantization.linear import QuantizedLinear, unpacked
from gateskip_compress.quantization.transform import _block_of, _inputs
from gateskip_compress.step import Context
from gateskip_compress.track import untracked
from gateskip_compress.transforms import build


def naive(weight, bits, group_size, symmetric):
    """The docstring's equations, one weight after another."""
    out, most = torch.empty_like(weight), 2**bits - 1
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], group_size):
            group = weight[row, start : start + group_size]
            if symmetric:
                scale, zero = 2 * group.abs().max() / most, torch.tensor(2.0 ** (bits - 1))
            else:
                low, high = group.min().clamp(max=0), group.max().clamp(min=0)
                scale = (high - low) / most
                zero = (-low / scale).round() if scale > 0 else torch.tensor(0.0)
            if 2**-14 <= scale <= 65504:
                scale = scale.half().float()
            for i, value in enumerate(group):
                code = 0 if scale == 0 else ((value / scale).round() + zero).clamp(0, most)
                out[row, start + i] = 0 if scale == 0 else (code - zero) * scale
    return out


@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 5),
    width=st.sampled_from([24, 32, 64, 96, 160]),
    bits=st.sampled_from([3, 4, 8]),
    group_size=st.sampled_from([32, 64]),
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
    size=st.sampled_from([1e-6, 1.0, 1e4]),
)
def test_quantize_equals_the_naive_loop(rows, width, bits, group_size, symmetric, seed, size):
    weight = size * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    weight[0, :group_size] = 0
    found = dequantize(quantize(weight, bits, group_size, symmetric))
    torch.testing.assert_close(found, naive(weight, bits, group_size, symmetric), atol=0, rtol=1e-5)


@settings(deadline=None)
@given(rows=st.integers(1, 7), eights=st.integers(1, 9), bits=st.sampled_from([3, 4, 8]), seed=st.integers(0, 99))
def test_packing_loses_nothing(rows, eights, bits, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (rows, 8 * eights), generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (rows, eights * bits)
    assert torch.equal(unpack(packed, bits), codes)


def test_error_is_at_most_half_a_step():
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    packed = quantize(weight, 4, 64, symmetric=False)
    error = (dequantize(packed) - weight).abs().unflatten(1, (2, 64)).amax(-1)
    # rounding of the zero point can push an end of the range out by half a step more
    assert (error <= 1.01 * packed.scale).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value):
    weight = torch.ones(4, 64)
    weight[1, 3] = value
    with pytest.raises(ValueError, match="1 NaN or infinite"):
        quantize(weight, 4, 64, symmetric=True)


def test_a_group_size_that_does_not_divide_names_those_that_do():
    model = tiny(intermediate_size=96)
    with pytest.raises(
        ValueError, match=r"group_size 64 .* divide in_features 96; .* these do: 32; .*short_groups=True"
    ):
        compress(model, g.Quantize(group_size=64))
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_layer_multiplies_by_the_dequantized_weight(symmetric):
    linear = torch.nn.Linear(64, 24)
    weight = quantize(linear.weight.data, 4, 32, symmetric)
    layer = QuantizedLinear.like(linear, 4, 32, symmetric)
    layer.load(weight, linear.bias)
    x = torch.randn(3, 5, 64)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, dequantize(weight), linear.bias))


def test_only_projections_in_blocks_are_quantized():
    model = compress(tiny(), g.GateSkip(rank=4), g.Quantize(group_size=32))
    names = [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    assert len(names) == 4 * 7
    assert not any("gates" in name or "lm_head" in name for name in names)
    assert torch.isfinite(model(tokens(1, 8)).logits).all()


def test_unpacking_changes_speed_alone():
    model = compress(tiny(), g.Quantize(group_size=32))
    ids = tokens(1, 8)
    packed = model(ids).logits
    with unpacked(model):
        assert torch.equal(model(ids).logits, packed)
        held = [module._held for module in model.modules() if isinstance(module, QuantizedLinear)]
        assert all(matrix is not None for matrix in held)
    assert all(module._held is None for module in model.modules() if isinstance(module, QuantizedLinear))


def inputs_and_weight(n=300, d=96, o=12):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(n, d, generator=generator) @ torch.randn(d, d, generator=generator)
    return x, torch.randn(o, d, generator=generator)


def missed_by(weight, hessian, group_size, symmetric, found, damping=0.01):
    """How far, in steps, each code is from the value that is to be rounded, column after column.

    What is left takes the exact optimum for the errors of `found` so far, from a fresh inverse.
    """
    left, missed, rounded = weight.double().clone(), [], dequantize(found).double()
    damped = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(len(hessian))
    for column in range(weight.shape[1]):
        if column % group_size == 0:
            group = quantize(left[:, column : column + group_size].float(), 4, group_size, symmetric)
            scale, zero = found.scale[:, column // group_size], found.zero[:, column // group_size]
            torch.testing.assert_close(scale, group.scale[:, 0], atol=0, rtol=1e-3)
        inside = (left[:, column] / scale).clamp(0.0 - zero, 15.0 - zero)
        missed.append((inside - rounded[:, column] / scale).abs())
        inverse = torch.linalg.inv(damped[column:, column:])
        error = left[:, column] - rounded[:, column]
        left[:, column:] -= error[:, None] / inverse[0, 0] * inverse[0]
    return torch.stack(missed)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("d", [96, 256])
def test_gptq_rounds_what_fresh_inverses_leave(symmetric, d):
    x, weight = inputs_and_weight(n=600, d=d)
    hessian = x.T @ x
    codes, damping = gptq(weight, hessian, 4, 32, symmetric)
    assert damping == 0.01
    missed = missed_by(weight, hessian, 32, symmetric, codes)
    assert missed.max() < 0.51  # half a step, and what float32 sums are off by


@pytest.mark.parametrize("order", [False, True])
def test_gptq_loses_much_less_than_rounding_to_nearest(order):
    x, weight = inputs_and_weight()
    hessian = x.T @ x
    codes, _ = gptq(weight, hessian, 4, 32, symmetric=False, order=order)
    nearest = dequantize(quantize(weight, 4, 32, symmetric=False))
    lost = ((x @ (weight - dequantize(codes)).T) ** 2).sum() / ((x @ weight.T) ** 2).sum()
    assert output_error(weight, dequantize(codes), hessian) == pytest.approx(float(lost), rel=1e-3)
    assert lost < 0.6 * output_error(weight, nearest, hessian)


def test_gptq_of_dead_and_of_dependent_inputs():
    x, weight = inputs_and_weight()
    nothing, _ = gptq(weight, torch.zeros(96, 96), 4, 32, symmetric=True)
    assert torch.equal(nothing.codes, quantize(weight, 4, 32, symmetric=True).codes)
    x[:, 7] = 0
    x[:, 9] = x[:, 8]
    x = x[:20]  # of rank 20 at most
    codes, damping = gptq(weight, x.T @ x, 4, 32, symmetric=True)
    assert torch.isfinite(dequantize(codes)).all()
    assert damping >= 0.01
    column = (weight[:, 7] / codes.scale[:, 0]).round() + 8
    assert torch.equal(codes.codes[:, 7].float(), column.clamp(0, 15))
    with pytest.raises(ValueError, match="Hessian has NaN"):
        gptq(weight, torch.full((96, 96), torch.nan), 4, 32, symmetric=True)


@settings(deadline=None)
@given(rows=st.integers(1, 9), width=st.integers(1, 500), seed=st.integers(0, 99))
def test_a_gram_is_the_product(rows, width, seed):
    first, second = torch.randn(2, rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    total = torch.zeros(width, width, dtype=torch.float64)
    add_gram(total, first)
    add_gram(total, second)
    torch.testing.assert_close(mirrored(total), first.T @ first + second.T @ second)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_plain_block_is_run_as_far_as_it_is_read(family):
    model = tiny(family)
    found, whole = {n: m for n, m in linears(model).items() if _block_of(n) == 0}, {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _m, args, name=name: whole.setdefault(name, []).append(args[0].flatten(0, -2))
        )
        for name in found
    ]
    read = {}

    def visit(index, run):
        if index == 0:
            ended = []
            last = model.get_submodule(list(found)[-1]).register_forward_hook(lambda *_: ended.append(1))
            with _inputs(model, index, found) as seen:
                run()
            last.remove()
            assert not ended, "nothing is read of what the last projection gives"
            read.update(seen)

    with torch.no_grad():
        model(CALIBRATION)
        for handle in handles:
            handle.remove()
        walk(model, CALIBRATION, visit, untracked)
    for name, inputs in read.items():
        assert inputs.tokens == CALIBRATION.numel(), name
        if name in whole:  # keys and values out of a fused matrix are no call of it
            x = torch.cat(whole[name])
            torch.testing.assert_close(
                inputs.hessian, x.T @ x, atol=1e-5 * float(x.square().sum()) / len(inputs.hessian), rtol=1e-4
            )


def test_hessians_are_of_the_tokens_that_run():
    plain = compress(tiny(), g.GateSkip(budget=0.6, surrogate="narrow"))
    seen, expected = {}, {}
    layer = blocks(plain)[0]
    parts = {"self_attn.k_proj": layer.self_attn.k_proj, "mlp.down_proj": layer.mlp.down_proj}
    parts["gates.mlp.narrow.gate"] = layer.gates["mlp"].narrow.gate
    for name, part in parts.items():
        part.register_forward_pre_hook(lambda _m, args, name=name: seen.setdefault(name, []).append(args[0]))
    with torch.no_grad(), quick_products():
        for window in CALIBRATION:
            plain(window[None])
    for name, found in seen.items():
        x = torch.cat([part.flatten(0, -2) for part in found])
        with quick_products():
            hessian = x.T @ x
        expected[name], _ = gptq(parts[name].weight, hessian, 4, 32, symmetric=False, order=True, clip=True)
    tokens_run = {name: sum(part.flatten(0, -2).shape[0] for part in found) for name, found in seen.items()}
    assert tokens_run["mlp.down_proj"] + tokens_run["gates.mlp.narrow.gate"] == tokens_run["self_attn.k_proj"]
    model = compress(tiny(), g.GateSkip(budget=0.6, surrogate="narrow"), g.Quantize(group_size=32))
    for name, weight in expected.items():
        found = blocks(model)[0].get_submodule(name)
        agree = (unpack(found.codes, 4) == weight.codes).float().mean()
        assert agree > 0.95, name  # products in bfloat16 round windows one by one
    record = model.gateskip.steps[-1]["record"]
    assert record["without_input"] == []
    assert record["quantized"] == 4 * (7 + 3)


def test_clipping_finds_the_range_of_least_error():
    generator = torch.Generator().manual_seed(2)
    weight, counts = torch.randn(6, 64, generator=generator) ** 3, torch.rand(64, generator=generator)
    shares = [1 - step / 20 for step in range(9)]

    def error(found):
        return ((dequantize(found) - weight) ** 2 * counts).unflatten(1, (2, 32)).sum(-1)

    tried = []
    for share in shares:
        high = weight.unflatten(1, (2, 32)).abs().amax(-1, keepdim=True) * share
        cut = weight.unflatten(1, (2, 32)).clamp(-high, high).flatten(1)
        scale = quantize(cut, 4, 32, True).scale
        code = ((weight / scale.repeat_interleave(32, 1)).round() + 8).clamp(0, 15)
        tried.append(
            (((code - 8) * scale.repeat_interleave(32, 1) - weight) ** 2 * counts).unflatten(1, (2, 32)).sum(-1)
        )
    found = error(quantize(weight, 4, 32, True, clip=True, importance=counts))
    torch.testing.assert_close(found, torch.stack(tried).amin(0))
    assert (found < error(quantize(weight, 4, 32, True))).any()


def test_bits_by_name():
    model = compress(tiny(), g.Quantize(group_size=32, bits_of={r"layers\.0\.": 16, "down_proj": 8, "q_proj": 3}))
    found = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert not any(".layers.0." in name for name in found)
    assert {module.bits for name, module in found.items() if "down_proj" in name} == {8}
    assert {module.bits for name, module in found.items() if "q_proj" in name} == {3}
    assert {module.bits for name, module in found.items() if "up_proj" in name} == {4}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "apart"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "gpt_neox", "opt"])
def test_embedding_and_head_in_few_bits(family, tied, tmp_path):
    model, reference, ids = (
        tiny(family, tie_word_embeddings=tied),
        tiny(family, tie_word_embeddings=tied),
        tokens(2, 12),
    )
    compress(model, g.Quantize(solver="nearest", clip=False, bits_of={"embed|wte|head": 8, ".": 16}))
    for part in (reference.get_input_embeddings(), reference.get_output_embeddings())[: 1 if tied else 2]:
        part.weight.data = dequantize(quantize(part.weight.data, 8, 64, symmetric=False))
    with torch.inference_mode():
        expected = reference(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)
        assert g.count_macs(model, ids) == g.count_macs(reference, ids)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path).to(DEVICE)
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        with unpacked(loaded):
            assert torch.equal(loaded(ids).logits, model(ids).logits)
    stored = sum(part.numel() for name, part in loaded.state_dict().items() if name.endswith(".codes"))
    assert stored == (1 if tied else 2) * reference.get_output_embeddings().weight.numel()


def test_scales_are_stored_as_the_float16_numbers_that_they_are(tmp_path):
    """All but those that are none: theirs are kept in full."""
    model = compress(tiny(), g.Quantize(solver="nearest"))
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    odd = next(iter(layers))
    layers[odd].scale.mul_(1 + 1e-6)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(f"{name}.scale") for name in layers}
    assert {name: scale.dtype for name, scale in stored.items()} == dict.fromkeys(layers, torch.float16) | {
        odd: torch.float32
    }
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).to(DEVICE)
    for name, layer in layers.items():
        own = loaded.get_submodule(name).scale
        assert own.dtype == torch.float32
        assert torch.equal(own, layer.scale)


def test_bits_of_that_leave_nothing_or_ask_twice_are_refused():
    with pytest.raises(ValueError, match=r"'.': 16.* leaves nothing to quantize"):
        compress(tiny(), g.Quantize(bits_of={".": 16}))
    model = tiny(tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"model.embed_tokens and lm_head are one matrix: bits_of .* must be equal"):
        compress(model, g.Quantize(solver="nearest", bits_of={"embed_tokens": 8, "lm_head": 4}))


@pytest.mark.parametrize("mean_bits", [3.8, 5])
def test_bits_by_a_mean(mean_bits, tmp_path):
    model = compress(tiny(), g.Quantize(group_size=32, mean_bits=mean_bits, bits_of={"o_proj": 8}))
    record = model.gateskip.steps[-1]["record"]
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    sizes = [layer.in_features * layer.out_features for layer in layers]
    found = sum(layer.bits * size for layer, size in zip(layers, sizes, strict=True)) / sum(sizes)
    assert found == pytest.approx(record["mean_bits"])
    assert mean_bits - max(sizes) / sum(sizes) <= found <= mean_bits
    assert {bits for name, bits in record["bits"].items() if "o_proj" in name} == {8}
    model.save_pretrained(tmp_path / "model")
    ids = tokens(1, 8)
    assert torch.equal(g.load(str(tmp_path / "model"), device=DEVICE)[0](ids).logits, model(ids).logits)


def test_measured_bits_go_where_rounding_moves_the_loss_most():
    model = tiny()
    found = linears(model)
    quiet = next(name for name in found if "layers.1.mlp.down_proj" in name)
    found[quiet].weight.data.mul_(1e-4)  # what it does is lost anyway
    bits = allocate_bits(model, found, {}, 4.0, partial(quantize, group_size=32, symmetric=False), Context(CALIBRATION))
    assert bits[quiet] == 3
    assert max(bits.values()) > 3


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_tabled_codes_stand_for_what_bitsandbytes_says(kind, tmp_path):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    model, original = compress(tiny(), g.Quantize(solver=kind, group_size=64)), tiny()
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            packed, state = quantize_4bit(original.get_submodule(name).weight.data, blocksize=64, quant_type=kind)
            torch.testing.assert_close(module.weight, dequantize_4bit(packed, state))
    model.save_pretrained(tmp_path / "model")
    ids = tokens(1, 8)
    assert torch.equal(g.load(str(tmp_path / "model"), device=DEVICE)[0](ids).logits, model(ids).logits)
    with pytest.raises(g.UnsupportedModel, match="no NF4 or FP4"):
        export(model, tmp_path / "out", "gptq")
    with pytest.raises(ValueError, match=r"'nf4' has 4 bits"):
        g.Quantize(solver="nf4", mean_bits=5)


def test_gptq_quantizes_every_family(gated, family):
    model, nearest, ids = gated, deepcopy(gated), tokens(2, 40, seed=6)
    with torch.no_grad(), g.budget(gated, 1):
        original = gated(ids).logits
    record = apply(g.Quantize(group_size=32), model, Context(CALIBRATION))
    assert record["without_input"] == []
    apply(g.Quantize(group_size=32, solver="nearest"), nearest, Context(CALIBRATION))
    with torch.no_grad(), g.budget(model, 1), g.budget(nearest, 1):
        lost = [(other(ids).logits - original).square().mean() for other in (model, nearest)]
    assert lost[0] < 1.2 * lost[1]  # text of tiny random models tells little; on real ones see benchmarks/


def test_what_gptq_refuses():
    with pytest.raises(g.PipelineError, match="solver = 'best'"):
        build("quantize", {"solver": "best"})
    with pytest.raises(g.PipelineError, match=r"bits = 5: Input should be 3, 4 or 8"):
        build("quantize", {"bits": 5})
    with pytest.raises(ValueError, match=r"bits_of 'down\(' is no regular expression"):
        g.Quantize(bits_of={"down(": 8})
    with pytest.raises(ValueError, match="mean_bits 2 must be from 3 to 8"):
        g.Quantize(mean_bits=2)
    with pytest.raises(ValueError, match="bits_of alone needs"):
        compress(tiny(), g.Quantize(group_size=32, bits_of={".": 8}, mean_bits=4))
    model = tiny()
    blocks(model)[1].mlp.up_proj.weight.data[3, 4] = torch.inf
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj: weight .* has 1 NaN or infinite"):
        compress(model, g.Quantize())
