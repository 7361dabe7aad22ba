"""Misspelt names, and values out of a list."""

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(name: str, known: Iterable[str]) -> str:
    """Words that name the closest known name, as the end of an error message; nothing where none is close."""
    close = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def check_choice(field: str, value: object, known: Iterable[object]) -> None:
    """Raise ValueError, naming what is known, where a field's value is none of it."""
    known = list(known)
    if value not in known:
        raise ValueError(f"{field} {value!r} must be one of {', '.join(str(one) for one in known if one is not None)}")
