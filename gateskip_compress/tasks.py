r"""Zero-shot multiple choice: which of a few continuations a model finds likeliest. Files are the user's; we ship none.

    task         file                     context                          choices
    hellaswag    hellaswag_val.jsonl.gz   context                          endings
    piqa         piqa_val.jsonl           Question: {goal}\nAnswer:         sol1, sol2
    arc_easy     arc_easy_val.jsonl       Question: {question}\nAnswer:     choices
    openbookqa   openbookqa_val.jsonl     question_stem                    choices

A choice's log-likelihood is log p(" " + choice | context), summed over its tokens; `accuracy` takes the highest,
`accuracy_normalised` the highest per character. These are the prompts, `acc` and `acc_norm` of lm-eval, but for this:
HellaSwag's context comes whole here, so its last part is not capitalised; and of a file we take items at even steps,
since HellaSwag is sorted by source, where lm-eval's limit takes the first ones.
"""

import gzip
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from .errors import CalibrationError
from .evaluate import bootstrap_interval
from .names import check_choice
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
    name, item_of = TASKS[task]
    path = Path(folder) / name
    if not path.is_file():
        raise CalibrationError(f"no file {path} for task {task}")
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
        records = [json.loads(line) for line in text.splitlines() if line.strip()]
        chosen = [records[i * len(records) // most] for i in range(most)] if most < len(records) else records
        items = [item_of(record) for record in chosen]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
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
    """Answer items with a model at the budget it is set to.

    Args:
        model: Any causal model, gated or not.
        tokenizer: Its own; it adds the special tokens that it adds to plain text.
        items: From `read_items`; one at least.
        track: As in `Context`.
    """
    right: dict[str, list[float]] = {"": [], "_normalised": []}
    for item in track(items, "answer questions"):
        found = log_likelihoods(model, *encode(tokenizer, item))
        per_character = found / torch.tensor([max(1, len(choice)) for choice in item.choices], device=found.device)
        right[""].append(float(found.argmax() == item.label))
        right["_normalised"].append(float(per_character.argmax() == item.label))
    shares: dict[str, float] = {}
    for which, answers in right.items():
        low, high = bootstrap_interval(torch.tensor(answers), torch.ones(len(answers), dtype=torch.long))
        shares[f"accuracy{which}"] = sum(answers) / len(answers)
        shares |= {f"accuracy{which}_low": low, f"accuracy{which}_high": high}
    return Accuracy(items=len(items), **shares)


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


TASKS: dict[str, tuple[str, Callable[[dict[str, Any]], Item]]] = {
    "hellaswag": ("hellaswag_val.jsonl.gz", _hellaswag),
    "piqa": ("piqa_val.jsonl", _piqa),
    "arc_easy": ("arc_easy_val.jsonl", _arc),
    "openbookqa": ("openbookqa_val.jsonl", _openbookqa),
}
"""Name -> file, and how a line of it is read."""
