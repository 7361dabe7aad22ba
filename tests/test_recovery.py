from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from tiny_models import CALIBRATION, compress, tiny, tiny_tokenizer

import gateskip_compress as g
from gateskip_compress.gating.gate import Gate
from gateskip_compress.gating.turning import dial_of
from gateskip_compress.losses import kl_divergence
from gateskip_compress.macs import count_macs
from gateskip_compress.pipeline import apply, start
from gateskip_compress.step import Context
from gateskip_compress.transforms import build

NARROW = g.Prune(share=0.3, multiple=16, shape="uneven")


def recovered(*steps, context=None):
    model = tiny()
    start(model, tiny_tokenizer(), source="tiny")
    for step in steps:
        apply(step, model, context or Context(CALIBRATION, original=tiny()))
    return model


def distance(model):
    with torch.no_grad():
        original = tiny()(CALIBRATION).logits.flatten(0, 1)
        return kl_divergence(original, model(CALIBRATION).logits.flatten(0, 1)).mean().item()


@pytest.mark.parametrize("what", ["lora", "norms", "all"])
def test_the_model_comes_nearer_to_the_original(what):
    rate = {"lora": 4e-2, "norms": 1e-2, "all": 7e-3}[what]
    pruned = compress(tiny(), NARROW)
    model = recovered(NARROW, g.Recover(tokens=6000, what=what, rate=rate, cross_entropy=0))
    assert distance(model) < 0.9 * distance(pruned)
    assert model.state_dict().keys() == pruned.state_dict().keys()
    assert len(model.gateskip.steps[1]["record"]["losses"]) == round(6000 / (4 * 48))
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, pruned.state_dict()[name])}
    assert changed == {
        name for name, p in pruned.named_parameters() if what == "all" or ("norm" in name) == (what == "norms")
    } - ({"model.embed_tokens.weight", "lm_head.weight"} if what == "lora" else set())


def test_a_tensor_learns_at_a_share_of_its_size():
    """AdamW's first step moves every entry that has a gradient by the learning rate."""
    pruned = compress(tiny(), NARROW)
    model = recovered(NARROW, g.Recover(tokens=1, what="all", rate=2e-3))
    for (name, before), after in zip(pruned.named_parameters(), model.parameters(), strict=True):
        moved, expected = (after - before).abs().max().item(), 2e-3 * before.square().mean().sqrt().item()
        assert moved == pytest.approx(expected, rel=0.02), name


def test_norms_alone_recover_few_bits_whose_codes_stay():
    quantize = g.Quantize(bits=3, group_size=32, solver="nearest", clip=False)
    before = compress(tiny(), quantize)
    model = recovered(quantize, g.Recover(tokens=4000, what="norms", rate=1e-2, cross_entropy=0))
    assert distance(model) < 0.95 * distance(before)
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]) == ("norm" not in name), name
    with pytest.raises(
        g.PipelineError, match="weights of few bits cannot be trained: use what='norms' instead of 'all'"
    ):
        recovered(quantize, g.Recover(what="all"))


def test_gates_keep_their_scores_and_their_budget_holds_anew():
    gate = g.GateSkip(budget=0.7, rank=4)
    before = compress(tiny(), gate)
    table = dial_of(before).table
    model = recovered(gate, g.Recover(tokens=3000, what="all", rate=7e-3, cross_entropy=0))
    assert distance(model) < distance(before)
    for old, new in zip(*([m for m in x.modules() if isinstance(m, Gate)] for x in (before, model)), strict=True):
        assert torch.equal(old.score_weight, new.score_weight)
        assert not torch.equal(old.up, new.up)
    assert dial_of(model).table != table
    share = count_macs(model, CALIBRATION[:4]) / count_macs(tiny(), CALIBRATION[:4])
    assert share == pytest.approx(0.7, abs=0.04)
    assert model.gateskip.steps[0]["record"]["table"][0]["thresholds"] == list(dial_of(model).table[0].thresholds)


def test_an_interrupted_recovery_goes_on(tmp_path):
    step = g.Recover(tokens=6000, what="all", rate=7e-3)
    pruned, whole = compress(tiny(), NARROW), compress(tiny(), NARROW)
    step.apply(whole, Context(CALIBRATION, original=tiny()))

    def stopping(items, description, total=None):
        for count, item in enumerate(items):
            if description == "recover" and count == 28:
                raise KeyboardInterrupt
            yield item

    model = deepcopy(pruned)
    with pytest.raises(KeyboardInterrupt):
        step.apply(model, Context(CALIBRATION, track=stopping, scratch=tmp_path, original=tiny()))
    step.apply(pruned, Context(CALIBRATION, scratch=tmp_path, original=tiny()))
    torch.testing.assert_close(pruned(CALIBRATION).logits, whole(CALIBRATION).logits, atol=1e-4, rtol=1e-4)


def test_the_texts_own_tokens_count_as_asked():
    pruned = compress(tiny(), NARROW)
    with torch.no_grad():
        logits, following = pruned(CALIBRATION).logits[:, :-1], CALIBRATION[:, 1:]
        original = tiny()(CALIBRATION).logits[:, :-1]
        expected = kl_divergence(original.flatten(0, 1), logits.flatten(0, 1)).mean()
        expected = float(expected + 0.5 * F.cross_entropy(logits.flatten(0, 1), following.flatten()))
    whole = g.Recover(tokens=CALIBRATION.numel(), batch=len(CALIBRATION), cross_entropy=0.5)
    (first,) = whole.apply(pruned, Context(CALIBRATION, original=tiny()))["losses"]
    assert first == pytest.approx(expected, rel=1e-4)


def test_bad_input_is_said():
    with pytest.raises(ValueError, match=r"cross_entropy -0\.1 must not be negative"):
        g.Recover(cross_entropy=-0.1)
    with pytest.raises(g.PipelineError, match=r"recover\.what = 'some'"):
        build("recover", {"what": "some"})
    with pytest.raises(ValueError, match="tokens 0 must be at least 1"):
        g.Recover(tokens=0)
    with pytest.raises(ValueError, match=r"rate -1\.0 must be above 0"):
        g.Recover(rate=-1.0)
    with pytest.raises(g.PipelineError, match="needs the original model"):
        recovered(NARROW, g.Recover(), context=Context(CALIBRATION))
