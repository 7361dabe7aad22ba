"""What each family must do beyond `test_gating.py`: caches, padding, stacks and reloading; and what is refused."""

import pytest
import torch
from tiny_models import DEVICE, FAMILY_CONFIGS, SLIDING, compress, tiny, tokens
from torch import nn
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM, StaticCache

import gateskip_compress as g
from gateskip_compress.gating.calibrate import everywhere, spent
from gateskip_compress.gating.turning import decisions, dial_of
from gateskip_compress.model import blocks, branches, keep_softcap, linears, read_out, watch
from gateskip_compress.quantization.linear import QuantizedLinear

CLOSE = dict(atol=2e-4, rtol=2e-4)


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, **kwargs).logits


def padded(rows, side):
    """A batch of rows of unequal lengths: ids, attention mask, positions."""
    longest = max(row.shape[1] for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long, device=DEVICE)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(longest - row.shape[1], longest) if side == "left" else slice(row.shape[1])
        ids[i, place], mask[i, place] = row[0], 1
    return ids, mask, (mask.cumsum(1) - 1).clamp_min(0)


ROWS = [tokens(1, n, seed=30 + n) for n in (9, 24, 17)]


@pytest.mark.parametrize("how", ["compact", "masked"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_ragged_batch_gives_each_row_as_if_alone(gated, side, how):
    dial_of(gated).how = how
    ids, mask, positions = padded(ROWS, side)
    together = logits(gated, ids, attention_mask=mask, position_ids=positions)
    for row, real, found in zip(ROWS, mask.bool(), together, strict=True):
        torch.testing.assert_close(found[real][None], logits(gated, row), **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_never_runs_nor_counts(gated, side):
    ids, mask, positions = padded(ROWS, side)
    with decisions(gated) as together:
        logits(gated, ids, attention_mask=mask, position_ids=positions)
    with decisions(gated) as alone:
        for row in ROWS:
            logits(gated, row)
    for decision in together:
        assert not decision.keep[mask == 0].any()
        assert torch.equal(decision.real, mask.bool())
    assert spent(gated, together, 24) == spent(gated, alone, 24)


@pytest.mark.parametrize("given", [True, False], ids=["positions given", "no positions"])
def test_the_first_real_token_is_protected(gated, given):
    ids, mask, positions = padded(ROWS, "left")
    dial_of(gated).thresholds = everywhere(gated, 1e9)
    with decisions(gated) as seen:
        logits(gated, ids, attention_mask=mask, **({"position_ids": positions} if given else {}))
    for decision in seen:
        assert torch.equal(decision.keep, (mask == 1) & (mask.cumsum(1) == 1))


def test_a_padded_batch_is_decoded_as_its_rows_are(gated):
    ids, mask, _ = padded(ROWS, "left")
    settings = dict(max_new_tokens=6, do_sample=False)
    together = gated.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :]
    for row, found in zip(ROWS, together, strict=True):
        assert torch.equal(gated.generate(row, **settings)[0, row.shape[1] :], found)


@pytest.mark.parametrize("chunk", [1, 7])
def test_a_static_cache_gives_the_same(gated, chunk):
    ids = tokens(2, 29, seed=6)
    cache = StaticCache(config=gated.config, max_cache_len=40)
    pieces = [ids[:, :8], *ids[:, 8:].split(chunk, dim=1)]
    parts = [logits(gated, piece, past_key_values=cache, use_cache=True) for piece in pieces]
    torch.testing.assert_close(torch.cat(parts, dim=1), logits(gated, ids), **CLOSE)


def test_a_stack_of_all_reloads_and_speculates(family, tmp_path):
    model = compress(tiny(family), g.Prune(blocks=1), g.GateSkip(budget=0.85, rank=4), g.Quantize(group_size=32))
    assert {type(module) for block in blocks(model) for module in block.modules()}.isdisjoint({nn.Linear})
    assert len([m for m in model.modules() if isinstance(m, QuantizedLinear)]) == len(linears(tiny(family))) * 3 // 4
    ids = tokens(1, 12, seed=4)
    expected = logits(model, ids)
    with g.masked(model):
        torch.testing.assert_close(logits(model, ids), expected, **CLOSE)
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model").to(DEVICE)
    assert torch.equal(logits(again, ids), expected)
    settings = dict(max_new_tokens=12, do_sample=False)
    drafting = dict(custom_generate=g.self_speculative, draft_budget=0.6, draft_tokens=3)
    if family in SLIDING:
        with pytest.raises(ValueError, match="cannot be rolled back"):
            model.generate(ids, **settings, **drafting)
    else:
        assert torch.equal(model.generate(ids, **settings, **drafting), model.generate(ids, **settings))


def test_scaling_gates_work(family):
    model = compress(tiny(family), g.GateSkip(kind="vector", budget=1, surrogate="mean"))
    ids = tokens(2, 20, seed=4)
    torch.testing.assert_close(logits(model, ids), logits(tiny(family), ids), **CLOSE)
    generator = torch.Generator().manual_seed(0)
    for block in blocks(model):
        for parameter in block.gates.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator).to(DEVICE)
    with decisions(model) as seen:
        logits(model, ids)
    dial_of(model).thresholds = tuple(d.score.median().item() for d in seen)
    with g.masked(model), decisions(model) as seen:
        expected = logits(model, ids)
    assert 0.2 < torch.cat([d.keep.flatten() for d in seen]).float().mean() < 0.8
    torch.testing.assert_close(logits(model, ids), expected, **CLOSE)


def test_branches_add_up_to_the_block(family):
    model = tiny(family)
    seen = {}
    with watch(model, lambda layer, kind, *parts: seen.update({(layer, kind): parts})):
        hidden = model(tokens(2, 9), output_hidden_states=True).hidden_states
    for layer in range(3):  # the last entry is normalised
        (_, attention, residual), (_, mlp, later) = seen[layer, "attention"], seen[layer, "mlp"]
        torch.testing.assert_close(residual, hidden[layer])
        torch.testing.assert_close(residual + attention + mlp, hidden[layer + 1], **CLOSE)
        parallel = getattr(model.config, "use_parallel_residual", False)
        torch.testing.assert_close(later, residual if parallel else residual + attention, **CLOSE)


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["", "soft cap"])
@torch.no_grad()
def test_the_read_out_turns_the_last_block_into_logits(family, softcap):
    model = tiny(family)
    if softcap is not None:
        if not hasattr(model.config, "final_logit_softcapping"):
            pytest.skip("only Gemma has it")
        model.config.final_logit_softcapping = softcap
    last = []
    blocks(model)[-1].register_forward_hook(lambda _module, _args, out: last.append(out))
    expected = logits(model, tokens(2, 9))
    assert torch.equal(read_out(model)(last[0]), expected)


@pytest.mark.parametrize(
    ("family", "path"),
    [("llama", "model.norm"), ("gpt2", "transformer.ln_f"), ("opt", "model.decoder.final_layer_norm")],
)
def test_a_missing_final_norm_is_named(family, path):
    model = tiny(family)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, None)
    with pytest.raises(g.UnsupportedModel, match=f"has no final norm at {path}"):
        read_out(model)


def test_a_soft_cap_is_not_ignored():
    model = compress(tiny("gemma2"), g.GateSkip(budget=0.7, rank=4))
    ids = tokens(1, 20)
    capped = logits(model, ids)
    for block in blocks(model):
        block.self_attn.attn_logit_softcapping = None
    assert not torch.allclose(logits(model, ids), capped, atol=1e-2)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before is False"),
        ("opt", {"word_embed_proj_dim": 32}, "word_embed_proj_dim 32 is not hidden_size 64"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_config_that_is_left_out_is_refused_with_the_reason(family, changes, message):
    with pytest.raises(g.UnsupportedModel, match=message):
        branches(tiny(family, **changes))


def test_blocks_whose_scale_follows_their_place_are_not_dropped():
    model = tiny("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(g.UnsupportedModel, match="scale_attn_by_inverse_layer_idx"):
        compress(model, g.Prune(blocks=1))


def test_checkpointing_is_refused_where_it_would_drop_out():
    step = g.GateSkip(training=g.Training(steps=1, checkpointing=True))
    with pytest.raises(g.UnsupportedModel, match=r"drop out 0\.1 in each block"):
        compress(tiny("opt"), step)


def test_an_unknown_family_is_named_beside_the_known():
    with pytest.raises(g.UnsupportedModel, match="'bloom' is not supported; supported: gemma2, gemma3_text, gpt2"):
        branches(BloomForCausalLM(BloomConfig(vocab_size=96, hidden_size=64, n_layer=2, n_head=4)))


@pytest.mark.parametrize(
    ("family", "part", "message"),
    [
        ("llama", "mlp", "block 2 of this llama model has no 'mlp'"),
        ("opt", "fc2", "block 2 of this opt model has no 'fc2'"),
        ("llama", "self_attn.k_proj", "attention of block 2 of this llama model has no k_proj"),
        ("phi3", "self_attn.qkv_proj", "attention of block 2 of this phi3 model has no qkv_proj"),
    ],
    ids=lambda value: value if "." not in value and " " not in value else None,
)
def test_a_missing_part_is_named(family, part, message):
    model = tiny(family)
    parent, _, name = part.rpartition(".")
    delattr(blocks(model)[2].get_submodule(parent), name)
    with pytest.raises(g.UnsupportedModel, match=message):
        compress(model, g.GateSkip())


def test_every_family_is_tested():
    assert {config.model_type for config in FAMILY_CONFIGS.values()} == set(g.model.FAMILIES)


def test_a_cap_on_scores_is_not_left_to_fused_kernels():
    model, ids = tiny("gemma2"), tokens(2, 30)
    expected = logits(model, ids)
    model.config._attn_implementation = "sdpa"  # as transformers before 5.21 loads it
    keep_softcap(model)
    assert model.config._attn_implementation == "eager"
    assert torch.equal(logits(model, ids), expected)
