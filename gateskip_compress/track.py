"""Progress is shown by whoever has a screen; everything else takes a function like `untracked`."""

from collections.abc import Iterable
from typing import Any, TypeVar

T = TypeVar("T")


def untracked(items: Iterable[T], description: Any, total: int | None = None) -> Iterable[T]:  # noqa: ARG001 a protocol
    """Show no progress.

    Args:
        items: What is looped over.
        description: What the loop does, or a function that says what it does by now.
        total: Number of items, where it is not their length.
    """
    return items
