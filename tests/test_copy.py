"""Tokens that skip attention take keys and values from the block below: `GateSkip(kv="copy")`."""

from copy import deepcopy

import pytest
import torch
from tiny_models import CALIBRATION, DEVICE, FAMILY_CONFIGS, SLIDING, compress, tiny, tokens
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import gateskip_compress as g
from gateskip_compress.gating.calibrate import everywhere, observe, spent
from gateskip_compress.gating.turning import decisions, dial_of
from gateskip_compress.macs import branch_costs, ungated_macs_per_token

CLOSE = dict(atol=2e-4, rtol=2e-4)
REFUSED = ("smollm3", "gemma3_text")
COPYING = [family for family in FAMILY_CONFIGS if family not in REFUSED]


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, **kwargs).logits


@pytest.fixture(scope="module", params=COPYING)
def copying_once(request):
    model = compress(tiny(request.param), g.GateSkip(budget=0.6, rank=4, kv="copy"))
    model.tiny_family = request.param
    return model


@pytest.fixture
def copying(copying_once):
    return deepcopy(copying_once)


def test_budget_1_leaves_logits_bit_equal(copying):
    ids = tokens(2, 40, seed=3)
    with g.budget(copying, 1):
        assert torch.equal(logits(copying, ids), logits(tiny(copying.tiny_family), ids))


@pytest.mark.parametrize("threshold", [None, 1e9, -1e9], ids=["calibrated", "none kept", "all kept"])
@pytest.mark.parametrize("rows", [1, 3])
def test_compact_equals_masked(copying, threshold, rows):
    if threshold is not None:
        dial_of(copying).thresholds = everywhere(copying, threshold)
    ids = tokens(rows, 40, seed=4)
    with g.masked(copying):
        expected = logits(copying, ids)
    torch.testing.assert_close(logits(copying, ids), expected, **CLOSE)
    assert dial_of(copying).below is None


@pytest.mark.parametrize("how", ["compact", "masked", "soft"])
def test_the_cache_holds_copies_where_tokens_skipped_and_their_own_elsewhere(copying, how):
    dial = dial_of(copying)
    dial.how, dial.spreads = how, everywhere(copying, 1.0)
    cache = DynamicCache()
    with decisions(copying) as seen:
        logits(copying, tokens(2, 15, seed=4), past_key_values=cache, use_cache=True)
    kept = {d.layer: d.keep for d in seen if d.kind == "attention"}
    assert any(not kept[layer].all() for layer in range(1, 4))
    for layer in range(1, 4):
        for part in ("keys", "values"):
            here, below = (getattr(cache.layers[i], part).transpose(1, 2) for i in (layer, layer - 1))
            same = (here == below).flatten(2).all(-1)
            assert torch.equal(same, ~kept[layer])


def test_copies_change_the_output_and_spend_less(copying):
    ids = tokens(1, 40, seed=5)
    dense = compress(tiny(copying.tiny_family), g.GateSkip(budget=0.6, rank=4))
    dense.load_state_dict(copying.state_dict())
    dial_of(dense).thresholds = dial_of(copying).thresholds
    seen = observe(copying, ids, None)
    assert not torch.allclose(logits(copying, ids), logits(dense, ids), atol=1e-2)
    assert spent(copying, seen, 40).budget < spent(dense, seen, 40).budget
    # the dense model, reading other streams, decides otherwise: what it would spend on the same decisions
    assert g.count_macs(copying, ids) < 40 * ungated_macs_per_token(dense, 40) * spent(dense, seen, 40).budget


@pytest.mark.parametrize("cache", [DynamicCache, lambda config: StaticCache(config=config, max_cache_len=40)])
@pytest.mark.parametrize("chunk", [1, 7])
def test_cached_decoding_equals_the_full_pass(copying, chunk, cache):
    ids = tokens(2, 29, seed=6)
    held, parts = cache(config=copying.config), []
    for piece in [ids[:, :8], *ids[:, 8:].split(chunk, dim=1)]:
        parts.append(logits(copying, piece, past_key_values=held, use_cache=True))
    torch.testing.assert_close(torch.cat(parts, dim=1), logits(copying, ids), **CLOSE)


def test_a_row_does_not_depend_on_its_neighbours_nor_on_padding(copying):
    ids = tokens(3, 30, seed=7)
    torch.testing.assert_close(logits(copying, ids)[1:2], logits(copying, ids[1:2]), **CLOSE)
    padded = torch.cat((torch.zeros(1, 6, dtype=torch.long, device=DEVICE), ids[:1, :24]), dim=1)
    mask = torch.stack((torch.arange(30, device=DEVICE) >= 6, torch.ones(30, dtype=torch.bool, device=DEVICE))).long()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    found = logits(copying, torch.cat((padded, ids[1:2])), attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(found[:1, 6:], logits(copying, ids[:1, :24]), **CLOSE)
    torch.testing.assert_close(found[1:], logits(copying, ids[1:2]), **CLOSE)


def test_reported_multiply_adds_are_those_that_ran(copying):
    window = tokens(1, 48, seed=9)
    share = spent(copying, observe(copying, window, None), 48).budget
    counted = g.count_macs(copying, window)
    assert counted / (48 * ungated_macs_per_token(copying, 48)) == pytest.approx(share, rel=2e-3)


def test_the_budget_is_kept_on_its_calibration_text(copying):
    found = spent(copying, observe(copying, CALIBRATION, None), CALIBRATION.shape[1]).budget
    assert found == pytest.approx(0.6, abs=0.02)


def test_it_reloads_and_speculates(copying, tmp_path):
    ids = tokens(1, 12, seed=4)
    copying.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model").to(DEVICE)
    assert torch.equal(logits(again, ids), logits(copying, ids))
    if copying.tiny_family in SLIDING:
        return
    settings = dict(max_new_tokens=14, do_sample=False)
    dial_of(again).set(0.9)
    drafted = again.generate(ids, custom_generate=g.self_speculative, draft_budget=0.6, draft_tokens=3, **settings)
    assert torch.equal(drafted, again.generate(ids, **settings))


@pytest.mark.parametrize("change", [{"every": 2}, {"every": 3}, {"where": "attention"}, {"where": "block"}], ids=str)
def test_where_gates_stand(change):
    model = compress(tiny(), g.GateSkip(budget=0.85, rank=4, kv="copy", **change))
    ids = tokens(2, 40, seed=4)
    expected = logits(model, ids)
    with g.masked(model):
        torch.testing.assert_close(logits(model, ids), expected, **CLOSE)
    share = spent(model, observe(model, ids[:1], None), 40).budget
    assert g.count_macs(model, ids[:1]) / (40 * ungated_macs_per_token(model, 40)) == pytest.approx(share, rel=2e-3)
    copied = [cost.always == 0 for (_, kind), cost in branch_costs(model, 40).items() if kind == "attention"]
    every = change.get("every", 1)
    assert copied == [(layer + 1) % every == 0 and layer > 0 for layer in range(4)]


def test_training_goes_through_copies():
    training = g.Training(steps=2, batch=2)
    model = compress(tiny(), g.GateSkip(budget=0.7, rank=4, kv="copy", training=training))
    ids = tokens(1, 30)
    with g.masked(model):
        expected = logits(model, ids)
    torch.testing.assert_close(logits(model, ids), expected, **CLOSE)


@pytest.mark.parametrize(
    ("family", "changes", "what"),
    [
        ("smollm3", {}, "block 2 the keys of block 1: rotary positions False there, True here"),
        ("gemma3_text", {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]}, "rotary parameters"),
    ],
    ids=["smollm3", "gemma3_text"],
)
def test_blocks_whose_keys_are_turned_differently_are_refused(family, changes, what):
    with pytest.raises(g.UnsupportedModel, match=what):
        compress(tiny(family, **changes), g.GateSkip(kv="copy"))


@pytest.mark.parametrize(
    ("family", "changes"),
    [("smollm3", {"no_rope_layers": [1] * 4}), ("gemma3_text", {"layer_types": ["full_attention"] * 4})],
    ids=["smollm3", "gemma3_text"],
)
def test_they_are_not_where_all_are_turned_alike(family, changes):
    model = compress(tiny(family, **changes), g.GateSkip(budget=0.7, rank=4, kv="copy"))
    ids = tokens(2, 20)
    with g.masked(model):
        expected = logits(model, ids)
    torch.testing.assert_close(logits(model, ids), expected, **CLOSE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv": "copy", "where": "mlp"}, "where='mlp' skips none"),
        ({"kv": "copy", "training": g.Training(checkpointing=True)}, "checkpointing=False"),
    ],
    ids=["mlp", "checkpointing"],
)
def test_what_cannot_work_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        g.GateSkip(**settings)
