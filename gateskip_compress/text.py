"""Text as token ids: from a file, from a Hugging Face dataset, or written by the model itself.

Models are fitted on `windows` and trained on `packed`, documents end to end, and measured on `passages`: a chat by
itself, where only the answers are scored. (End to end, a chat template's fixed opening comes back every hundred tokens.
A model recalls it almost for free, and what a perplexity then shows is mostly how well it recalls it.) Where the
tokenizer begins every text with a token, windows cut out of the middle begin with it too: models taught so are lost
without it.

A file is .txt (one long text), .json or .jsonl (records). A record is read by its keys, first match wins:

    messages                                            a chat
    instruction, input, output                          a chat of one question and its answer
    prompt, response | question, answer                 the same
    text                                                plain text

Chats go through the tokenizer's chat template; without one, question and answer are joined by an empty line.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .errors import CalibrationError
from .folders import write_whole
from .track import untracked

SELF = "self"
_PAIRS = (("instruction", "output"), ("prompt", "response"), ("question", "answer"))
_MARK = "\u2063user text\u2063"


@dataclass(frozen=True)
class Passage:
    """A sequence of its own, and which of its tokens a model is judged by.

    Args:
        ids: Token ids.
        scored: Tokens whose prediction counts; never the first.
        opening: What the tokenizer begins every text with, and so what each window of it is to begin with.
    """

    ids: Int[Tensor, " t"]
    scored: Bool[Tensor, " t"]
    opening: int | None = None

    @classmethod
    def whole(cls, ids: Int[Tensor, " t"], opening: int | None = None) -> "Passage":
        """All tokens but the first scored."""
        return cls(ids, torch.arange(len(ids), device=ids.device) > 0, opening)

    def split(self, window_tokens: int) -> Iterator["Passage"]:
        """In windows, the last one as long as it comes."""
        begin = 0
        while begin < len(self.ids):
            opens = self.opening is not None and window_tokens > 1 and int(self.ids[begin]) != self.opening
            end = begin + window_tokens - opens
            ids = F.pad(self.ids[begin:end], (int(opens), 0), value=self.opening or 0)
            scored = F.pad(self.scored[begin:end], (int(opens), 0), value=False)
            yield Passage(ids, scored & (torch.arange(len(ids)) > 0), self.opening)
            begin = end


def documents(source: str | Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[Passage]:
    """Each document of a file or of a dataset; of a chat, the assistant's turns are scored.

    Args:
        source: Path of a file, or `hf:NAME[:CONFIG]:SPLIT` for a dataset.
        tokenizer: Its chat template is used where it has one.

    Raises:
        CalibrationError: no such file, or nothing in it that we can read.
    """
    bos = tokenizer.bos_token_id
    opening = bos if bos is not None and tokenizer("").input_ids[:1] == [bos] else None
    for record in _records(source):
        chat = _chat(record)
        if chat is not None:
            yield replace(_chat_passage(chat, tokenizer), opening=opening)
        elif isinstance(record.get("text"), str):
            ids = torch.tensor(tokenizer(record["text"], verbose=False).input_ids, dtype=torch.long)
            yield Passage.whole(ids, opening)
        else:
            raise CalibrationError(
                f"{source}: a record with keys {', '.join(record)} has no text, messages or question"
            )


def passages(
    source: str | Path, tokenizer: PreTrainedTokenizerBase, window_tokens: int, most_tokens: int
) -> list[Passage]:
    """What models are measured on: document by document, long ones in windows.

    Args:
        source: As in `documents`.
        tokenizer: As in `documents`.
        window_tokens: The longest passage.
        most_tokens: Stop after so many tokens, scored or not.

    Raises:
        CalibrationError: nothing is left to score.
        ValueError: a window of less than 2 tokens.
    """
    return cut(documents(source, tokenizer), window_tokens, most_tokens, str(source))


def cut(found: Iterable[Passage], window_tokens: int, most_tokens: int, source: str = "the text") -> list[Passage]:
    """Documents, long ones in windows, up to a number of tokens; see `passages`."""
    if window_tokens < 2:
        raise ValueError(f"window_tokens {window_tokens} must be at least 2: a passage's first token is not scored")
    kept: list[Passage] = []
    tokens = 0
    for document in found:
        for passage in document.split(window_tokens):
            if tokens + len(passage.ids) > most_tokens:
                return _some(kept, source, most_tokens)
            if passage.scored.any():
                kept.append(passage)
                tokens += len(passage.ids)
    return _some(kept, source, most_tokens)


def _some(found: list[Passage], source: object, most_tokens: int) -> list[Passage]:
    if not found:
        raise CalibrationError(f"{source} has nothing to score within {most_tokens} tokens")
    return found


def windows(
    source: str | Path, tokenizer: PreTrainedTokenizerBase, window_tokens: int, most_tokens: int
) -> Int[Tensor, "n t"]:
    """Documents end to end, cut into whole windows.

    Raises:
        CalibrationError: the text is shorter than one window.
    """
    return windowed(documents(source, tokenizer), window_tokens, most_tokens, str(source))


def windowed(
    found: Iterable[Passage], window_tokens: int, most_tokens: int, source: str = "the text"
) -> Int[Tensor, "n t"]:
    """Passages end to end, cut into whole windows; see `windows`."""
    taken: list[Passage] = []
    tokens = 0
    for passage in found:
        taken.append(passage)
        tokens += len(passage.ids)
        if tokens >= most_tokens:
            break
    return torch.stack([window.ids for window in _whole_windows(taken, window_tokens, most_tokens, source)])


def packed(
    sources: Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    window_tokens: int,
    most_tokens: int,
    *,
    prompts: bool = False,
    seed: int = 0,
) -> list[Passage]:
    """What models are trained on: documents of all sources in seeded order, end to end, cut into whole windows.

    Args:
        sources: Each as in `documents`.
        tokenizer: As in `documents`.
        window_tokens: Length of every passage.
        most_tokens: Of all passages together.
        prompts: Score the user's turns too, not the answers alone.
        seed: Of the order.

    Raises:
        CalibrationError: the text is shorter than one window, or nothing in it is scored.
    """
    found = [document for source in sources for document in documents(source, tokenizer)]
    return joined(found, window_tokens, most_tokens, prompts=prompts, seed=seed, source=", ".join(map(str, sources)))


def joined(
    found: Sequence[Passage],
    window_tokens: int,
    most_tokens: int,
    *,
    prompts: bool = False,
    seed: int = 0,
    source: str = "the text",
) -> list[Passage]:
    """Documents in seeded order, end to end, cut into whole windows; see `packed`."""
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
    windows = _whole_windows([found[i] for i in order], window_tokens, most_tokens, source)
    if prompts:
        windows = [Passage.whole(window.ids, window.opening) for window in windows]
    return _some([window for window in windows if window.scored.any()], source, most_tokens)


def _whole_windows(found: Sequence[Passage], window_tokens: int, most_tokens: int, source: str) -> list[Passage]:
    """Of passages end to end."""
    ids = torch.cat([passage.ids for passage in found]) if found else torch.empty(0, dtype=torch.long)
    scored = torch.cat([passage.scored for passage in found]) if found else torch.empty(0, dtype=torch.bool)
    most = min(len(ids), most_tokens) // window_tokens
    if most == 0:
        raise CalibrationError(f"{source} has {len(ids)} tokens, fewer than one window of {window_tokens}")
    stream = Passage(ids, scored, found[0].opening)
    whole = (window for window in stream.split(window_tokens) if len(window.ids) == window_tokens)
    return list(islice(whole, most_tokens // window_tokens))


def self_written(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int = 64,
    window_tokens: int = 256,
    seed: int = 0,
    cache: Path | None = None,
    track: Any = untracked,
) -> Int[Tensor, "n t"]:
    """Text that the model writes itself, sampled at temperature 1, all windows in one batch.

    A chat model starts in the user's place of its chat template and writes both sides; another starts at its first
    token. End tokens do not stop it, so that windows are whole.

    Args:
        model: As it stands; the windows are of its own distribution.
        tokenizer: With or without a chat template.
        count: Windows, which run as one batch.
        window_tokens: Tokens in each.
        seed: Of the sampling; the global generator is left as it was.
        cache: Folder that keeps the text, by model, sizes and seed; None keeps nothing.
        track: As in `Context`.
    """
    path = None
    if cache is not None:
        path = cache / f"self-{fingerprint(model)}-{count}x{window_tokens}-{seed}.json"
        if path.is_file():
            return torch.tensor(json.loads(path.read_text()))
    start = _first_ids(model, tokenizer)
    ids = torch.tensor([start], device=model.device).expand(count, -1)
    generator = torch.Generator().manual_seed(seed)
    output = None
    written = [ids.cpu()]
    with torch.inference_mode():
        for _ in track(range(window_tokens - len(start)), "write calibration text"):
            past = None if output is None else output.past_key_values
            output = model(ids, past_key_values=past, use_cache=True, logits_to_keep=1)
            ids = drawn(output.logits[:, -1].float().softmax(-1).cpu(), generator).to(model.device)
            written.append(ids.cpu())
    result = torch.cat(written, dim=1)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(result.tolist()))
    return result


def drawn(probability: Float[Tensor, "n v"], generator: torch.Generator | None = None) -> Int[Tensor, "n 1"]:
    """A token for each row; far faster than `multinomial`, which takes as long as a third of the model."""
    below = probability.cumsum(-1)
    at = torch.rand(len(below), 1, generator=generator) * below[:, -1:]
    return torch.searchsorted(below, at, right=True).clamp_(max=below.shape[-1] - 1)


def chat_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> Int[Tensor, "1 t"]:
    """Ids of a prompt, in the chat template where there is one."""
    if not tokenizer.chat_template:
        return tokenizer(prompt, return_tensors="pt").input_ids
    chat = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids


def _first_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What self-written text starts from."""
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": _MARK}]
        opening = tokenizer.apply_chat_template(chat, tokenize=False).split(_MARK)[0]
        return list(tokenizer(opening, add_special_tokens=False).input_ids)
    config: GenerationConfig = model.generation_config
    first = config.bos_token_id if config.bos_token_id is not None else tokenizer.bos_token_id
    if first is None:
        raise CalibrationError("the tokenizer has neither a chat template nor a first token: give a calibration file")
    return [first]  # pyright: ignore[reportReturnType]


def fingerprint(model: PreTrainedModel) -> str:
    """Of the config and of a sample of every tensor: two models that differ do not share their text."""
    digest = hashlib.sha256(model.config.to_json_string(use_diff=False).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {float(tensor.flatten()[:4096].float().sum()):.6e}".encode())
    return digest.hexdigest()[:16]


def _records(source: str | Path) -> Iterable[dict[str, Any]]:
    if str(source).startswith("hf:"):
        try:
            from datasets import load_dataset  # heavy, and seldom needed
        except ImportError as error:
            raise CalibrationError(f"{source} needs the package datasets: pip install datasets") from error

        *name, split = str(source)[3:].split(":")
        return load_dataset(*name, split=split, streaming=True)
    path = Path(source)
    if not path.is_file():
        raise CalibrationError(f"no text file {path}; give a .txt, .json or .jsonl file, hf:NAME:SPLIT, or {SELF!r}")
    try:
        content = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            return json.loads(content)
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in content.splitlines() if line.strip()]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path} cannot be read: {error}") from error
    return [{"text": content}]


def _chat_passage(chat: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> Passage:
    """A chat in the tokenizer's template, the assistant's turns scored."""
    if not tokenizer.chat_template:
        parts = [(turn["content"] + "\n\n", turn["role"] == "assistant") for turn in chat]
    else:
        parts, before = [], ""
        for count, turn in enumerate(chat, 1):
            answers = turn["role"] == "assistant"
            if answers:  # the opening of an answer is given
                opened = tokenizer.apply_chat_template(chat[: count - 1], tokenize=False, add_generation_prompt=True)
                parts.append((opened.removeprefix(before), False))
                before = opened
            after = tokenizer.apply_chat_template(chat[:count], tokenize=False)
            if not after.startswith(before):
                raise CalibrationError("this chat template rewrites earlier turns: give calibration and text as .txt")
            parts.append((after.removeprefix(before), answers))
            before = after
    ids: list[int] = []
    scored: list[bool] = []
    for text, answers in parts:  # a template writes the special tokens itself
        part = tokenizer(text, add_special_tokens=not ids and not tokenizer.chat_template).input_ids
        ids += part
        scored += [answers] * len(part)
    whole = Passage.whole(torch.tensor(ids, dtype=torch.long))
    return Passage(whole.ids, whole.scored & torch.tensor(scored))


def _chat(record: dict[str, Any]) -> list[dict[str, str]] | None:
    """A record as turns of a chat, None where it is plain text."""
    if "messages" in record:
        return record["messages"]
    for question, answer in _PAIRS:
        if question in record and answer in record:
            asked = "\n\n".join(filter(None, (record[question], record.get("input"))))
            return [{"role": "user", "content": asked}, {"role": "assistant", "content": record[answer]}]
    return None
