"""Gate kinds, placements and allocations; `test_gating.py` has what holds for all gated models."""

import math
from copy import deepcopy
from functools import cache

import pytest
import torch
from tiny_models import CALIBRATION, DEVICE, compress, tiny, tokens
from transformers import AutoModelForCausalLM, DynamicCache

import gateskip_compress as g
from gateskip_compress.gating.calibrate import calibrate, everywhere, observe, spent
from gateskip_compress.gating.closed_form import backward_elimination
from gateskip_compress.gating.dial import RUN_ALL
from gateskip_compress.gating.fit import RIDGE
from gateskip_compress.gating.gate import KINDS, Gate
from gateskip_compress.gating.turning import dial_of
from gateskip_compress.losses import gate_kl, gate_l1, gate_l2
from gateskip_compress.macs import ungated_macs_per_token
from gateskip_compress.model import FAMILIES, blocks, entering, resumed
from gateskip_compress.precision import quick_products
from gateskip_compress.transforms import build

CLOSE = dict(atol=2e-4, rtol=2e-4)
SCALED = [kind for kind in KINDS if kind != "effect"]
VARIANTS = {
    **{kind: {"kind": kind} for kind in SCALED},
    "vector before": {"kind": "vector", "placement": "before"},
    "lowrank before, zero": {"kind": "lowrank", "placement": "before", "surrogate": "zero"},
    "attention": {"where": "attention"},
    "mlp": {"where": "mlp"},
    "block": {"where": "block"},
    "scalar block": {"where": "block", "kind": "scalar"},
    "every second": {"every": 2},
    "hybrid every second": {"every": 2, "kind": "hybrid"},
    "narrow": {"surrogate": "narrow"},
    "vector narrow": {"kind": "vector", "surrogate": "narrow", "channels": 0.5},
    "uniform": {"allocation": "uniform"},
    "sensitivity": {"allocation": "sensitivity"},
}


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, **kwargs).logits


def stirred(family="llama", **settings):
    """A gated model whose scaling gates are as if trained: random, calibrated, at a budget of 0.75 or 0.8."""
    return deepcopy(stirred_once(family, **settings))


@cache
def stirred_once(family, **settings):
    scaled = settings.get("kind", "effect") != "effect"
    model = compress(tiny(family), g.GateSkip(**{"rank": 4, "budget": 1 if scaled else 0.75, **settings}))
    if scaled:
        generator = torch.Generator().manual_seed(0)
        for block in blocks(model):
            for parameter in block.gates.parameters():
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator).to(DEVICE)
        dial = dial_of(model)
        dial.table = calibrate(model, CALIBRATION, settings.get("allocation", "global"))
        dial.set(0.8)
        model.gateskip.steps[-1]["record"]["table"] = [vars(setting) for setting in dial.table]
        model.gateskip.steps[-1]["settings"] |= {"budget": 0.8, "training": {}}
    return model


@pytest.mark.parametrize("kind", SCALED)
def test_an_untrained_gate_changes_no_bit(kind):
    ids = tokens(2, 40, seed=3)
    for placement in ("after", "before"):
        model = compress(tiny(), g.GateSkip(kind=kind, budget=1, rank=4, placement=placement))
        assert torch.equal(logits(model, ids), logits(tiny(), ids))


@pytest.mark.parametrize("kind", SCALED)
def test_scale_is_its_equation(kind):
    torch.manual_seed(0)
    gate = Gate(6, kind, "zero", 3)
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 6)

    def line(layer, row, bias=True):
        return [
            sum(float(w * v) for w, v in zip(weights, row, strict=True)) + (float(layer.bias[i]) if bias else 0)
            for i, weights in enumerate(layer.weight)
        ]

    def opening(z):
        return [(1 + math.exp(-5)) / (1 + math.exp(-v - 5)) for v in z]

    for row, found, score in zip(x, gate.scale(x), gate.score(x, gate.scale(x)), strict=True):
        if kind in ("vector", "shared", "hybrid"):
            expected = opening(line(gate.matrix, row))
        if kind == "scalar":
            expected = opening(line(gate.line, row))
        if kind == "mlp":
            expected = opening(line(gate.outer, [max(0.0, v) for v in line(gate.inner, row)]))
        if kind == "lowrank":
            expected = opening(line(gate.outer, line(gate.inner, row, bias=False)))
        if kind == "hybrid":
            expected = [v * opening(line(gate.line, row))[0] for v in expected]
        assert found.tolist() == pytest.approx(expected, rel=1e-4)
        assert score.item() == pytest.approx(sum(expected) / len(expected), rel=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_the_same_masked_cached_and_reloaded(variant, tmp_path):
    model = stirred(**VARIANTS[variant])
    ids = tokens(2, 40, seed=4)
    expected = logits(model, ids)
    kept = torch.cat([d.keep.flatten() for d in observe(model, ids, None)]).float().mean()
    assert 0.05 < kept < 0.97
    with g.masked(model):
        torch.testing.assert_close(logits(model, ids), expected, **CLOSE)
    cache = DynamicCache(config=model.config)
    parts = [logits(model, piece, past_key_values=cache, use_cache=True) for piece in ids.split(9, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, **CLOSE)
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model").to(DEVICE)
    assert torch.equal(logits(again, ids), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_reports_the_multiply_adds_that_ran(variant):
    model = stirred(**VARIANTS[variant])
    window = tokens(1, 48, seed=9)
    share = spent(model, observe(model, window, None), 48).budget
    assert g.count_macs(model, window) / (48 * ungated_macs_per_token(model, 48)) == pytest.approx(share, rel=2e-3)


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3"])
def test_scales_work_beside_post_norms(family):
    model = stirred(family, kind="vector")
    ids = tokens(2, 20, seed=4)
    with g.masked(model):
        expected = logits(model, ids)
    torch.testing.assert_close(logits(model, ids), expected, **CLOSE)


def test_a_scale_acts_after_the_post_norm():
    model = compress(tiny("gemma3_text"), g.GateSkip(kind="scalar", budget=1))
    ids = tokens(1, 8)
    before = logits(model, ids)
    for block in blocks(model):
        block.gates["mlp"].line.bias.data.fill_(-20.0)  # closed: the branch adds nothing
    hidden = []
    handle = blocks(model)[0].pre_feedforward_layernorm.register_forward_hook(
        lambda _m, args, _o: hidden.append(args[0])
    )
    after = model(ids, output_hidden_states=True)
    handle.remove()
    torch.testing.assert_close(after.hidden_states[1], hidden[0], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(after.logits, before, atol=1e-2)


def test_a_block_is_decided_by_its_attention():
    model = stirred(where="block")
    seen = observe(model, tokens(1, 30, seed=2), None)
    for attention, mlp in zip(seen[::2], seen[1::2], strict=True):
        assert (attention.kind, mlp.kind) == ("attention", "mlp")
        assert torch.equal(attention.keep, mlp.keep)
    assert not torch.stack([d.keep for d in seen]).all()


def test_gates_stand_where_they_were_asked_for():
    seen = observe(stirred(every=2), tokens(1, 8), None)
    assert {d.layer for d in seen} == {1, 3}
    assert {d.kind for d in observe(stirred(where="mlp"), tokens(1, 8), None)} == {"mlp"}


def test_a_shared_matrix_is_stored_once():
    model = stirred(kind="shared")
    matrices = [name for name in model.state_dict() if ".matrix.weight" in name]
    assert len(matrices) == 2
    x = torch.randn(3, 64)
    first, last = blocks(model)[0].gates["mlp"], blocks(model)[-1].gates["mlp"]
    assert torch.equal(first.scale(x), last.scale(x))


def test_uniform_keeps_the_same_share_in_every_branch():
    model = stirred(allocation="uniform")
    seen = observe(model, CALIBRATION, None)
    shares: dict = {}
    for decision in seen:
        shares.setdefault((decision.layer, decision.kind), []).append(decision.keep[:, 1:].float().mean().item())
    means = [sum(part) / len(part) for part in shares.values()]
    assert max(means) - min(means) < 0.12
    found = observe(stirred(), CALIBRATION, None)
    assert len({round(d.keep.float().mean().item(), 1) for d in found}) > 3  # one threshold does not


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_pass_resumed_at_any_block_is_the_whole_pass(family):
    model, ids = tiny(family), tokens(1, 9)
    with torch.no_grad():
        with entering(model) as streams:
            whole = model(ids, use_cache=False).logits
        for index in range(len(blocks(model))):
            with resumed(model, index, streams[index][0]):
                changed = model(ids.flip(1), use_cache=False).logits  # what would enter the first block counts no more
            torch.testing.assert_close(changed, whole, rtol=0, atol=0)
        assert not torch.equal(model(ids.flip(1), use_cache=False).logits, whole)


def test_sensitivity_shifts_scores_by_measured_loss():
    plain, weighed = stirred(allocation="global"), stirred(allocation="sensitivity")
    shifts = weighed.gateskip.steps[-1]["record"]["sensitivity"]
    assert sum(shifts) == pytest.approx(0, abs=1e-4)
    assert max(shifts) - min(shifts) > 0.1
    for index, shift in enumerate(shifts):
        gates = [blocks(m)[index // 2].gates[("attention", "mlp")[index % 2]] for m in (plain, weighed)]
        assert (gates[1].score_bias - gates[0].score_bias).item() == pytest.approx(shift, abs=1e-4)


def test_thresholds_between_settings_lie_between_them():
    dial = dial_of(stirred(allocation="uniform"))
    above, below = dial.table[0], dial.table[1]
    found = dial.thresholds_of((above.budget + below.budget) / 2)
    for a, b, between in zip(above.thresholds, below.thresholds, found, strict=True):
        assert between == pytest.approx((a + b) / 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, "every 0 must be at least 1"),
        ({"channels": 1.0}, "channels 1.0 must be between 0 and 1"),
        ({"kind": "vector"}, "vector gates know nothing before training"),
        ({"kind": "scalar", "budget": 1, "allocation": "sensitivity"}, "weighs effects"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        g.GateSkip(**settings)


@pytest.mark.parametrize("field", ["kind", "where", "allocation", "placement", "surrogate", "kv"])
def test_a_choice_that_is_none_names_the_choices(field):
    with pytest.raises(g.PipelineError, match=rf"gateskip.{field} = 'nothing': Input should be '"):
        build("gateskip", {field: "nothing"})


def test_more_than_all_blocks_is_refused():
    with pytest.raises(ValueError, match="every 5 must be at most 4"):
        compress(tiny(), g.GateSkip(every=5))


def test_gate_losses_are_their_equations():
    opening = torch.tensor([[0.2, 0.9], [0.5, 0.4]])
    values = opening.flatten().tolist()
    assert gate_l1(opening).item() == pytest.approx(sum(values) / 4)
    assert gate_l2(opening).item() == pytest.approx(sum(v * v for v in values) / 4)
    kl = sum(v * math.log(v / 0.3) + (1 - v) * math.log((1 - v) / 0.7) for v in values) / 4
    assert gate_kl(opening, 0.3).item() == pytest.approx(kl, rel=1e-5)
    assert math.isfinite(gate_kl(torch.tensor([[0.0, 1.01]]), 1.0).item())


def test_everything_runs_at_the_lowest_threshold():
    model = stirred()
    assert all(d.keep.all() for d in observe(model, tokens(1, 20), everywhere(model, RUN_ALL)))


def test_a_narrow_surrogate_is_least_squares_on_the_mlps_channels():
    model, layer = stirred(surrogate="narrow"), 1
    mlp, narrow = blocks(model)[layer].mlp, blocks(model)[layer].gates["mlp"].narrow
    rows = [int((mlp.up_proj.weight == row).all(1).nonzero()) for row in narrow.up.weight]
    assert len(set(rows)) == 32  # a quarter of 128
    assert torch.equal(narrow.gate.weight, mlp.gate_proj.weight[rows])
    inputs = []
    plain = tiny()
    handle = blocks(plain)[layer].mlp.register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    with quick_products():  # as fitting has them: which of two channels goes can hang on the last bits
        for window in CALIBRATION[:5]:  # of 8 windows, 60 % are for surrogates
            logits(plain, window[None])
        with torch.no_grad():
            x = torch.cat([part[0, 1:] for part in inputs])
            values = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
    handle.remove()
    with torch.no_grad():
        gram = values.T @ values
        assert rows == backward_elimination(gram, mlp.down_proj.weight, 32, RIDGE).tolist()
        features = torch.cat((values[:, rows], torch.ones(len(x), 1, device=DEVICE)), dim=1).double()
        solution = torch.linalg.lstsq(features, mlp(x).double()).solution
        found, least = narrow(x) - mlp(x), features @ solution - mlp(x)
    assert least.square().sum() <= found.square().sum() < 1.02 * least.square().sum()  # but for the ridge


def test_an_mlp_without_a_gate_has_no_narrow_surrogate():
    with pytest.raises(g.UnsupportedModel, match="has no gate_proj, up_proj and down_proj"):
        compress(tiny("gpt2"), g.GateSkip(surrogate="narrow"))


def test_budgets_hold_on_the_text_that_thresholds_were_recalibrated_on(tmp_path):
    model = stirred()
    other = [tokens(1, length, seed=length)[0] for length in range(12, 40)]
    keys = sum(len(ids) ** 2 for ids in other) / sum(len(ids) for ids in other)
    g.recalibrate(model, other)
    for share in (0.9, 0.75, 0.6):
        with g.budget(model, share):
            assert spent(model, observe(model, other, None), round(keys)).budget == pytest.approx(share, abs=0.02)
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model").to(DEVICE)
    assert dial_of(again).table == dial_of(model).table
    with pytest.raises(g.CalibrationError, match="no sequence has more than one token"):
        g.recalibrate(model, [tokens(1, 1)[0]])
    with pytest.raises(g.UnsupportedModel, match="no gates"):
        g.recalibrate(tiny(), other)


def test_a_budget_that_is_set_is_saved(tmp_path):
    model, ids = compress(tiny(), g.GateSkip(budget=0.9, rank=4)), tokens(2, 24)
    g.set_budget(model, 0.7)
    with g.budget(model, 0.8):
        pass
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model").to(DEVICE)
    assert dial_of(again).budget == g.manifest_of(again).transforms[0].budget == 0.7
    assert torch.equal(again(ids).logits, compress(tiny(), g.GateSkip(budget=0.7, rank=4))(ids).logits)
    with pytest.raises(ValueError, match=r"budget 0\.01 is below"):
        g.set_budget(model, 0.01)
    assert dial_of(model).budget == 0.7
    with pytest.raises(g.UnsupportedModel, match="no gates"):
        g.set_budget(tiny(), 0.9)
