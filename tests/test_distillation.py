import pytest
import torch
import torch.nn.functional as F
from tiny_models import DEVICE, tiny

import gateskip_compress.distillation as distillation
from gateskip_compress.distillation import Distillation, chosen, predictions
from gateskip_compress.losses import kl_divergence
from gateskip_compress.text import Passage
from gateskip_compress.training import collate

generator = torch.Generator().manual_seed(5)


def passages(vocabulary):
    """Of two lengths, not all of them scored."""
    found = []
    for length in (9, 13, 13):
        ids = torch.randint(vocabulary, (length,), generator=generator)
        found.append(Passage(ids, torch.arange(length) > 3))
    return found


def scored_logits(model, batch):
    """A loop over tokens."""
    logits = model(batch.ids, attention_mask=batch.real.long()).logits
    rows, places = batch.scored.nonzero(as_tuple=True)
    return torch.stack([logits[row, place - 1] for row, place in zip(rows, places, strict=True)])


def gradients(model, loss):
    for parameter in model.parameters():
        parameter.grad = None
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("gemma2", {"final_logit_softcapping": 0.5}),
        ("gpt2", {}),
    ],
    ids=["llama", "tied", "softcap", "gpt2"],
)
@pytest.mark.parametrize("used", [None, 12], ids=["whole", "some"])
def test_loss_and_gradients_are_those_of_all_logits(family, settings, used, monkeypatch):
    """Of the chosen tokens' logits, where the passages use few; rows go by a few at a time."""
    monkeypatch.setattr(distillation, "_LOGITS", 300)
    model, original = tiny(family, **settings), tiny(family, initializer_range=0.1, **settings)
    model.requires_grad_(True)
    vocabulary = model.config.vocab_size
    found = passages(used or vocabulary)
    batch = collate(found, torch.device(DEVICE))
    targets = batch.ids[batch.scored]
    with torch.no_grad():
        expected, reference = scored_logits(original, batch), predictions(original, batch)
    loss = Distillation(found, 3, 0.7, 0.4)(predictions(model, batch), reference, targets, 2)
    ours = gradients(model, loss)
    logits = scored_logits(model, batch)
    tokens = chosen(torch.cat([p.ids for p in found]).unique(), vocabulary, 3, 2)
    assert (tokens is None) == (used is None)
    if tokens is not None:
        ids, shift = (tensor.to(DEVICE) for tensor in tokens)
        logits, expected = logits[:, ids] + shift, expected[:, ids] + shift
        targets = torch.tensor([ids.tolist().index(target) for target in targets.tolist()], device=DEVICE)
    naive = 0.7 * kl_divergence(expected, logits).sum() + 0.4 * F.cross_entropy(logits, targets, reduction="sum")
    assert loss.item() == pytest.approx(naive.item(), rel=1e-5)
    theirs = gradients(model, naive)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_without_an_original_the_tokens_alone_count_and_what_does_not_learn_has_no_gradient():
    model = tiny()
    model.requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    found = passages(model.config.vocab_size)
    batch = collate(found, torch.device(DEVICE))
    targets = batch.ids[batch.scored]
    loss = Distillation(found, 0, 1.0, 0.5)(predictions(model, batch), None, targets, 0)
    naive = 0.5 * F.cross_entropy(scored_logits(model, batch), targets, reduction="sum")
    assert loss.item() == pytest.approx(naive.item(), rel=1e-5)
    ours = gradients(model, loss)
    assert ours.keys() == {"model.norm.weight"}
    torch.testing.assert_close(ours["model.norm.weight"], gradients(model, naive)["model.norm.weight"])


def test_drawn_tokens_stand_for_all_that_passages_do_not_use():
    used = torch.tensor([3, 7, 50, 51])
    logits = torch.randn(100, generator=generator)
    sums = []
    for step in range(4000):
        ids, shift = chosen(used, 100, 1, step)
        assert ids[:4].tolist() == used.tolist()
        assert shift[:4].tolist() == [0] * 4
        assert len(ids.unique()) == len(ids) == 8
        sums.append((logits[ids] + shift).exp().sum())
    assert torch.stack(sums).mean().item() == pytest.approx(logits.exp().sum().item(), rel=0.02)
    assert not torch.equal(chosen(used, 100, 1, 0).ids, chosen(used, 100, 1, 1).ids)
    assert torch.equal(chosen(used, 100, 1, 0).ids, chosen(used, 100, 1, 0).ids)
    assert not torch.equal(chosen(used, 100, 1, 0).ids, chosen(used, 100, 2, 0).ids)
    assert chosen(used % 15, 15, 1, 0) is None
    assert len(chosen(used % 16, 16, 1, 0).ids) == 8
