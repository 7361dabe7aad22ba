"""Checkpoints for other libraries, loaded by those libraries."""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import DEVICE, compress, tiny, tiny_tokenizer, tokens
from transformers import AutoModelForCausalLM

import gateskip_compress as g
from gateskip_compress.formats import export
from gateskip_compress.formats.gptq import from_gptq, to_gptq
from gateskip_compress.model import blocks
from gateskip_compress.pipeline import Pipeline
from gateskip_compress.quantization.groups import dequantize, quantize
from gateskip_compress.quantization.linear import QuantizedLinear

IDS = tokens(2, 12)
SYMMETRIC, ASYMMETRIC = (g.Quantize(group_size=32, symmetric=symmetric) for symmetric in (True, False))


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def naive_gptq(parts, bits, less):
    """The docstring's layout, one weight after another."""
    d, o = len(parts["g_idx"]), parts["qweight"].shape[1]
    out, per_word = torch.empty(o, d), 32 // bits
    for row in range(o):
        for column in range(d):
            group = int(parts["g_idx"][column])
            word = int(parts["qweight"][column // per_word, row]) & 0xFFFFFFFF
            code = (word >> (bits * (column % per_word))) & (2**bits - 1)
            word = int(parts["qzeros"][group, row // per_word]) & 0xFFFFFFFF
            zero = ((word >> (bits * (row % per_word))) & (2**bits - 1)) + less
            out[row, column] = (code - zero) * float(parts["scales"][group, row])
    return out


@settings(deadline=None, max_examples=20)
@given(
    words=st.integers(1, 3),
    width=st.sampled_from([32, 48, 96]),
    bits=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_gptq_layout_is_what_it_says_and_reads_back(words, width, bits, symmetric, seed):
    weight = torch.randn(8 * words, width, generator=torch.Generator().manual_seed(seed))
    ours = quantize(weight, bits, 32, symmetric)
    parts, less = to_gptq(ours, symmetric), 1 if symmetric else 0
    read = from_gptq(parts, bits, 32, less, torch.float32)
    assert torch.equal(read.codes, ours.codes)
    assert torch.equal(read.zero, ours.zero)
    torch.testing.assert_close(naive_gptq(parts, bits, less), dequantize(read))
    torch.testing.assert_close(dequantize(read), dequantize(ours), rtol=1e-3, atol=1e-5)  # float16 scales


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "apart"])
@pytest.mark.parametrize(
    "step",
    [SYMMETRIC, ASYMMETRIC, g.Quantize(bits=8, group_size=64), g.Quantize(bits_of={"embed": 8, "head": 8})],
    ids=repr,
)
def test_a_gptq_export_reads_back(step, tied, tmp_path):
    model = compress(tiny(tie_word_embeddings=tied), step)
    assert export(model, tmp_path / "out", "gptq") == []
    read, _ = g.load(str(tmp_path / "out"), device=DEVICE)
    quantized = {name: module for name, module in blocks(model).named_modules() if isinstance(module, QuantizedLinear)}
    for module in quantized.values():
        module.scale.copy_(module.scale.to(torch.float16))  # all that the format loses
    torch.testing.assert_close(logits(read), logits(model), rtol=0, atol=1e-5 * float(logits(model).abs().max()))
    codes = {name: module.codes for name, module in quantized.items()}
    assert codes
    assert all(torch.equal(blocks(read).get_submodule(name).codes, found) for name, found in codes.items())


@pytest.mark.parametrize(
    "step",
    [
        SYMMETRIC,
        g.Quantize(group_size=32, symmetric=True, bits_of={"down_proj": 8, "q_proj": 3, "o_proj": 16}),
    ],
    ids=repr,
)
def test_transformers_loads_compressed_tensors_with_equal_logits(step, tmp_path):
    model = compress(tiny(), step)
    export(model, tmp_path / "out", "compressed-tensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").to(DEVICE)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # its imports give many
@pytest.mark.parametrize("step", [SYMMETRIC, ASYMMETRIC], ids=repr)
def test_gptqmodel_loads_a_gptq_export(step, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)  # GPTQModel 7.6 fails on a machine with fewer than four
    pytest.importorskip("gptqmodel", reason="needs `make peers`")
    model = compress(tiny(), step)
    export(model, tmp_path / "out", "gptq")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu")
    assert "gptqmodel" in type(loaded.model.layers[0].mlp.up_proj).__module__
    # its kernel for CPUs multiplies in bfloat16
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0.05 * float(logits(model).abs().max()))


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_what_a_format_cannot_hold_is_said_and_dropped_only_when_told(form, tmp_path):
    model = compress(tiny(), g.GateSkip(budget=0.8, surrogate="narrow"), SYMMETRIC, g.SelfSpeculation(draft_budget=0.6))
    with pytest.raises(
        g.UnsupportedModel, match=r"would lose gates and surrogates.*self-speculation.*drop=True, or --drop"
    ):
        export(model, tmp_path / "out", form)
    assert list(tmp_path.iterdir()) == []
    assert len(export(model, tmp_path / "out", form, drop=True)) == 2
    loaded = g.load(str(tmp_path / "out"), device=DEVICE)[0]
    with g.budget(model, 1):
        expected = logits(model)
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=2e-3 * float(expected.abs().max()))
    assert not any("gates" in name for name in load_file(tmp_path / "out" / "model.safetensors"))


def test_an_imported_model_can_be_gated_and_speculated_and_saved(tmp_path):
    export(compress(tiny(), SYMMETRIC), tmp_path / "gptq", "gptq")
    model, tokenizer = g.load(str(tmp_path / "gptq"), device=DEVICE)
    gated = Pipeline(g.GateSkip(budget=0.8, rank=4), g.SelfSpeculation(draft_budget=0.6)).run(
        model, tokenizer, calibration=tokens(8, 64, seed=1)
    )
    assert [step["name"] for step in gated.gateskip.steps] == ["quantize", "gateskip", "self_speculation"]
    gated.save_pretrained(tmp_path / "ours")
    again = g.load(str(tmp_path / "ours"), device=DEVICE)[0]
    assert torch.equal(logits(again), logits(gated))
    plain = again.generate(IDS[:1], max_new_tokens=12, do_sample=False)
    fast = again.generate(IDS[:1], max_new_tokens=12, do_sample=False, custom_generate=g.self_speculative)
    assert torch.equal(fast, plain)
    with pytest.raises(g.UnsupportedModel, match="compressed already"):
        Pipeline(g.GateSkip()).run(again, tokenizer)


@pytest.mark.filterwarnings("ignore")  # its imports give many
def test_a_checkpoint_of_gptqmodel_is_read_gated_and_speculated(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)  # as above
    monkeypatch.chdir(tmp_path)  # it writes logs where it runs
    gptqmodel = pytest.importorskip("gptqmodel", reason="needs `make peers`")
    tiny().save_pretrained(tmp_path / "float")
    tiny_tokenizer().save_pretrained(tmp_path / "float")
    config = gptqmodel.QuantizeConfig(bits=4, group_size=32, sym=True, desc_act=False)
    theirs = gptqmodel.GPTQModel.load(str(tmp_path / "float"), config, device="cpu")
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens(8, 64, seed=2)]
    theirs.quantize(rows, batch_size=1)
    theirs.save(str(tmp_path / "theirs"))
    model, tokenizer = g.load(str(tmp_path / "theirs"), device=DEVICE)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", device_map="cpu", dtype=torch.float32)
    torch.testing.assert_close(logits(model), logits(loaded), rtol=0, atol=0.05 * float(logits(model).abs().max()))
    gated = Pipeline(g.GateSkip(budget=0.8, rank=4), g.SelfSpeculation(draft_budget=0.6)).run(
        model, tokenizer, calibration=tokens(8, 64, seed=1)
    )
    plain = gated.generate(IDS[:1], max_new_tokens=12, do_sample=False)
    fast = gated.generate(IDS[:1], max_new_tokens=12, do_sample=False, custom_generate=g.self_speculative)
    assert torch.equal(fast, plain)


def change(folder: Path, edit_config=None, edit_tensors=None):
    """Edit an export in place."""
    if edit_config:
        config = json.loads((folder / "config.json").read_text())
        edit_config(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))
    if edit_tensors:
        tensors = load_file(folder / "model.safetensors")
        edit_tensors(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


UP = "model.layers.1.mlp.up_proj"
BROKEN = {
    "bits": (lambda c: c.update(bits=2), None, "of 2 bits cannot be read; 4, 8 can"),
    "format": (lambda c: c.update(checkpoint_format="marlin"), None, "format 'marlin' cannot be read"),
    "dynamic": (lambda c: c.update(dynamic={"-:x": {}}), None, "`dynamic` overrides"),
    "order": (None, lambda t: t[f"{UP}.g_idx"].copy_(t[f"{UP}.g_idx"].flip(0)), f"{UP}: .*desc_act=False"),
    "missing layer": (None, lambda t: t.pop(f"{UP}.qweight"), f"{UP} is not quantized"),
    "missing scales": (None, lambda t: t.pop(f"{UP}.scales"), f"{UP}: 'scales'"),
    "missing norm": (None, lambda t: t.pop("model.norm.weight"), "lacks model.norm.weight"),
    "group size": (lambda c: c.update(group_size=48), None, "group_size 48 must be one of 32, 64, 128"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_foreign_checkpoint_that_does_not_fit_says_why(name, tmp_path):
    edit_config, edit_tensors, message = BROKEN[name]
    export(compress(tiny(), SYMMETRIC), tmp_path / "gptq", "gptq")
    change(tmp_path / "gptq", edit_config, edit_tensors)
    with pytest.raises((g.GateSkipError, ValueError), match=message):
        g.load(str(tmp_path / "gptq"), device=DEVICE)


def test_exports_that_are_refused(tmp_path):
    with pytest.raises(g.UnsupportedModel, match="not quantized: put a Quantize step"):
        export(compress(tiny(), g.Prune(blocks=1)), tmp_path / "out", "gptq")
    mixed = compress(tiny(), g.Quantize(group_size=32, bits_of={"down_proj": 8}))
    with pytest.raises(g.UnsupportedModel, match="these have 4, 8; use compressed-tensors"):
        export(mixed, tmp_path / "out", "gptq")
    partly = compress(tiny(), g.Quantize(group_size=32, bits_of={"down_proj": 16}))
    with pytest.raises(g.UnsupportedModel, match=r"every projection quantized, and .*down_proj is not"):
        export(partly, tmp_path / "out", "gptq")
    with pytest.raises(g.UnsupportedModel, match="use symmetric=True"):
        export(partly, tmp_path / "out", "compressed-tensors")
    short = compress(tiny(intermediate_size=80), g.Quantize(group_size=32, symmetric=True, short_groups=True))
    with pytest.raises(g.UnsupportedModel, match=r"no shorter last groups, and .*down_proj has one: 80 / 32"):
        export(short, tmp_path / "out", "compressed-tensors")
    with pytest.raises(ValueError, match="format 'gguf' must be"):
        export(mixed, tmp_path / "out", "gguf")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(g.CheckpointError, match="is not empty"):
        export(compress(tiny(), SYMMETRIC), tmp_path / "full", "gptq")
