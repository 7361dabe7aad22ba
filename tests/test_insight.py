"""Where a gated model skips: numbers against naive loops, and the page that shows them."""

import json
import re

import pytest
import torch
from test_report import Page
from tiny_models import compress, tiny, tiny_tokenizer, tokens

from gateskip_compress import GateSkip, UnsupportedModel, budget
from gateskip_compress.gating.calibrate import observe, spent
from gateskip_compress.gating.insight import CLASSES, FEWEST_USES, by_position, by_string, classes, insight
from gateskip_compress.gating.turning import dial_of
from gateskip_compress.report import write_insight
from gateskip_compress.report.insight import visible
from gateskip_compress.text import Passage


@pytest.fixture(scope="module")
def model():
    return compress(tiny(), GateSkip(budget=0.7, rank=4))


@pytest.fixture(scope="module")
def passages():
    return [Passage.whole(tokens(1, length, seed)[0]) for seed, length in enumerate((40, 24, 33))]


@pytest.fixture(scope="module")
def found(model, passages):
    return {"model": "tiny", "text": "some.txt", **insight(model, tiny_tokenizer(), passages, 2)}


@pytest.fixture(scope="module")
def seen(model, passages):
    """The decisions behind `found`, passage by passage."""
    return [observe(model, passage.ids[None], None) for passage in passages]


def rounded(value):
    return pytest.approx(value, abs=1e-9)


def test_parts_sum_to_what_calibration_says_is_spent(model, passages, found, seen):
    one = insight(model, tiny_tokenizer(), passages[:1])
    assert sum(part["macs_share"] for part in one["parts"]) == rounded(spent(model, seen[0], 40).budget)
    assert one["macs_share"] == rounded(spent(model, seen[0], 40).budget)
    assert one["executed_share"] == rounded(spent(model, seen[0], 40).executed)
    for key, whole in (("macs_share", found["macs_share"]), ("ungated_macs_share", 1)):
        assert sum(part[key] for part in found["parts"]) == rounded(whole)
    assert {part["part"] for part in found["parts"] if part["ungated_macs_share"] == 0} == {"gates", "surrogates"}
    assert all(part["macs_share"] > 0 for part in found["parts"])


@pytest.mark.parametrize(
    "gates",
    [dict(where="attention"), dict(where="mlp"), dict(where="block"), dict(every=2), dict(surrogate="zero")],
    ids=lambda gates: "-".join(map(str, gates.values())),
)
def test_parts_sum_wherever_gates_are(gates):
    model, ids = compress(tiny(), GateSkip(budget=0.9, rank=4, **gates)), tokens(1, 48)
    found = insight(model, tiny_tokenizer(), [Passage.whole(ids[0])])
    assert sum(part["macs_share"] for part in found["parts"]) == rounded(
        spent(model, observe(model, ids, None), 48).budget
    )
    kinds = {kind for kind, share in found["kinds"].items() if share is not None}
    assert kinds == {gates.get("where")} & {"attention", "mlp"} or kinds == {"attention", "mlp"}
    for margins, kept in zip(found["passage"]["margins"], found["passage"]["kept"], strict=True):
        assert all(keep == (margin > 0) for margin, keep in zip(margins[1:], kept[1:], strict=True))


def test_kept_shares_of_branches_and_layers(found, seen):
    for at, branch in enumerate(found["branches"]):
        kept = [keep for decided in seen for keep in decided[at].keep[0].tolist()]
        assert (branch["layer"], branch["kind"]) == (at // 2, ("attention", "mlp")[at % 2])
        assert branch["kept_share"] == rounded(sum(kept) / len(kept))
    shares = [branch["kept_share"] for branch in found["branches"]]
    for at, layer in enumerate(found["layers"]):
        pair = shares[2 * at], shares[2 * at + 1]
        assert (layer["attention"], layer["mlp"]) == pair
        assert layer["kept_share"] == rounded(sum(pair) / 2)
    assert found["kinds"]["mlp"] == rounded(sum(shares[1::2]) / 4)
    assert min(shares) < 1  # or nothing here was tested


def test_the_passage_is_the_one_asked_for(model, found, seen, passages):
    shown, thresholds = found["passage"], dial_of(model).thresholds
    assert shown["number"] == 2
    assert [token["text"] for token in shown["tokens"]] == [f"w{i}" if i > 2 else "<unk>" for i in passages[1].ids]
    for at, decision in enumerate(seen[1]):
        assert shown["kept"][at] == decision.keep[0].tolist()
        assert shown["margins"][at] == pytest.approx((decision.score[0] - thresholds[at]).tolist(), abs=1e-4)
    shares = [sum(column) / len(column) for column in zip(*shown["kept"], strict=True)]
    assert [token["kept_share"] for token in shown["tokens"]] == rounded(shares)


def test_classes_of_tokens_hold_their_own_means(found, seen, passages):
    naive = {name: [] for name in CLASSES}
    uses = [int(i) for passage in passages for i in passage.ids[1:] if i > 2]
    by_use = sorted(dict.fromkeys(uses), key=uses.count, reverse=True)
    frequent = []
    while sum(map(uses.count, frequent)) < len(uses) / 2 and uses.count(by_use[len(frequent)]) > 2:
        frequent.append(by_use[len(frequent)])
    for passage, decided in zip(passages, seen, strict=True):
        for at, token in enumerate(passage.ids.tolist()):
            kept = sum(bool(d.keep[0, at]) for d in decided) / len(decided)
            rare = "rare words" if uses.count(token) <= 2 else "other words"
            name = "first token" if at == 0 else "special tokens" if token <= 2 else rare
            naive["frequent words" if name == "other words" and token in frequent else name].append(kept)
    for row in found["classes"]:
        mine = naive[row["class"]]
        assert row["tokens"] == len(mine)
        assert row["kept_share"] == (rounded(sum(mine) / len(mine)) if mine else None)
    rows = {row["class"]: row for row in found["classes"]}
    assert sum(row["tokens"] for row in rows.values()) == found["tokens"] == 97
    assert rows["first token"]["kept_share"] == rows["first token"]["low"] == 1
    assert rows["rare words"]["low"] <= rows["rare words"]["kept_share"] <= rows["rare words"]["high"]
    digits = rows["digits"]
    assert digits["tokens"] == digits["passages"] == 0
    assert {digits[key] for key in ("kept_share", "low", "high", "attention", "mlp")} == {None}


def test_a_class_is_the_first_that_fits():
    texts = dict(enumerate(("<s>", "Be", " good", "\n\n", " ", "12", " 7", ".", " --", "a1", "\ufffd", " the")))
    ids = [[0, 1, 2, 3, 4, 5, 6, 0], [0, 1, 2, 7, 8, 9, 10, 11, 11, 11, 9]]
    first, second = classes(ids, texts, {0})
    opening, space, digits = "shared opening", "newline or whitespace", "digits"
    assert first == ["first token", opening, opening, space, space, digits, digits, "special tokens"]
    assert second[:5] == ["first token", opening, opening, "punctuation", "punctuation"]
    assert second[5:] == ["rare words", "rare words", *["frequent words"] * 3, "rare words"]
    assert classes(ids[1:], texts, set())[0][1] == "rare words"  # one passage shares nothing with others


def test_most_and_least_kept_tokens_occur_often_enough():
    kept = {1: 1.0, 2: 0.5, 3: 0.0}
    ids = [[9, 1, 2, 3] * FEWEST_USES, [1, 2, 4]]
    keep = [torch.tensor([[kept.get(i, 0) > 0 for i in one], [kept.get(i, 0) > 0.5 for i in one]]) for one in ids]
    names = [["first token"] + ["other words"] * (len(one) - 1) for one in ids]
    texts = {i: f"t{i}" for i in range(10)}
    found = by_string(keep, ids, texts, names)
    assert [(row["text"], row["uses"], row["kept_share"]) for row in found["most"]] == [("t1", 5, 1.0), ("t2", 6, 0.5)]
    assert [row["text"] for row in found["least"]] == ["t3"]  # 9 is once a first token, 4 is too rare


def test_bins_of_positions_cover_the_passage_once():
    keep = [torch.tensor([[True] * 3 + [False] * 17] * 2), torch.tensor([[True, False]] * 2)]
    names = [["first token"] + ["punctuation"] * 9 + ["rare words"] * 10, ["first token", "rare words"]]
    rows = by_position(keep, names)
    assert [(row["first"], row["last"], row["tokens"]) for row in rows] == [
        (0, 0, 2),
        (1, 3, 4),
        (4, 15, 12),
        (16, 19, 4),
    ]
    assert [row["kept_share"] for row in rows] == [1, 0.5, 0, 0]
    assert [row["words"]["tokens"] for row in rows] == [0, 1, 6, 4]
    assert rows[0]["words"]["kept_share"] is None
    assert rows[2]["low"] is None  # one passage is too few for an interval


def test_what_cannot_be_looked_into_is_refused(model, passages):
    with pytest.raises(UnsupportedModel, match="no gates"):
        insight(tiny(), tiny_tokenizer(), passages)
    with pytest.raises(ValueError, match="passage 4 must be from 1 to 3"):
        insight(model, tiny_tokenizer(), passages, 4)
    with budget(model, 1), pytest.raises(ValueError, match="budget 1 runs every branch"):
        insight(model, tiny_tokenizer(), passages)


def test_the_page_holds_the_numbers(found, tmp_path):
    files = write_insight(found, tmp_path / "new" / "page.html")
    assert json.loads(files["json"].read_text(encoding="utf-8"), parse_constant=pytest.fail) == found
    page = Page(files["html"].read_text(encoding="utf-8"))
    assert list(page.tables) == ["parts", "layers", "heat", "classes", "most", "least", "positions"]
    assert [row[0] for row in page.tables["classes"][1:]] == list(CLASSES)
    assert page.tables["parts"][-1][1:3] == [f"{100 * found['macs_share']:.2f} %", "100.00 %"]
    head, _, *rows = page.tables["heat"]
    assert head[1:] == [token["text"] for token in found["passage"]["tokens"]]
    assert len(rows) == len(found["branches"])
    order = [at for at, branch in enumerate(found["branches"]) if branch["kind"] == "attention"]
    for row, at in zip(rows[: len(order)], order, strict=True):
        assert row[0] == f"attention {found['branches'][at]['layer']}"
        cells = zip(row[1:], found["passage"]["margins"][at], found["passage"]["kept"][at], strict=True)
        for cell, margin, kept in list(cells)[1:]:
            assert cell.startswith("+" if kept else "\N{MINUS SIGN}")
            assert float(cell.replace("\N{MINUS SIGN}", "-")) == pytest.approx(margin, abs=0.006)
    assert len(page.tables["positions"][2:]) == len(found["positions"])


def test_the_page_loads_nothing_and_heads_its_tables(found, tmp_path):
    html = write_insight(found, tmp_path / "page.html")["html"].read_text(encoding="utf-8")
    page = Page(html)
    assert html.startswith("<!doctype html>")
    assert page.addresses == []
    assert re.findall(r"https?:|url\(|@import", html) == []
    assert not {"link", "iframe", "object", "img"} & set(page.tags)
    assert re.findall(r"<th(?![^>]*\bscope=)[ >]", html) == []
    assert html.count("<caption") == html.count("<table ")
    assert html.count("<h1>") == 1
    assert html.count('role="img" aria-label=') == 2


def test_text_cannot_become_markup(found, tmp_path):
    evil = "<script>alert('x')</script>"
    passage = {**found["passage"], "tokens": [{**token, "text": evil} for token in found["passage"]["tokens"]]}
    rows = [{"text": evil, "class": "rare words", "uses": 9, "kept_share": 0.5}]
    changed = {**found, "model": evil, "text": evil, "passage": passage}
    changed["strings"] = {"fewest_uses": 5, "most": rows, "least": []}
    page = Page(write_insight(changed, tmp_path / "page.html")["html"].read_text(encoding="utf-8"))
    assert page.tags.count("script") == 1  # ours
    assert page.text.count(evil) > len(passage["tokens"])
    assert page.tables["least"][1] == ["none occurs so often"]


def test_a_page_has_its_ending(found, tmp_path):
    with pytest.raises(ValueError, match=r"page.json must end in .html"):
        write_insight(found, tmp_path / "page.json")


@pytest.mark.parametrize(("text", "seen"), [(" the", "·the"), ("\n\n", "↵↵"), ("\t", "⇥"), ("", "∅")])
def test_spaces_can_be_seen(text, seen):
    assert visible(text) == seen
