"""Baselines really skip, at the budget asked for; `test_gating.py` has the same for the product's own gates."""

from copy import deepcopy
from functools import cache

import pytest
import torch
from tiny_models import CALIBRATION, DEVICE, tiny, tokens
from transformers import DynamicCache

import gateskip_compress as g
from gateskip_compress.baselines.batch_quantile import BatchQuantile
from gateskip_compress.baselines.early_exit import EarlyExit
from gateskip_compress.baselines.mixture_of_depths import MixtureOfDepths
from gateskip_compress.baselines.random_skip import RandomSkip, random_score
from gateskip_compress.gating.calibrate import everywhere, observe, spent
from gateskip_compress.gating.turning import decisions, dial_of, skipping
from gateskip_compress.macs import head_macs, ungated_macs_per_token
from gateskip_compress.model import blocks
from gateskip_compress.step import Context, Transform

CLOSE = dict(atol=2e-4, rtol=2e-4)
TRAINING = g.Training(steps=12, batch=2, gate_rate=0.02, ramp=0.2)
PAPER = g.GateSkip(kind="vector", surrogate="zero", allocation="uniform", budget=0.75, training=TRAINING)
TOKENWISE = {
    "random": RandomSkip(0.75),
    "random, lowrank": RandomSkip(0.75, "lowrank", 4),
    "saturation": EarlyExit(0.75),
    "softmax": EarlyExit(0.75, "softmax"),
    "mixture of depths": MixtureOfDepths(TRAINING, 0.75),
    "mixture of depths, every block": MixtureOfDepths(TRAINING, 0.75, every=1),
}
BASELINES = {**TOKENWISE, "batch quantile": BatchQuantile(PAPER)}


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, **kwargs).logits


@cache
def made_once(name, family):
    model = tiny(family)
    model.record = BASELINES[name].apply(model, Context(CALIBRATION))
    return model


def made(name, family="llama"):
    return deepcopy(made_once(name, family))


@pytest.mark.parametrize("name", BASELINES)
def test_it_skips_at_the_budget_asked_for(name):
    model = made(name)
    for share in (0.75, 0.85):
        with g.budget(model, share) as dial:
            seen = observe(model, CALIBRATION, dial.thresholds)
        assert spent(model, seen, CALIBRATION.shape[1]).budget == pytest.approx(share, abs=0.03)
        assert not torch.cat([d.keep.flatten() for d in seen]).all()
        assert all(d.keep[:, 0].all() for d in seen)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        *((name, "llama") for name in BASELINES),
        ("softmax", "gemma3_text"),
        ("softmax", "gpt2"),
        ("random", "qwen3"),
        ("random, lowrank", "opt"),
        ("saturation", "olmo2"),
        ("mixture of depths", "gpt_neox, sequential"),
        ("batch quantile", "gpt2"),
        ("random", "gpt_neox"),
        ("saturation", "gpt_neox"),
    ],
)
def test_compact_equals_masked(name, family):
    model = made(name, family)
    ids = tokens(3, 40, seed=4)
    with g.masked(model):
        expected = logits(model, ids)
    torch.testing.assert_close(logits(model, ids), expected, **CLOSE)
    with g.budget(model, 1):
        assert not torch.allclose(logits(model, ids), expected, atol=1e-2)


@pytest.mark.parametrize("name", TOKENWISE)
def test_decisions_are_the_same_cached_and_in_any_batch(name):
    model = made(name)
    ids = tokens(3, 29, seed=6)
    expected = logits(model, ids)
    cache_, parts = DynamicCache(config=model.config), []
    for piece in [ids[:, :8], *ids[:, 8:].split(1, dim=1)]:
        parts.append(logits(model, piece, past_key_values=cache_, use_cache=True))
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, **CLOSE)
    torch.testing.assert_close(logits(model, ids[1:2, :20]), expected[1:2, :20], **CLOSE)


@pytest.mark.parametrize("name", TOKENWISE)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_never_runs_and_changes_nothing(name, side):
    model = made(name)
    rows = [tokens(1, n, seed=30 + n) for n in (9, 24)]
    ids, mask = torch.zeros(2, 24, dtype=torch.long, device=DEVICE), torch.zeros(2, 24, dtype=torch.long, device=DEVICE)
    for i, row in enumerate(rows):
        place = slice(24 - row.shape[1], 24) if side == "left" else slice(row.shape[1])
        ids[i, place], mask[i, place] = row[0], 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with decisions(model) as seen:
        together = logits(model, ids, attention_mask=mask, position_ids=positions)
    for row, real, found in zip(rows, mask.bool(), together, strict=True):
        torch.testing.assert_close(found[real][None], logits(model, row), **CLOSE)
    first = (mask == 1) & (mask.cumsum(1) == 1)
    for decision in seen:
        assert torch.equal(decision.real, mask.bool())
        assert not decision.keep[mask == 0].any()
        assert decision.keep[first].all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_part_of_the_batch_quantile(side):
    model, row = made("batch quantile"), tokens(1, 24, seed=8)
    with decisions(model) as alone:
        expected = logits(model, row)
    padding, place = torch.zeros(1, 9, dtype=torch.long, device=DEVICE), slice(9, 33) if side == "left" else slice(24)
    ids = torch.cat((padding, row) if side == "left" else (row, padding), dim=1)
    mask = torch.zeros_like(ids)
    mask[:, place] = 1
    with decisions(model) as padded:
        found = logits(model, ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0))
    torch.testing.assert_close(found[:, place], expected, **CLOSE)
    for with_padding, without in zip(padded, alone, strict=True):
        assert torch.equal(with_padding.keep[:, place], without.keep)
        assert not with_padding.keep[mask == 0].any()


@pytest.mark.parametrize("name", BASELINES)
def test_reported_multiply_adds_are_those_that_ran(name):
    model = made(name)
    window = tokens(1, 48, seed=9)
    seen = observe(model, window, None)
    reported = spent(model, seen, 48).budget * 48 * ungated_macs_per_token(model, 48)
    if name == "softmax":  # measured before the second block for all tokens, then for those that ran the block below
        running = [int(d.keep.sum()) for d in seen if d.kind == "attention"]
        reported += head_macs(model) * (48 + sum(running[:-1]))
    assert g.count_macs(model, window) == pytest.approx(reported, rel=2e-3)


@pytest.mark.parametrize("name", [name for name in TOKENWISE if "mixture" not in name])
def test_budget_1_leaves_logits_and_multiply_adds_alone(name):
    model, ids = made(name), tokens(2, 40, seed=3)
    with g.budget(model, 1):
        assert torch.equal(logits(model, ids), logits(tiny(), ids))
        assert g.count_macs(model, ids) == g.count_macs(tiny(), ids)


def test_random_scores_depend_on_place_and_seed_alone():
    positions = torch.arange(2000)[None]
    score = random_score(positions, 5)
    assert torch.equal(score[:, 700:], random_score(positions[:, 700:], 5))

    def hash_of(x):
        x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
        x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
        return x ^ (x >> 16)

    naive = [hash_of((position + hash_of(5)) % 2**32) / (2**32 - 1) for position in range(2000)]
    torch.testing.assert_close(score[0], torch.tensor(naive))
    assert score.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist() == pytest.approx([0.1, 0.5, 0.9], abs=0.03)
    other = random_score(positions, 6)
    assert abs(torch.corrcoef(torch.cat((score, other)))[0, 1]) < 0.06
    seeds = []
    for seed in (0, 1):
        model = tiny()
        RandomSkip(0.75).apply(model, Context(CALIBRATION, seed=seed))
        seeds.append(torch.stack([d.keep[0] for d in observe(model, tokens(1, 40), None)]))
    assert not torch.equal(*seeds)


@pytest.mark.parametrize("confidence", ["softmax", "saturation"])
@torch.no_grad()
def test_a_token_that_left_is_frozen_at_its_first_confident_block(confidence):
    model, ids = made(confidence), tokens(2, 40, seed=2)
    with g.budget(model, 0.6), decisions(model) as seen:
        threshold = -dial_of(model).thresholds[0]
        # before each block, and after the last, without the final norm that transformers applies to it
        last = []
        handle = blocks(model)[-1].register_forward_hook(lambda _m, _args, out: last.append(out))
        hidden = [*model(ids, output_hidden_states=True).hidden_states[:-1], *last]
        handle.remove()
    kept = {(d.layer, d.kind): d.keep for d in seen}
    left = torch.zeros(2, 40, dtype=torch.bool, device=DEVICE)
    for layer in range(1, len(blocks(model))):
        for row in range(2):
            for column in range(1, 40):
                now, before = hidden[layer][row, column], hidden[layer - 1][row, column]
                if confidence == "softmax":
                    best = model.lm_head(model.model.norm(now)).softmax(-1).sort(descending=True).values
                    sure = float(best[0] - best[1])
                else:
                    sure = float(now @ before / now.norm() / before.norm())
                left[row, column] |= sure >= threshold
        assert torch.equal(kept[layer, "attention"], ~left)
        assert torch.equal(kept[layer, "mlp"], ~left)
        assert torch.equal(hidden[layer + 1][left], hidden[layer][left])
    assert 0.2 < left.float().mean() < 1


def test_routers_start_neutral_and_weigh_alike_in_training_and_inference():
    ids = tokens(2, 30, seed=5)
    model = tiny()
    still = g.Training(steps=1, batch=1, gate_rate=0.0)
    MixtureOfDepths(still, 1.0).apply(model, Context(CALIBRATION))
    assert torch.equal(logits(model, ids), logits(tiny(), ids))
    model = made("mixture of depths")
    expected = logits(model, ids)
    with skipping(model, "soft"):
        torch.testing.assert_close(logits(model, ids), expected, **CLOSE)
    seen = observe(model, ids, None)
    assert {d.layer for d in seen} == {1, 3}
    for attention, mlp in zip(seen[::2], seen[1::2], strict=True):
        assert torch.equal(attention.keep, mlp.keep)
        assert torch.equal(attention.scale, mlp.scale)
        assert attention.scale.std() > 1e-5


def test_a_router_weighs_attention_and_mlp():
    model, ids = made("mixture of depths"), tokens(1, 12, seed=5)
    block = blocks(model)[1]
    block.gates["attention"].line.bias.data.fill_(-20.0)  # r near 0: the block adds nothing
    with g.budget(model, 1), torch.no_grad():
        seen = model(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(seen[2], seen[1], atol=1e-3, rtol=1e-3)


def test_the_batch_quantile_skips_its_share_of_every_call_and_so_depends_on_the_call():
    model = made("batch quantile")
    share = dial_of(model).thresholds[0]
    assert 0.2 < share < 0.9
    ids = tokens(3, 41, seed=8)
    with decisions(model) as seen:
        together = logits(model, ids)
    for decision in seen:
        assert 1 - decision.keep[:, 1:].float().mean().item() == pytest.approx(share, abs=2 / 120)
    assert not torch.allclose(together[:1], logits(model, ids[:1]), atol=1e-2)
    cache_ = DynamicCache(config=model.config)
    logits(model, ids[:1, :20], past_key_values=cache_, use_cache=True)
    with decisions(model) as seen:
        logits(model, ids[:1, 20:21], past_key_values=cache_, use_cache=True)
    assert all(d.keep.all() for d in seen)  # one token is its own quantile: the reference never skips it


def test_checkpointing_is_refused_where_it_would_drop_out():
    step = MixtureOfDepths(g.Training(steps=1, checkpointing=True))
    with pytest.raises(g.UnsupportedModel, match=r"drop out 0\.1 in each block"):
        step.apply(tiny("opt"), Context(CALIBRATION))


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_are_no_steps(name):
    assert not isinstance(BASELINES[name], Transform)  # so pipelines and recipes refuse them


def test_none_and_all_may_skip():
    for name in TOKENWISE:
        model, ids = made(name), tokens(2, 12)
        seen = observe(model, ids, everywhere(model, 1e9))
        assert not any(d.keep[:, 1:].any() for d in seen), name
        assert all(d.keep.all() for d in observe(model, ids, everywhere(model, -1e9)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomSkip(0.0), "budget 0.0 must be above 0"),
        (lambda: EarlyExit(1.5), "budget 1.5 must be above 0"),
        (lambda: MixtureOfDepths(TRAINING, every=0), "every 0 must be at least 1"),
        (lambda: MixtureOfDepths(TRAINING, every=9).apply(tiny(), Context(CALIBRATION)), "every 9 must be at most 4"),
        (lambda: RandomSkip(0.05).apply(tiny(), Context(CALIBRATION)), "budget 0.05 is below 0.399, the lowest"),
    ],
    ids=["zero", "over 1", "every", "every of all", "floor"],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
