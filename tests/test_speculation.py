"""Self-speculative decoding as a whole: its text is plain decoding's, and it refuses what it cannot do."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from tiny_models import (
    CALIBRATION,
    DEVICE,
    SLIDING,
    VOCABULARY,
    compress,
    compress_further,
    tiny,
    tiny_tokenizer,
    tokens,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LogitsProcessor,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StopStringCriteria,
    TextStreamer,
)

import gateskip_compress as g
from gateskip_compress.gating.turning import dial_of, drafting
from gateskip_compress.speculation import decode
from gateskip_compress.speculation.acceptance import Acceptance
from gateskip_compress.speculation.rows import Rows
from gateskip_compress.step import Context

FEW = CALIBRATION[:3]
STACKS = {
    "gates": (g.GateSkip(budget=0.9, rank=4, allocation="global"),),
    "gates at 1": (g.GateSkip(budget=1, rank=4, allocation="global"),),
    "all": (
        g.Prune(blocks=1),
        g.GateSkip(budget=0.85, rank=4, allocation="global"),
        g.Quantize(group_size=32, solver="nearest", clip=False),
    ),
}
HOW = {
    "gates": dict(drafts="gates", draft_budget=0.6, draft_tokens=3, adapt=False),
    "one token": dict(drafts="gates", draft_budget=0.8, draft_tokens=1, adapt=False),
    "look-up": dict(drafts="look-up", draft_tokens=4, adapt=False),
    "both": dict(drafts="both", draft_budget=0.6, draft_tokens=4, adapt=False),
    "adapting": dict(),
}


def speculate(model, ids, how="both", **settings):
    """New text and the counts."""
    counts = Acceptance()
    given = {"do_sample": False, **HOW[how], **settings}
    return model.generate(ids, custom_generate=g.self_speculative, acceptance=counts, **given), counts


@pytest.fixture(scope="module")
def stacks():
    return {name: compress(tiny(), *steps, g.SelfSpeculation(), calibration=FEW) for name, steps in STACKS.items()}


@pytest.fixture
def model(stacks):
    return stacks["gates"]


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("how", HOW)
def test_text_equals_plain_greedy_decoding(stacks, stack, how):
    model = stacks[stack]
    ids = tokens(1, 9, seed=20)
    plain = model.generate(ids, max_new_tokens=21, do_sample=False)
    found, counts = speculate(model, ids, how, max_new_tokens=21)
    assert torch.equal(found, plain)
    assert 0 <= counts.accepted <= counts.drafted
    assert counts.accepted + counts.verifies + counts.plain_steps == 20  # the first token comes with the prompt
    assert counts.verifies > 0 or how == "adapting"


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "opt"])
def test_families(family):
    gated = compress(tiny(family), g.GateSkip(budget=0.8, surrogate="mean", allocation="global"), calibration=FEW)
    ids = tokens(1, 9, seed=3)
    plain = gated.generate(ids, max_new_tokens=12, do_sample=False)
    found, counts = speculate(gated, ids, max_new_tokens=12, draft_budget=0.5)
    assert torch.equal(found, plain)
    assert counts.drafted > 0


@pytest.mark.parametrize("how", HOW)
def test_rows_of_a_batch_accept_different_lengths(model, how):
    ids, mask = tokens(4, 12, seed=5), torch.ones(4, 12, dtype=torch.long, device=DEVICE)
    for row, padding in enumerate((0, 5, 2, 11)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=16, do_sample=False)
    end = int(plain[2, 20])  # some rows end early
    settings = dict(attention_mask=mask, max_new_tokens=16, eos_token_id=end)
    plain = model.generate(ids, do_sample=False, **settings)
    assert (plain[:, -1] == 0).any()
    assert torch.equal(speculate(model, ids, how, **settings)[0], plain)


def test_an_end_token_inside_a_draft_stops_the_text(model):
    ids = tokens(1, 9)
    plain = model.generate(ids, max_new_tokens=30, do_sample=False)
    for end in plain[0, 12:17].tolist():
        stops = 9 + plain[0, 9:].tolist().index(end) + 1
        assert torch.equal(speculate(model, ids, max_new_tokens=30, eos_token_id=end)[0], plain[:, :stops])


def test_a_stop_string_inside_a_draft_stops_the_text(model):
    vocabulary = {chr(33 + i): i for i in range(VOCABULARY - 2)} | {"ab": VOCABULARY - 2, "bc": VOCABULARY - 1}
    letters = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b"), ("b", "c")]))
    letters.pre_tokenizer, letters.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer, ids = PreTrainedTokenizerFast(tokenizer_object=letters), tokens(1, 9)
    two = tokenizer.decode(model.generate(ids, max_new_tokens=30, do_sample=False)[0, 9 + 6 : 9 + 8])
    settings = dict(max_new_tokens=30, stopping_criteria=[StopStringCriteria(tokenizer, [two])])
    stopped = model.generate(ids, do_sample=False, **settings)
    assert stopped.shape[1] < 39
    assert torch.equal(speculate(model, ids, **settings)[0], stopped)


@pytest.mark.parametrize("new", [1, 2, 3])
def test_the_length_is_kept_to_the_token(model, new):
    assert speculate(model, tokens(1, 9), max_new_tokens=new)[0].shape == (1, 9 + new)


def test_criteria_see_every_text_once(model):
    class Watch(StoppingCriteria):
        def __init__(self):
            self.lengths = []

        def __call__(self, input_ids, _scores, **_):
            self.lengths.append(input_ids.shape[1])
            return torch.zeros(len(input_ids), dtype=torch.bool, device=DEVICE)

    watch = Watch()
    speculate(model, tokens(1, 9), max_new_tokens=14, stopping_criteria=[watch])
    assert watch.lengths == list(range(10, 24))


def test_a_streamer_gets_the_text(model, capsys):
    tokenizer, ids = tiny_tokenizer(), tokens(1, 9)
    model.generate(ids, max_new_tokens=20, do_sample=False, streamer=TextStreamer(tokenizer))
    plain, streamer = capsys.readouterr().out, TextStreamer(tokenizer)
    how = dict(custom_generate=partial(g.self_speculative, streamer=streamer), **HOW["both"])
    model.generate(ids, max_new_tokens=20, do_sample=False, streamer=streamer, **how)
    assert capsys.readouterr().out == plain


def test_the_cache_serves_the_next_turn(model):
    ids = tokens(1, 9)
    end = int(model.generate(ids, max_new_tokens=30, do_sample=False)[0, 9 + 8])
    texts = []
    for how in (dict(), dict(custom_generate=g.self_speculative, **HOW["both"])):
        cache, text = DynamicCache(config=model.config), ids
        for _ in range(2):
            settings = dict(max_new_tokens=15, do_sample=False, eos_token_id=end)
            text = model.generate(text, past_key_values=cache, **settings, **how)
            assert cache.get_seq_length() == text.shape[1] - 1
            text = torch.cat((text, tokens(1, 3, seed=8)), dim=1)
        texts.append(text)
    assert torch.equal(*texts)


@pytest.mark.parametrize("family", SLIDING)
def test_windows_cannot_be_rolled_back(family):
    with pytest.raises(ValueError, match=r"DynamicSlidingWindowLayer.*cannot be rolled back"):
        speculate(tiny(family), tokens(1, 9), "look-up", max_new_tokens=5)


PROCESSORS = {
    "repetition": dict(repetition_penalty=1.5, no_repeat_ngram_size=2),
    "lengths": dict(min_new_tokens=6, eos_token_id=7, exponential_decay_length_penalty=(4, 1.2)),
    "words": dict(bad_words_ids=[[5], [9, 11]], suppress_tokens=[12, 13], sequence_bias={(20,): 2.0, (4, 5): -3.0}),
}


@pytest.mark.parametrize("settings", PROCESSORS.values(), ids=PROCESSORS)
def test_processors_act_alike_in_draft_and_verify(model, settings):
    for ids in (tokens(1, 9), tokens(2, 9)):
        plain = model.generate(ids, max_new_tokens=14, do_sample=False, **settings)
        assert torch.equal(speculate(model, ids, max_new_tokens=14, **settings)[0], plain)


class NoNumber(LogitsProcessor):
    """After so many tokens, as transformers' penalty on lengths makes of a forbidden end token by infinities."""

    def __init__(self, after):
        self.after = after

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] < self.after:
            return scores
        return scores.index_fill(1, torch.tensor([9], device=DEVICE), torch.nan)


@pytest.mark.parametrize("after", [9, 13])
def test_a_score_that_is_no_number_ends_no_draft(model, after):
    settings = dict(logits_processor=[NoNumber(after)], max_new_tokens=14)
    plain = model.generate(tokens(1, 9), do_sample=False, **settings)
    found, counts = speculate(model, tokens(1, 9), "gates", **settings)
    assert counts.drafted > 0
    assert torch.equal(found, plain)


def test_a_penalty_that_knows_each_rows_padding_acts_alike_in_draft_and_verify(model):
    ids, mask = tokens(3, 12), torch.ones(3, 12, dtype=torch.long, device=DEVICE)
    mask[0, :4] = mask[2, :7] = 0
    settings = dict(max_new_tokens=14, repetition_penalty=1.5, attention_mask=mask, pad_token_id=0)
    ends = model.generate(ids, do_sample=False, **settings)[0, 12 + 3].item()  # rows end apart
    plain = model.generate(ids, do_sample=False, eos_token_id=ends, **settings)
    assert torch.equal(speculate(model, ids, eos_token_id=ends, **settings)[0], plain)


class Counts(LogitsProcessor):
    """Remembers how often it was called."""

    def __init__(self):
        self.calls = {"n": 0}

    def __call__(self, _input_ids, scores):
        self.calls["n"] += 1
        return scores


class Draws(LogitsProcessor):
    """Answers at random."""

    def __call__(self, _input_ids, scores):
        return scores + torch.rand_like(scores)


class Parity(LogitsProcessor):
    """Reads the text alone: tokens as even as the last."""

    def __call__(self, input_ids, scores):
        even = torch.arange(scores.shape[1], device=DEVICE) % 2 == input_ids[:, -1:] % 2
        return scores.masked_fill(~even, -torch.inf)


def test_a_processor_that_reads_the_text_alone_is_allowed(model):
    settings = dict(max_new_tokens=20, logits_processor=[Parity()])
    plain = model.generate(tokens(1, 9), do_sample=False, **settings)
    assert torch.equal(speculate(model, tokens(1, 9), **settings)[0], plain)


REFUSED = {
    "beams": (dict(num_beams=2), "set num_beams 2 to 1"),
    "budget": (dict(draft_budget=0.95), r"0\.95 must be below the budget that verifies, 0\.9"),
    "budget equal": (dict(draft_budget=0.9), r"0\.9 must be below the budget that verifies, 0\.9"),
    "budget too low": (dict(draft_budget=0.01), r"budget 0\.01 is below 0\."),
    "length": (dict(draft_tokens=0), "draft_tokens 0 must be at least 1"),
    "static cache": (dict(cache_implementation="static"), "StaticCache.*cannot be rolled back"),
    "no cache": (dict(use_cache=False), "NoneType.*cannot be rolled back"),
    "a dict asked for": (dict(return_dict_in_generate=True), "leaves out return_dict_in_generate"),
    "counting processor": (dict(logits_processor=[Counts()]), r"Counts remembers earlier calls \(calls changed"),
    "random processor": (dict(logits_processor=[Draws()]), r"Draws remembers earlier calls \(its answer changed"),
    "guidance": (dict(guidance_scale=2.0), "UnbatchedClassifierFreeGuidanceLogitsProcessor remembers earlier calls"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_it_cannot_do_is_refused(model, change, message):
    with pytest.raises(ValueError, match=message):
        speculate(model, tokens(1, 9), max_new_tokens=5, **change)


def test_what_it_cannot_do_with_batches_is_refused(model):
    settings = dict(prefix_allowed_tokens_fn=lambda row, _: [5 + row], max_new_tokens=3)
    assert speculate(model, tokens(1, 9), **settings)[0][0, 9:].tolist() == [5, 5, 5]
    with pytest.raises(ValueError, match=r"PrefixConstrained.*tells rows apart"):
        speculate(model, tokens(2, 9), **settings)


def test_gates_are_asked_for_only_where_they_draft():
    model = tiny()
    with pytest.raises(g.UnsupportedModel, match="no gates"):
        speculate(model, tokens(1, 9), max_new_tokens=5)
    plain = model.generate(tokens(1, 9), max_new_tokens=20, do_sample=False)
    assert torch.equal(speculate(model, tokens(1, 9), "look-up", max_new_tokens=20)[0], plain)


def test_no_budget_is_left_to_draft_with(model):
    low = dial_of(model).floor
    with (
        g.budget(model, low),
        pytest.raises(ValueError, match=rf"no budget was calibrated more than 0\.05 below {low}"),
    ):
        speculate(model, tokens(1, 9), max_new_tokens=5, draft_budget=None)


def test_a_text_read_again_is_plain_decoding_bit_for_bit(model):
    """The kernels for four tokens leave other last bits in the cache than those for one."""
    ids, more = tokens(1, 9), tokens(1, 8, seed=2)

    def rows():
        made = Rows(model, DynamicCache(config=model.config), None)
        made.begin(ids, torch.arange(9, device=DEVICE)[None])
        return made

    with torch.inference_mode():
        plain = rows()
        wanted = [plain.feed(token) for token in more.split(1, dim=1)][-1]
        found = rows()
        found.feed(more[:, :1])
        found.feed(more[:, 1:5])
        assert found.clean == 10
        found.take_back(torch.tensor([2], device=DEVICE))
        assert found.clean == 10
        found.take_back(torch.tensor([2], device=DEVICE))
        assert torch.equal([found.feed(token) for token in more[:, 1:].split(1, dim=1)][-1], wanted)
        assert found.clean == 17


def test_ties_are_decided_as_plain_decoding_decides_them(model, monkeypatch):
    ids = tokens(1, 9)
    plain = model.generate(ids, max_new_tokens=20, do_sample=False)
    monkeypatch.setattr(decode, "TIE", 1e9)  # everything is tied
    found, counts = speculate(model, ids, max_new_tokens=20)
    assert torch.equal(found, plain)
    assert counts.repeated > 0
    monkeypatch.setattr(decode, "TIE", 0)
    assert speculate(model, ids, max_new_tokens=20)[1].repeated == 0


def test_in_16_bits_the_text_is_what_the_verify_passes_choose(model):
    """Their kernels for one and more tokens differ by more than many margins, so plain decoding may go elsewhere."""
    short, passes = deepcopy(model).to(torch.bfloat16), []

    def see(_, args, kwargs, out):
        if dial_of(short).budget == 0.9:
            passes.append((args[0][0].tolist(), out.logits[0].argmax(-1).tolist()))

    short.register_forward_hook(see, with_kwargs=True)
    ids = tokens(1, 9)
    found, counts = speculate(short, ids, max_new_tokens=20)
    text = passes[0][1]
    for fed, chosen in passes[1:]:
        assert fed[0] == text[-1]
        stands = 0
        while stands < len(fed) - 1 and fed[1 + stands] == chosen[stands]:
            stands += 1
        text = text + chosen[: stands + 1]
    assert found[0, 9:].tolist() == text
    assert counts.accepted > 0
    assert counts.repeated == 0


OWN = g.GateSkip(
    budget=0.5, rank=8, allocation="global", training=g.Training(steps=16, batch=2, ramp=0.2, surrogate_rate=5e-3)
)


@pytest.fixture(scope="module")
def drafter():
    """A model with gates trained for drafting, and the same without."""
    plain = compress(tiny(), g.GateSkip(budget=0.9, rank=4, allocation="global"), calibration=FEW)
    before = deepcopy(plain)
    step = g.SelfSpeculation(gates=OWN, adapt=False, drafts="gates", draft_tokens=3)
    return compress_further(plain, step, calibration=CALIBRATION[:4]), before


def test_draft_gates_leave_the_model_that_verifies_as_it_was(drafter):
    model, before = drafter
    ids = tokens(2, 20)
    assert torch.equal(model(ids).logits, before(ids).logits)
    assert dial_of(model).table == dial_of(before).table
    with drafting(model):
        assert dial_of(model).table != dial_of(before).table
        assert dial_of(model).budget == 0.5
        assert not torch.equal(model(ids).logits, before(ids).logits)
        with drafting(model):
            assert torch.equal(model(ids).logits, before(ids).logits)


def test_draft_gates_learn_to_say_what_the_verifier_says(drafter):
    losses = drafter[0].gateskip.steps[-1]["record"]["gates"]["training"]["losses"]
    assert sum(losses[14:16]) < 0.9 * sum(losses[4:6])  # epochs of the same windows, both at the final budget


def test_draft_gates_draft_and_survive_a_reload(drafter, tmp_path):
    model, before = drafter
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").to(DEVICE)
    assert loaded.self_speculation == model.self_speculation
    ids, settings = tokens(1, 9), dict(max_new_tokens=20, do_sample=False)
    plain, found = before.generate(ids, **settings), []
    for each in (model, loaded):
        counts = Acceptance()
        text = each.generate(ids, custom_generate=g.self_speculative, acceptance=counts, **settings)
        assert torch.equal(text, plain)
        found.append((counts.drafted, counts.accepted))
        with drafting(each):
            found.append(each(ids).logits)
    assert found[0] == found[2]
    assert torch.equal(found[1], found[3])


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (dict(gates=OWN, draft_budget=0.5), "leave out draft_budget"),
        (dict(gates=OWN, drafts="look-up"), "uses no gates"),
        (dict(gates=g.GateSkip(budget=0.5, training=g.Training(train="all"))), "would change the model that verifies"),
        (dict(draft_budget=1.0), "draft_budget 1.0 must be between 0 and 1"),
    ],
    ids=["two budgets", "look-up", "backbone", "budget"],
)
def test_steps_that_contradict_themselves_are_refused(step, message):
    with pytest.raises(ValueError, match=message):
        g.SelfSpeculation(**step)


def test_draft_gates_must_run_as_the_models_own(drafter):
    step = g.SelfSpeculation(gates=g.GateSkip(budget=0.5, kv="copy"))
    with pytest.raises(ValueError, match=r"kv 'copy' must be like the model's own: placement='after', kv='dense'"):
        step.apply(drafter[1], Context(CALIBRATION))
    with pytest.raises(g.PipelineError, match=r"lower draft_budget under 0\.4"):
        g.Pipeline(g.GateSkip(budget=0.4), g.SelfSpeculation(gates=OWN))
