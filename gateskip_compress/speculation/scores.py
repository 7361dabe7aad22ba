"""Logits processors, applied alike to drafts and to what verifies them.

Plain decoding calls the processors once a step, with the text so far. A draft's tokens are judged in one pass, and may
be taken back, so processors are called out of step: each sees the text that plain decoding would show it, but a
processor that remembers earlier calls would see other calls. Such ones are refused.
"""

from collections.abc import Sequence
from copy import copy, deepcopy
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessorList

_OWN = "transformers.generation.logits_process"
_REMEMBER = (
    "SynthIDTextWatermark",
    "UnbatchedClassifierFreeGuidance",
    "WhisperNoSpeechDetection",
    "DiaEOSDelayPattern",
)
_NEED_BATCH = ("PrefixConstrained", "EncoderRepetitionPenalty", "EncoderNoRepeatNGram")
_TEXT_BLIND = ("Temperature", "TopK", "TopP", "TopH", "MinP", "Typical", "Epsilon", "Eta", "LogitNormalization")
"""Beginnings of class names: remembers calls; tells rows apart by their number; reads scores alone."""


def of_rows(processors: LogitsProcessorList, rows: int) -> list[LogitsProcessorList]:
    """Each row's own, to be called with its text alone: what a processor knows of every row, it knows of this one."""
    return [LogitsProcessorList([_of_row(processor, row) for processor in processors]) for row in range(rows)]


def _of_row(processor: Any, row: int) -> Any:
    ignored = getattr(processor, "prompt_ignore_length", None)  # of a repetition penalty: each row's padding
    if not isinstance(ignored, Tensor):
        return processor
    own = copy(processor)
    own.prompt_ignore_length = ignored[row : row + 1]
    return own


def processed(
    processors: Sequence[LogitsProcessorList],
    texts: Sequence[Int[Tensor, " _t"]],
    drafted: Int[Tensor, "b k"],
    logits: Float[Tensor, "b n v"],
) -> Float[Tensor, "b n v"]:
    """Scores as plain decoding has them, float32.

    Args:
        processors: Of each row.
        texts: Of each row, padding on the left included.
        drafted: Tokens after them.
        logits: After the last n - 1 .. 0 drafted tokens, the text alone being 0 of k: n is 1 or k + 1.
    """
    scores, n = logits.float(), logits.shape[1]
    if len(processors[0]) == 0:
        return scores
    if all(_named(processor, _TEXT_BLIND) for processor in processors[0]):
        return processors[0](drafted, scores.flatten(0, 1)).view(scores.shape)
    first = drafted.shape[1] + 1 - n
    rows = []
    for row, text in enumerate(texts):
        whole = torch.cat((text, drafted[row]))[None]
        ends = range(len(text) + first, whole.shape[1] + 1)
        own = processors[row]
        rows.append(torch.cat([own(whole[:, :end], scores[row, i, None]) for i, end in enumerate(ends)]))
    return torch.stack(rows)


def check_processors(processors: LogitsProcessorList, ids: Int[Tensor, "b t"], vocabulary: int) -> None:
    """Refuse processors that remember earlier calls, and in a batch those that tell rows apart by their number.

    Those of transformers are known. Another is copied, and the copy called twice with the same text: it must answer
    the same, and hold the same afterwards. What it keeps elsewhere cannot be seen.

    Raises:
        ValueError: names the processor, and what gave it away.
    """
    for processor in processors:
        name = type(processor).__name__
        if type(processor).__module__ == _OWN:
            if _named(processor, _REMEMBER):
                raise ValueError(f"{name} remembers earlier calls, and speculation calls it out of step: leave it out")
            if len(ids) > 1 and _named(processor, _NEED_BATCH):
                raise ValueError(f"{name} tells rows apart by their number: decode one sequence at a time")
            continue
        changed = _changed(processor, ids[:1], vocabulary)
        if changed is not None:
            raise ValueError(
                f"{name} remembers earlier calls ({changed} changed between two calls with the same text), "
                "and speculation calls it out of step: leave it out, or compute it from the text alone"
            )


def _named(processor: Any, beginnings: tuple[str, ...]) -> bool:
    return type(processor).__module__ == _OWN and type(processor).__name__.startswith(beginnings)


def _changed(processor: Any, ids: Int[Tensor, "1 t"], vocabulary: int) -> str | None:
    """What differs between two calls of a copy: an attribute's name, or its answer."""
    twin = deepcopy(processor)
    scores = torch.zeros(1, vocabulary, device=ids.device)
    twin(ids, scores.clone())  # may prepare itself
    first = twin(ids, scores.clone())
    before = deepcopy(vars(twin))
    second = twin(ids, scores.clone())
    for name, value in vars(twin).items():
        if not _same(value, before.get(name)):
            return name
    return None if _same(first, second) else "its answer"


def _same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if type(a).__eq__ is object.__eq__:
        return not hasattr(a, "__dict__") or _same(vars(a), vars(b))
    return bool(a == b)
