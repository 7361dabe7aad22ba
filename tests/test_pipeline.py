import json
from pathlib import Path

import pytest
import torch
from tiny_models import CALIBRATION, DEVICE, compress, tiny, tiny_tokenizer, tokens
from transformers import AutoModelForCausalLM

import gateskip_compress as g
from gateskip_compress.checkpoint import read_manifest

PRUNE, GATE, INT4 = g.Prune(blocks=1), g.GateSkip(budget=0.8, rank=4), g.Quantize(group_size=32)
DRAFT = g.SelfSpeculation(draft_budget=0.6, draft_tokens=2)
NARROW, UNEVEN = g.Prune(share=0.2, multiple=32), g.Prune(share=0.2, multiple=16, shape="uneven")
BRANCHES, BY_GATES = g.Prune(share=0.3, cut="branches"), g.Prune(share=0.1, cut="branches", by="gates")
LORA, NORMS = g.Recover(tokens=400, batch=2), g.Recover(tokens=400, batch=2, what="norms")
LEGAL = {
    "prune": (PRUNE,),
    "gate": (GATE,),
    "gate, mean": (g.GateSkip(budget=0.8, surrogate="mean"),),
    "int4": (INT4,),
    "int4, symmetric": (g.Quantize(group_size=64, symmetric=True),),
    "prune+gate": (PRUNE, GATE),
    "prune+int4": (PRUNE, INT4),
    "gate+int4": (GATE, INT4),
    "gate+draft": (GATE, DRAFT),
    "all": (PRUNE, GATE, INT4, DRAFT),
    "narrow+recover+gate": (NARROW, LORA, GATE),
    "uneven+gate+int4": (UNEVEN, GATE, g.Quantize(group_size=32, short_groups=True)),
    "branches+gate+draft": (BRANCHES, g.GateSkip(budget=0.9, rank=4), g.SelfSpeculation(draft_budget=0.7)),
    "gate+prune by gates+recover+int4+recover": (GATE, BY_GATES, g.Recover(tokens=400, what="all"), INT4, NORMS),
    "prune+gate+prune blocks by gates": (PRUNE, GATE, g.Prune(blocks=1, by="gates")),
    "all+recover": (PRUNE, GATE, INT4, DRAFT, NORMS),
}


@pytest.mark.parametrize("stack", LEGAL)
def test_every_stack_saves_and_loads_with_equal_logits(stack, tmp_path):
    model = g.Pipeline(*LEGAL[stack]).run(tiny(), tiny_tokenizer(), calibration=CALIBRATION)
    ids = tokens(2, 24)
    model.save_pretrained(tmp_path / "once")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "once").to(DEVICE)
    assert torch.equal(again(ids).logits, model(ids).logits)
    loaded, _ = g.load(str(tmp_path / "once"), device=DEVICE)
    assert loaded.gateskip.steps == model.gateskip.steps
    loaded.save_pretrained(tmp_path / "twice")
    twice, _ = g.load(str(tmp_path / "twice"), device=DEVICE)
    assert torch.equal(twice(ids).logits, model(ids).logits)


ILLEGAL = {
    "quantize before prune": ((INT4, PRUNE), r"Prune\(.*cannot follow Quantize\(.*float weights; put prune first"),
    "gate before prune": ((GATE, PRUNE), r"Prune\(.*cannot follow GateSkip\(.*stale; put prune first"),
    "quantize before gate": ((INT4, GATE), r"GateSkip\(.*cannot follow Quantize\(.*; put gateskip first"),
    "draft before int4": ((GATE, DRAFT, INT4), r"Quantize\(.*cannot follow SelfSpeculation\("),
    "gate before prune by gates": ((BY_GATES, GATE), r"needs a GateSkip step before it"),
    "prune by gates without": ((BY_GATES,), "needs a GateSkip step before it, whose gates it reads; add one"),
    "prune by gates twice": ((GATE, BY_GATES, BY_GATES), "same kind of step; keep one"),
    "prune by gates after int4": ((GATE, INT4, BY_GATES), r"cannot follow Quantize\(.*put GateSkip and prune first"),
    "prune by paper gates": (
        (g.GateSkip(kind="vector", training=g.Training(steps=1)), BY_GATES),
        r"cannot read the gates of GateSkip\(.*use kind='effect', where='branches'",
    ),
    "recover first": ((LORA, PRUNE), "has nothing to recover from; put it after another step"),
    "recover twice": ((PRUNE, LORA, LORA), "same kind of step; keep one"),
    "recover weights of few bits": ((INT4, LORA), r"Recover\(.*cannot follow Quantize\(.*use what='norms'"),
    "twice": ((INT4, INT4), "same kind of step; keep one"),
    "draft without gates": ((DRAFT,), "needs a GateSkip step before it"),
    "draft above": ((g.GateSkip(budget=0.5), DRAFT), "lower draft_budget under 0.5"),
}


@pytest.mark.parametrize("stack", ILLEGAL)
def test_every_illegal_stack_says_both_steps_the_reason_and_the_mend(stack):
    steps, message = ILLEGAL[stack]
    with pytest.raises(g.PipelineError, match=message):
        g.Pipeline(*steps)


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        model = g.Pipeline(PRUNE, GATE, INT4).run(tiny(), tiny_tokenizer(), seed=3)
        model.save_pretrained(tmp_path / name)
    hashes = [json.loads((tmp_path / name / "gateskip.json").read_text())["files"] for name in ("a", "b")]
    assert hashes[0] == hashes[1]


def test_compressing_twice_is_refused():
    with pytest.raises(g.UnsupportedModel, match="compressed already"):
        compress(compress(tiny(), INT4), INT4)


@pytest.fixture
def folder(tmp_path):
    compress(tiny(), GATE, INT4).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_damage_is_found_before_anything_loads(folder):
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    for load in (AutoModelForCausalLM.from_pretrained, g.load, lambda path: read_manifest(Path(path))):
        with pytest.raises(g.CheckpointError, match=r"model\.safetensors is damaged"):
            load(str(folder))


def test_a_device_that_is_not_here_is_named(folder):
    assert g.load(str(folder), device="auto")[0].device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match=r"device 'tpu' must be auto, cpu, cuda, or one of several such as cuda:1"):
        g.load(str(folder), device="tpu")
    with pytest.raises(ValueError, match=r"device 'cuda:64': torch sees \d+ CUDA devices here"):
        g.load(str(folder), device="cuda:64")


@pytest.mark.parametrize("missing", ["model.safetensors", "generation_config.json"])
def test_a_half_copied_folder_does_not_load(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(g.CheckpointError, match=f"lacks {missing}"):
        g.load(str(folder))


def test_without_its_manifest_it_does_not_load(folder):
    (folder / "gateskip.json").unlink()
    with pytest.raises(g.CheckpointError, match=r"has no gateskip\.json"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_save_that_fails_leaves_the_old_checkpoint_and_nothing_else(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model, _ = g.load(str(folder))
    monkeypatch.setattr("gateskip_compress.checkpoint.card", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_folder_with_other_things_is_not_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(g.CheckpointError, match="choose another folder"):
        compress(tiny(), INT4).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_unknown_families_are_named():
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=2, vocab_size=50))
    with pytest.raises(g.UnsupportedModel, match=r"no blocks|'bloom' is not supported"):
        compress(model, GATE)
