"""Where a gated model skips, as a page: reads the dict that `gating.insight.insight` makes, and nothing else."""

import json
from pathlib import Path
from typing import Any

import torch

from ..folders import write_whole
from .render import templates

_LEVELS = 3


def write_insight(insight: dict[str, Any], page: Path) -> dict[str, Path]:
    """Write a page and, beside it under the same name, its numbers as JSON; the numbers come first.

    Args:
        insight: What `gating.insight.insight` returns, with the `model` and the `text` it was made of.
        page: Ends in .html; its folder is made if it is not there.

    Returns:
        Paths by kind, `json` and `html`.

    Raises:
        ValueError: the page has another ending.
    """
    files = {"json": numbers_beside(page), "html": page}
    page.parent.mkdir(parents=True, exist_ok=True)
    write_whole(files["json"], json.dumps(insight, ensure_ascii=False, allow_nan=False) + "\n")
    values = {**insight, "heat": heat(insight), "extremes": extremes(insight)}
    pages = templates()
    pages.filters |= {"visible": visible, "signed": signed}
    write_whole(page, pages.get_template("insight.html.j2").render(values))
    return files


def numbers_beside(page: Path) -> Path:
    """Where the numbers of a page go."""
    if page.suffix != ".html":
        raise ValueError(f"page {page} must end in .html; its numbers go beside it, in a file that ends in .json")
    return page.with_suffix(".json")


def heat(insight: dict[str, Any]) -> dict[str, Any]:
    """Rows of the heat map, attention first, each cell a pair of a CSS class and a text.

    Classes are `k` for kept and `s` for skipped, and how far from the threshold: 0, 1 or 2, split so that each level
    holds a third of the passage's cells.
    """
    passage = insight["passage"]
    away = [abs(margin) for row in passage["margins"] for margin in row if margin is not None]
    steps = torch.tensor(away or [0.0]).quantile(torch.arange(1, _LEVELS) / _LEVELS).tolist()
    rows = []
    for branch, margins, kept in zip(insight["branches"], passage["margins"], passage["kept"], strict=True):
        cells = [_cell(*cell, steps) for cell in zip(margins, kept, strict=True)]
        rows.append({**branch, "cells": cells})
    rows.sort(key=lambda row: row["kind"])  # attention above, MLP below, each from the first layer down
    return {"steps": steps, "rows": rows}


def _cell(margin: float | None, kept: bool, steps: list[float]) -> tuple[str, str]:
    if margin is None:
        return "k2", "always"
    level = sum(abs(margin) > step for step in steps)
    if kept and margin <= 0:
        return "k0", f"{signed(margin)} by rule"
    return f"{'k' if kept else 's'}{level}", signed(margin)


def extremes(insight: dict[str, Any]) -> dict[str, list[str]]:
    """What runs most and what skips most, as phrases under `most` and `least`."""
    branches = sorted(insight["branches"], key=lambda branch: -branch["kept_share"])
    kinds = [row for row in insight["classes"] if row["kept_share"] is not None and row["class"] != "first token"]
    kinds.sort(key=lambda row: -row["kept_share"])
    found: dict[str, list[str]] = {}
    for word, end in (("most", 0), ("least", -1)):
        place = [branches[end]]
        found[word] = [f"{_branch(b)}: {_whole(b['kept_share'])} of tokens run it" for b in place]
        found[word] += [f"{row['class']}: {_whole(row['kept_share'])} of branches run" for row in kinds[end:][:1]]
    return found


def _branch(branch: dict[str, Any]) -> str:
    return f"{'MLP' if branch['kind'] == 'mlp' else 'attention'} of layer {branch['layer']}"


def _whole(share: float) -> str:
    return f"{100 * share:.0f}\N{NO-BREAK SPACE}%"


def visible(text: str) -> str:
    """A token's text with its spaces and ends of lines to be seen."""
    return text.translate({ord(" "): "\N{MIDDLE DOT}", ord("\n"): "↵", ord("\r"): "␍", ord("\t"): "⇥"}) or "∅"


def signed(value: float) -> str:
    """A number with its sign and two decimals."""
    return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")
