"""What a matrix says, from rows with chosen numbers: no model runs here."""

import csv
import json
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_report import Page
from tiny_matrix import PARTS, made_up, matrix_file

import gateskip_compress as g
from gateskip_compress.matrix.cells import nodes_of
from gateskip_compress.matrix.derive import derive, front, judge, saves
from gateskip_compress.matrix.metrics import METRICS, parse_goal
from gateskip_compress.matrix.search import value_of
from gateskip_compress.matrix.spec import read_spec
from gateskip_compress.quality import bootstrap_means
from gateskip_compress.report.matrix import initials, plain, write_matrix

LOSSES = {"": (20, 20), "prune": (22, 20), "quantize": (21, 21), "prune+quantize": (24, 22), "gateskip": (21, 20)}
LOSSES |= {"gateskip+self_speculation": (21, 20), "gateskip+quantize": (23, 21)}
LOSSES |= {"gateskip+quantize+self_speculation": (23, 21)}
SECONDS = {"": 6.0, "prune": 3.0, "quantize": 2.0, "prune+quantize": 1.5, "gateskip": 4.0}
SECONDS |= {"gateskip+self_speculation": 3.0, "gateskip+quantize": 2.0, "gateskip+quantize+self_speculation": 1.0}


def derived(goals=(), losses=LOSSES, seconds=SECONDS, **changes):
    spec, cells, rows = made_up(losses, seconds, **changes)
    return derive(spec, cells, rows, [parse_goal(goal) for goal in goals], "gateskip matrix x.yaml --out x")


def by_name(report):
    return {cell["name"]: cell for cell in report["cells"]}


def test_stacking_efficiency_is_the_speed_up_over_the_product_of_the_parts():
    cells = by_name(derived())
    assert cells["prune"]["values"]["decode_speedup"] == 2
    assert cells["prune + quantize"]["values"]["stacking_efficiency"] == pytest.approx((6 / 1.5) / (2 * 3))
    # speculation does not run alone: it counts as what it added to gates, 4 s to 3 s
    assert cells["gateskip + self_speculation"]["values"]["stacking_efficiency"] == pytest.approx(1)
    whole = cells["gateskip + quantize + self_speculation"]["values"]
    assert whole["stacking_efficiency"] == pytest.approx((6 / 1) / ((6 / 4) * 3 * (4 / 3)))
    assert "stacking_efficiency" not in cells["prune"]["values"]


def test_interaction_is_the_loss_beyond_the_parts_losses():
    cells = by_name(derived())
    # mean losses of 20 tokens: original 2.0, prune 2.1, quantize 2.1, both 2.3
    assert cells["prune + quantize"]["values"]["interaction_nats"] == pytest.approx(0.1)
    low, high = cells["prune + quantize"]["bounds"]["interaction_nats"]
    # by passage: (24-20) - (22-20) - (21-20) = 1 and (22-20) - 0 - 1 = 1, over 10 tokens each: no spread
    assert low == pytest.approx(0.1)
    assert high == pytest.approx(0.1)


def test_ratios_are_paired_passage_by_passage():
    cells = by_name(derived())
    low, high = cells["quantize"]["bounds"]["perplexity_ratio"]  # worse by 1 nat in both passages
    assert low == pytest.approx(math.exp(0.1))
    assert high == pytest.approx(math.exp(0.1))
    low, high = cells["prune"]["bounds"]["perplexity_ratio"]  # worse by 2 nats in one, not in the other
    assert low == pytest.approx(1)
    assert high == pytest.approx(math.exp(0.2))
    assert cells["prune"]["bounds"]["decode_speedup"] == (2, 2)  # a slow moment hits both of a pair


def test_bootstrap_rows_share_their_draws():
    sums, counts = torch.tensor([[1.0, 5.0, 3.0], [2.0, 6.0, 4.0]]).double(), torch.tensor([1, 2, 4])
    means = bootstrap_means(sums, counts)
    each = [bootstrap_means(row, counts) for row in sums]
    torch.testing.assert_close(means, torch.stack(each))


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_a_front_holds_what_nothing_beats(points):
    kept = {points[i] for i in front(points)}
    beaten = {p for p in points if any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
    assert kept == set(points) - beaten


@pytest.mark.parametrize(
    ("memory", "speed", "label"),
    [(0.5, 2.0, "both"), (0.5, 1.0, "memory"), (1.0, 2.0, "speed"), (0.97, 1.03, "neither"), (None, 2.0, None)],
)
def test_labels_say_what_a_cell_saves(memory, speed, label):
    values = {"memory_share": memory, "decode_speedup": speed}
    assert saves({name: value for name, value in values.items() if value is not None}) == label


def test_the_cheapest_stack_that_surely_meets_the_goal_is_recommended():
    goal = "decode_speedup >= 1.5 and perplexity_ratio <= 1.15"
    report = derived([goal, "decode_speedup > 100", "decode_speedup >= 1.5"])
    names = {cell["id"]: cell["name"] for cell in report["cells"]}
    first, none, cheapest = report["goals"]
    assert first["verdict"] == "yes"
    assert names[first["recommended"]] == "gateskip + self_speculation"
    met = {"prune", "quantize", "gateskip", "gateskip + self_speculation"}
    assert {names[i] for i in first["met"]} == met
    assert by_name(report)["prune"]["verdicts"][0] == "likely"
    assert (none["recommended"], names[none["nearest"]]) == (None, "gateskip + quantize + self_speculation")
    costs = {cell["name"]: cell["values"].get("cost_share") for cell in report["cells"] if cell["status"] == "done"}
    assert names[cheapest["recommended"]] == min(costs, key=costs.get)
    own = by_name(report)["prune"]["values"]
    expected = (own["disk_share"] * own["memory_share"] * own["macs_share"] / own["decode_speedup"]) ** 0.25
    assert costs["prune"] == pytest.approx(expected)


def test_a_stack_whose_interval_reaches_past_the_goal_comes_second():
    def entry(name, cost, high):
        values = {"perplexity_ratio": 1.0, "cost_share": cost}
        return {
            "id": name,
            "status": "done",
            "kind": "stack",
            "values": values,
            "bounds": {"perplexity_ratio": (1, high)},
        }

    goal = parse_goal("perplexity_ratio <= 1.1")
    sure, dearer, unsure = entry("sure", 0.5, 1.05), entry("dearer", 0.6, 1.05), entry("unsure", 0.4, 1.2)
    assert judge(goal, [dearer, unsure, sure])["recommended"] == "sure"
    assert judge(goal, [unsure])["verdict"] == "likely"


def test_pairs_say_what_works_and_why_not():
    report = derived(orders="light")
    found = {(pair["first"], pair["second"]): pair for pair in report["pairs"]}
    assert len(found) == 16
    assert found["prune", "quantize"]["status"] == "works"
    assert found["quantize", "prune"]["status"] == "refused"
    assert "pruning needs float weights" in found["quantize", "prune"]["reason"]
    assert "same kind of step" in found["prune", "prune"]["reason"]
    assert "needs a GateSkip step before it" in found["prune", "self_speculation"]["reason"]
    orders = {tuple(study["parts"]): len(study["cells"]) for study in report["orders"]}
    assert orders["prune", "quantize"] == 2


def test_cells_share_the_nodes_they_begin_with():
    spec, cells, _ = made_up({}, {}, budgets=[0.8])
    nodes = nodes_of(cells, spec)
    assert len(cells) == 1 + 15 + 4  # the original, all subsets, four of them have gates and no speculation
    assert len({cell.id for cell in cells}) == len(cells)
    assert len(nodes) == 1 + 11  # four subsets speculate without gates
    assert all(node.parent in nodes for node in nodes.values() if node.steps)
    changed = made_up({}, {}, seed=1)
    assert not set(nodes) & set(nodes_of(changed[1], changed[0]))


@pytest.mark.parametrize(
    ("text", "value", "verdict"),
    [
        ("perplexity_ratio <= 1.1", 1.05, "yes"),
        ("perplexity_ratio <= 1.1", 1.09, "likely"),
        ("perplexity_ratio <= 110 %", 1.2, "no"),
        ("perplexity_ratio<=1.1 and decode_speedup>=2", 1.05, "unknown"),
        ("perplexity_ratio<=1.1 and decode_speedup>=2", 1.2, "no"),
        ("perplexity_ratio > .5 and perplexity_ratio < 2e0", 1.2, "yes"),
    ],
)
def test_goals_are_judged(text, value, verdict):
    bounds = {"perplexity_ratio": (value - 0.02, value + 0.02)}
    assert parse_goal(text).verdict({"perplexity_ratio": value}, bounds) == verdict
    assert parse_goal(str(parse_goal(text))) == parse_goal(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("perplexity_ration <= 1.1", "unknown metric 'perplexity_ration', did you mean 'perplexity_ratio'"),
        ("perplexity_ratio = 1.1", "'perplexity_ratio = 1.1' must be a metric, one of"),
        ("", "must be a metric"),
        ("perplexity_ratio <= 1.1 and", "'' must be a metric"),
        ("__import__('os') <= 1", "must be a metric"),
        ("perplexity_ratio <= 1.1 or disk_share < 1", "must be a metric"),
    ],
)
def test_goals_that_are_none_are_refused(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_goal(text)


def test_a_search_is_drawn_to_goals_met_and_then_to_cost():
    goal = parse_goal("perplexity_ratio <= 1.1")
    near, far = value_of(goal, {"perplexity_ratio": 1.2}), value_of(goal, {"perplexity_ratio": 2.0})
    dear = value_of(goal, {"perplexity_ratio": 1.1, "cost_share": 3.0})
    cheap = value_of(goal, {"perplexity_ratio": 1.0, "cost_share": 0.5})
    assert cheap < dear < 1 < near < far < value_of(goal, {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modles": ["x"]}, "unknown key 'modles', did you mean 'models'"),
        ({"timing": {"batch": [1]}}, "unknown key 'timing.batch', did you mean 'batches'"),
        ({"timing": {"batches": [0]}}, "timing.batches 0 must be at least 1"),
        ({"parts": {"prun": {"light": {}}}}, "unknown step 'prun', did you mean 'prune'"),
        ({"parts": {"prune": {"light": {"block": 1}}}}, "prune has no field 'block', did you mean 'blocks'"),
        ({"parts": {"quantize": {"light": {"bits": 5}}}}, "quantize.bits = 5"),
        ({"stacks": [["prune", "quantise"]]}, "no part 'quantise', did you mean 'quantize'"),
        ({"stacks": [["prune.ligth"]]}, "part 'prune' has no strength 'ligth', did you mean 'light'"),
        ({"orders": "strong"}, "has no strength 'strong'"),
        ({"metrics": ["perplexity_ration"]}, "unknown metric 'perplexity_ration', did you mean 'perplexity_ratio'"),
        ({"goals": ["disk_size < 1"]}, "unknown metric 'disk_size'"),
        ({"tasks": {"names": ["hellaswagg"], "folder": "."}}, "unknown task 'hellaswagg', did you mean 'hellaswag'"),
        ({"budgets": [1.5]}, "budgets: 1.5 must be above 0 and at most 1"),
        ({"baselines": {"two": [{"prune": {}, "quantize": {}}]}}, "baseline 'two': each step is one name"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value)[:40],
)
def test_mistakes_in_a_matrix_are_named(changes, message, tmp_path):
    path = matrix_file(tmp_path, **changes)
    with pytest.raises((g.PipelineError, ValueError), match=re.escape(message)):
        read_spec(path)


def test_sizes_and_tasks_are_metrics_too(tmp_path):
    folder = {"names": ["piqa"], "folder": "."}
    known = read_spec(matrix_file(tmp_path, tasks=folder)).known_metrics
    assert known.keys() - METRICS.keys() == {
        "accuracy_piqa",
        *(f"{name}_b2_t8" for name in ("prefill_speedup", "decode_speedup", "time_to_first_token_ms")),
        *(f"{name}_b2_t8" for name in ("prefill_tokens_per_s", "decode_tokens_per_s")),
    }


def written(report, folder):
    return {name: path.read_text(encoding="utf-8") for name, path in write_matrix(report, folder).items()}


def test_the_page_has_a_row_a_cell_and_loads_nothing(tmp_path):
    files = written(derived(["perplexity_ratio <= 1.15"], orders="light"), tmp_path)
    html = files["report.html"]
    page = Page(re.sub(r"<table(?! id)", "<table id=other", html))
    assert page.addresses == []
    assert re.findall(r"https?:|url\(|@import|\bfetch\(", html) == []
    assert not {"link", "iframe", "object", "img"} & set(page.tags)
    head, *rows = page.tables["cells"]
    row = next(row for row in rows if row[0].split()[-1] == "quantize" and "+" not in row[0])
    assert row[head.index("perplexity\N{MULTIPLICATION SIGN}")].startswith("1.105")
    assert len(page.tables["cells"]) == 1 + len(json.loads(_data(html))["cells"])
    assert re.findall(r"<th(?![^>]*\bscope=)[ >]", html) == []


def _data(html):
    return re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL).group(1)


def test_names_out_of_a_file_cannot_become_markup(tmp_path):
    evil = "</script><img src=http://x.test>|`a`"
    baselines = {evil: [{"prune": {"blocks": 1}}, {"quantize": {}}]}
    files = written(derived(baselines=baselines), tmp_path)
    page = Page(re.sub(r"<table(?! id)", "<table id=other", files["report.html"]))
    assert "img" not in page.tags
    lines = [line for line in files["report.md"].splitlines() if line.startswith("| ")]
    assert not any(re.search(r"(?<!\\)<", line) for line in lines)


def test_csv_and_json_lines_hold_every_cell(tmp_path):
    report = derived(["perplexity_ratio <= 1.15"])
    files = written(report, tmp_path)
    rows = list(csv.DictReader(files["report.csv"].splitlines()))
    lines = [json.loads(line) for line in files["report.jsonl"].splitlines()]
    assert [row["id"] for row in rows] == [line["id"] for line in lines] == [cell["id"] for cell in report["cells"]]
    row = next(row for row in rows if row["name"] == "prune")
    assert float(row["decode_speedup"]) == 2
    assert float(row["perplexity_ratio_high"]) == pytest.approx(math.exp(0.2))
    assert row["perplexity_ratio <= 1.15"] == "likely"
    refused = next(row for row in rows if row["status"] == "refused")
    assert refused["decode_speedup"] == refused["perplexity_ratio <= 1.15"] == ""


def test_every_cell_has_a_recipe_that_reads_back(tmp_path):
    report = derived()
    written(report, tmp_path)
    cell = by_name(report)["prune + quantize"]
    recipe = g.read_recipe(tmp_path / "recipes" / f"{cell['id']}.yaml")
    assert [step.name for step in recipe.pipeline()] == ["prune", "quantize"]
    assert f"{tmp_path}/recipes/{cell['id']}.yaml" in cell["command"]


def test_a_matrix_of_which_nothing_is_measured_still_has_a_page(tmp_path):
    files = written(derived(["decode_speedup > 2"], losses={}), tmp_path)
    assert "No stack here meets it" in files["report.html"]
    assert "not measured yet" in files["report.md"]


def test_reasons_and_marks_are_short():
    assert plain("Prune(blocks=1) cannot follow Quantize(bits_of={}, x=(1, 2)): it (so) is") == (
        "Prune cannot follow Quantize: it (so) is"
    )
    assert initials(["prune", "quantize", "prefix", "gateskip"]) == dict(
        prune="P", quantize="Q", prefix="PR", gateskip="G"
    )
    assert initials(list(PARTS)) == dict(prune="P", gateskip="G", quantize="Q", self_speculation="S")
