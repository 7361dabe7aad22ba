"""Native or torch: which of them runs a model."""

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel

from ..errors import RuntimeUnavailable, UnsupportedModel
from ..names import check_choice
from .extension import extension
from .lowering import check_lowerable, lower
from .session import Session

RUNTIMES = ("auto", "native", "torch")


def why_not_native(model: PreTrainedModel) -> str | None:
    """What keeps the native runtime from running a model; None where nothing does."""
    try:
        extension()
        check_lowerable(model)
    except (RuntimeUnavailable, UnsupportedModel) as error:
        return str(error)
    return None


def choose_runtime(
    model: PreTrainedModel,
    runtime: str,
    context_tokens: int,
    tell: Callable[[str], object],
    *,
    rows: int = 1,
    beside: Path | None = None,
    release: bool = False,
) -> Session | None:
    """A session, or None where torch runs the model.

    Args:
        model: To run.
        runtime: Of RUNTIMES; `auto` takes the native one where it can, and else tells why not.
        context_tokens: Of the session's cache.
        tell: Gets that reason, once.
        rows: Sequences that decode together at most.
        beside: As in `lower`.
        release: As there.

    Raises:
        RuntimeUnavailable: `native` was asked for and is not built.
        UnsupportedModel: `native` was asked for and does not know the model.
    """
    check_choice("runtime", runtime, RUNTIMES)
    if runtime == "torch":
        return None
    try:
        return lower(model, context_tokens=context_tokens, rows=rows, beside=beside, release=release)
    except (RuntimeUnavailable, UnsupportedModel) as error:
        if runtime == "native":
            raise
        tell(f"running on torch: {error}")
        return None
