"""A matrix run for real on a tiny model: what it measures, how it goes on, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future

import pytest
import torch
import yaml
from test_cli import call as call
from tiny_matrix import PARTS, TIMING, matrix_file
from tiny_models import tiny, tiny_tokenizer, tokens

import gateskip_compress as g
from gateskip_compress.fresh import ProcessFailed, fresh_rows, fresh_value
from gateskip_compress.matrix import run
from gateskip_compress.matrix.run import Matrix, report_matrix, run_matrix
from gateskip_compress.matrix.search import search
from gateskip_compress.matrix.spec import Timing, read_spec
from gateskip_compress.matrix.store import opened, read_rows
from gateskip_compress.matrix.timing import Subject, rival, time_pair
from gateskip_compress.pipeline import apply, start
from gateskip_compress.quantization.linear import unpacked
from gateskip_compress.step import Context
from gateskip_compress.text import passages, windows

SMALL = {"stacks": [["prune", "quantize"], ["gateskip", "self_speculation"], ["quantize", "prune"]], "budgets": [0.8]}
SMALL |= {"baselines": {"odd groups": [{"quantize": {"group_size": 128}}]}}


@pytest.fixture(autouse=True)
def one_core(monkeypatch):
    monkeypatch.setattr(run, "cores", lambda: 1)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A matrix that was run."""
    place = tmp_path_factory.mktemp("matrix")
    spec = read_spec(matrix_file(place, **SMALL))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "cores", lambda: 1)
        run_matrix(spec, place / "out")
    return place


@pytest.fixture
def report(place):
    return run.report_matrix(place / "out")


def by_name(report):
    return {cell["name"]: cell for cell in report["cells"]}


def measured(out, *, but=("environment", "compression")):
    """What a run found out and another should find too."""
    rows = [row for (_, part, _), row in read_rows(out).items() if part == "quality"]
    return {row["cell"]: {key: value for key, value in row.items() if key not in but} for row in rows}


def test_every_cell_is_done_or_refused_with_its_reason(report):
    cells = by_name(report)
    status = {name: cell["status"] for name, cell in cells.items()}
    assert status == {
        "original": "done",
        "prune + quantize": "done",
        "gateskip + self_speculation": "done",
        "quantize + prune": "refused",
        "odd groups": "refused",
    }
    assert (
        cells["quantize + prune"]["reason"]
        == "Prune cannot follow Quantize: pruning needs float weights; put prune first"
    )
    assert "group_size 128" in cells["odd groups"]["reason"]


def test_quality_is_that_of_the_pipeline(place, report):
    model, original, tokenizer = tiny(), tiny(), tiny_tokenizer()
    text = place / "text.jsonl"
    start(model, tokenizer, source="tiny")
    context = Context(windows(text, tokenizer, 24, 96))
    torch.manual_seed(0)
    for step in (g.Prune(blocks=1), g.Quantize(bits=4, group_size=32)):
        apply(step, model, context)
    held_out = passages(text, tokenizer, 24, 192)
    with unpacked(model):
        quality = g.evaluate(model, held_out, original)
    found = by_name(report)["prune + quantize"]
    assert found["quality"]["quality"]["perplexity"] == pytest.approx(quality.perplexity, rel=1e-6)
    assert found["values"]["kl_nats"] == pytest.approx(quality.kl_nats, rel=1e-4)
    plain = g.evaluate(original, held_out)
    assert found["values"]["perplexity_ratio"] == pytest.approx(quality.perplexity / plain.perplexity, rel=1e-6)


def test_numbers_of_speculation_are_those_of_its_gates(place, report):
    cells = by_name(report)
    whole = cells["gateskip + self_speculation"]
    assert 0.8 < whole["values"]["macs_share"] < 1
    assert 0 <= whole["values"]["accepted_share"] <= 1
    for size, batch in zip(whole["speed"]["sizes"], TIMING["batches"], strict=True):
        assert size["batch"] == batch
        assert len(size["decode_s"]) == len(size["original_decode_s"]) == TIMING["runs"]
    for speed in (whole["speed"], cells["prune + quantize"]["speed"]):
        assert speed["runtime"].startswith("native, ")
        assert speed["not_native"] is None
    assert report["runtimes"] == [whole["speed"]["runtime"]]
    assert [step["step"] for step in whole["quality"]["compression"]["steps"]] == ["gateskip", "self_speculation"]
    assert whole["quality"]["environment"]["threads"] == 1
    assert [list(step) for step in whole["quality"]["steps"]] == [["gateskip"], ["self_speculation"]]
    assert whole["speed"]["seed"] == 0
    assert cells["original"]["values"]["disk_share"] == 1


def test_what_the_native_runtime_does_not_know_is_timed_on_torch_with_the_reason(place, tmp_path):
    tiny("gpt2").save_pretrained(tmp_path / "cell")
    tiny_tokenizer().save_pretrained(tmp_path / "cell")
    timing = Timing(prompt_tokens=[6], batches=[2], new_tokens=2, runs=1)
    subjects = [Subject(folder, None, 1) for folder in (tmp_path / "cell", place / "plain")]
    with rival(subjects[0], timing) as cell, rival(subjects[1], timing) as original:
        found = time_pair(cell, original, timing, [[tokens(2, 6).tolist()]])
    assert found["runtime"] == "torch"
    assert "does not know family 'gpt2'" in found["not_native"]
    assert found["sizes"][0]["decode_s"][0] > 0


def test_gates_are_fitted_once_for_all_budgets(tmp_path):
    parts = {"gateskip": {name: {"budget": share, "rank": 4} for name, share in (("light", 0.9), ("strong", 0.75))}}
    spec, models = read_spec(matrix_file(tmp_path, parts=parts, timing=None)), []
    for stacks in ([["gateskip.light"]], [["gateskip.strong"]], [["gateskip.light"], ["gateskip.strong"]]):
        out = tmp_path / f"out{len(models)}"
        run_matrix(spec.model_copy(update={"stacks": stacks}), out)
        with opened(out):
            nodes = Matrix(spec, out).nodes.values()
        made = [out / "cache" / node.key for node in nodes if node.steps]
        models.append({node.name: node / "model" for node in made if node.is_dir()})
    both = models.pop()
    seconds = [json.loads((folder.parent / "facts.json").read_text())["seconds"] for folder in both.values()]
    assert len(seconds) == 2
    assert seconds[0] == seconds[1]
    for apart in models:
        ((name, folder),) = apart.items()
        assert both[name].samefile(folder) is False
        for file in ("model.safetensors", "gateskip.json", "config.json"):
            assert (both[name] / file).read_bytes() == (folder / file).read_bytes()


def test_text_too_short_for_a_prompt_is_refused(tmp_path):
    out = tmp_path / "out"
    timing = {**TIMING, "prompt_tokens": [300]}
    spec = read_spec(matrix_file(tmp_path, parts={"quantize": PARTS["quantize"]}, timing=timing))
    found = run_matrix(spec, out)
    for cell in found["cells"]:
        assert cell["speed"]["status"] == "refused"
        assert "300 prompt tokens: the evaluation text" in cell["speed"]["reason"]
        assert "has 192 tokens; lower timing.prompt_tokens" in cell["speed"]["reason"]


def test_a_second_run_measures_nothing(place):
    before = (place / "out" / "rows.jsonl").read_bytes()
    run_matrix(read_spec(place / "matrix.yaml"), place / "out")
    assert (place / "out" / "rows.jsonl").read_bytes() == before


def test_a_torn_line_and_a_half_made_node_are_made_good(place, tmp_path):
    out = tmp_path / "out"
    subprocess.run(["cp", "-r", place / "out", out], check=True)
    lines = (out / "rows.jsonl").read_text().splitlines(keepends=True)
    quality = [i for i, line in enumerate(lines) if json.loads(line)["part"] == "quality"]
    torn = [*lines[: quality[-1]], lines[quality[-1]][:40]]
    (out / "rows.jsonl").write_text("".join(torn))
    cell = json.loads(lines[quality[-1]])["cell"]
    spec = read_spec(place / "matrix.yaml")
    with opened(out):
        matrix = Matrix(spec, out)
        node = next(c.node for c in matrix.cells if c.id == cell)
    (out / "cache" / node / "facts.json").unlink()
    (out / "cache" / node / ".model.half").mkdir()
    run_matrix(spec.model_copy(update={"timing": None}), out)
    assert measured(out) == measured(place / "out")
    assert not (out / "cache" / node / ".model.half").exists()


def test_a_lost_job_takes_only_what_stands_on_it(place, tmp_path):
    spec = read_spec(matrix_file(tmp_path, parts={part: PARTS[part] for part in ("prune", "quantize")}, timing=None))
    out = tmp_path / "out"
    jobs = []

    def submit(job):
        future = Future()
        jobs.append(job)
        lost = [name for name, _ in job.node.steps] == ["prune"]
        if not lost:
            (out / "cache" / job.node.key).mkdir(parents=True)
            (out / "cache" / job.node.key / "facts.json").write_text("{}")
        rows = [{"cell": c.id, "part": "quality", "settings": job.settings, "status": "done"} for c in job.cells]
        future.set_result(([], "killed by SIGKILL") if lost else (rows, None))
        return future

    with opened(out):
        matrix = Matrix(spec, out)
        assert len(list(matrix.measure_quality(submit, 1))) == 4
    found = {"+".join(cell.parts): matrix.row(cell, "quality") for cell in matrix.cells}
    assert {name: row["status"] for name, row in found.items()} == {
        "": "done",
        "prune": "failed",
        "quantize": "done",
        "prune+quantize": "failed",
    }
    assert found["prune+quantize"]["reason"] == "a step before its last: killed by SIGKILL"
    assert [len(job.node.steps) for job in jobs] == [0, 1, 1]
    again = Matrix(spec, out)
    assert [again.nodes[key].steps[-1][0] for key in again.nodes_to_do] == ["prune", "quantize"]  # failed: tried again


@pytest.mark.parametrize(("status", "code"), [("done", 0), ("refused", 0), ("failed", 1)])
def test_the_exit_code_says_whether_a_cell_failed(place, tmp_path, monkeypatch, call, status, code):
    out = tmp_path / "out"
    subprocess.run(["cp", "-r", place / "out", out], check=True)
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    last = next(row for row in reversed(rows) if row["part"] == "quality" and row["status"] == "done")
    last |= {} if status == "done" else {"status": status, "reason": "for this test"}
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # as a run would that ends so; a run of its own would measure the cell again
    monkeypatch.setattr("gateskip_compress.matrix.run.run_matrix", lambda _, out, **__: report_matrix(out))
    found, said, _ = call("matrix", place / "matrix.yaml", "--out", out)
    assert found == code
    assert ("1 failed" in said) == (status == "failed")


def _is_killed():
    yield 1
    os.kill(os.getpid(), signal.SIGKILL)


def _raises():
    yield 1
    raise OSError("no room")


@pytest.mark.parametrize(
    ("work", "message"), [(_is_killed, "killed by SIGKILL; was memory short"), (_raises, "OSError: no room")]
)
def test_a_process_says_how_it_ended(work, message):
    rows = fresh_rows(work)
    assert next(rows) == 1
    with pytest.raises(ProcessFailed, match=message):
        next(rows)


def test_a_process_gives_back_what_a_function_returns_or_says():
    assert fresh_value(divmod, 17, 5) == (3, 2)
    with pytest.raises(ProcessFailed, match=r"ValueError: invalid literal"):
        fresh_value(int, "x")
    with pytest.raises(ProcessFailed, match=r"^no file nowhere\.gguf$"):
        fresh_value(g.load, "nowhere.gguf")


def test_two_runs_into_one_folder_are_refused(tmp_path):
    with (
        opened(tmp_path / "out"),
        pytest.raises(g.PipelineError, match=f"in use by another run .process {os.getpid()}"),
    ):
        opened(tmp_path / "out").__enter__()
    with opened(tmp_path / "out"):
        pass


def test_results_of_another_version_are_refused(tmp_path):
    with opened(tmp_path / "out"):
        pass
    (tmp_path / "out" / "matrix.json").write_text(json.dumps({"format": 0, "package": "0.0.9"}))
    with pytest.raises(g.PipelineError, match=r"holds results of version 0\.0\.9 .format 0., this is"):
        opened(tmp_path / "out").__enter__()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(g.PipelineError, match="is not a matrix of ours"):
        opened(tmp_path / "other").__enter__()


def test_tasks_without_files_or_a_hub_say_what_would_serve(tmp_path, monkeypatch):
    spec = read_spec(matrix_file(tmp_path, tasks={"names": ["piqa", "lambada"]}))
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(g.CalibrationError, match=r"need lm-eval.*folder with piqa_val.jsonl, lambada_openai.jsonl"):
        run_matrix(spec, tmp_path / "out")
    monkeypatch.setitem(sys.modules, "lm_eval", type(sys)("lm_eval"))
    with pytest.raises(g.CalibrationError, match=r"HF_HUB_OFFLINE is set: unset it; or give tasks.folder"):
        run_matrix(spec, tmp_path / "out")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(g.CalibrationError, match=r"no hub at http://127.0.0.1:9 .*piqa_val.jsonl"):
        run_matrix(spec, tmp_path / "out")


def test_the_report_is_written_again_with_other_goals(place, call):
    code, _, err = call("report", place / "out", "--goal", "disk_share <= 0.5")
    assert code == 0, err
    assert "disk at most 50 %" in (place / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("matrix", "absent.yaml", "--out", "x"), "no recipe absent.yaml"),
        (("matrix", "{file}", "--out", "{new}", "--goal", "disk < 1"), "unknown metric 'disk', did you mean 'disk_"),
        (("matrix", "{file}", "--out", "{new}", "--workers", "0"), "workers 0 must be at least 1"),
        (("matrix", "{file}", "--out", "{plain}"), "is not a matrix of ours"),
        (("report", "{out}", "--goal", "nonsense"), "must be a metric"),
        (("search", "{file}", "--out", "{new}", "--goal", "disk_share < 1"), "this matrix has no search"),
        (("matrix", "{file}", "--out", "{new}", "--set", "timing.rnus=3"), "unknown key 'timing.rnus', did you mean"),
        (("matrix", "{file}", "--out", "{new}", "--set", "timing"), "'timing' must be key=value"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message, place, tmp_path, call):
    names = {"file": place / "matrix.yaml", "new": tmp_path / "new", "plain": place / "plain", "out": place / "out"}
    code, _, err = call(*(a.format(**names) for a in arguments))
    assert code == 2
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize("given", [[4, 1], [1], "few", {"off": [1]}, {"of": []}])
def test_ranges_of_a_search_are_checked(given, tmp_path):
    pytest.importorskip("optuna", reason="Optuna is not installed: pip install 'gateskip-compress[search]'")
    spec = read_spec(matrix_file(tmp_path, search={"ranges": {"prune": {"blocks": given}}}))
    with pytest.raises(g.PipelineError, match=r"search.ranges.prune.blocks = .* must be \[lowest, highest\] or"):
        search(spec, tmp_path / "out", "disk_share <= 0.5")


def test_values_of_a_matrix_can_be_set(tmp_path):
    spec = read_spec(matrix_file(tmp_path, timing=None), ["timing.runs=7", "budgets=[0.9]"])
    assert spec.timing is not None
    assert (spec.timing.runs, spec.budgets) == (7, [0.9])


@pytest.mark.slow
def test_killed_ten_times_it_gives_the_same(place, tmp_path):
    """The command itself, killed at ever later moments, then left alone; with two workers."""
    out = tmp_path / "out"
    flags = ["--workers", "2", "--out", str(out)]
    command = [sys.executable, "-m", "gateskip_compress.cli", "matrix", str(place / "matrix.yaml"), *flags]
    done, before = 0, _servers()
    for kill in range(10):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            process.wait(8 + 2 * kill)
            done += 1
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.communicate()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert done < 8  # else nothing was killed
    whole, broken = measured(place / "out"), measured(out)
    assert broken.keys() == whole.keys()
    for cell, row in whole.items():
        for key in ("status", "disk_bytes"):
            assert broken[cell].get(key) == row.get(key)
        if row["status"] == "done":  # this one ran on one thread, that one too
            assert broken[cell]["samples"] == row["samples"]
            assert broken[cell]["quality"] == row["quality"]
    time.sleep(5)
    assert _servers() <= before


def _servers():
    """Processes that start others; each ends with the run it belongs to."""
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in listed.splitlines() if "gateskip_compress.matrix.job" in line}


@pytest.mark.slow
def test_peak_memory_is_not_that_of_the_process_that_started_this_one():
    child = "import torch; from gateskip_compress.measure import peak_bytes; print(peak_bytes(torch.device('cpu')))"
    parent = f"import subprocess, sys; held = bytearray(2 * 10**9); subprocess.run([sys.executable, '-c', {child!r}])"
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True)
    assert 50e6 < int(done.stdout) < 1e9


@pytest.mark.slow
def test_two_nodes_of_a_ray_cluster_do_the_same(place, tmp_path):
    pytest.importorskip("ray", reason="ray is not installed: pip install 'gateskip-compress[ray]'")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ray's own
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        try:
            cluster.add_node(num_cpus=1)
            spec = read_spec(place / "matrix.yaml").model_copy(update={"timing": None})
            run_matrix(spec, tmp_path / "out", ray_address=cluster.address)
        finally:
            cluster.shutdown()
    assert measured(tmp_path / "out") == measured(place / "out")


@pytest.mark.slow
def test_a_search_finds_what_meets_the_goal_and_goes_on(tmp_path, call):
    pytest.importorskip("optuna", reason="Optuna is not installed: pip install 'gateskip-compress[search]'")
    ranges = {"prune": {"blocks": [1, 2]}, "quantize": {"bits": {"of": [4, 8]}, "group_size": {"of": [32]}}}
    ranges["quantize"]["bits_of"] = {"of": [{"embed": 8}]}
    path = matrix_file(tmp_path, search={"ranges": ranges}, timing=None)
    flags = ("--goal", "disk_share <= 0.4 and perplexity_ratio <= 1.5", "--out", tmp_path / "out", "--json")
    for trials in (3, 8):
        code, out, err = call("search", path, *flags, "--trials", trials)
        assert code == 0, err
        found = json.loads(out)
    assert found["goals"][0]["recommended"].startswith("trial ")
    report = run.report_matrix(tmp_path / "out")
    best = next(c for c in report["cells"] if c["id"] == report["goals"][0]["recommended"])
    assert best["values"]["disk_share"] <= 0.4
    assert best["values"]["cost_share"] == min(
        c["values"]["cost_share"] for c in report["cells"] if c["id"] in report["goals"][0]["met"]
    )
    assert yaml.safe_load((tmp_path / "out" / "recipes" / f"{best['id']}.yaml").read_text())["steps"] == best["steps"]
