"""The scripts of benchmarks/ that time the native runtime run, on a tiny checkpoint; what they time says nothing."""

import json
import subprocess
import sys
from math import isfinite
from pathlib import Path

import numpy as np
import pytest
from tiny_models import compress_further, tiny, tiny_tokenizer

import gateskip_compress as g
from gateskip_compress.pipeline import start

pytest.importorskip("gateskip_compress.runtime._native", reason="the extension is not built")
SCRIPTS = Path(__file__).parents[1] / "benchmarks"
KINDS = ["writing", "translation", "summarization", "qa", "math_reasoning", "rag"]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A folder of a checkpoint, a text and prompts."""
    folder, rng = tmp_path_factory.mktemp("benchmarks"), np.random.default_rng(0)
    stack = g.GateSkip(budget=0.8, rank=4), g.Quantize(group_size=64), g.SelfSpeculation(0.6, 2)
    model = tiny()
    for part in (model, tiny_tokenizer()):
        part.save_pretrained(folder / "original")
    start(model, tiny_tokenizer(), source=str(folder / "original"))
    compress_further(model, *stack).save_pretrained(folder / "model")

    def words(count):
        return " ".join(f"w{i}" for i in rng.integers(3, 96, count))

    (folder / "text.txt").write_text(words(3000))
    (folder / "none.gguf").touch()  # so that peers are missing, where there are any
    lines = [{"question_id": i, "category": kind, "turns": [words(20)]} for i, kind in enumerate(2 * KINDS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize(
    ("script", "how", "rates"),
    [
        ("prefill", "--text text.txt --tokens 64 --native --runs 2", ["tokens_per_s"]),
        ("skipping", "--text text.txt --prompts 8 --steps 4 --saved 0.1 --runs 2", ["tokens_per_s"]),
        ("sampling", "--prompts-file prompts.jsonl --prompts 1 --new-tokens 6", ["tokens_per_s"]),
        ("speculation", "--prompts-file prompts.jsonl --prompts 1 --new-tokens 6 --theory-prompts 1", ["tokens_per_s"]),
        (
            "decode",
            "--text text.txt --gguf none.gguf --prompts 12 --new-tokens 4 --runs 2 --dtype float32",
            ["prefill_tokens_per_s", "decode_tokens_per_s"],
        ),
    ],
)
def test_scripts_run_and_write_rows(given, script, how, rates):
    out = given / f"{script}.jsonl"
    command = [sys.executable, SCRIPTS / f"{script}.py", "model", *how.split(), "--out", out]
    ran = subprocess.run(command, cwd=given, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    found = [row[rate] for row in rows for rate in rates if rate in row]  # but of theory, and of what is missing
    assert found
    assert all(isfinite(rate) and rate > 0 for rate in found)
