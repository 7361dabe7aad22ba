import json

import pytest
import torch
from tiny_models import FAMILY_CONFIGS, tiny, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

import gateskip_compress as g
from gateskip_compress.losses import kl_divergence
from gateskip_compress.macs import count_macs
from gateskip_compress.quality import Reference
from gateskip_compress.text import Passage, chat_prompt, drawn, packed, passages, self_written, windows

TEMPLATE = (
    "{% for m in messages %}{{ 'w3' if m.role == 'user' else 'w4' }} {{ m.content }} w5 {% endfor %}"
    "{% if add_generation_prompt %}w4 {% endif %}"
)
CHAT = {"prompt": "w10 w11", "response": "w12 w13 w14"}


def write(folder, records):
    path = folder / "text.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def chatty():
    chat = tiny_tokenizer()
    chat.chat_template = TEMPLATE
    return chat


def test_of_a_chat_the_answer_is_scored_and_its_opening_is_not(tmp_path):
    (passage,) = passages(write(tmp_path, [CHAT]), chatty(), 512, 512)
    assert passage.ids.tolist() == [3, 10, 11, 5, 4, 12, 13, 14, 5]
    assert passage.ids[~passage.scored].tolist() == [3, 10, 11, 5, 4] == chat_prompt(chatty(), "w10 w11")[0].tolist()


def test_every_answer_of_a_long_chat_is_scored(tmp_path):
    turns = [("user", "w20"), ("assistant", "w21"), ("user", "w22"), ("assistant", "w23")]
    record = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (passage,) = passages(write(tmp_path, [record]), chatty(), 512, 512)
    assert passage.ids.tolist() == [3, 20, 5, 4, 21, 5, 3, 22, 5, 4, 23, 5]
    assert passage.ids[passage.scored].tolist() == [21, 5, 23, 5]


def test_without_a_template_the_answer_alone_is_scored(tmp_path):
    (passage,) = passages(write(tmp_path, [CHAT]), tiny_tokenizer(), 512, 512)
    assert passage.ids[passage.scored].tolist() == [12, 13, 14]


def test_long_documents_are_cut_and_nothing_is_beyond_the_most(tmp_path):
    path = write(tmp_path, [{"text": " ".join(f"w{i}" for i in range(10, 50))}, CHAT, {"text": "w7 w8 w9"}])
    found = passages(path, tiny_tokenizer(), 16, 64)
    assert sum(len(passage.ids) for passage in found) <= 64
    assert max(len(passage.ids) for passage in found) == 16
    assert not any(passage.scored[0] for passage in found)
    assert all(passage.scored[1:].all() for passage in found[:2])


def test_training_windows_hold_every_document_once_in_seeded_order(tmp_path):
    chats = [{"prompt": f"w{10 + i} w11", "response": f"w{40 + i} w13"} for i in range(12)]
    path = write(tmp_path, chats)
    found = packed([path], tiny_tokenizer(), 8, 512, seed=3)
    assert len(found) == 6
    ids = torch.cat([passage.ids for passage in found]).tolist()
    assert sorted(ids) == sorted([*range(10, 22), *range(40, 52), *[11, 13] * 12])
    assert ids != sorted(ids)
    for passage in found:
        places = passage.scored.nonzero().squeeze(1)
        assert all(int(passage.ids[i]) == 13 or 40 <= int(passage.ids[i]) < 52 for i in places)
    prompts = packed([path], tiny_tokenizer(), 8, 24, prompts=True, seed=3)
    assert [passage.ids.tolist() for passage in prompts] == [passage.ids.tolist() for passage in found[:3]]
    assert all(passage.scored.tolist() == [False] + [True] * 7 for passage in prompts)
    with pytest.raises(g.CalibrationError, match="has 48 tokens, fewer than one window of 64"):
        packed([path], tiny_tokenizer(), 64, 512)


def test_every_window_begins_as_the_tokenizer_begins_texts(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    path = write(tmp_path, [{"text": " ".join(f"w{i}" for i in range(10, 24))}, {"text": "w30 w31 w32 w33"}])
    found = passages(path, tokenizer, 6, 64)
    assert [passage.ids.tolist() for passage in found] == [
        [1, *range(10, 15)],
        [1, *range(15, 20)],
        [1, *range(20, 24)],
        [1, *range(30, 34)],
    ]
    assert all(passage.scored.tolist() == [False] + [True] * (len(passage.ids) - 1) for passage in found)
    expected = [[1, 10, 11, 12, 13], [1, 14, 15, 16, 17], [1, 18, 19, 20, 21], [1, 22, 23, 1, 30]]
    assert windows(path, tokenizer, 5, 64).tolist() == expected
    assert windows(path, tokenizer, 5, 10).tolist() == expected[:2]
    rows = [passage.ids.tolist() for passage in packed([path], tokenizer, 5, 512)]
    assert all(row[0] == 1 for row in rows)
    assert len(rows) == 4


def test_nothing_to_score_is_said(tmp_path):
    with pytest.raises(g.CalibrationError, match="nothing to score within 8 tokens"):
        passages(write(tmp_path, []), tiny_tokenizer(), 8, 8)
    with pytest.raises(g.CalibrationError, match="no text file"):
        windows(tmp_path / "none.txt", tiny_tokenizer(), 8, 8)
    with pytest.raises(g.CalibrationError, match="keys title"):
        passages(write(tmp_path, [{"title": "a"}]), tiny_tokenizer(), 8, 8)


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path):
    chat = tiny_tokenizer()
    chat.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(g.CalibrationError, match="rewrites earlier turns"):
        passages(write(tmp_path, [CHAT]), chat, 64, 64)


def test_quality_is_that_of_a_plain_loop(tmp_path):
    model, original = tiny(), tiny(initializer_range=0.1)
    generator = torch.Generator().manual_seed(0)
    held_out = []
    for length in (5, 9, 7):
        scored = torch.rand(length, generator=generator) > 0.4
        scored[0], scored[-1] = False, True
        held_out.append(Passage(torch.randint(96, (length,), generator=generator), scored))
    found = g.evaluate(model, held_out, original)
    reference = Reference.of(original, held_out)
    assert g.evaluate(model, held_out, reference) == found
    reference.write(tmp_path / "reference.safetensors")
    again = Reference.read(tmp_path / "reference.safetensors", original)
    assert again.quality == reference.quality == g.evaluate(original, held_out)
    assert all(map(torch.equal, again.hidden, reference.hidden))
    apart = g.evaluate(model, held_out, again).kl_nats  # elsewhere in memory, where kernels may round otherwise
    assert apart == pytest.approx(found.kl_nats, rel=1e-6)
    whole = sum(count_macs(model, passage.ids[None]) for passage in held_out)
    assert found.macs_per_token == pytest.approx(whole / sum(len(passage.ids) for passage in held_out))
    losses, divergences, same = [], [], []
    for passage in held_out:
        with torch.inference_mode():
            p = original(passage.ids[None]).logits[0].log_softmax(-1)
            q = model(passage.ids[None]).logits[0].log_softmax(-1)
        for i in range(1, len(passage.ids)):
            if passage.scored[i]:
                losses.append(-float(q[i - 1, passage.ids[i]]))
                divergences.append(sum(float(a.exp() * (a - b)) for a, b in zip(p[i - 1], q[i - 1], strict=True)))
                same.append(int(p[i - 1].argmax()) == int(q[i - 1].argmax()))
    assert found.tokens == len(losses)
    assert found.perplexity == pytest.approx(torch.tensor(losses).mean().exp().item(), rel=1e-5)
    assert found.kl_nats == pytest.approx(sum(divergences) / len(losses), rel=1e-4)
    assert found.top1_agreement == pytest.approx(sum(same) / len(same))
    assert found.perplexity_low < found.perplexity < found.perplexity_high


def test_divergence_from_itself_is_nothing():
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(kl_divergence(logits, logits), torch.zeros(3))


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_a_reference_keeps_the_logits_of_every_family(family):
    model = tiny(family)
    held_out = [Passage.whole(torch.arange(1, 9)), Passage.whole(torch.arange(20, 25))]
    reference = Reference.of(model, held_out)
    for at, passage in enumerate(held_out):
        with torch.inference_mode():
            assert torch.equal(reference.logits(at), model(passage.ids[None]).logits[0, :-1].float())
    assert g.evaluate(model, held_out, reference).kl_nats == 0


def test_tokens_are_drawn_as_often_as_they_are_likely():
    likely = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    ids = drawn(likely.expand(20_000, 6), torch.Generator().manual_seed(0)).squeeze(1)
    counts = torch.bincount(ids, minlength=6)
    assert counts[likely == 0].sum() == 0
    expected = 20_000 * likely[likely > 0]
    statistic = ((counts[likely > 0] - expected) ** 2 / expected).sum()
    assert statistic < 13.8  # chi-square, 2 degrees of freedom: one in a thousand lies above


def test_self_written_text_is_kept_and_seeded(tmp_path):
    model = tiny()
    settings = {"count": 3, "window_tokens": 12, "cache": tmp_path}
    first = self_written(model, tiny_tokenizer(), **settings)
    assert first.shape == (3, 12)
    assert len(list(tmp_path.iterdir())) == 1
    assert torch.equal(self_written(model, tiny_tokenizer(), **settings), first)
    assert not torch.equal(self_written(model, tiny_tokenizer(), **settings, seed=1), first)
    assert not torch.equal(self_written(tiny(initializer_range=0.1), tiny_tokenizer(), **settings), first)
