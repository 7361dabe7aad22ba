"""Files to learn from, split: every fifth document is held out."""

from typing import Any

from gateskip_compress.text import Passage, cut, documents, joined

HELD_OUT = 100
"""Documents that are measured on, if so many are held out."""


def lessons_and_held_out(
    paths: list[str], tokenizer: Any, window_tokens: int, most_tokens: int, held_out_tokens: int
) -> tuple[list[Passage], list[Passage]]:
    """Windows of documents end to end to learn from, and passages of others to measure on."""
    taught = [document for path in paths for document in documents(path, tokenizer)]
    lessons = joined([d for i, d in enumerate(taught) if i % 5 > 0], window_tokens, most_tokens, prompts=True)
    unseen = taught[::5]
    return lessons, cut(unseen[:: max(1, len(unseen) // HELD_OUT)], 512, held_out_tokens)
