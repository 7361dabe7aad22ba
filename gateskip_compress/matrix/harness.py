"""Accuracy by lm-eval's own tasks, where a hub is reachable; where not, `tasks` has files of the same questions."""

import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import CalibrationError
from ..tasks import TASKS, Answer


def check_hub(names: Sequence[str]) -> None:
    """Raise CalibrationError, saying which files would serve instead, where lm-eval or a hub is out of reach."""
    files = [TASKS[name].file for name in names if name in TASKS]
    instead = f"; or give tasks.folder, a folder with {', '.join(files)}" if files else ""
    try:
        import lm_eval as _  # noqa: F401 heavy  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise CalibrationError(f"tasks at a hub need lm-eval: pip install 'gateskip-compress[eval]'{instead}") from None
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        raise CalibrationError(f"tasks at a hub, but HF_HUB_OFFLINE is set: unset it{instead}")
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(hub, method="HEAD"), timeout=10).close()
    except urllib.error.HTTPError:
        return  # it answers
    except OSError as error:
        raise CalibrationError(f"no hub at {hub} ({error}): check the network{instead}") from None


def hub_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, names: Sequence[str], most: int, **found_by: Any
) -> dict[str, list[Answer]]:
    """The first `most` items of each task, answered; normalised is the plain answer where a task has no such score.

    Args:
        model: At the budget it is set to.
        tokenizer: Its own.
        names: Tasks of lm-eval.
        most: Items of each.
        found_by: For `lm_eval.simple_evaluate`, such as a `task_manager` that knows more tasks.

    Raises:
        ValueError: lm-eval does not know a task.
    """
    import lm_eval  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    try:
        found = lm_eval.simple_evaluate(
            wrapped, tasks=list(names), limit=most, bootstrap_iters=0, log_samples=True, **found_by
        )
    except KeyError as error:
        raise ValueError(f"lm-eval knows no task {error}") from error
    answers: dict[str, list[Answer]] = {}
    for name, samples in (found or {})["samples"].items():
        first = samples[0].get("filter")
        plain = [s.get("acc", s.get("exact_match")) for s in samples if s.get("filter") == first]
        normal = [s.get("acc_norm", p) for s, p in zip(samples, plain, strict=False)]
        answers[name] = [(bool(p), bool(n)) for p, n in zip(plain, normal, strict=True)]
    return answers
