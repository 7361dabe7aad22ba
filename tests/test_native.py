"""Whole tiny models in the native runtime against the Hugging Face path on the same codes."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from tiny_models import FAMILY_CONFIGS, compress, tiny, tiny_tokenizer, tokens
from transformers import LogitsProcessorList, TextStreamer
from transformers.generation.streamers import BaseStreamer

import gateskip_compress as g
from gateskip_compress.gating.block import GatedBlock
from gateskip_compress.gating.dial import Dial
from gateskip_compress.gating.transform import put_in
from gateskip_compress.gating.turning import decisions, dial_of, drafting
from gateskip_compress.model import blocks, remove
from gateskip_compress.quantization.linear import QuantizedLinear, unpacked
from gateskip_compress.runtime import choose_runtime, doctor, extension, lower
from gateskip_compress.runtime.lowered import Draws, Lowered
from gateskip_compress.runtime.packed import Packed
from gateskip_compress.speculation.acceptance import Acceptance
from gateskip_compress.speculation.control import Control
from gateskip_compress.speculation.lookup import look_up

native = pytest.importorskip("gateskip_compress.runtime._native", reason="the extension is not built")
KERNELS = [name for name, _ in native.kernels()]
EXACT = dict(floats="f32", head="f32", cache="f32", context_tokens=128, threads=1)
WAYS = pytest.mark.parametrize(
    ("prompt", "atol"),
    [(False, 5e-5), (True, 2e-4 if native.prompt_kernels("bf16") else 5e-5)],  # there of 16 bits
    ids=["verifying", "as a prompt"],
)
FAMILIES = ("llama", "mistral", "mistral, sliding", "qwen2", "qwen3", "smollm3", "gemma3_text")
LLAMA3 = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3["original_max_position_embeddings"] = 32
gates = partial(g.GateSkip, budget=0.6, rank=4, allocation="global")
GATES = {
    "lowrank": gates(),
    "narrow, copy": gates(surrogate="narrow", kv="copy"),
    "zero, block": gates(surrogate="zero", where="block"),
    "mean, every second": gates(surrogate="mean", every=2, budget=0.8),
}


class Heard(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def logits_of(session, ids, **wanted):
    """Of every token of one text, in one call."""
    places = np.arange(len(ids), dtype=np.int32)
    return session.run(ids.numpy(), np.zeros_like(places), places, places, logits=True, **wanted)


def logits_after(session, ids, **wanted):
    """The same, as a tensor."""
    return torch.from_numpy(logits_of(session, ids, **wanted).logits)


@torch.no_grad()
def torch_logits(model, ids):
    return model(ids[None]).logits[0]


@WAYS
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_float_models_equal_transformers(family, kernels, prompt, atol):
    model, ids = tiny(family), tokens(1, 70)[0]
    found = logits_after(lower(model, kernels=kernels, **EXACT), ids, prompt=prompt)
    torch.testing.assert_close(found, torch_logits(model, ids), rtol=0, atol=atol)  # float32 sums in another order


@pytest.mark.parametrize(("cache", "atol"), [("f32", 5e-4), ("f16", 7e-3)])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_prompts_of_bf16_models_give_what_verifying_gives(family, cache, atol):
    """With keys of 16 bits up to what these change logits themselves, 0.0063 of llama, as scores may be as coarse."""
    ids = tokens(1, 120)[0]
    session = lower(tiny(family), **EXACT | dict(floats="bf16", cache=cache))
    verified = logits_after(session, ids)
    torch.testing.assert_close(logits_after(session, ids, prompt=True), verified, rtol=0, atol=atol)
    for count in (1, 8, 9, 33):  # a tile that is not full; what is left of tokens that are there already
        session.run_row(ids[:-count].numpy(), 0, 0, wanted=0)
        some = session.run_row(ids[-count:].numpy(), 0, 120 - count, wanted=count, logits=True, prompt=True).logits
        torch.testing.assert_close(torch.from_numpy(some), verified[-count:], rtol=0, atol=atol)


@pytest.mark.parametrize("kind", [None, *GATES])
def test_prompts_of_quantized_models_give_what_verifying_gives(kind):
    """Up to what rounding to 16 bits leaves, whose steps are those of whole rows in prompts and of spans elsewhere."""
    quantize = g.Quantize(group_size=64, solver="nearest", clip=False, short_groups=True, bits_of={"v_proj": 8})
    model, ids = compress(tiny(), *([GATES[kind]] if kind else []), quantize), tokens(1, 300)[0].numpy()

    def given(threads=1, bits=16, **how):
        """A window, tokens of which threads share out if it is a prompt, and a rest, rows of which they do."""
        session = lower(model, **EXACT | dict(context_tokens=300, threads=threads, activation_bits=bits))
        parts = {0: ids[: native.WINDOW], native.WINDOW: ids[native.WINDOW :]}
        found = [session.run_row(part, 0, at, wanted=len(part), logits=True, **how) for at, part in parts.items()]
        return torch.from_numpy(np.concatenate([step.logits for step in found]))

    def sure():
        """The first tokens, up to one that has a score within rounding of its gate's threshold."""
        dial, session = dial_of(model) if kind else None, lower(model, **EXACT | dict(context_tokens=300))
        if dial is None:
            return native.WINDOW
        scores = session.run_row(ids[: native.WINDOW], 0, 0, wanted=0, decisions=True).scores
        near = np.abs(scores - np.array(dial.thresholds, np.float32)[:, None]) < 1e-4  # false where there is none
        return int(near.any(0).argmax()) if near.any() else native.WINDOW

    eight, verified, alone, shared = given(bits=8), given(), given(prompt=True), given(threads=2, prompt=True)
    some = slice(sure())
    assert some.stop > 60
    assert rms(alone[some] - verified[some]) < rms(eight[some] - verified[some]) / 50
    assert torch.equal(shared, alone)


def test_llama3_positions_and_untied_heads_equal_transformers():
    model, ids = tiny("llama", rope_parameters=LLAMA3, tie_word_embeddings=True), tokens(1, 90)[0]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    found = logits_after(lower(model, **EXACT), ids)
    torch.testing.assert_close(found, torch_logits(model, ids), rtol=0, atol=5e-5)


def round_spans(_module, inputs):
    """Spans of 64 to 255 even steps, as `native/kernels.h` says."""
    (x,) = inputs
    spans = torch.nn.functional.pad(x, (0, -x.shape[-1] % 64)).unflatten(-1, (-1, 64))
    step = spans.abs().amax(-1, keepdim=True) / 127
    return ((spans / step).round() * step).flatten(-2)[..., : x.shape[-1]]


def rms(difference):
    return difference.square().mean().sqrt()


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize(("symmetric", "group_size"), [(False, 128), (True, 32)], ids=["zeros, 128", "symmetric, 32"])
def test_on_the_same_codes_all_error_is_rounding_of_activations(bits, symmetric, group_size):
    step = g.Quantize(bits, group_size, symmetric, solver="nearest", clip=False, short_groups=True)
    model, ids = compress(tiny("qwen2"), step), tokens(1, 70)[0]
    own = {bits: logits_after(lower(model, **EXACT, activation_bits=bits), ids) for bits in (8, 16)}
    expected = torch_logits(model, ids)
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.register_forward_pre_hook(round_spans)
    explained = rms(torch_logits(model, ids) - expected)
    # not the same error: a value at the edge of a step falls either way, and what comes after differs
    assert rms(own[8] - expected) < 1.5 * explained
    assert rms(own[16] - expected) < explained / 100  # steps are 257 times as small


@WAYS
@pytest.mark.parametrize("kind", GATES)
def test_gated_models_decide_and_give_as_transformers_does(kind, prompt, atol):
    model, ids = compress(tiny(), GATES[kind]), tokens(1, 70)[0]
    found = logits_of(lower(model, **EXACT), ids, decisions=True, prompt=prompt)
    with decisions(model) as made:
        expected = torch_logits(model, ids)
    asked = {2 * d.layer + (d.kind == "mlp"): d for d in made}
    assert 0.2 < torch.cat([d.keep for d in made]).float().mean() < 0.95
    for branch, kept in enumerate(found.kept):
        assert np.array_equal(kept, asked[branch].keep[0].numpy() if branch in asked else np.ones_like(kept))
        if branch in asked and not np.isnan(found.scores[branch]).any():
            score = asked[branch].score[0].numpy()
            np.testing.assert_allclose(found.scores[branch], score, rtol=0, atol=atol if prompt else 2e-5)
    np.testing.assert_allclose(found.logits, expected.numpy(), rtol=0, atol=atol)
    with g.budget(model, 1):
        whole = logits_of(lower(model, **EXACT), ids, decisions=True, prompt=prompt)
        np.testing.assert_allclose(whole.logits, torch_logits(model, ids).numpy(), rtol=0, atol=atol)
    assert whole.kept.all()


BRANCHES = g.Prune(share=0.3, cut="branches", by="influence")
CUTS = {
    "branches": (BRANCHES,),
    "uneven heads": (g.Prune(share=0.12, cut="attention", shape="uneven", by="magnitude", multiple=16),),
    "uneven": (g.Prune(share=0.2, shape="uneven", multiple=16),),
    "surrogates for branches": (gates(budget=0.8), g.Prune(share=0.3, cut="branches", by="gates")),
    "gates on what branches left": (BRANCHES, gates(budget=0.8, surrogate="narrow")),
}


@WAYS
@pytest.mark.parametrize("kind", CUTS)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_pruned_models_give_what_transformers_does(family, kind, prompt, atol):
    model, ids = compress(tiny(family), *CUTS[kind]), tokens(1, 70)[0]
    assert len({sum(p.numel() for p in block.parameters()) for block in blocks(model)}) > 1
    session = lower(model, **EXACT)
    torch.testing.assert_close(logits_after(session, ids, prompt=prompt), torch_logits(model, ids), rtol=0, atol=atol)
    text = dict(max_new_tokens=40, do_sample=False)
    plain = session.generate(ids[None, :20], **text)
    assert torch.equal(plain, model.generate(ids[None, :20], **text))
    assert torch.equal(session.generate(ids[None, :20], speculate=True, **text), plain)


def test_a_taken_out_branch_with_draft_gates_gives_what_transformers_does():
    steps = CUTS["surrogates for branches"], (g.SelfSpeculation(0.5, 3),)
    model, ids = compress(tiny(), *sum(steps, ())), tokens(1, 40)[0]
    session, text = lower(model, **EXACT), dict(max_new_tokens=40, do_sample=False)
    drafted = session.generate(ids[None], speculate=True, **text)
    assert torch.equal(drafted, model.generate(ids[None], **text))


@pytest.mark.parametrize("family", ["mistral, sliding", "gemma3_text"])
def test_windows_that_slide_far_from_the_beginning_equal_transformers(family):
    model, ids = tiny(family, max_position_embeddings=1024), tokens(1, 700)[0]
    session = lower(model, **{**EXACT, "context_tokens": 800})
    session.prefill(ids[:600].numpy())
    found = session.run_row(ids[600:].numpy(), 0, 600, wanted=100, logits=True).logits
    torch.testing.assert_close(torch.from_numpy(found), torch_logits(model, ids)[600:], rtol=0, atol=1e-4)
    single = np.stack(
        [session.run_row(ids[i : i + 1].numpy(), 0, i, wanted=1, logits=True).logits[0] for i in range(600, 700)]
    )
    assert np.array_equal(single, found)


@pytest.fixture(scope="module")
def small():
    """A gated, quantized model that drafts."""
    steps = (
        gates(budget=0.8, surrogate="narrow"),
        g.Quantize(group_size=32, solver="nearest", clip=False),
        g.SelfSpeculation(0.5, 3),
    )
    return compress(tiny(), *steps)


@pytest.fixture(scope="module")
def session(small):
    return lower(small, context_tokens=160, rows=3)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("cache", ["f16", "f32", "int8"])
@pytest.mark.parametrize("activations", [8, 16])
def test_tokens_together_give_the_bits_of_tokens_one_by_one(small, kernels, cache, activations):
    ids = tokens(1, 40)[0]
    session = lower(small, context_tokens=64, kernels=kernels, cache=cache, activation_bits=activations, threads=1)
    alone = [session.run_row(ids[i : i + 1].numpy(), 0, i, wanted=1, logits=True).logits for i in range(len(ids))]
    for size in (40, 7, 3):
        parts = ids.split(size)
        together = [
            session.run_row(part.numpy(), 0, size * i, wanted=len(part), logits=True).logits
            for i, part in enumerate(parts)
        ]
        assert np.array_equal(np.concatenate(together), np.concatenate(alone)), size


@pytest.mark.parametrize("kernels", KERNELS)
def test_long_texts_have_the_same_bits_however_their_attention_is_shared_out(kernels):
    """That of many tokens by queries, that of a few by runs of 256 positions, among one thread or two."""
    model, ids = tiny(max_position_embeddings=640), tokens(1, 600)[0]
    exact = EXACT | dict(context_tokens=640, kernels=kernels)
    session = lower(model, **exact)
    windows = [(i, ids[i : i + 128].numpy()) for i in range(0, 600, 128)]
    whole = np.concatenate([session.run_row(few, 0, i, wanted=len(few), logits=True).logits for i, few in windows])
    np.testing.assert_allclose(whole, torch_logits(model, ids).numpy(), rtol=0, atol=5e-5)
    for threads in (1, 2):
        session = lower(model, **exact | dict(threads=threads))
        for begin, few in windows[:4]:
            session.run_row(few, 0, begin, wanted=0)
        for size, begin in ((9, 500), (5, 509), (1, 514), (3, 515)):
            few = ids[begin : begin + size].numpy()
            found = session.run_row(few, 0, begin, wanted=size, logits=True).logits
            assert np.array_equal(found, whole[begin : begin + size]), (threads, size)


@pytest.mark.parametrize("how", [EXACT, {}], ids=["floats", "codes, exact rows for the largest logits"])
def test_shares_of_the_work_follow_the_pace_of_threads_and_change_no_bit(how):
    model, ids = tiny(intermediate_size=1600, max_position_embeddings=640), tokens(1, 400)[0].numpy()
    if not how:
        model = compress(model, g.Quantize(group_size=64, solver="nearest", clip=False, short_groups=True))
    found, shares = [], []
    for threads in (1, 2):
        session = lower(model, **how | dict(context_tokens=640, threads=threads))
        shares.append(session.native.shares)
        singles = [session.run_row(ids[i : i + 1], 0, i, wanted=1, logits=True).logits for i in range(300)]
        fews = [session.run_row(ids[i : i + 5], 0, i, wanted=5, logits=True).logits for i in range(300, 400, 5)]
        found.append(np.concatenate(singles + fews))
        shares.append(session.native.shares)
    assert np.array_equal(*found)
    assert shares[:3] == [[1], [1], [0.5, 0.5]]
    assert shares[3] != [0.5, 0.5]
    assert sum(shares[3]) == pytest.approx(1)
    assert all(0.2 < share < 0.8 for share in shares[3])


@pytest.mark.parametrize("prompt", [False, True], ids=["verifying", "as a prompt"])
@pytest.mark.parametrize("kind", GATES)
def test_tokens_whose_logits_nobody_wants_change_no_bit(kind, prompt):
    model, ids = compress(tiny(), GATES[kind], g.Quantize(group_size=32)), tokens(1, 201)[0].numpy()
    session = lower(model, context_tokens=256, threads=1)
    places, rows = np.arange(200, dtype=np.int32), np.zeros(200, dtype=np.int32)
    run = partial(session.run, ids[:200], rows, places, logits=True, prompt=prompt)
    whole = run(places)
    after = session.run_row(ids[200:], 0, 200, wanted=1, logits=True).logits
    for want in ([199], [150, 3, 17], []):
        wanted = np.array(want, dtype=np.int32)
        assert np.array_equal(run(wanted).logits, whole.logits[want])
        assert np.array_equal(session.run_row(ids[200:], 0, 200, wanted=1, logits=True).logits, after)
    decided = run(wanted, decisions=True)
    assert np.array_equal(decided.kept, run(places, decisions=True).kept)


def test_a_prompt_is_of_one_row(session):
    places = np.arange(4, dtype=np.int32)
    with pytest.raises(ValueError, match="a prompt has one row"):
        session.run(places, np.array([0, 0, 1, 1], dtype=np.int32), places, places, prompt=True)


def test_threads_and_neighbours_in_a_batch_change_no_bit(small, session):
    ids, lengths = tokens(3, 30), (30, 11, 23)
    single = lower(small, context_tokens=160, threads=1)
    mask = torch.zeros(3, 30, dtype=torch.long)
    padded = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, 30 - length :], padded[row, 30 - length :] = 1, ids[row, :length]
    together = session.generate(padded, attention_mask=mask, max_new_tokens=20, do_sample=False)
    for row, length in enumerate(lengths):
        alone = single.generate(ids[row : row + 1, :length], max_new_tokens=20, do_sample=False)
        assert torch.equal(together[row, 30:], alone[0, length:])


@pytest.mark.parametrize("budget", [1, 0.6])
def test_texts_equal_transformers(small, budget):
    session = lower(small, **EXACT)  # keys and values of 16 bits change a token of random weights now and then
    for seed in range(4):
        ids = tokens(1, 9, seed=seed)
        with g.budget(small, budget), unpacked(small):
            expected = small.generate(ids, max_new_tokens=25, do_sample=False)
            assert torch.equal(session.generate(ids, max_new_tokens=25, do_sample=False), expected)


def test_texts_of_a_batch_end_where_transformers_ends_them(small, session):
    ids = tokens(3, 9)
    with unpacked(small):
        whole = small.generate(ids, max_new_tokens=40, do_sample=False)
        ends = sorted({int(whole[0, 15]), int(whole[1, 30])})
        settings = dict(max_new_tokens=40, do_sample=False, eos_token_id=ends, pad_token_id=0)
        expected = small.generate(ids, **settings)
    assert (expected[:, 9:] == 0).any()  # not all end at once
    assert torch.equal(session.generate(ids, **settings), expected)


def test_where_nobody_drafts_steps_go_together(small, session, monkeypatch):
    steps, follow = [], Lowered.follow

    def followed(self, *args):
        found = follow(self, *args)
        steps.append(len(found))
        return found

    monkeypatch.setattr(Lowered, "follow", followed)
    monkeypatch.setattr(Control, "idle", property(lambda control: 5 if control.plain_steps else 0))
    ids, settings = tokens(2, 9), dict(max_new_tokens=33, do_sample=False)
    expected = session.generate(ids, **settings)
    steps.clear()
    monkeypatch.setattr(small, "speculation_controls", {}, raising=False)
    speculating = dict(speculate=True, draft_budget=0.5, draft_tokens=3, drafts="gates")
    counts = Acceptance()
    assert torch.equal(session.generate(ids, **settings, **speculating, acceptance=counts), expected)
    assert max(steps) == 5
    assert counts.plain_steps + counts.accepted + counts.verifies == 2 * 32  # the first came with the prompt


@pytest.mark.parametrize("extra", [{}, dict(repetition_penalty=1.5), dict(draft_budget=0.4, draft_tokens=7)])
def test_speculation_changes_no_token(small, session, extra):
    counts = Acceptance()
    for seed in range(3):
        ids = tokens(1, 9, seed=30 + seed).repeat(1, 3)  # repeats, which looking up finds
        plain = {name: value for name, value in extra.items() if not name.startswith("draft")}
        settings = dict(max_new_tokens=60, do_sample=False)
        expected = session.generate(ids, **settings, **plain)
        found = session.generate(ids, **settings, **extra, speculate=True, adapt=False, acceptance=counts)
        assert torch.equal(found, expected)
    assert 0 <= counts.accepted <= counts.drafted
    assert counts.drafted > 0


def test_passes_inside_guess_what_look_up_finds(session):
    """Each pass of `speculate` beside the search, and the tokens that plain decoding gives."""
    guesses, most, counts = np.array([0, 1, 0, 4, *[6] * 13], dtype=np.int32), 70, [0, 0, 0]
    for seed in range(4):
        ids = tokens(1, 9, seed=50 + seed).repeat(1, 3)
        plain = session.generate(ids, max_new_tokens=most, do_sample=False)[0].numpy()
        session.prefill(ids[0, :-1].numpy())
        passes = session.speculate(ids[0].numpy(), 0, guesses, True, most, 60.0, np.array([], dtype=np.int32))
        assert passes.tokens.tolist() == plain[27:].tolist()
        at = 27
        for found, guessed, stood in zip(passes.found, passes.guessed, passes.stood, strict=True):
            passage = look_up(plain[:at], 6)
            assert found == passage.found
            assert guessed == min(guesses[found], len(plain) - at - 1)
            same = passage.tokens[:guessed] == plain[at : at + guessed]
            assert stood == (guessed if same.all() else same.argmin())
            at += stood + 1
            counts = [counts[0] + (guessed == 0), counts[1] + (stood == 0 < guessed), counts[2] + (stood > 1)]
        assert at == len(plain)
        assert (passes.seconds > 0).all()
    assert min(counts) > 0  # plain steps, guesses that fell, and some that stood


def test_passes_inside_end_where_they_are_told_to(session):
    ids, none = tokens(1, 9, seed=51).repeat(1, 3), np.array([], dtype=np.int32)
    guesses = np.array([0, *[4] * 16], dtype=np.int32)
    text = session.generate(ids, max_new_tokens=60, do_sample=False)[0].numpy()
    run = partial(session.speculate, ids[0].numpy(), 0)
    session.prefill(ids[0, :-1].numpy())
    assert run(guesses, True, 5, 60.0, none).tokens.tolist() == text[27:32].tolist()
    end = text[34:35].astype(np.int32)
    until = run(guesses, True, 60, 60.0, end).tokens
    assert until.tolist() == text[27 : 27 + len(until)].tolist()
    assert end[0] in until
    assert end[0] not in until[:-5]
    assert len(run(guesses, True, 60, 0.0, none).tokens) == 0
    assert len(run(0 * guesses, False, 60, 60.0, none).tokens) == 0
    lone = np.array([1, 2, 3], dtype=np.int32)  # nothing is found again
    session.prefill(lone[:-1])
    assert len(session.speculate(lone, 0, guesses, False, 60, 60.0, none).tokens) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(most=200), "steps do not fit into the cache"),
        (dict(row=3), "there is no row 3"),
        (dict(guesses=np.array([0, 100_000], dtype=np.int32)), "a number of guesses 100000 must be from 0 to"),
        (dict(text=np.array([1, -1], dtype=np.int32)), "token id -1 must be from 0 to 95"),
        (dict(text=np.array([], dtype=np.int32)), "there is no text"),
    ],
)
def test_passes_inside_refuse_what_does_not_fit(session, change, message):
    given = dict(
        text=np.array([1, 2], dtype=np.int32),
        row=0,
        guesses=np.array([0, 2], dtype=np.int32),
        plainly=True,
        most=4,
        seconds=1.0,
        ends=np.array([], dtype=np.int32),
    )
    with pytest.raises(ValueError, match=message):
        session.speculate(**given | change)


@pytest.mark.parametrize("drafts", ["look-up", "both"])
def test_adaptive_speculation_of_one_text_changes_no_token(small, session, monkeypatch, drafts):
    monkeypatch.setattr(small, "speculation_controls", {}, raising=False)
    inside, speculate = [], Lowered.speculate

    def counted(self, *args):
        passes = speculate(self, *args)
        inside.append(int(passes.stood.sum()))
        return passes

    monkeypatch.setattr(Lowered, "speculate", counted)
    counts, settings = Acceptance(), dict(max_new_tokens=90, do_sample=False)
    for seed in range(4):
        ids = tokens(1, 9, seed=60 + seed).repeat(1, 3)
        expected = session.generate(ids, **settings)
        found = session.generate(ids, **settings, speculate=True, drafts=drafts, acceptance=counts)
        assert torch.equal(found, expected)
    assert counts.plain_steps + counts.accepted + counts.verifies == 4 * 89  # the first came with the prompt
    assert 0 < sum(inside) <= counts.accepted


@pytest.mark.parametrize("extra", [{}, dict(repetition_penalty=1.5), dict(drafts="gates"), dict(drafts="look-up")])
def test_speculation_in_batches_gives_each_row_what_it_would_be_alone(small, extra):
    """Rows of other lengths, padded, that accept and end apart."""
    session, counts = lower(small, rows=3, context_tokens=160), Acceptance()
    rows = [tokens(1, n, seed=40 + n)[0].repeat(2) for n in (4, 9, 7)]
    ids = torch.stack([torch.nn.functional.pad(row, (18 - len(row), 0)) for row in rows])
    mask = torch.stack([(torch.arange(18) >= 18 - len(row)).long() for row in rows])
    plain = {name: value for name, value in extra.items() if name != "drafts"}
    settings = dict(max_new_tokens=50, do_sample=False, pad_token_id=0)
    whole = session.generate(ids, attention_mask=mask, **settings, **plain)
    common = whole[:, 18:].flatten().mode().values.item()  # ends rows at different places
    for end in (None, common):
        expected = session.generate(ids, attention_mask=mask, eos_token_id=end, **settings, **plain)
        for adapt in (False, True):
            how = dict(speculate=True, adapt=adapt, acceptance=counts, eos_token_id=end)
            assert torch.equal(session.generate(ids, attention_mask=mask, **settings, **extra, **how), expected)
    assert counts.drafted > 0


def test_processors_that_remember_are_refused_where_they_would_be_called_out_of_step(session):
    class Counts:
        calls = 0

        def __call__(self, _ids, scores):
            self.calls += 1
            return scores

    settings = dict(logits_processor=LogitsProcessorList([Counts()]), max_new_tokens=4, do_sample=False)
    session.generate(tokens(1, 5), **settings)
    with pytest.raises(ValueError, match="Counts remembers earlier calls"):
        session.generate(tokens(1, 5), speculate=True, **settings)


@pytest.mark.parametrize("extra", [{}, dict(top_k=5, repetition_penalty=1.2), dict(draft_budget=0.4, draft_tokens=7)])
def test_speculation_draws_what_plain_decoding_draws(small, session, extra):
    counts = Acceptance()
    for seed in range(4):
        ids = tokens(1, 9, seed=30 + seed).repeat(1, 3)
        plain = {name: value for name, value in extra.items() if not name.startswith("draft")}
        settings = dict(max_new_tokens=60, do_sample=True, temperature=0.3)
        torch.manual_seed(seed)
        expected = session.generate(ids, **settings, **plain)
        torch.manual_seed(seed)
        found = session.generate(ids, **settings, **extra, speculate=True, adapt=False, acceptance=counts)
        assert torch.equal(found, expected)
    assert counts.drafted > 0
    assert "repetition_penalty" in extra or counts.accepted > 0


@pytest.mark.parametrize(
    "limits",
    [dict(top_k=0), dict(top_k=7), dict(top_p=0.8), dict(min_p=0.1, temperature=2.0), dict(top_k=9, top_p=0.6)],
)
def test_tokens_drawn_inside_are_those_drawn_step_by_step(small, session, monkeypatch, limits):
    """Step by step by transformers' processors, as one stands behind them; inside, plainly and looking passages up."""
    monkeypatch.setattr(small, "speculation_controls", {}, raising=False)
    counts = Acceptance()
    for seed in range(3):
        ids = tokens(1, 9, seed=80 + seed).repeat(1, 3)
        settings = {"max_new_tokens": 60, "do_sample": True, "temperature": 0.4} | limits
        found = []
        for how in (dict(renormalize_logits=True), {}, dict(speculate=True, drafts="look-up", acceptance=counts)):
            torch.manual_seed(seed)
            found.append((session.generate(ids, **settings, **how), torch.rand(1)))
        for text, random in found[1:]:
            assert torch.equal(text, found[0][0])
            assert torch.equal(random, found[0][1])  # as many numbers were taken
    assert counts.plain_steps > 0


def test_scores_that_are_no_numbers_are_told_from_inside(small, session):
    class Off(Draws):
        limits, spent = {}, 0

        def ahead(self, count):
            return np.full(count, 0.5)

        def spend(self, count):
            self.spent += count

    held, draws = small.model.norm.weight.detach().clone(), Off()
    text, guesses = np.array([1, 2, 3]), np.zeros(1, dtype=np.int32)
    ends = np.array([], dtype=np.int32)
    for weight, error in ((held, None), (held * torch.nan, "no token can be drawn: scores are not numbers")):
        small.model.norm.weight.data.copy_(weight)
        own = lower(small, context_tokens=32)
        small.model.norm.weight.data.copy_(held)
        own.prefill(text[:-1])
        with pytest.raises(ValueError, match=error) if error else nullcontext():
            own.speculate(text, 0, guesses, True, 5, 1.0, ends, draws)
    assert draws.spent == 5


def test_speculation_by_looking_up_needs_no_gates_and_fills_the_cache_to_its_end():
    model = tiny()
    session, counts = lower(model, context_tokens=64), Acceptance()
    ids = tokens(1, 4)
    expected = session.generate(ids, max_new_tokens=60, do_sample=False)
    found = session.generate(ids, max_new_tokens=60, do_sample=False, speculate=True, adapt=False, acceptance=counts)
    assert torch.equal(found, expected)


def test_gates_for_drafting_alone_draft_as_on_torch_and_change_no_token():
    own = g.GateSkip(budget=0.5, rank=8, allocation="global")
    model = compress(
        tiny(), gates(budget=0.9), g.SelfSpeculation(gates=own, drafts="gates", adapt=False, draft_tokens=3)
    )
    session, ids = lower(model, **EXACT), tokens(1, 9)[0]
    for share, places in ((model.model.layers[0].draft_dial.budget, drafting), (None, nullcontext)):
        with places(model), decisions(model) as seen, torch.no_grad():
            model(ids[None])
        step = logits_of(session, ids, decisions=True, draft=share)
        expected = {(d.layer, d.kind): d.keep[0] for d in seen}
        kinds = [(layer, kind) for layer in range(model.config.num_hidden_layers) for kind in ("attention", "mlp")]
        assert np.array_equal(step.kept, torch.stack([expected[key] for key in kinds]).numpy())
    counts, settings = Acceptance(), dict(max_new_tokens=40, do_sample=False)
    expected = session.generate(ids[None], **settings)
    assert torch.equal(
        session.generate(ids[None], **settings, speculate=True, adapt=False, acceptance=counts), expected
    )
    assert 0 < counts.accepted < counts.drafted


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_part_of_the_vocabulary_has_the_bits_of_the_whole(small, kernels):
    session, ids = lower(small, kernels=kernels, **EXACT), tokens(1, 40)[0]
    whole, part = logits_of(session, ids), logits_of(session, ids, vocabulary=64)
    assert np.array_equal(part.logits, whole.logits[:, :64])
    assert np.array_equal(part.best, whole.logits[:, :64].argmax(-1))
    for wrong in (0, 33, 1024):
        with pytest.raises(ValueError, match="a part of the vocabulary"):
            logits_of(session, ids, vocabulary=wrong)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("bits", [8, None], ids=["coded", "float"])
def test_the_quick_head_finds_what_the_whole_head_does(kernels, bits):
    """Among 20,000 tokens whose rows are alike in pairs, so that 4 bits alone could not tell them apart."""
    model = tiny("llama", vocab_size=20_000)
    with torch.no_grad():
        rows = model.lm_head.weight
        rows[1::2] = rows[::2] * 1.002
    steps = [g.Quantize(bits=4, group_size=32, solver="nearest", bits_of={"lm_head": bits})] if bits else []
    session = lower(compress(model, *steps) if steps else model, kernels=kernels, context_tokens=64, threads=1)
    ids = tokens(1, 60)[0].numpy()
    whole = session.run_row(ids, 0, 0, wanted=len(ids), logits=True)
    assert np.array_equal(session.run_row(ids, 0, 0, wanted=len(ids)).best, whole.best)


def test_drafts_choose_among_the_first_quarter_of_a_large_vocabulary():
    model = tiny("llama", vocab_size=20_000)
    session = lower(compress(model, gates(surrogate="mean", budget=0.95)), **EXACT)
    ids = tokens(1, 20)[0].numpy()
    session.prefill(ids)
    place = np.array([len(ids) - 1], dtype=np.int32)
    drafted = session.draft(ids[-1:], np.zeros_like(place), place, 0.95, logits=True)
    with g.budget(model, 0.95):
        whole = session.run_row(ids[-1:], 0, len(ids) - 1, wanted=1, logits=True).logits
    assert drafted.logits.shape == (1, 5024)  # 157 chunks of 32
    assert np.array_equal(drafted.logits, whole[:, :5024])
    likeliest = torch.from_numpy(whole[:, :5024]).softmax(dim=-1).max(dim=-1)
    assert drafted.best == likeliest.indices.numpy()
    np.testing.assert_allclose(drafted.shares, likeliest.values, rtol=1e-5)


def test_drafts_follow_a_new_calibration(small):
    session, ids, place = lower(small, **EXACT), tokens(1, 20)[0].numpy(), np.array([19], dtype=np.int32)
    session.prefill(ids)

    def drafted():
        return session.draft(ids[-1:], np.zeros_like(place), place, 0.5, logits=True).logits

    before, dial = drafted(), dial_of(small)
    table, nothing = dial.table, (1e9,) * len(dial.table[-1].thresholds)
    try:
        dial.table = tuple(replace(setting, thresholds=nothing) for setting in table)
        assert not np.array_equal(drafted(), before)
    finally:
        dial.table = table
    assert np.array_equal(drafted(), before)


def test_sampling_draws_from_the_models_own_distribution(small, session):
    ids = tokens(1, 12)
    with torch.no_grad():
        expected = (small(ids).logits[0, -1] / 0.7).topk(5)
    torch.manual_seed(0)
    settings = dict(do_sample=True, temperature=0.7, top_k=5, max_new_tokens=1)
    drawn = torch.cat([session.generate(ids, **settings)[:, -1] for _ in range(300)])
    counts = torch.stack([(drawn == token).sum() for token in expected.indices]).float()
    assert counts.sum() == 300
    likely = 300 * expected.values.softmax(-1)
    statistic = ((counts - likely) ** 2 / likely).sum()
    assert statistic < 23.5  # of chi square with 4 degrees, exceeded once in ten thousand


def test_an_end_token_stops_and_a_streamer_hears_each_token(session):
    ids = tokens(1, 9)
    plain = session.generate(ids, max_new_tokens=30, do_sample=False)[0].tolist()
    end = plain[9 + 6]
    for extra in ({}, dict(speculate=True)):
        heard = Heard()
        settings = dict(max_new_tokens=30, do_sample=False, eos_token_id=end, pad_token_id=0)
        stopped = session.generate(ids, streamer=heard, **settings, **extra)[0].tolist()
        assert stopped == plain[: plain.index(end, 9) + 1]
        assert heard.tokens == stopped
        assert heard.ended


def test_an_interrupt_stops_generation_and_the_session_goes_on(session):
    class Interrupt(BaseStreamer):
        def put(self, value):
            if value.numel() == 1:
                raise KeyboardInterrupt

        def end(self):
            raise AssertionError

    ids = tokens(1, 9)
    before = session.generate(ids, max_new_tokens=9, do_sample=False)
    with pytest.raises(KeyboardInterrupt):
        session.generate(tokens(1, 20, seed=5), max_new_tokens=9, do_sample=False, streamer=Interrupt())
    assert torch.equal(session.generate(ids, max_new_tokens=9, do_sample=False), before)


@pytest.mark.parametrize(
    ("ids", "settings", "message"),
    [
        (tokens(1, 150), dict(max_new_tokens=20), "150 prompt and 20 new tokens do not fit into a cache of 160: lower"),
        (torch.tensor([[3, 96]]), {}, "token id 96 is out of range: the vocabulary has 96 entries"),
        (torch.tensor([[3, -1]]), {}, "token id -1 is out of range"),
        (tokens(4, 5), {}, "4 sequences, and the cache has 3 rows"),
        (tokens(1, 5), dict(num_beams=2), "num_beams 2"),
        (tokens(2, 5), dict(speculate=True, streamer=Heard()), "a streamer follows one sequence, got 2"),
        (tokens(1, 5), dict(attention_mask=torch.tensor([[1, 0, 1, 1, 1]])), "hides tokens between others"),
        (tokens(1, 5), dict(speculate=True, draft_tokens=0), "draft_tokens 0 must be at least 1"),
        (tokens(1, 5), dict(speculate=True, draft_tokens=256), "draft_tokens 256 must be from 1 to 255"),
        (tokens(1, 5), dict(speculate=True, draft_budget=0.9), "must be below the budget that verifies, 0.8"),
    ],
    ids=["context", "id", "negative id", "rows", "beams", "streamer", "holes", "draft", "long draft", "draft budget"],
)
def test_what_cannot_be_decoded_is_refused(session, ids, settings, message):
    with pytest.raises(ValueError, match=message):
        session.generate(ids, **{"max_new_tokens": 5, "do_sample": False, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(threads=1000), "threads 1000 must be from 1 to "),
        (dict(threads=0), "threads 0 must be from 1 to "),
        (dict(context_tokens=0), "context_tokens 0 and rows 1 must be at least 1"),
        (dict(kernels="mmx"), "kernels 'mmx' must be one of .*portable"),
        (dict(activation_bits=4), "activation_bits 4 must be one of 8, 16"),
    ],
    ids=["threads", "no thread", "context", "kernels", "activations"],
)
def test_arguments_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        lower(tiny(), **settings)


def without_attention():
    model = tiny()
    for layer in range(len(blocks(model))):
        remove(model, layer, "attention")
    return model


class Otherwise(GatedBlock):
    def decide(self, *given):  # noqa: ARG002
        raise AssertionError


def skipping_otherwise(model):
    put_in(model, {}, Dial(), form=Otherwise)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny("gemma2"), "does not know family 'gemma2'; it knows llama, mistral"),
        (lambda: tiny("gemma3_text", final_logit_softcapping=30.0), "final_logit_softcapping is 30.0"),
        (lambda: tiny(hidden_act="gelu"), "does not know activation 'gelu'"),
        (lambda: compress(tiny(), g.GateSkip(budget=1, kind="scalar")), "block 0 has a 'scalar' gate, which scales"),
        (lambda: compress(tiny(), g.Quantize(solver="nf4")), "NF4 and FP4 weights are no integers"),
        (lambda: skipping_otherwise(tiny()), "decides in another way than by its gates"),
        (lambda: tiny(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)), "rope_type 'dynamic'"),
        (without_attention, "no block has attention"),
    ],
    ids=["family", "soft cap", "activation", "gate", "levels", "baseline", "rope", "no attention"],
)
def test_models_that_it_does_not_know_are_refused_and_run_on_torch(make, message):
    model, told = make(), []
    with pytest.raises(g.UnsupportedModel, match=message):
        choose_runtime(model, "native", 64, told.append)
    assert told == []
    assert choose_runtime(model, "auto", 64, told.append) is None
    assert len(told) == 1
    assert "running on torch: " in told[0]


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_and_an_embedding_of_few_bits_keep_their_codes(tied):
    few = g.Quantize(solver="nearest", clip=False, bits_of={"embed|head": 8})
    model, ids = compress(tiny(tie_word_embeddings=tied), few), tokens(1, 16)[0]
    found = logits_after(lower(model, **{**EXACT, "head": "int8"}), ids)
    torch.testing.assert_close(found, torch_logits(model, ids), rtol=0, atol=2e-3)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("head", ["int8", "f32"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("bits", "symmetric"), [(3, True), (4, False), (8, True)])
def test_an_embedding_of_few_bits_is_read_from_its_codes_exactly(bits, symmetric, tied, head, kernels):
    few = g.Quantize(solver="nearest", clip=False, symmetric=symmetric, group_size=32, bits_of={"embed|head": bits})
    model, ids = compress(tiny(tie_word_embeddings=tied), few), tokens(1, 16)[0]
    settings = {**EXACT, "head": head, "kernels": kernels}
    found = logits_after(lower(model, **settings), ids)
    floats = torch.nn.Embedding.from_pretrained(model.get_input_embeddings().weight)
    model.set_input_embeddings(floats)
    assert torch.equal(found, logits_after(lower(model, **settings), ids))


@pytest.mark.parametrize("how", ["float", "stacked", "vocabulary too"])
def test_a_released_model_decodes_in_its_session_alone(how, tmp_path):
    few = partial(g.Quantize, bits=4, group_size=32, solver="nearest", clip=False)
    steps = {
        "float": (gates(),),
        "stacked": (gates(surrogate="narrow"), few()),
        "vocabulary too": (gates(), few(bits_of={"embed": 8})),
    }[how]
    model, ids = compress(tiny(), *steps), tokens(1, 30)
    held = lower(model, context_tokens=64)
    expected = held.generate(ids, max_new_tokens=12, do_sample=False)
    session = lower(model, context_tokens=64, release=True)
    assert torch.equal(session.generate(ids, max_new_tokens=12, do_sample=False), expected)
    assert torch.equal(session.generate(ids, max_new_tokens=12, do_sample=False, speculate=True), expected)
    with g.budget(model, 1.0):
        assert session.run_row(ids[0].numpy(), 0, 0, wanted=1, decisions=True).kept.all()
    left = [t for block in model.model.layers for t in (*block.parameters(), *block.buffers()) if t.dim() == 2]
    assert left == []
    for use in (lambda: model(ids), lambda: model.save_pretrained(tmp_path / "out"), lambda: lower(model)):
        with pytest.raises(g.UnsupportedModel, match="load the model again"):
            use()
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_refused_keeps_its_weights():
    few = g.Quantize(solver="nf4", bits_of={"layers.0.": 16})
    model, ids, told = compress(tiny(hidden_size=64), few), tokens(1, 9), []
    before = torch_logits(model, ids[0])
    assert choose_runtime(model, "auto", 64, told.append, release=True) is None
    assert "NF4 and FP4" in told[0]
    with pytest.raises(ValueError, match="threads 99"):
        lower(tiny(), threads=99, release=True)
    assert torch.equal(torch_logits(model, ids[0]), before)


def test_a_window_that_the_context_does_not_reach_makes_no_difference():
    model, ids = tiny("mistral, sliding"), tokens(1, 16)[0]
    found = logits_after(lower(model, **{**EXACT, "context_tokens": 16}), ids)
    torch.testing.assert_close(found, torch_logits(model, ids), rtol=0, atol=5e-5)


def test_without_the_extension_auto_says_why_and_native_raises(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(extension, "import_module", missing)
    told = []
    assert choose_runtime(tiny(), "auto", 64, told.append) is None
    assert "no C++17 compiler" in told[0]
    with pytest.raises(g.GateSkipError, match="no native runtime here"):
        choose_runtime(tiny(), "native", 64, told.append)
    assert choose_runtime(tiny(), "torch", 64, told.append) is None
    assert len(told) == 1
    found = doctor()
    assert not found["native"]
    assert "no native runtime here" in found["reason"]


def test_the_doctor_names_what_is_here():
    found = doctor()
    assert found["kernels"] == KERNELS
    assert found["kernels"][-1] == "portable"
    assert all(rate > 0 for rate in found["read_bytes_per_s"].values())


def test_the_familiar_streamer_works(session, capsys):
    streamer = TextStreamer(tiny_tokenizer(), skip_prompt=True)
    out = session.generate(tokens(1, 5), max_new_tokens=4, do_sample=False, streamer=streamer)
    assert capsys.readouterr().out.split() == [f"w{i}" for i in out[0, 5:].tolist()]


def test_families_here_are_known_families():
    assert set(FAMILIES) <= set(FAMILY_CONFIGS)


def test_packed_weights_beside_a_checkpoint_are_read_and_give_the_same_bits(small, tmp_path):
    folder, ids = tmp_path / "model", tokens(1, 20)[0]
    small.save_pretrained(folder)
    expected = logits_after(lower(small, context_tokens=64), ids)
    first = lower(small, context_tokens=64, beside=folder)
    (file,) = folder.glob("native.*.packed")
    written = file.stat().st_mtime_ns
    again = lower(small, context_tokens=64, beside=folder)
    assert file.stat().st_mtime_ns == written
    assert str(file) not in Path("/proc/self/maps").read_text()  # it was copied: the file may go
    for session in (first, again):
        assert torch.equal(logits_after(session, ids), expected)
    assert again.bytes_per_token == first.bytes_per_token


def test_packed_arrays_in_one_piece_are_the_same_arrays_each_from_a_cache_line_on():
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 5), "b": (0,), "c": (1,), "d": (4, 64), "e": (7, 11, 2)}
    types = {"a": np.float32, "b": np.uint8, "c": np.uint16, "d": np.uint8, "e": np.uint16}
    arrays = {name: rng.integers(0, 255, shape).astype(types[name]) for name, shape in shapes.items()}
    arrays["f"] = arrays["e"].transpose(2, 0, 1)  # as it is read, not as it lies
    made = Packed(cast(Any, {}), arrays, None).in_one_piece()
    assert set(made.arrays) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(made.arrays[name], array, strict=True)
        assert made.arrays[name].ctypes.data % 64 == 0
    places = sorted((a.ctypes.data, a.nbytes) for a in made.arrays.values() if a.nbytes)
    assert all(begin + size <= after for (begin, size), (after, _) in pairwise(places))
    assert places[-1][0] - places[0][0] < sum(-(-a.nbytes // 64) * 64 for a in arrays.values())


def test_scales_of_groups_take_two_bytes_but_where_they_are_no_float16_numbers():
    step = g.Quantize(group_size=32, solver="nearest", clip=False, bits_of={"embed|head": 16})
    models = [compress(tiny().to(dtype), step) for dtype in (torch.float32, torch.float32, torch.bfloat16)]
    scales = [m.scale for m in models[1].modules() if isinstance(m, QuantizedLinear)]
    for scale in scales:
        scale.data *= 1.001
    short, whole, bfloat16 = (lower(m, context_tokens=64, floats="bf16", head="bf16").bytes_per_token for m in models)
    assert whole - short == 2 * sum(scale.numel() for scale in scales)
    assert bfloat16 == short


@pytest.mark.parametrize("how", ["cut off", "changed", "noise", "of another checkpoint", "of other settings"])
def test_packed_weights_that_do_not_belong_are_replaced(small, tmp_path, how):
    folder, ids = tmp_path / "model", tokens(1, 20)[0]
    small.save_pretrained(folder)
    other = tmp_path / "other"
    compress(tiny(), g.Quantize(group_size=32, bits=8, solver="nearest", clip=False)).save_pretrained(other)
    lower(small, context_tokens=64, beside=folder)
    (file,) = folder.glob("native.*.packed")
    if how == "cut off":
        file.write_bytes(file.read_bytes()[:-7])
    elif how == "changed":
        file.write_bytes(file.read_bytes()[:-7] + b"changed")
    elif how == "noise":
        file.write_bytes(b"\xff" * 5000)
    elif how == "of another checkpoint":
        lower(g.load(str(other))[0], context_tokens=64, beside=other)
        file.write_bytes((other / file.name).read_bytes())
    else:
        lower(small, context_tokens=64, beside=folder, head="f32")
    before = file.read_bytes()
    found = logits_after(lower(small, context_tokens=64, beside=folder), ids)
    assert torch.equal(found, logits_after(lower(small, context_tokens=64), ids))
    assert file.read_bytes() != before


def test_a_folder_that_cannot_be_written_keeps_nothing(small, tmp_path, monkeypatch):
    folder, ids = tmp_path / "model", tokens(1, 20)[0]
    small.save_pretrained(folder)

    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr("gateskip_compress.runtime.packed.write_whole", refuse)  # root may write anywhere
    session = lower(small, context_tokens=64, beside=folder)
    assert not list(folder.glob("*.packed"))
    assert torch.equal(logits_after(session, ids), logits_after(lower(small, context_tokens=64), ids))


def test_torch_keeps_its_threads_after_decoding_and_after_an_error(session):
    before = torch.get_num_threads()
    session.generate(tokens(1, 4), max_new_tokens=2, do_sample=False)
    with pytest.raises(ValueError, match="draft_budget"):
        session.generate(tokens(1, 4), max_new_tokens=2, do_sample=False, speculate=True, draft_budget=2.0)
    assert torch.get_num_threads() == before
