import gzip
import json
import warnings

import pytest
import torch
import yaml
from tiny_models import DEVICE, compress, tiny, tiny_tokenizer, tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import gateskip_compress as g
from gateskip_compress.matrix.harness import hub_answers
from gateskip_compress.tasks import (
    TASKS,
    Item,
    accuracy_of,
    encode,
    go_on,
    log_likelihoods,
    read_items,
    score,
    work_out,
)

RECORDS = {
    "hellaswag": {
        "ind": 7,
        "context": "w3 w4 [step] w5 ",
        "endings": ["w6 [x] w7", "w8", "w9", "w10 w11"],
        "label": 3,
    },
    "piqa": {"goal": "w3", "sol1": "w4", "sol2": "w5 w6", "label": 1},
    "arc_easy": {"question": "w3", "choices": {"text": ["w4", "w5", "w6"], "label": ["1", "2", "3"]}, "answerKey": "2"},
    "openbookqa": {"question_stem": "w3", "choices": {"text": ["w4", "w5"], "label": ["A", "B"]}, "answerKey": "B"},
    "lambada": {"context": "w3 w4", "continuation": "w5"},
}
ITEMS = {
    "hellaswag": Item("w3 w4 w5", ("w6 w7", "w8", "w9", "w10 w11"), 3),
    "piqa": Item("Question: w3\nAnswer:", ("w4", "w5 w6"), 1),
    "arc_easy": Item("Question: w3\nAnswer:", ("w4", "w5", "w6"), 1),
    "openbookqa": Item("w3", ("w4", "w5"), 1),
    "lambada": Item("w3 w4", ("w5",), 0),
}


def write(folder, task, lines):
    name = TASKS[task][0]
    content = "".join(line + "\n" for line in lines).encode()
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)


@torch.no_grad()
def naive(model, context, choice):
    """One full pass without a cache, token by token."""
    ids = torch.cat((context, choice)).to(DEVICE)
    logits = model(ids[None], use_cache=False).logits[0].log_softmax(-1)
    return sum(float(logits[place - 1, ids[place]]) for place in range(len(context), len(ids)))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("gates", [False, True], ids=["ungated", "gated"])
def test_log_likelihoods_are_those_of_a_full_pass_for_each_choice(family, gates):
    model = compress(tiny(family), g.GateSkip(budget=0.6, rank=4)) if gates else tiny(family)
    for context, lengths in ((20, (1, 7, 4)), (1, (3, 2)), (30, (1, 1)), (5, (6,))):
        start = tokens(1, context, seed=context)[0]
        choices = [tokens(1, length, seed=length)[0] for length in lengths]
        expected = [naive(model, start, choice) for choice in choices]
        torch.testing.assert_close(
            log_likelihoods(model, start, choices), torch.tensor(expected, device=DEVICE), atol=2e-3, rtol=2e-4
        )


def test_choices_follow_their_context():
    context, choices = encode(tiny_tokenizer(), Item("w3 w4", ("w5", "w6 w7"), 0))
    assert context.tolist() == [3, 4]
    assert [choice.tolist() for choice in choices] == [[5], [6, 7]]


def test_accuracy_takes_the_likeliest_and_the_likeliest_per_character():
    model, tokenizer = tiny(), tiny_tokenizer()
    items, right, normalised = [], 0, 0
    for i in range(12):
        words = [f"w{int(t)}" for t in tokens(1, 9, seed=i)[0]]
        item = Item(" ".join(words[:3]), (words[3], " ".join(words[4:7]), " ".join(words[7:])), i % 3)
        context, choices = encode(tokenizer, item)
        found = [naive(model, context, choice) for choice in choices]
        each = [value / len(text) for value, text in zip(found, item.choices, strict=True)]
        right += found.index(max(found)) == item.label
        normalised += each.index(max(each)) == item.label
        items.append(item)
    answered = score(model, tokenizer, items)
    assert answered.items == 12
    assert answered.accuracy == pytest.approx(right / 12)
    assert answered.accuracy_normalised == pytest.approx(normalised / 12)
    assert answered.accuracy_low <= answered.accuracy <= answered.accuracy_high
    assert right != normalised  # so that the two are told apart


@pytest.mark.parametrize("task", RECORDS)
def test_a_line_is_an_item_with_lm_evals_prompt(task, tmp_path):
    write(tmp_path, task, [json.dumps(RECORDS[task])])
    assert read_items(tmp_path, task, 5) == [ITEMS[task]]


def test_items_are_taken_at_even_steps(tmp_path):
    write(tmp_path, "piqa", [json.dumps({**RECORDS["piqa"], "goal": f"w{i}"}) for i in range(10)])
    assert [item.context for item in read_items(tmp_path, "piqa", 4)] == [
        f"Question: w{i}\nAnswer:" for i in (0, 2, 5, 7)
    ]
    assert len(read_items(tmp_path, "piqa", 99)) == 10


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"goal": "w3"}'], "piqa_val.jsonl is no file of piqa: KeyError 'sol1'"),
        (["not json"], "is no file of piqa: JSONDecodeError"),
        ([json.dumps({**RECORDS["piqa"], "label": 2})], "label 2 of .* is none of 2 choices"),
        ([], "holds no items"),
        (None, "no file .*piqa_val.jsonl for task piqa"),
    ],
    ids=["field", "json", "label", "empty", "missing"],
)
def test_bad_files_are_named(lines, message, tmp_path):
    if lines is not None:
        write(tmp_path, "piqa", lines)
    with pytest.raises(g.CalibrationError, match=message):
        read_items(tmp_path, "piqa", 5)


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="task 'boolq' must be one of hellaswag, piqa"):
        read_items(tmp_path, "boolq", 5)
    with pytest.raises(ValueError, match="items 0 must be at least 1"):
        read_items(tmp_path, "piqa", 0)
    with pytest.raises(ValueError, match=r"choices of \[2, 0\]"):
        log_likelihoods(tiny(), tokens(1, 3)[0], [tokens(1, 2)[0], tokens(1, 0)[0]])


def test_lambada_is_right_where_greedy_decoding_gives_the_continuation():
    model, tokenizer = tiny(), tiny_tokenizer()
    ids = tokens(1, 6)
    greedy = model.generate(ids, do_sample=False, max_new_tokens=3, pad_token_id=0)[0, 6:].tolist()
    context = " ".join(f"w{t}" for t in ids[0].tolist())
    assert go_on(model, tokenizer, Item(context, (" ".join(f"w{t}" for t in greedy),), 0)) == (True, True)
    wrong = [*greedy[:2], greedy[2] % 90 + 3]
    assert go_on(model, tokenizer, Item(context, (" ".join(f"w{t}" for t in wrong),), 0)) == (False, False)


def test_gsm8k_shows_five_other_questions_and_reads_the_last_number(tmp_path):
    lines = [json.dumps({"question": f"w{i}", "answer": f"because\n#### 1,0{i}0"}) for i in range(7)]
    write(tmp_path, "gsm8k", lines)
    first, second = read_items(tmp_path, "gsm8k", 9)
    assert (first.choices, second.choices) == (("1000",), ("1010",))
    assert second.context.count("Answer: because\n#### 1,0") == 5
    assert second.context.endswith("#### 1,060\n\nQuestion: w1\nAnswer:")
    words = ["<pad>", "<s>", "<unk>", *map(str, range(3, 96))]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")),
        pad_token="<pad>",
        unk_token="<unk>",
    )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model = tiny(vocab_size=96)
    ids = tokenizer("5 9 11", return_tensors="pt").input_ids.to(DEVICE)
    out = model.generate(ids, do_sample=False, max_new_tokens=256, pad_token_id=0)[0, 3:].tolist()
    last = [str(t) for t in out if t > 2][-1]
    answers = [work_out(model, tokenizer, Item("5 9 11", (answer,), 0)) for answer in (last, last + "0")]
    assert answers == [(False, True), (False, False)]  # no #### was written
    assert accuracy_of(answers).accuracy_normalised == 0.5


@pytest.mark.slow
def test_lm_eval_answers_the_same_item_by_item(tmp_path):
    """Its own scoring of the same prompts, on a task that reads a local file."""
    tasks = pytest.importorskip("lm_eval.tasks", reason="lm-eval is not installed: pip install lm-eval")
    words = [[f"w{int(t)}" for t in tokens(1, 12, seed=i)[0]] for i in range(12)]
    records = [
        {"goal": " ".join(w[:4]), "sol1": " ".join(w[4 : 6 + i % 4]), "sol2": " ".join(w[10:]), "label": i % 2}
        for i, w in enumerate(words)
    ]
    write(tmp_path, "piqa", map(json.dumps, records))
    mine = {
        "task": "own_piqa",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(tmp_path / "piqa_val.jsonl")}},
        "output_type": "multiple_choice",
        "validation_split": "validation",
        "doc_to_text": "Question: {{goal}}\nAnswer:",
        "doc_to_target": "label",
        "doc_to_choice": "{{[sol1, sol2]}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    (tmp_path / "own_piqa.yaml").write_text(yaml.safe_dump(mine))
    model, tokenizer = tiny(), tiny_tokenizer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lm-eval's own
        manager = tasks.TaskManager(include_path=str(tmp_path))
        found = hub_answers(model, tokenizer, ["own_piqa"], 12, task_manager=manager)
    ours = [TASKS["piqa"].answer(model, tokenizer, item) for item in read_items(tmp_path, "piqa", 12)]
    assert found == {"own_piqa": ours}
    assert len(set(ours)) > 2  # so that the two scores are told apart
