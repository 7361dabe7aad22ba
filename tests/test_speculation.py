import pytest
import torch
from tiny_models import compress, tiny, tokens

import gateskip_compress as g
from gateskip_compress.speculation.accept import accepted_tokens
from gateskip_compress.speculation.decode import Acceptance


@pytest.mark.parametrize(
    ("drafted", "verified", "stands"),
    [([1, 2, 3], [9, 2, 3, 4], 0), ([1, 2, 3], [1, 2, 3, 4], 3), ([1, 2, 3], [1, 7, 3, 4], 1), ([], [5], 0)],
    ids=["never", "always", "sometimes", "no draft"],
)
def test_the_accept_rule(drafted, verified, stands):
    found = accepted_tokens(torch.tensor(drafted, dtype=torch.long), torch.tensor(verified))
    assert found == stands


STACKS = {
    "gates": (g.GateSkip(budget=0.9, rank=4),),
    "gates at 1": (g.GateSkip(budget=1, rank=4),),
    "all": (g.Prune(blocks=1), g.GateSkip(budget=0.85, rank=4), g.Quantize(group_size=32)),
}


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("draft_tokens", [1, 4])
@pytest.mark.parametrize("draft_budget", [0.5, 0.8])
def test_text_equals_plain_greedy_decoding(stack, draft_tokens, draft_budget):
    step = g.SelfSpeculation(draft_budget=draft_budget, draft_tokens=draft_tokens)
    model = compress(tiny(), *STACKS[stack], step)
    for seed in range(2):
        ids = tokens(1, 9, seed=20 + seed)
        plain = model.generate(ids, max_new_tokens=21, do_sample=False)
        counts = Acceptance()
        found = model.generate(
            ids, max_new_tokens=21, do_sample=False, custom_generate=g.self_speculative, acceptance=counts
        )
        assert torch.equal(found, plain)
        assert 0 <= counts.accepted <= counts.drafted
        assert counts.verifies >= 21 / (draft_tokens + 1)


@pytest.fixture
def model():
    return compress(tiny(), g.GateSkip(budget=0.9, rank=4), g.SelfSpeculation(draft_budget=0.6))


def test_an_end_token_inside_a_draft_stops_the_text(model):
    ids = tokens(1, 9)
    plain = model.generate(ids, max_new_tokens=30, do_sample=False)
    end = int(plain[0, 9 + 6])
    settings = dict(max_new_tokens=30, do_sample=False, eos_token_id=end)
    stopped = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, custom_generate=g.self_speculative, **settings), stopped)


def test_processors_act_alike_in_draft_and_verify(model):
    settings = dict(max_new_tokens=30, do_sample=False, repetition_penalty=1.5, no_repeat_ngram_size=2)
    ids = tokens(1, 9)
    assert torch.equal(
        model.generate(ids, custom_generate=g.self_speculative, **settings), model.generate(ids, **settings)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(do_sample=True), "greedily"),
        (dict(draft_budget=0.95), "must be below the budget that verifies"),
        (dict(draft_tokens=0), "at least 1"),
        (dict(cache_implementation="static"), "cannot be rolled back"),
    ],
    ids=["sampling", "budget", "length", "cache"],
)
def test_what_it_cannot_do_is_refused(model, change, message):
    with pytest.raises(ValueError, match=message):
        model.generate(
            tokens(1, 9), custom_generate=g.self_speculative, **{"max_new_tokens": 5, "do_sample": False, **change}
        )


def test_batches_are_refused(model):
    with pytest.raises(ValueError, match="batch of 2"):
        model.generate(tokens(2, 9), custom_generate=g.self_speculative, max_new_tokens=5, do_sample=False)
