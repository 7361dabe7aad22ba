import json

import pytest
import yaml
from tiny_models import compress, tiny, tiny_tokenizer

import gateskip_compress as g
from gateskip_compress import cli
from gateskip_compress.gating.turning import dial_of


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A plain model, a compressed one made from it, a text and a recipe."""
    place = tmp_path_factory.mktemp("cli")
    tiny().save_pretrained(place / "plain")
    tiny_tokenizer().save_pretrained(place / "plain")
    model = compress(tiny(), g.GateSkip(budget=0.9, rank=4), g.Quantize(group_size=32), g.SelfSpeculation(0.6, 2))
    model.gateskip.original["source"] = str(place / "plain")
    model.save_pretrained(place / "small")
    compress(tiny(), g.Prune(blocks=1)).save_pretrained(place / "pruned")
    (place / "text.txt").write_text(" ".join(f"w{3 + i * 7 % 90}" for i in range(400)))
    recipe = {
        "model": str(place / "plain"),
        "calibration": {"windows": 4, "window_tokens": 24},
        "evaluation": {"text": "text.txt", "window_tokens": 32, "most_tokens": 128},
        "bench": {"prompt_tokens": 8, "new_tokens": 4, "runs": 1},
        "steps": [{"prune": {"blocks": 1}}, {"gateskip": {"budget": 0.9, "rank": 4}}, {"quantize": {"group_size": 32}}],
    }
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return place


@pytest.fixture
def call(monkeypatch, capsys):
    """Run the command line here; returns exit code, stdout and stderr."""

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["gateskip", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return call


def test_generate_gives_the_same_with_and_without_speculation(call, place):
    results = []
    for flags in ([], ["--speculate"]):
        code, out, err = call("generate", place / "small", "--prompt", "w5 w9", "--new-tokens", 12, "--json", *flags)
        assert code == 0, err
        results.append(json.loads(out))
    assert results[0]["token_ids"] == results[1]["token_ids"]
    assert results[0]["accepted_share"] is None
    assert results[1]["drafted_tokens"] + results[1]["plain_steps"] > 0
    assert sum(results[1][f"{part}_time_share"] for part in ("draft", "verify", "plain")) == pytest.approx(1)


def test_generate_streams_the_same_with_and_without_speculation(call, place):
    command = ("generate", place / "small", "--prompt", "w5 w9", "--new-tokens", 12)
    plain = call(*command)[1]
    code, out, err = call(*command, "--speculate")
    assert code == 0
    assert out == plain != ""
    assert "plain steps" in err


@pytest.mark.parametrize("runtime", ["native", "torch"])
def test_a_model_without_gates_looks_passages_up(runtime, call, place):
    command = ("generate", place / "plain", "--prompt", "w5 w9 w5 w9", "--new-tokens", 12, "--runtime", runtime)
    plain = call(*command)[1]
    code, out, err = call(*command, "--speculate")
    assert code == 0
    assert out == plain != ""
    assert "no gates to draft with: passages of the text are looked up alone" in err


def test_generate_draws_by_a_seed(call, place):
    command = ("generate", place / "small", "--prompt", "w5 w9", "--temperature", 2, "--new-tokens", 8, "--json")
    texts = [json.loads(call(*command, "--seed", seed)[1])["token_ids"] for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_eval_compares_with_the_original(call, place):
    flags = ("--text", place / "text.txt", "--window-tokens", 40, "--json")
    code, out, err = call("eval", place / "small", *flags)
    assert code == 0, err
    found = json.loads(out)
    assert found["kl_nats"] > 0
    assert 0.85 < found["macs_share"] < 0.95
    assert found["perplexity_low"] <= found["perplexity"] <= found["perplexity_high"]
    _, out, _ = call("eval", place / "plain", *flags)
    plain = json.loads(out)
    assert plain["macs_share"] == 1
    assert plain["kl_nats"] is None


def test_calibrate_writes_a_checkpoint_for_another_text_and_budget(call, place, tmp_path):
    command = ("calibrate", place / "small", "--text", place / "text.txt", "--out", tmp_path / "mine", "--json")
    code, out, err = call(*command, "--window-tokens", 32, "--most-tokens", 128, "--budget", 0.8)
    assert code == 0, err
    found = json.loads(out)
    assert found["budget"] == 0.8
    assert found["tokens"] == 128
    model, tokenizer = g.load(str(tmp_path / "mine"))
    assert [setting.budget for setting in dial_of(model).table] == [row["budget"] for row in found["table"]]
    assert dial_of(model).budget == 0.8
    assert tokenizer("w5 w9").input_ids == tiny_tokenizer()("w5 w9").input_ids
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("kept")
    code, _, err = call(*command[:5], tmp_path / "notes")
    assert code == 2
    assert "is not a checkpoint of ours; choose another folder" in err
    code, _, err = call(*command, "--budget", 1.5)
    assert code == 2
    assert "budget 1.5 must be above 0 and at most 1" in err


def test_bench_keeps_its_samples(call, place):
    sizes = ("--prompt-tokens", 8, "--new-tokens", 4, "--runs", 2)
    code, out, err = call("bench", place / "small", "--text", place / "text.txt", *sizes, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert len(found["prefill_s"]) == len(found["decode_s"]) == 2
    assert found["peak_bytes"] > 0
    assert found["disk_bytes"] == (place / "small" / "model.safetensors").stat().st_size


def test_the_doctor_says_what_is_here(call):
    code, out, err = call("doctor", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["cores"] >= 1
    assert found["native"] == (found["reason"] is None)


def test_plan_writes_nothing(call, place):
    before = sorted(place.rglob("*"))
    code, out, err = call("plan", place / "recipe.yaml", "--json")
    assert code == 0, err
    assert len(json.loads(out)["steps"]) == 3
    assert sorted(place.rglob("*")) == before


def test_a_run_resumes_after_a_kill_and_reports(call, place, monkeypatch):
    monkeypatch.setenv("GATESKIP_CACHE", str(place / "cache"))
    with monkeypatch.context() as patch:
        patch.setattr("gateskip_compress.quantization.transform.Quantize.apply", _interrupt)
        code, _, err = call("run", place / "recipe.yaml", "--out", place / "run")
    assert code == 2
    assert "interrupted" in err
    assert not (place / "run" / "model").exists()
    kept = (place / "run" / "steps" / "2-gateskip" / "stage.json").stat().st_mtime_ns
    code, out, err = call("run", place / "recipe.yaml", "--out", place / "run")
    assert code == 0, err
    assert (place / "run" / "steps" / "2-gateskip" / "stage.json").stat().st_mtime_ns == kept
    report = json.loads((place / "run" / "report.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == ["original", "prune", "gateskip", "quantize"]
    assert report["stages"][-1]["macs_share"] < report["stages"][1]["macs_share"] < 1
    code, out, _ = call("inspect", place / "run" / "model", "--json")
    assert json.loads(out)["whole"]
    code, _, err = call("run", place / "recipe.yaml", "--out", place / "run", "--set", "seed=1")
    assert code == 2
    assert "another recipe" in err


def test_inspect_shows_where_gates_skip(call, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ("--text", place / "text.txt", "--budget", 0.8)
    code, out, err = call("inspect", place / "small", *flags, "--passage", 2, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found == json.loads((tmp_path / "insight.json").read_text(encoding="utf-8"))
    assert found["budget"] == 0.8
    assert 0.7 < found["macs_share"] < 0.9
    assert found["passage"]["number"] == 2
    assert "<!doctype html>" in (tmp_path / "insight.html").read_text(encoding="utf-8")
    code, out, err = call("inspect", place / "small", *flags, "--out", tmp_path / "new" / "page.html")
    assert code == 0, err
    assert "page.html" in out
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"page.html", "page.json"}
    code, out, _ = call("inspect", place / "small", "--json")
    assert json.loads(out)["whole"]


def test_prompts_longer_than_the_text_are_refused_before_anything_is_fitted(call, place, tmp_path):
    setting = "bench.prompt_tokens=129"
    code, _, err = call("run", place / "recipe.yaml", "--out", tmp_path / "new", "--set", setting)
    assert code == 2
    assert "bench.prompt_tokens 129: the evaluation text" in err
    assert "has 128 tokens; lower it, or raise evaluation.most_tokens" in err


def _interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "absent.yaml", "--out", "x"), "no recipe absent.yaml"),
        (("generate", "./absent", "--prompt", "a"), "no such folder"),
        (("generate", "{small}", "--prompt", "a", "--budget", "0"), "budget 0.0 must be above 0"),
        (("generate", "{small}", "--prompt", "a", "--budget", "1.5"), "budget 1.5 must be"),
        (("generate", "{small}", "--prompt", "a", "--temperature=-1"), "--temperature -1.0 must not be negative"),
        (("generate", "{small}", "--prompt", "a", "--temperature=1", "--top-k=-5"), "--top-k -5 must not be negative"),
        (("generate", "{small}", "--prompt", "a", "--temperature=1", "--top-p=0"), "--top-p 0.0 must be above 0"),
        (("generate", "{small}", "--prompt", "a", "--temperature=1", "--min-p=2"), "--min-p 2.0 must be from 0 to 1"),
        (("generate", "{small}", "--prompt", "a", "--top-p=0.9"), "give --temperature too"),
        (("generate", "{small}", "--prompt", "a", "--device", "cuda:9"), "device 'cuda:9': torch sees"),
        (("generate", "{small}", "--prompt", "a", "--runtime", "cuda"), "runtime 'cuda' must be one of auto, native"),
        (
            ("bench", "{small}", "--text", "{text}", "--prompt-tokens", "8", "--runtime", "native", "--unpack"),
            "--unpack is for torch",
        ),
        (("eval", "{small}", "--text", "absent.txt"), "no text file absent.txt"),
        (("eval", "{small}", "--text", "{text}", "--window-tokens", "1"), "window_tokens 1 must be at least 2"),
        (("inspect", "{plain}"), "not a checkpoint of ours"),
        (("inspect", "{small}", "--budget", "0.8"), "--budget 0.8 says how a text is looked into; give --text too"),
        (("inspect", "{small}", "--text", "absent.txt"), "no text file absent.txt"),
        (("inspect", "{plain}", "--text", "{text}"), "not a checkpoint of ours"),
        (("inspect", "{pruned}", "--text", "{text}"), "no gates"),
        (("inspect", "{small}", "--text", "{text}", "--passage", "3"), "passage 3 must be from 1 to 2"),
        (("inspect", "{small}", "--text", "{text}", "--passage", "0"), "passage 0 must be from 1 to 2"),
        (("inspect", "{small}", "--text", "{text}", "--budget", "0.01"), "budget 0.01 is below 0."),
        (("inspect", "{small}", "--text", "{text}", "--budget", "1"), "budget 1 runs every branch"),
        (("inspect", "{small}", "--text", "{text}", "--out", "{small}/page.html"), "is inside the checkpoint"),
        (("inspect", "{small}", "--text", "{text}", "--out", "page.txt"), "page.txt must end in .html"),
        (("report", "{plain}"), "not a finished run"),
        (("bench", "{small}"), "Missing option '--text'"),
        (("bench", "{small}", "--text", "{text}", "--runs", "0"), "--runs 0 must be at least 1"),
        (("bench", "{small}", "--text", "{text}"), "has 400 tokens, fewer than one window of 512"),
        (("plan", "{recipe}", "--set", "quantize.group_size=48"), "48 must be one of 32, 64, 128"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_mistakes_end_in_one_line_and_exit_code_2(arguments, message, call, place):
    names = {
        "small": place / "small",
        "pruned": place / "pruned",
        "plain": place / "plain",
        "text": place / "text.txt",
        "recipe": place / "recipe.yaml",
    }
    code, out, err = call(*(str(a).format(**names) for a in arguments))
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert out == ""
