"""The parts of self-speculation: which tokens stand, the distribution they leave, look-up, and the control."""

from itertools import product
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CALIBRATION, DEVICE, compress, tiny, tokens
from transformers import DynamicCache

import gateskip_compress as g
from gateskip_compress.speculation.accept import stand_by_chance, stand_greedily
from gateskip_compress.speculation.control import Control, Drafter, looked_up, sure
from gateskip_compress.speculation.lookup import LONGEST, look_up
from gateskip_compress.speculation.rows import Rows

SIGNIFICANCE = 1e-4


def chi_square_limit(cells):
    """What chi-square exceeds with probability SIGNIFICANCE (Wilson and Hilferty 1931)."""
    df = cells - 1
    return df * (1 - 2 / (9 * df) + NormalDist().inv_cdf(1 - SIGNIFICANCE) * (2 / (9 * df)) ** 0.5) ** 3


def power(cells, shift):
    """Chance to see a sum of (p' - p)² / p times the sample size, by the normal limit of noncentral chi-square."""
    df = cells - 1
    return 1 - NormalDist(df + shift, (2 * (df + 2 * shift)) ** 0.5).cdf(chi_square_limit(cells))


def chi_square(counts, shares):
    expected = shares * counts.sum()
    assert expected.min() > 5
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize(
    ("drafted", "chosen", "stands"),
    [([1, 2, 3], [9, 2, 3, 4], 0), ([1, 2, 3], [1, 2, 3, 4], 3), ([1, 2, 3], [1, 7, 3, 4], 1), ([], [5], 0)],
    ids=["never", "always", "sometimes", "no draft"],
)
def test_the_greedy_rule(drafted, chosen, stands):
    drafted, chosen = torch.tensor([drafted], dtype=torch.long), torch.tensor([chosen])
    assert stand_greedily(drafted, chosen, torch.tensor([drafted.shape[1]])).tolist() == [stands]


@given(st.integers(1, 4), st.integers(0, 5), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_the_greedy_rule_is_a_loop(b, k, seed):
    generator = torch.Generator().manual_seed(seed)
    drafted, chosen = (torch.randint(2, (b, n), generator=generator) for n in (k, k + 1))
    lengths = torch.randint(k + 1, (b,), generator=generator)
    wanted = []
    for row in range(b):
        stands = 0
        while stands < lengths[row] and drafted[row, stands] == chosen[row, stands]:
            stands += 1
        wanted.append(stands)
    assert stand_greedily(drafted, chosen, lengths).tolist() == wanted


def draw(draft_first, draft_second, target_first, target_second, n, rule):
    """The first two tokens of n texts, some drafted by one token, some by two, some by none; counts by pair."""
    v = len(draft_first)
    first = torch.multinomial(draft_first.expand(n, -1), 1)
    drafted = torch.cat((first, torch.multinomial(draft_second[first[:, 0]], 1)), dim=1)
    lengths = torch.arange(n) % 3
    draft = torch.stack((draft_first.expand(n, -1), draft_second[first[:, 0]]), dim=1)
    third = torch.full((n, v), 1 / v)
    target = torch.stack((target_first.expand(n, -1), target_second[first[:, 0]], third), dim=1)
    stands, after = rule(drafted, draft, target, lengths)
    text = drafted.clone()
    text[stands == 0, 0] = after[stands == 0]
    text[stands == 1, 1] = after[stands == 1]
    short = stands == 0
    text[short, 1] = torch.multinomial(target_second[text[short, 0]], 1)[:, 0]
    return torch.bincount(text[:, 0] * v + text[:, 1], minlength=v * v).double()


def biased(drafted, draft, target, lengths):
    """Speculative sampling that forgets to take q from p after a token fell."""
    stands, _ = stand_by_chance(drafted, draft, target, lengths)
    return stands, torch.multinomial(target[torch.arange(len(stands)), stands], 1)[:, 0]


def test_sampled_tokens_have_the_verify_pass_distribution():
    """60,000 pairs of tokens over 16 cells; a rule that forgets to subtract is seen."""
    torch.manual_seed(0)
    q1, q2, p1, p2 = (torch.randn(shape).mul(1.5).softmax(-1) for shape in ((4,), (4, 4), (4,), (4, 4)))
    shares = (p1[:, None] * p2).flatten().double()
    assert chi_square(draw(q1, q2, p1, p2, 60_000, stand_by_chance), shares) < chi_square_limit(16)
    wrong = draw(q1, q2, p1, p2, 60_000, biased)
    assert chi_square(wrong, shares) > chi_square_limit(16)
    # any distribution 0.02 off in total variation has at least this shift, and is seen with this chance
    assert power(16, 60_000 * (2 * 0.02) ** 2) > 0.99


@pytest.fixture(scope="module")
def model():
    return compress(tiny(), g.GateSkip(budget=0.9, rank=4, allocation="global"), calibration=CALIBRATION[:3])


def shares_of(model, prompt, new, **warpers):
    """Probability of every continuation by plain steps over the whole text, no cache."""
    texts, chances = prompt, torch.ones(1, dtype=torch.double, device=DEVICE)
    for _ in range(new):
        with torch.no_grad():
            logits = model(texts, use_cache=False).logits[:, -1]
        penalty = warpers.get("repetition_penalty", 1.0)
        for row, text in enumerate(texts):
            seen = text.unique()
            logits[row, seen] = torch.where(
                logits[row, seen] < 0, logits[row, seen] * penalty, logits[row, seen] / penalty
            )
        best = (logits / warpers["temperature"]).topk(warpers["top_k"], dim=-1)
        step = best.values.softmax(-1).double()
        texts = torch.cat((texts.repeat_interleave(step.shape[1], 0), best.indices.flatten()[:, None]), dim=1)
        chances = (chances[:, None] * step).flatten()
    return {tuple(text[prompt.shape[1] :].tolist()): float(chance) for text, chance in zip(texts, chances, strict=True)}


@pytest.mark.parametrize(
    ("drafts", "n", "warpers"),
    [
        ("gates", 2000, dict(temperature=1.5, top_k=3)),
        ("look-up", 2000, dict(temperature=1.5, top_k=3)),
        ("gates", 600, dict(temperature=2.0, top_k=2, repetition_penalty=1.8)),
    ],
    ids=["gates", "look-up", "gates, penalty"],
)
def test_sampled_texts_have_the_models_distribution(model, drafts, n, warpers):
    """All continuations of three tokens; one 0.1 (penalty: 0.15) off in total variation is seen with chance 0.97."""
    prompt = tokens(1, 6).repeat(1, 2)  # a passage to be found again
    shares = shares_of(model, prompt, 3, **warpers)
    torch.manual_seed(1)
    found = model.generate(
        prompt,
        do_sample=True,
        top_p=1.0,
        max_new_tokens=3,
        num_return_sequences=n,
        custom_generate=g.self_speculative,
        drafts=drafts,
        draft_budget=0.5,
        draft_tokens=2,
        adapt=False,
        **warpers,
    )
    counts = dict.fromkeys(shares, 0)
    for text in found[:, prompt.shape[1] :].tolist():
        counts[tuple(text)] += 1
    # rare continuations together
    common = [text for text in shares if shares[text] * n > 10]
    rest = [1 - sum(shares[text] for text in common), n - sum(counts[text] for text in common)]
    cells = [(shares[text], counts[text]) for text in common] + ([tuple(rest)] if rest[0] * n > 10 else [])
    observed = torch.tensor([c for _, c in cells], dtype=torch.double)
    expected = torch.tensor([s for s, _ in cells], dtype=torch.double)
    assert chi_square(observed, expected / expected.sum()) < chi_square_limit(len(cells))
    off = 0.1 if n == 2000 else 0.15
    assert power(len(cells), n * (2 * off) ** 2) > 0.97


SHIFTED = st.sampled_from((0, 1, 256, 257, 2**16))  # bytes of one are found across two others


@given(st.lists(SHIFTED, min_size=1, max_size=14), st.integers(1, 6))
@settings(max_examples=200, deadline=None)
def test_look_up_is_a_loop(text, most):
    wanted, length = [], 0
    for found in range(LONGEST, 0, -1):
        starts = [i for i in range(len(text) - found) if text[i : i + found] == text[-found:]]
        if starts:
            wanted, length = list(text), found
            begin = starts[-1] + found
            while len(wanted) < len(text) + most:
                wanted.append(wanted[begin + len(wanted) - len(text)])
            wanted = wanted[len(text) :]
            break
    passage = look_up(np.array(text), most)
    assert (passage.found, passage.tokens.tolist()) == (length, wanted)


def test_rows_go_on_apart(model):
    """Rows that take back different counts continue as each alone would."""
    ids, more, last = tokens(3, 7), tokens(3, 4, seed=2), tokens(3, 2, seed=3)
    kept = [4, 1, 2]
    with torch.inference_mode():
        rows = Rows(model, DynamicCache(config=model.config), None)
        rows.begin(ids, torch.arange(7, device=DEVICE).expand(3, -1))
        rows.feed(more)
        rows.take_back(torch.tensor([4 - n for n in kept], device=DEVICE))
        rows.feed(last[:, :1])
        rows.select(torch.tensor([True, True, False], device=DEVICE))
        found = rows.feed(last[:2, 1:])
        for row in range(2):
            text = torch.cat((ids[row], more[row, : kept[row]], last[row]))[None]
            wanted = model(text, use_cache=False).logits[0, -1]
            torch.testing.assert_close(found[row, 0], wanted, rtol=1e-4, atol=1e-4)


def simulate(chance_of, cost=0.6, per_token=0.1, jump=0.3, steps=2000, drafters=None, seed=0):
    """Tokens by time, in plain steps, of a control at work; chance_of(tokens so far) is that a drafted one stands."""
    torch.manual_seed(seed)
    control = Control(drafters or [Drafter(0.5)], 6)
    time, count = 0.0, 0
    while count < steps:
        drafter = control.choose(3 if control.looks else 0)
        if drafter is None:
            control.plain(1.0)
            time, count = time + 1, count + 1
            continue
        chance = chance_of(count)
        if drafter.budget is None:
            k = control.look_up_length(3, 6)[0]
            evidence, draft_s = [looked_up(3 + i) for i in range(k)], 0.0
        else:
            k, likely = 1, control.odds.of(sure(drafter.budget, 0.9))
            while k < 6 and control.goes_on(drafter, likely**k):
                k += 1
            evidence, draft_s = [sure(drafter.budget, 0.9)] * k, cost * k
        draws = (torch.rand(k) < chance).tolist()
        stands = draws.index(False) if False in draws else k
        verify_s = 1 + jump + per_token * k
        control.learn(drafter, [evidence], [stands], draft_s, verify_s)
        time, count = time + draft_s + verify_s, count + stands + 1
    return count / time, control


def test_a_drafter_that_loses_costs_at_most_three_percent():
    for chance, steps in product((0.0, 0.3, 0.6), (128, 600)):
        drafters = [Drafter(None), Drafter(0.8), Drafter(0.6), Drafter(0.5)]
        pace, _ = simulate(lambda _, chance=chance: chance, cost=0.9, steps=steps, drafters=drafters)
        assert pace > 0.97, (chance, steps)


def test_a_drafter_that_wins_is_used_and_drafts_far():
    pace, _ = simulate(lambda _: 0.95, cost=0.3)
    assert pace > 1.5  # seven tokens for 0.3 * 6 + 1.9 steps would be 1.6 on average
    pace, _ = simulate(lambda _: 0.9, drafters=[Drafter(None)])
    assert pace > 2.2


def test_passages_of_one_text_are_taken_as_far_as_their_tokens_pay():
    """The lengths for all passages at once are each passage's own, and the best of all by a loop."""
    control = Control([Drafter(None)], 6)
    for drafted, seconds in ((0, 1.0), (0, 1.0), (1, 1.2), (3, 1.9), (6, 4.5)):
        if drafted:
            control.learn(
                control.drafters[0], [[looked_up(2 + i) for i in range(drafted)]], [drafted // 2], 0.0, seconds
            )
        else:
            control.plain(seconds)
    costs = control.costs.upto(6)
    lengths = control.look_up_lengths(20)
    for found in range(1, 21):
        gains, chance, expected = [1.05], 1.0, 1.0
        for k in range(1, 7):
            chance *= control.odds.of(looked_up(found + k - 1))
            expected += chance
            gains.append(expected * costs[0] / costs[k])
        assert lengths[found] == gains.index(max(gains)) == control.look_up_length(found, 6)[0]
    assert lengths[0] == 0
    assert len(set(lengths)) > 2


def test_costs_are_means_of_the_same_passes():
    """A pace that halves hits plain steps and passes alike, whichever was seen of late."""
    control = Control([Drafter(None)], 6)
    for pace in (1.0, 2.0):
        for _ in range(40):
            control.plain(pace)
            control.learn(control.drafters[0], [[looked_up(5)] * 3], [3], 0.0, 2 * pace)
        costs = control.costs.upto(6)
        assert costs[3] / costs[0] == pytest.approx(2.0, rel=0.05)
    assert costs[0] == pytest.approx(2.0, rel=0.15)


def test_drafting_stops_when_it_loses_and_starts_again_when_it_wins():
    pace, control = simulate(lambda count: 0.95 if not 700 < count < 2000 else 0.0, cost=0.3, steps=5000)
    assert control.drafters[0].rate > 1.4
    assert pace > 1.2


def test_the_better_of_several_budgets_is_found():
    cheap, dear = Drafter(0.3), Drafter(0.8)
    torch.manual_seed(0)
    control = Control([dear, cheap], 4)
    for _ in range(3):
        control.plain(1.0)
    used = []
    for _ in range(400):
        drafter = control.choose(0)
        used.append(drafter)
        if drafter is None:
            control.plain(1.0)
            continue
        chance, cost = (0.9, 0.3) if drafter is cheap else (0.9, 0.8)
        draws = (torch.rand(4) < chance).tolist()
        stands = draws.index(False) if False in draws else 4
        control.learn(drafter, [[sure(drafter.budget, 0.9)] * 4], [stands], 4 * cost, 1.5)
    assert used[100:].count(cheap) > 250


def test_idle_is_how_long_nobody_drafts():
    """Simulated a plain step at a time: while some tokens are idle, no gates are chosen."""
    control, waited = Control([Drafter(None), Drafter(0.7), Drafter(0.5)], 4), 0
    for _ in range(600):
        promised, drafter = control.idle, control.choose(0)
        assert drafter is None or promised < 1
        waited = max(waited, promised)
        if drafter is None:
            control.plain(1.0)
        else:
            control.learn(drafter, [[sure(0.5, 0.9)] * 2], [0], 1.0, 1.3)
    assert waited > 30
