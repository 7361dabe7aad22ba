r"""Questions with known answers, zero-shot but for GSM8K. Files are the user's; we ship none.

    task         file                     context                          choices
    hellaswag    hellaswag_val.jsonl.gz   context                          endings
    piqa         piqa_val.jsonl           Question: {goal}\nAnswer:         sol1, sol2
    arc_easy     arc_easy_val.jsonl       Question: {question}\nAnswer:     choices
    openbookqa   openbookqa_val.jsonl     question_stem                    choices
    lambada      lambada_openai.jsonl     context                          continuation
    gsm8k        gsm8k_test.jsonl         five worked questions, then      the number after ####
                                          Question: {question}\nAnswer:

A choice's log-likelihood is log p(" " + choice | context), summed over its tokens; `accuracy` takes the highest,
`accuracy_normalised` the highest per character. LAMBADA is right where the continuation is what greedy decoding gives.
For GSM8K the model writes up to 256 tokens; `accuracy` reads the number after ####, `accuracy_normalised` the last
number. These are the prompts and scores of lm-eval, but for this: HellaSwag's context comes whole here, so its last
part is not capitalised; GSM8K's five examples are the last of the same file, and left out of the score; and of a file
we take items at even steps, since HellaSwag is sorted by source, where lm-eval's limit takes the first ones.
"""

import gzip
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList

from .errors import CalibrationError
from .names import check_choice
from .quality import bootstrap_interval
from .track import untracked


@dataclass(frozen=True)
class Item:
    """A question: its context, what may follow, and the index of what should."""

    context: str
    choices: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class Accuracy:
    """Shares of items answered rightly, each with its 95 % interval by resampling the items."""

    items: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    accuracy_normalised: float
    accuracy_normalised_low: float
    accuracy_normalised_high: float


def read_items(folder: Path, task: str, most: int) -> list[Item]:
    """Up to `most` items of a task, at even steps through its file.

    Raises:
        CalibrationError: the file is missing, or a line of it is no such item.
        ValueError: `task` is unknown, or `most` below 1.
    """
    check_choice("task", task, TASKS)
    if most < 1:
        raise ValueError(f"items {most} must be at least 1")
    kind = TASKS[task]
    path = Path(folder) / kind.file
    if not path.is_file():
        raise CalibrationError(f"no file {path} for task {task}")
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
        records = [json.loads(line) for line in text.splitlines() if line.strip()]
        split = max(0, len(records) - kind.shots)
        records, examples = records[:split], records[split:]
        chosen = [records[i * len(records) // most] for i in range(most)] if most < len(records) else records
        items = [kind.item_of(record) for record in chosen]
        worked = "".join(f"Question: {e['question']}\nAnswer: {e['answer']}\n\n" for e in examples)
        items = [replace(item, context=worked + item.context) for item in items]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, LookupError, TypeError, ValueError) as error:
        raise CalibrationError(f"{path} is no file of {task}: {type(error).__name__} {error}") from error
    if not items:
        raise CalibrationError(f"{path} holds no items")
    for item in items:
        if not 0 <= item.label < len(item.choices):
            raise CalibrationError(
                f"{path}: label {item.label} of {item.context!r} is none of {len(item.choices)} choices"
            )
    return items


def score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], track: Any = untracked
) -> Accuracy:
    """Answer multiple-choice items with a model at the budget it is set to.

    Args:
        model: Any causal model, gated or not.
        tokenizer: Its own; it adds the special tokens that it adds to plain text.
        items: From `read_items`; one at least.
        track: As in `Context`.
    """
    return accuracy_of([choose(model, tokenizer, item) for item in track(items, "answer questions")])


def accuracy_of(answers: Sequence["Answer"]) -> Accuracy:
    """Shares of answers that were right."""
    shares: dict[str, float] = {}
    for which, right in zip(("", "_normalised"), zip(*answers, strict=True), strict=True):
        low, high = bootstrap_interval(torch.tensor(right).double(), torch.ones(len(right), dtype=torch.long))
        shares[f"accuracy{which}"] = sum(right) / len(right)
        shares |= {f"accuracy{which}_low": low, f"accuracy{which}_high": high}
    return Accuracy(items=len(answers), **shares)


Answer = tuple[bool, bool]
"""Whether an item was answered rightly, plainly and normalised."""


def choose(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, item: Item) -> Answer:
    """Whether the right choice is the likeliest, and whether it is the likeliest per character."""
    found = log_likelihoods(model, *encode(tokenizer, item))
    per_character = found / torch.tensor([max(1, len(choice)) for choice in item.choices], device=found.device)
    return int(found.argmax()) == item.label, int(per_character.argmax()) == item.label


@torch.inference_mode()
def go_on(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, item: Item) -> Answer:
    """Whether greedy decoding gives the only choice, token for token."""
    context, (choice,) = encode(tokenizer, item)
    ids = torch.cat((context, choice[:-1]))[None].to(model.device)
    logits = model(ids, use_cache=False, logits_to_keep=len(choice)).logits[0]
    right = bool((logits.argmax(-1).cpu() == choice).all())
    return right, right


def work_out(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, item: Item) -> Answer:
    """Whether the number after #### in what the model writes is right, and whether its last number is."""
    ids = tokenizer(item.context, return_tensors="pt").input_ids.to(model.device)

    def asks(written: Tensor, _: Any) -> Tensor:
        """Whether the model has gone on to a question of its own."""
        last = tokenizer.decode(written[0, ids.shape[1] :][-8:], skip_special_tokens=True)
        return torch.tensor([_NEXT in last], device=written.device)

    stop: dict[str, Any] = {"stopping_criteria": StoppingCriteriaList([asks]), "max_new_tokens": _WRITTEN_TOKENS}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **stop)
    text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).split(_NEXT)[0]
    marked, last = re.findall(r"#### (-?[0-9.,]+)", text)[:1], re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", text)[-1:]
    (right,) = item.choices
    return [_figure(found) for found in marked] == [right], [_figure(found) for found in last] == [right]


_WRITTEN_TOKENS = 256
_NEXT = "Question:"


def _figure(text: str) -> str:
    """A number without what may be written into it."""
    return re.sub(r"[,$]|\.$", "", text)


def encode(tokenizer: PreTrainedTokenizerBase, item: Item) -> tuple[Int[Tensor, " t"], list[Int[Tensor, " _"]]]:
    """Ids of the context, and of each choice as it follows the context: what the two together add to the context's."""
    context = tokenizer(item.context).input_ids
    whole = [tokenizer(f"{item.context} {choice}").input_ids for choice in item.choices]
    return torch.tensor(context), [torch.tensor(ids[len(context) :]) for ids in whole]


@torch.inference_mode()
def log_likelihoods(
    model: PreTrainedModel, context: Int[Tensor, " t"], choices: Sequence[Int[Tensor, " _"]]
) -> Float[Tensor, " c"]:
    """Of each choice, log p(choice | context) in nats.

    The context runs once and its keys and values serve all choices, which run side by side, padded on the right: causal
    attention lets no token see the padding after it. Gates decide token by token, so the numbers are those of a full
    pass for each choice.

    Raises:
        ValueError: the context or a choice has no tokens.
    """
    lengths = torch.tensor([len(choice) for choice in choices])
    if len(context) == 0 or lengths.min() == 0:
        raise ValueError(
            f"a context of {len(context)} tokens and choices of {lengths.tolist()}: each needs one at least"
        )
    ids = torch.nn.utils.rnn.pad_sequence(list(choices), batch_first=True).to(model.device)
    cache = DynamicCache(config=model.config)
    first = model(context[None].to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    logits = first.expand(len(ids), -1, -1)  # predicts the first token of every choice
    if ids.shape[1] > 1:
        cache.batch_repeat_interleave(len(ids))
        rest = model(ids[:, :-1], past_key_values=cache, use_cache=True).logits
        logits = torch.cat((logits, rest), dim=1)
    each = logits.float().log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    real = torch.arange(ids.shape[1], device=model.device) < lengths.to(model.device)[:, None]
    return torch.where(real, each, 0).sum(1)


def _hellaswag(record: dict[str, Any]) -> Item:
    return Item(_plain(record["context"]), tuple(map(_plain, record["endings"])), int(record["label"]))


def _plain(text: str) -> str:
    """Without the marks that its source, WikiHow, left in brackets."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _piqa(record: dict[str, Any]) -> Item:
    return Item(f"Question: {record['goal']}\nAnswer:", (record["sol1"], record["sol2"]), int(record["label"]))


def _arc(record: dict[str, Any]) -> Item:
    return _lettered(f"Question: {record['question']}\nAnswer:", record)


def _openbookqa(record: dict[str, Any]) -> Item:
    return _lettered(record["question_stem"], record)


def _lettered(context: str, record: dict[str, Any]) -> Item:
    choices = record["choices"]
    return Item(context, tuple(choices["text"]), choices["label"].index(record["answerKey"]))


def _lambada(record: dict[str, Any]) -> Item:
    return Item(record["context"], (record["continuation"],), 0)


def _gsm8k(record: dict[str, Any]) -> Item:
    return Item(f"Question: {record['question']}\nAnswer:", (_figure(record["answer"].split("#### ")[1]),), 0)


class Task(NamedTuple):
    """Where a task's items are, how a line is read, how an item is answered, how many worked examples come first."""

    file: str
    item_of: Callable[[dict[str, Any]], Item]
    answer: Callable[[PreTrainedModel, PreTrainedTokenizerBase, Item], Answer] = choose
    shots: int = 0


TASKS: dict[str, Task] = {
    "hellaswag": Task("hellaswag_val.jsonl.gz", _hellaswag),
    "piqa": Task("piqa_val.jsonl", _piqa),
    "arc_easy": Task("arc_easy_val.jsonl", _arc),
    "openbookqa": Task("openbookqa_val.jsonl", _openbookqa),
    "lambada": Task("lambada_openai.jsonl", _lambada, go_on),
    "gsm8k": Task("gsm8k_test.jsonl", _gsm8k, work_out, shots=5),
}
