import pytest
import torch
from tiny_models import CALIBRATION, DEVICE, compress, tiny, tokens
from transformers import DynamicCache, StaticCache

import gateskip_compress as g
from gateskip_compress.gating.calibrate import everywhere, observe, spent
from gateskip_compress.gating.turning import decisions, dial_of
from gateskip_compress.macs import ungated_macs_per_token
from gateskip_compress.model.attention import whole_rectangles

CLOSE = dict(atol=2e-4, rtol=2e-4)  # products over other sets of rows round differently


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, **kwargs).logits


def test_budget_1_leaves_logits_bit_equal(gated, family):
    plain = tiny(family)
    ids = tokens(2, 40, seed=3)
    with g.budget(gated, 1):
        assert torch.equal(logits(gated, ids), logits(plain, ids))


@pytest.mark.parametrize("threshold", ["calibrated", "none kept", "all kept"])
@pytest.mark.parametrize("rows", [1, 3])
def test_compact_equals_masked(gated, threshold, rows):
    dial = dial_of(gated)
    fixed = {"none kept": 1e9, "all kept": -1e9}
    if threshold in fixed:
        dial.thresholds = everywhere(gated, fixed[threshold])
    ids = tokens(rows, 40, seed=4)
    with g.masked(gated):
        expected = logits(gated, ids)
    torch.testing.assert_close(logits(gated, ids), expected, **CLOSE)


def test_skipping_happens_and_changes_the_output(gated):
    ids = tokens(1, 40, seed=5)
    with decisions(gated) as seen:
        skipped = logits(gated, ids)
    kept = torch.cat([d.keep.flatten() for d in seen]).float().mean()
    assert 0.2 < kept < 0.95
    with g.budget(gated, 1):
        assert not torch.allclose(skipped, logits(gated, ids), atol=1e-2)


@pytest.mark.parametrize("chunk", [1, 7])
def test_cached_decoding_equals_the_full_pass(gated, chunk):
    ids = tokens(2, 29, seed=6)
    cache, parts = DynamicCache(config=gated.config), []
    for piece in [ids[:, :8], *ids[:, 8:].split(chunk, dim=1)]:
        parts.append(logits(gated, piece, past_key_values=cache, use_cache=True))
    torch.testing.assert_close(torch.cat(parts, dim=1), logits(gated, ids), **CLOSE)


def test_a_static_cache_gives_the_same():
    model = compress(tiny(), g.GateSkip(budget=0.6, rank=4))
    ids = tokens(1, 20, seed=6)
    cache = StaticCache(config=model.config, max_cache_len=32)
    parts = [logits(model, piece, past_key_values=cache, use_cache=True) for piece in ids.split(5, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), logits(model, ids), **CLOSE)


def test_a_row_does_not_depend_on_its_neighbours_nor_on_later_tokens(gated):
    ids = tokens(3, 30, seed=7)
    together = logits(gated, ids)
    torch.testing.assert_close(together[1:2], logits(gated, ids[1:2]), **CLOSE)
    torch.testing.assert_close(together[:, :20], logits(gated, ids[:, :20]), **CLOSE)


def test_left_padding_does_not_change_a_row():
    model = compress(tiny(), g.GateSkip(budget=0.6, rank=4))
    ids = tokens(1, 20, seed=8)
    padded = torch.cat((torch.zeros(1, 6, dtype=torch.long, device=DEVICE), ids), dim=1)
    mask = (torch.arange(26, device=DEVICE) >= 6)[None].long()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    found = logits(model, padded, attention_mask=mask, position_ids=positions)[:, 6:]
    torch.testing.assert_close(found, logits(model, ids), **CLOSE)


def test_the_first_token_is_never_skipped(gated):
    dial_of(gated).thresholds = everywhere(gated, 1e9)
    with decisions(gated) as seen:
        logits(gated, tokens(2, 12))
    for decision in seen:
        assert decision.keep[:, 0].all()
        assert not decision.keep[:, 1:].any()


def test_reported_multiply_adds_are_those_that_ran(gated):
    dial = dial_of(gated)
    window = tokens(1, 48, seed=9)
    share = spent(gated, observe(gated, window, dial.thresholds), 48).budget
    counted = g.count_macs(gated, window)
    # rotary tables are a matrix product too: a few multiply-adds beside the model's
    assert counted / (48 * ungated_macs_per_token(gated, 48)) == pytest.approx(share, rel=2e-3)


def test_masked_skipping_saves_nothing(gated):
    window = tokens(1, 48, seed=9)
    with g.masked(gated):
        counted = g.count_macs(gated, window)
    assert counted >= 48 * ungated_macs_per_token(gated, 48)


@pytest.mark.parametrize("share", [0.9, 0.75, 0.6])
def test_a_budget_is_kept_on_its_calibration_text(gated, share):
    with g.budget(gated, share) as dial:
        found = spent(gated, observe(gated, CALIBRATION, dial.thresholds), CALIBRATION.shape[1]).budget
    assert found == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("share", [0, -0.5, 1.5, float("nan")])
def test_budgets_out_of_range_are_refused(share):
    with pytest.raises(ValueError, match="must be above 0 and at most 1"):
        g.GateSkip(budget=share)


def test_a_budget_below_the_floor_names_the_floor(gated):
    floor = dial_of(gated).floor
    with pytest.raises(ValueError, match=f"{floor:.3f}, the lowest"), g.budget(gated, 0.01):
        pass


def test_the_dial_goes_back_after_an_error(gated):
    with pytest.raises(RuntimeError), g.budget(gated, 0.8):
        raise RuntimeError
    assert dial_of(gated).budget == 0.6


def test_an_ungated_model_has_no_dial():
    with pytest.raises(g.UnsupportedModel, match="no gates"), g.budget(tiny(), 0.8):
        pass


def test_flash_attention_is_refused():
    model = tiny()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(g.UnsupportedModel, match="sdpa"):
        compress(model, g.GateSkip())


def test_hidden_states_are_still_recorded(gated):
    out = gated(tokens(1, 8), output_hidden_states=True)
    assert len(out.hidden_states) == 5


@pytest.mark.parametrize("real", [[150, 150], [150, 40]])
def test_long_prompts_attend_in_strips_and_give_the_same(gated, real):
    ids = tokens(2, 150, seed=8)
    mask = (torch.arange(150, device=DEVICE) >= 150 - torch.tensor(real, device=DEVICE)[:, None]).long()
    seen = mask > 0
    with g.budget(gated, 0.6):
        striped = logits(gated, ids, attention_mask=mask)[seen]
        with whole_rectangles():
            torch.testing.assert_close(striped, logits(gated, ids, attention_mask=mask)[seen], **CLOSE)
        with g.masked(gated):
            torch.testing.assert_close(striped, logits(gated, ids, attention_mask=mask)[seen], **CLOSE)
