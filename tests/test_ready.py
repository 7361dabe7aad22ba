"""Checkpoints that write without torch and transformers, and imports that wait."""

import ast
import hashlib
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import compress, tiny, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models

import gateskip_compress as g
from gateskip_compress import jobs, runtime
from gateskip_compress.manifest import MANIFEST
from gateskip_compress.runtime.blueprint import turns
from gateskip_compress.runtime.lowering import FAMILIES
from gateskip_compress.runtime.prompt import Printer, Words
from gateskip_compress.runtime.ready import generate_ready, is_for

CHAT = "{%- for m in messages %}w3 {{ m['content'] | trim }} w4{% endfor %}{% if add_generation_prompt %} w5{% endif %}"
STACKS = {
    "gates, codes, speculation": (  # drafts by no clock: what is drafted decides which random numbers are drawn
        g.GateSkip(budget=0.9, rank=4),
        g.Quantize(group_size=32),
        g.SelfSpeculation(0.6, 2, adapt=False),
    ),
    "gates for drafts": (
        g.GateSkip(budget=0.9, rank=4),
        g.SelfSpeculation(drafts="gates", gates=g.GateSkip(budget=0.6, surrogate="narrow")),
    ),
    "narrow, copied keys": (g.GateSkip(budget=0.6, surrogate="narrow", kv="copy"),),
    "pruned": (g.Prune(blocks=1),),
    "codes, head and embedding too": (g.Quantize(group_size=32, bits_of={"embed_tokens": 8}),),
}
HOW = {"new_tokens": 12, "budget": None, "speculate": False, "temperature": 0.0, "seed": 0}
HOW |= {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of tiny checkpoints, packed by a first run through transformers."""
    made = {}

    def of(stack, chat=None):
        if (stack, chat) not in made:
            folder, model = tmp_path_factory.mktemp("ready") / "model", compress(tiny(), *STACKS[stack])
            model.gateskip.tokenizer.chat_template = chat
            model.save_pretrained(folder)
            usual(folder)
            made[stack, chat] = folder
        return made[stack, chat]

    return of


def usual(folder, prompt="w5 w9", **how):
    """What the way through transformers says; packs where nothing is packed."""
    return jobs.generate(str(folder), prompt, **HOW | how, runtime="native", keep=True)[0]


def ready(folder, prompt="w5 w9", put=None, tell=lambda _: None, **how):
    return generate_ready(str(folder), prompt, **HOW | how, put=put, tell=tell)


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("chat", [None, CHAT])
def test_ready_checkpoints_write_what_others_write(saved, stack, chat):
    folder = saved(stack, chat)
    for prompt in ("w5 w9", "  w7 nowhere \n\n w8 "):
        found, _ = ready(folder, prompt)
        expected = usual(folder, prompt)
        assert (found["text"], found["token_ids"]) == (expected["text"], expected["token_ids"])
        assert len(found["token_ids"]) == 12


@pytest.mark.parametrize("stack", STACKS)
def test_ready_checkpoints_speculate_as_their_step_says(saved, stack):
    told = []
    found, counts = ready(saved(stack), speculate=True, new_tokens=40, tell=told.append)
    assert found["token_ids"] == usual(saved(stack), new_tokens=40)["token_ids"]
    assert found["plain_steps"] == counts.plain_steps
    assert counts.plain_steps + counts.verifies > 0
    assert len(told) == (stack in ("pruned", "codes, head and embedding too"))


@pytest.mark.parametrize(
    "limits",
    [
        {"temperature": 0.7},
        {"temperature": 1.0},
        {"temperature": 3.0},
        {"temperature": 2.0, "top_k": 9, "top_p": 0.8},
        {"temperature": 1.5, "min_p": 0.05},
    ],
)
@pytest.mark.parametrize("speculate", [False, True])
def test_ready_checkpoints_draw_what_torch_draws(saved, limits, speculate):
    folder = saved("gates, codes, speculation")
    how = {**limits, "new_tokens": 40, "speculate": speculate}
    drawn = [ready(folder, seed=seed, **how)[0]["token_ids"] for seed in (0, 7)]
    assert drawn == [usual(folder, seed=seed, **how)["token_ids"] for seed in (0, 7)]
    assert drawn[0] != drawn[1]


def test_ready_checkpoints_turn_their_dial(saved):
    folder = saved("narrow, copied keys")
    texts = {share: ready(folder, budget=share, new_tokens=40)[0]["token_ids"] for share in (0.6, 0.8, 1.0)}
    assert texts == {share: usual(folder, budget=share, new_tokens=40)["token_ids"] for share in texts}
    assert texts[0.6] != texts[1.0]
    with pytest.raises(ValueError, match=r"budget 0\.1 is below"):
        ready(folder, budget=0.1)


def test_ready_checkpoints_stop_at_an_end_token(saved, tmp_path):
    folder = copy_of(saved("pruned"), tmp_path)
    tokens = ready(folder)[0]["token_ids"]
    ends = {"eos_token_id": [95, tokens[3]]}
    change(folder, "generation_config.json", lambda text: json.dumps(json.loads(text) | ends))
    usual(folder)
    stopped = ready(folder)[0]["token_ids"]
    assert stopped == tokens[: tokens.index(tokens[3]) + 1] == usual(folder)["token_ids"]


def test_ready_checkpoints_stream_whole_words(saved):
    pieces = []
    found, _ = ready(saved("pruned"), put=pieces.append)
    assert "".join(pieces) == found["text"] + "\n"
    assert all(piece.endswith((" ", "\n")) or piece == found["text"].split()[-1] for piece in pieces)


def copy_of(folder, place):
    """A copy, without its packed file: that belongs to the folder as it was."""
    target = place / "model"
    target.mkdir()
    for file in folder.iterdir():
        target.joinpath(file.name).write_bytes(file.read_bytes())
    return target


def change(folder, name, how, honest=True):
    """Change a file, and its hash in the manifest."""
    file, manifest = folder / name, folder / MANIFEST
    file.write_text(how(file.read_text()))
    if honest:
        content = json.loads(manifest.read_text())
        content["files"][name] = hashlib.sha256(file.read_bytes()).hexdigest()
        manifest.write_text(json.dumps(content))


UNUSUAL = {
    "nothing packed": lambda folder: next(folder.glob("native.*")).unlink(),
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "processors": lambda folder: change(
        folder, "generation_config.json", lambda text: json.dumps(json.loads(text) | {"repetition_penalty": 1.2})
    ),
    "a step of a baseline": lambda folder: change(
        folder, MANIFEST, lambda text: text.replace('"prune"', '"random_skip"'), honest=False
    ),
    "a damaged tokenizer": lambda folder: change(folder, "tokenizer.json", lambda text: text + " ", honest=False),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
}


@pytest.mark.parametrize("how", UNUSUAL)
def test_what_is_unusual_is_left_to_transformers(saved, tmp_path, how):
    folder = copy_of(saved("pruned"), tmp_path)
    UNUSUAL[how](folder)
    assert ready(folder) is None


def test_a_tokenizer_that_transformers_reads_otherwise_is_left_to_it(saved, tmp_path):
    folder = copy_of(saved("pruned"), tmp_path)
    change(folder, "tokenizer.json", lambda text: text.replace('"w5"', '"w05"'))
    usual(folder)  # packs anew
    assert ready(folder) is not None
    template = folder / "chat_template.jinja"
    template.write_text("{{ strftime_now('%Y') }} {{ messages[0]['content'] }}")
    usual(folder)
    assert ready(folder) is None


def test_budgets_without_gates_and_empty_prompts_are_left_to_it(saved):
    assert ready(saved("pruned"), budget=0.5) is None
    assert ready(saved("pruned"), prompt="") is None
    assert ready(saved("pruned"), temperature=-1.0) is None
    assert ready(saved("pruned"), temperature=1.0, seed=-1) is None
    assert ready("no/such/folder") is None


def test_ready_is_for_the_cpu(monkeypatch):
    monkeypatch.setattr("gateskip_compress.runtime.ready.which", lambda _: None)
    assert is_for("auto", "auto")
    assert is_for("native", "auto")
    assert is_for("auto", "cpu")
    assert not is_for("torch", "auto")
    assert not is_for("auto", "cuda")
    monkeypatch.setattr("gateskip_compress.runtime.ready.which", lambda _: "/usr/bin/nvidia-smi")
    assert not is_for("auto", "auto")
    assert is_for("native", "auto")


def fresh(code, *arguments):
    """Run code in a process of its own; what it prints."""
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ready_checkpoints_need_neither_torch_nor_transformers(saved):
    code = """
import sys
from gateskip_compress.cli import main
sys.argv = ["gateskip", "generate", *sys.argv[1:]]
try:
    main()
finally:
    print("heavy:", *{"torch", "transformers", "matplotlib"} & sys.modules.keys())
"""
    folder = saved("gates, codes, speculation")
    how = ("--prompt", "w5 w9", "--new-tokens", "12", "--speculate", "--runtime", "native")
    text, heavy = fresh(code, folder, *how).split("\nheavy:")
    assert text == usual(folder)["text"]
    assert heavy.strip() == ""


@pytest.mark.parametrize("first", ["import gateskip_compress", "import transformers, transformers.quantizers.auto"])
def test_transformers_loads_our_checkpoints_whichever_is_imported_first(saved, first):
    code = f"""
{first}
import sys
early = "torch" in sys.modules
import gateskip_compress
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(early, len(model.gateskip.steps), gateskip_compress.evaluate.__name__)
"""
    early = "transformers" in first
    assert fresh(code, saved("gates, codes, speculation")).split() == [str(early), "3", "evaluate"]


@pytest.mark.parametrize("package", [g, runtime])
def test_names_that_come_late_are_those_that_type_checkers_see(package):
    tree = ast.parse(Path(package.__file__).read_text())
    seen = next(part for part in tree.body if isinstance(part, ast.If)).body
    for line in seen:
        (name,) = (alias.asname for alias in line.names)
        assert getattr(package, name) is getattr(import_module(f".{line.module}", package.__name__), name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing


@pytest.mark.parametrize("family", FAMILIES)
def test_rotary_positions_are_transformers_own(family):
    rotary = tiny(family, max_position_embeddings=4096).model.rotary_emb
    kinds = [] if hasattr(rotary, "inv_freq") else rotary.layer_types
    for kind in kinds or [None]:
        prefix = f"{kind}_" if kind else ""
        own = getattr(rotary, f"{prefix}inv_freq"), getattr(rotary, f"{prefix}attention_scaling")
        found = turns(own[0].numpy(), own[1], 4096)
        cos, sin = rotary(torch.zeros(1), torch.arange(4096)[None], *([kind] if kind else []))
        np.testing.assert_allclose(found[0], cos[0].numpy(), rtol=0, atol=1e-6)
        np.testing.assert_allclose(found[1], sin[0].numpy(), rtol=0, atol=1e-6)


def test_words_are_shown_when_they_are_whole():
    pieces, ids = [], tiny_tokenizer()("w5 w6 w7").input_ids
    words = Words(tiny_tokenizer().backend_tokenizer, None)
    printer = Printer(words, pieces.append)
    for token in ids:
        printer.add(token)
    assert pieces == ["w5 ", "w6 "]
    printer.end()
    assert pieces == ["w5 ", "w6 ", "w7", "\n"]


def test_characters_of_writing_without_spaces_are_shown_at_once():
    tokenizer = Tokenizer(models.BPE({"漢": 0, "字": 1, "\ufffd": 2, "a": 3}, []))
    tokenizer.decoder = decoders.Fuse()
    pieces = []
    printer = Printer(Words(tokenizer, None), pieces.append)
    for token in (0, 1, 2, 3):
        printer.add(token)
    assert pieces == ["漢", "字"]
    printer.end()
    assert pieces == ["漢", "字", "\ufffda", "\n"]
