"""A matrix as files: one HTML page, Markdown, CSV, JSON lines, pictures, and a recipe for each cell.

Reads the dict that `matrix.derive.derive` makes and nothing else. What is unknown is a dash or an empty field, never 0.
"""

import csv
import io
import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from ..folders import write_whole
from .render import UNKNOWN, mega, number, templates
from .scatter import color_of, scatter, standalone

_EXACT = {"perplexity_ratio": 3, "decode_speedup": 2, "prefill_speedup": 2, "stacking_efficiency": 2}
"""Decimals of factors that are near 1, where significant digits would jump."""
FIXED = ("id", "model", "name", "strength", "kind", "budget", "status", "reason", "saves")


def write_matrix(report: dict[str, Any], out: Path) -> dict[str, Path]:
    """Write report.html, .md, .csv, .jsonl, the pictures and recipes/; each file is whole, or as it was before.

    Args:
        report: Cells get what the templates show them by, in place.
        out: The results folder.

    Returns:
        Paths by file name.
    """
    letters = initials(report["parts"])
    (out / "recipes").mkdir(parents=True, exist_ok=True)
    for cell in report["cells"]:
        dress(report, cell, letters, out)
        if cell["status"] == "done" and cell["steps"]:
            write_whole(out / "recipes" / f"{cell['id']}.yaml", cell["recipe_yaml"])
    pictures = {name: scatter(report, name) for name in report["fronts"]}
    values = {
        **report,
        "pairs": [{**pair, "reason": pair["reason"] and plain(pair["reason"])} for pair in report["pairs"]],
        "names": [model.rstrip("/").rsplit("/", 1)[-1] for model in report["models"]],
        "letters": letters,
        "bar": partial(bar, report),
        "pictures": {name: picture for name, picture in pictures.items() if picture is not None},
        "by_id": {cell["id"]: cell for cell in report["cells"]},
        "data": Markup(json.dumps(page_data(report), ensure_ascii=False).replace("<", "\\u003c")),
    }
    pages = templates()
    pages.filters |= {"in_words": in_words, "metric": lambda v, name: shown(v, report["metrics"][name]["unit"], name)}
    content = {
        "report.jsonl": "".join(json.dumps(cell, ensure_ascii=False) + "\n" for cell in report["cells"]),
        "report.csv": as_csv(report),
        "report.md": pages.get_template("matrix.md.j2").render(values),
        "report.html": pages.get_template("matrix.html.j2").render(values),
        **{f"{name}.svg": standalone(picture) for name, picture in values["pictures"].items()},
    }
    for name, text in content.items():
        write_whole(out / name, text)
    return {name: out / name for name in content}


def initials(parts: list[str]) -> dict[str, str]:
    """A short mark for each part: its first letter, or as many as tell it from the others."""
    found: dict[str, str] = {}
    for part in parts:
        size = next(n for n in range(1, len(part) + 1) if n == len(part) or part[:n].upper() not in found.values())
        found[part] = part[:size].upper()
    return found


def dress(report: dict[str, Any], cell: dict[str, Any], letters: dict[str, str], out: Path) -> None:
    """Add to a cell, in place, how it is called, coloured and repeated, and its numbers as text."""
    strength = f", {cell['strength']}" if cell["strength"] and cell["kind"] != "baseline" else ""
    many = f" ({cell['model']})" if len(report["models"]) > 1 else ""
    cell["label"] = f"{cell['name']}{strength}{many}"
    tag = "".join(letters.get(part, part[:1].upper()) for part in cell["parts"]) or "original"
    tag = cell["name"] if cell["kind"] == "baseline" else tag
    cell["tag"] = tag if cell["budget"] is None else f"{tag}@{cell['budget']:g}"
    cell["color"] = color_of(cell, report["strengths"])
    values = cell["values"]
    cell["texts"] = {
        name: [shown(values[name], metric["unit"], name), interval_text(report, cell, name)]
        for name, metric in report["metrics"].items()
        if name in values
    }
    if "stacking_efficiency" in values or "interaction_nats" in values:
        cell["expected"] = _expected(values)
    cell["reason"] = cell["reason"] and plain(cell["reason"])
    cell["recipe_yaml"] = yaml.safe_dump(cell["recipe"], sort_keys=False, allow_unicode=True)
    cell["command"] = _command(cell, report["evaluation"]["text"], out)


def _expected(values: dict[str, float]) -> dict[str, str]:
    """What a stack's parts promise: their speed-ups multiplied, their losses added."""
    found = {}
    if "stacking_efficiency" in values:
        found["decode_speedup"] = shown(values["decode_speedup"] / values["stacking_efficiency"], "×", "decode_speedup")
    if "interaction_nats" in values:
        ratio = values["perplexity_ratio"] / math.exp(values["interaction_nats"])
        found["perplexity_ratio"] = shown(ratio, "×", "perplexity_ratio")
    return found


def plain(reason: str) -> str:
    """A reason with steps by their names alone; their fields are in the recipe."""
    return re.sub(r"\b([A-Z]\w+)\((?:[^()]|\([^()]*\))*\)", r"\1", reason)


def _command(cell: dict[str, Any], text: str, out: Path) -> str:
    if not cell["steps"]:
        return f"gateskip eval {cell['model']} --text {text}\ngateskip bench {cell['model']}"
    first = f"gateskip run {out}/recipes/{cell['id']}.yaml --out runs/{cell['id']}"
    if cell["budget"] is None:
        return first
    return f"{first}\ngateskip eval runs/{cell['id']}/model --budget {cell['budget']:g} --text {text}"


def shown(value: float | None, unit: str, name: str = "") -> str:
    """A metric's value as text, its unit in the heading but for per cent."""
    if value is None:
        return UNKNOWN
    if name == "accuracy_change":
        return f"{100 * value:+.1f} pts".replace("-", "\N{MINUS SIGN}")
    if unit == "share":
        return f"{100 * value:.1f} %"
    if unit == "bytes":
        return f"{mega(value)} MB"
    if unit == "×" and 0.05 < value < 20:
        return f"{value:.{_EXACT.get(name, 2)}f}"
    if unit == "nats":
        return f"{value:.3f}".replace("-", "\N{MINUS SIGN}")
    return mega(value) + " M" if abs(value) >= 1e6 else number(float(value))


def interval_text(report: dict[str, Any], cell: dict[str, Any], name: str) -> str:
    """A metric's bounds as text, empty where there are none."""
    if name not in cell["bounds"]:
        return ""
    low, high = (shown(end, report["metrics"][name]["unit"], name).removesuffix(" %") for end in cell["bounds"][name])
    return f"{low} to {high}"


def in_words(condition: dict[str, Any], metrics: dict[str, Any]) -> str:
    """A goal's condition for people."""
    name, value, metric = condition["metric"], condition["value"], metrics[condition["metric"]]
    if name == "perplexity_ratio" and condition["sign"] == "<=":
        return f"perplexity at most {100 * (value - 1):.3g} % worse"
    word = {"<=": "at most", ">=": "at least", "<": "below", ">": "above"}[condition["sign"]]
    size = f"{100 * value:.3g} %" if metric["unit"] == "share" else f"{value:g} {metric['unit']}".strip()
    of = " of the original" if name.endswith("_share") and name != "accepted_share" else ""
    return f"{metric['label']} {word} {size}{of}"


def page_data(report: dict[str, Any]) -> dict[str, Any]:
    """What the page's script reads: for each cell its numbers as they are and as text, its recipe and its command."""
    keys = (
        *FIXED,
        "label",
        "tag",
        "parts",
        "values",
        "bounds",
        "texts",
        "untimed",
        "recipe_yaml",
        "command",
        "verdicts",
    )
    return {
        "metrics": report["metrics"],
        "fronts": sorted({name for front in report["fronts"].values() for name in front}),
        "goal": report["goals"][0]["conditions"] if report["goals"] else [],
        "cells": {
            cell["id"]: {
                **{key: cell[key] for key in keys},
                "raw": {part: cell[part] for part in ("quality", "speed") if cell[part] is not None},
            }
            for cell in report["cells"]
        },
    }


def as_csv(report: dict[str, Any]) -> str:
    """One line a cell: what it is, what it saves, verdicts on goals, and each metric with its bounds."""
    table = io.StringIO()
    names = [name for name in report["metrics"] if any(name in cell["values"] for cell in report["cells"])]
    goals = [goal["text"] for goal in report["goals"]]
    bounds = [f"{name}_{end}" for name in names for end in ("low", "high")]
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow([*FIXED, *goals, *names, *bounds])
    for cell in report["cells"]:
        values = [cell["values"].get(name) for name in names]
        ends = [end for name in names for end in cell["bounds"].get(name, (None, None))]
        verdicts = cell["verdicts"] if cell["status"] == "done" else [None] * len(goals)
        writer.writerow([*(cell[key] for key in FIXED), *verdicts, *values, *ends])
    return table.getvalue()


def bar(report: dict[str, Any], name: str, value: float | None) -> float | None:
    """How far a value fills its cell of the table, 0 to 1: shares as they are, factors against the largest."""
    if value is None or not math.isfinite(value):
        return None
    unit = report["metrics"][name]["unit"]
    if unit == "share":
        return min(max(value, 0.0), 1.0)
    if unit != "×":
        return None
    most = max((c["values"].get(name, 0.0) for c in report["cells"]), default=1.0)
    return min(value, 4.0) / min(most, 4.0)
