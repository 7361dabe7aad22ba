import json
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from tiny_models import CALIBRATION, DEVICE, compress, tiny, tiny_tokenizer, tokens
from torch import nn

import gateskip_compress as g
from gateskip_compress.gating.calibrate import observe
from gateskip_compress.gating.train import train_gates
from gateskip_compress.gating.turning import dial_of
from gateskip_compress.losses import kl_divergence
from gateskip_compress.model import blocks
from gateskip_compress.pipeline import start
from gateskip_compress.step import Context
from gateskip_compress.text import Passage
from gateskip_compress.training import STATE, collate, train

TRAINING = g.Training(steps=12, batch=2, gate_rate=0.01, surrogate_rate=0.01)


def gate_tensors(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if ".gates." in name}


def distance(model, share=0.7):
    ids, original = CALIBRATION, tiny()
    with torch.no_grad(), g.budget(model, share):
        return kl_divergence(original(ids).logits.flatten(0, 1), model(ids).logits.flatten(0, 1)).mean().item()


def test_training_brings_the_gated_model_nearer_to_the_ungated():
    untrained = compress(tiny(), g.GateSkip(budget=0.7, rank=4))
    training = g.Training(steps=40, batch=4, train="all", rate=1e-3, gate_rate=1e-3, surrogate_rate=1e-3)
    trained = compress(tiny(), g.GateSkip(budget=0.7, rank=4, training=training))
    assert distance(trained) < 0.8 * distance(untrained)
    record = trained.gateskip.steps[-1]["record"]["training"]
    assert len(record["losses"]) == len(record["budgets"]) == 40
    assert 0.96 < record["budgets"][0] < 1.01  # the schedule starts near 1
    assert sum(record["budgets"][-5:]) / 5 == pytest.approx(0.7, abs=0.03)
    assert record["tokens"] == 40 * 4 * 47


def test_the_backbone_is_left_alone_unless_asked():
    model = compress(tiny(), g.GateSkip(budget=0.7, rank=4, training=TRAINING))
    for name, tensor in tiny().state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert not any(parameter.requires_grad for block in blocks(model) for parameter in block.gates.parameters())


def test_fitted_scores_stay_unless_a_rate_is_given_for_them():
    untrained = gate_tensors(compress(tiny(), g.GateSkip(budget=0.7, rank=4)))
    model = compress(tiny(), g.GateSkip(budget=0.7, rank=4, training=g.Training(steps=4, batch=2, ramp=0)))
    changed = {name for name, tensor in gate_tensors(model).items() if not torch.equal(tensor, untrained[name])}
    assert any(".up" in name for name in changed)
    assert not any("score" in name for name in changed)
    with pytest.raises(ValueError, match="train 'gates' changes nothing here"):
        compress(tiny(), g.GateSkip(budget=0.7, rank=4, training=g.Training(steps=4, train="gates")))


@pytest.mark.parametrize("train_what", ["gates", "surrogates", "all"])
def test_what_is_trained_changes_and_nothing_else_does(train_what):
    training = g.Training(steps=4, batch=2, train=train_what, gate_rate=0.01, ramp=0)
    untrained = gate_tensors(compress(tiny(), g.GateSkip(budget=0.7, rank=4)))
    model = compress(tiny(), g.GateSkip(budget=0.7, rank=4, training=training))
    changed = {name for name, tensor in gate_tensors(model).items() if not torch.equal(tensor, untrained[name])}
    assert any("score_weight" in name for name in changed)
    assert any(".up" in name for name in changed) == (train_what != "gates")
    backbone = [not torch.equal(model.state_dict()[name], tensor) for name, tensor in tiny().state_dict().items()]
    assert any(backbone) == (train_what == "all")


@pytest.mark.parametrize(
    ("kind", "gate_loss"),
    [("vector", "l1"), ("scalar", "l2"), ("shared", "l2"), ("mlp", "l2"), ("lowrank", "l2"), ("hybrid", "kl")],
)
def test_scaling_gates_close_under_their_loss(kind, gate_loss):
    means = []
    for weight in (0.0, 50.0):
        training = g.Training(
            steps=8, batch=2, train="gates", gate_rate=0.05, gate_loss=gate_loss, gate_weight=weight, ramp=0
        )
        # mlp gates alone cost more than a tiny model can save
        budget = 1 if kind == "mlp" else 0.95
        model = compress(tiny(), g.GateSkip(kind=kind, budget=budget, rank=4, training=training))
        seen = observe(model, CALIBRATION[:2], None)
        means.append(torch.stack([d.score.mean() for d in seen]).mean().item())
    assert torch.cat([d.score.flatten() for d in seen]).std() > 1e-4  # they tell tokens apart
    assert means[1] < means[0] - 1e-3


def test_a_budget_that_gates_alone_exceed_names_the_floor():
    training = g.Training(steps=4, batch=2, ramp=0)
    with pytest.raises(
        ValueError, match=r"budget 0.5 cannot be reached: with all skipped these gates still spend 0\.\d"
    ):
        compress(tiny(), g.GateSkip(kind="mlp", budget=0.5, rank=4, training=training))


def test_checkpointing_gives_the_same_gradients():
    curves = []
    for checkpointing in (False, True):
        training = g.Training(steps=4, batch=2, gate_rate=0.01, ramp=0, checkpointing=checkpointing)
        model = compress(tiny(), g.GateSkip(budget=0.7, rank=4, training=training))
        curves.append(gate_tensors(model))
        assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    for name, tensor in curves[0].items():
        torch.testing.assert_close(curves[1][name], tensor, atol=1e-6, rtol=1e-4)


def test_bf16_autocast_runs():
    training = g.Training(steps=3, batch=2, precision="bf16", ramp=0)
    record = compress(tiny(), g.GateSkip(budget=0.7, rank=4, training=training)).gateskip.steps[-1]["record"]
    assert all(0 < loss < 2 for loss in record["training"]["losses"])


def gated():
    return compress(tiny(), g.GateSkip(budget=0.7, rank=4))


class Interrupted(Exception):
    pass


def test_a_resumed_training_is_as_if_it_had_never_stopped(tmp_path):
    training = g.Training(steps=60, batch=2, gate_rate=0.01, surrogate_rate=0.01)
    whole = gated()
    unbroken = train_gates(whole, training, 0.7, "global", Context(CALIBRATION))

    def stop_at(step):
        def track(items, description, total=None):
            for item in items:
                if item == step:
                    raise Interrupted
                yield item

        return track

    first = gated()
    with pytest.raises(Interrupted):
        train_gates(first, training, 0.7, "global", Context(CALIBRATION, track=stop_at(40), scratch=tmp_path))
    assert (tmp_path / STATE).is_file()
    second = gated()
    resumed = train_gates(second, training, 0.7, "global", Context(CALIBRATION, scratch=tmp_path))
    assert resumed["losses"] == unbroken["losses"]
    assert resumed["budgets"] == unbroken["budgets"]
    for name, tensor in gate_tensors(whole).items():
        assert torch.equal(gate_tensors(second)[name], tensor), name


def test_a_loss_that_breaks_stops_and_goes_back(tmp_path):
    weight = nn.Parameter(torch.ones(3))

    def loss(batch, step):
        return (weight * (float("nan") if step == 30 else 1.0)).sum() * 5, 5

    passages = [Passage.whole(row) for row in CALIBRATION]
    seen = []

    def track(items, description, total=None):
        for item in items:
            if item == 25:
                seen.append(weight.detach().clone())
            yield item

    with pytest.raises(g.TrainingError, match=r"became nan at step 30; parameters are back at step 25; lower"):
        train(
            [([weight], 0.1)],
            loss,
            passages,
            steps=40,
            batch=2,
            context=Context(CALIBRATION, track=track, scratch=tmp_path),
            accelerator=Accelerator(cpu=True),
        )
    assert torch.equal(weight.detach(), seen[0])
    with safe_open(tmp_path / STATE, framework="pt") as file:
        assert torch.equal(file.get_tensor("0.value"), seen[0])


def test_padding_and_prompts_do_not_count():
    model = gated()
    generator = torch.Generator().manual_seed(3)
    passages = []
    for length in (20, 31):
        scored = torch.arange(length) >= length // 2
        passages.append(Passage(torch.randint(2, 96, (length,), generator=generator), scored))
    records = []
    for tail in (0, 9):  # the same passages, with and without a longer neighbour's padding
        longer = torch.cat((passages[1].scored, torch.zeros(tail, dtype=torch.bool)))
        batch = [passages[0], Passage(torch.cat((passages[1].ids, tokens(1, tail)[0].cpu())), longer)]
        training = g.Training(steps=1, batch=2, ramp=0)
        records.append(train_gates(deepcopy(model), training, 0.7, "global", Context(CALIBRATION, passages=batch)))
    assert records[0]["losses"] == pytest.approx(records[1]["losses"], rel=1e-3)
    assert records[0]["tokens"] == sum(int(p.scored.sum()) for p in passages)
    together = collate(passages, torch.device("cpu"))
    assert together.real.sum() == 51
    assert not together.scored[~together.real].any()


def test_adapters_are_merged_into_plain_projections():
    pytest.importorskip("peft", reason="LoRA needs the extra `train`")
    training = g.Training(steps=4, batch=2, train="lora", rate=0.01, ramp=0)
    model = compress(tiny(), g.GateSkip(budget=0.7, rank=4, training=training))
    assert set(model.state_dict()) == set(gated().state_dict())
    changed = [
        name for name, tensor in tiny().state_dict().items() if not torch.equal(model.state_dict()[name], tensor)
    ]
    assert changed
    assert all("_proj.weight" in name for name in changed)


def test_two_processes_take_the_steps_of_one_with_twice_the_batch(tmp_path):
    script = Path(__file__).with_name("two_processes.py")
    curves = {}
    for processes, batch in ((1, 4), (2, 2)):
        # on CPUs `accelerate launch` needs MPI for this; on GPUs it sets the same variables as torchrun does here
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        out = tmp_path / f"{processes}.json"
        done = subprocess.run(
            [*launch, str(script), str(batch), str(out)], capture_output=True, text=True, check=False, cwd=script.parent
        )
        assert done.returncode == 0, done.stderr[-2000:]
        curves[processes] = json.loads(out.read_text())
    assert (curves[1]["processes"], curves[2]["processes"]) == (1, 2)
    assert curves[2]["losses"] == pytest.approx(curves[1]["losses"], rel=1e-4)
    assert curves[2]["budgets"] == pytest.approx(curves[1]["budgets"], rel=1e-3)
    assert curves[2]["tokens"] == curves[1]["tokens"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "training.steps 0 must be at least 1"),
        ({"ramp": 1.5}, "training.ramp 1.5 must be between 0 and 1"),
        ({"gate_rate": -1.0}, "training.gate_rate -1.0 must not be negative"),
        ({"distillation": 0.0}, "nothing to minimise"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        g.Training(**settings)


def test_effect_gates_have_no_gate_loss():
    with pytest.raises(ValueError, match="effect gates have no scale"):
        g.GateSkip(training=g.Training(gate_loss="l1"))


def test_a_trained_stack_is_a_recipe_and_a_checkpoint(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: x\nevaluation: {text: self}\nsteps:\n  - gateskip: {rank: 4, training: {steps: 2, batch: 1}}\n"
    )
    pipeline = g.read_recipe(path).pipeline()
    assert pipeline.steps[0].training == g.Training(steps=2, batch=1)
    path.write_text(path.read_text().replace("steps: 2", "step: 2"))
    with pytest.raises(g.PipelineError, match=r"gateskip.training has no field 'step', did you mean 'steps'"):
        g.read_recipe(path)
    model = pipeline.run(tiny(), tiny_tokenizer(), calibration=CALIBRATION)
    model.save_pretrained(tmp_path / "model")
    again, _ = g.load(str(tmp_path / "model"), device=DEVICE)
    ids = tokens(1, 16)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.gateskip.transforms[0].training == g.Training(steps=2, batch=1)


def test_the_schedule_falls_straight_and_stays():
    training = g.Training(steps=100, ramp=0.5)
    assert [training.budget_at(step, 0.6) for step in (0, 24, 49, 99)] == pytest.approx([0.992, 0.8, 0.6, 0.6])


def test_start_leaves_the_dial_as_it_was():
    model = gated()
    before = dial_of(model).thresholds
    train_gates(model, g.Training(steps=1, batch=1), 0.7, "global", Context(CALIBRATION))
    assert dial_of(model).thresholds == before
    assert dial_of(model).how == "compact"
    with pytest.raises(g.UnsupportedModel):
        start(model, tiny_tokenizer())
