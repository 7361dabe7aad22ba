"""A run's report as files: JSON for machines, Markdown for a repository, one HTML page for people, and a picture.

Reads the dict that a run makes and nothing else; measures nothing. A number that is None is unknown, and shown as –,
never as 0. Left out: comparing several runs.
"""

import json
import math
import re
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from ..folders import write_whole
from .picture import CURVE, INK, STAGE, draw

UNKNOWN = "\N{EN DASH}"


@dataclass(frozen=True)
class StageRow:
    """One stage as text, for a terminal: speeds in tokens/s, size in MB (10⁶ bytes)."""

    name: str
    perplexity: str
    macs_share: str
    disk_megabytes: str
    prefill_tokens_per_s: str
    decode_tokens_per_s: str

    @property
    def cells(self) -> tuple[str, ...]:
        """The fields in order."""
        return astuple(self)


def summary_rows(report: dict[str, Any]) -> list[StageRow]:
    """One row a stage, the original first."""
    return [
        StageRow(
            stage["name"],
            number(stage["perplexity"], 4),
            share(stage["macs_share"]),
            mega(stage["disk_bytes"]),
            number(stage["prefill_tokens_per_s"]),
            number(stage["decode_tokens_per_s"]),
        )
        for stage in report["stages"]
    ]


@dataclass(frozen=True)
class _Measure:
    """What the verdict weighs. A change below `noise` counts as none; timings and memory vary from run to run."""

    label: str
    key: str
    scale: float
    unit: str
    more_is_better: bool
    noise: float


_MEASURES = (
    _Measure("disk", "disk_bytes", 1e-6, "MB", False, 0.005),
    _Measure("multiply-adds per token", "macs_per_token", 1e-6, "M", False, 0.005),
    _Measure("prefill", "prefill_tokens_per_s", 1, "tokens/s", True, 0.05),
    _Measure("decode", "decode_tokens_per_s", 1, "tokens/s", True, 0.05),
    _Measure("peak memory", "peak_bytes", 1e-6, "MB", False, 0.05),
    _Measure("perplexity", "perplexity", 1, "", False, 0.005),
)


def verdict(report: dict[str, Any]) -> dict[str, list[str]]:
    """The last stage against the first: phrases under `gained`, `lost`, `unchanged` and `unknown`."""
    first, last = report["stages"][0], report["stages"][-1]
    found: dict[str, list[str]] = {"gained": [], "lost": [], "unchanged": [], "unknown": []}
    for measure in _MEASURES:
        before, after = first[measure.key], last[measure.key]
        if not before or not after:
            found["unknown"].append(measure.label)
            continue
        numbers = f"{number(before * measure.scale)} → {number(after * measure.scale)} {measure.unit}".rstrip()
        better = (after > before) == measure.more_is_better
        word = "unchanged" if abs(after / before - 1) < measure.noise else "gained" if better else "lost"
        found[word].append(f"{measure.label} {numbers} ({change(before, after)})")
    if last["top1_agreement"] is not None:
        differing = share(1 - last["top1_agreement"])
        found["lost"].append(f"the likeliest next token is another than the original's at {differing} of positions")
    return found


def write_report(report: dict[str, Any], folder: Path) -> dict[str, Path]:
    """Write report.json, report.md, report.html, quality.svg and quality.png; each file is whole, or as it was before.

    The numbers come first, so that no failure to draw or to lay out can lose them.

    Args:
        report: What `run.run_recipe` returns. NaN and infinity become None, and a note says where they were.
        folder: Made if it is not there.

    Returns:
        Paths by file name.
    """
    report = _finite_report(report)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "report.json", json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    picture = draw(report)
    svg = picture["svg"].decode()
    recipe = yaml.safe_dump(report["recipe"], sort_keys=False, allow_unicode=True)
    values = {**report, "verdict": verdict(report), "recipe_yaml": recipe, "picture": _inline(svg)}
    pages = templates()
    content: dict[str, str | bytes] = {
        "report.md": pages.get_template("report.md.j2").render(values),
        "report.html": pages.get_template("report.html.j2").render(values),
        "quality.svg": svg,
        "quality.png": picture["png"],
    }
    for name, data in content.items():
        write_whole(folder / name, data)
    return {name: folder / name for name in ("report.json", *content)}


def number(value: float | None, digits: int = 3) -> str:
    """A number to so many significant digits, whole digits never cut; unknown is a dash."""
    if value is None:
        return UNKNOWN
    if isinstance(value, int):
        return f"{value:,}"
    decimals = digits - 1 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(0, decimals)}f}"


def share(value: float | None) -> str:
    """A share as per cent."""
    return UNKNOWN if value is None else f"{100 * value:.1f} %"


def seconds(value: float | None) -> str:
    """A duration in seconds; not so exact that it says nothing."""
    return "under 0.1" if value is not None and value < 0.1 else number(value)


def mega(value: float | None) -> str:
    """A count in millions; bytes as MB."""
    return UNKNOWN if value is None else number(value / 1e6)


def change(before: float | None, after: float | None) -> str:
    """What became of a number: per cent, or a factor from 2 on."""
    if not before or not after:
        return UNKNOWN
    ratio = after / before
    if 0.5 < ratio < 2:
        return f"{100 * (ratio - 1):+.1f} %".replace("-", "\N{MINUS SIGN}")
    return f"\N{MULTIPLICATION SIGN} {number(ratio)}" if ratio > 1 else f"÷ {number(1 / ratio)}"


def inline(value: Any) -> str:
    """Text for a line or a cell of Markdown: on one line, its marks literal."""
    return "".join(f"\\{c}" if c in "\\`*[]<>|" else c for c in " ".join(str(value).split()))


def templates() -> Environment:
    """The package's templates, with this module's filters."""
    pages = Environment(
        loader=PackageLoader(str(__package__), ""),
        autoescape=select_autoescape(("html.j2",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters |= {made.__name__: made for made in (number, share, seconds, mega, change, inline)}
    pages.filters["pretty"] = lambda value: json.dumps(value, indent=1, ensure_ascii=False)
    return pages


def _inline(svg: str) -> Markup:
    """The picture as an element of a page: in the page's colours, and naming no address, not even as a namespace."""
    colors = {INK: "currentColor", STAGE: "var(--stage)", CURVE: "var(--curve)"}
    for ours, theirs in {**colors, "xlink:href": "href"}.items():
        svg = svg.replace(ours, theirs)
    return Markup(re.sub(r'.*<svg [^>]*(viewBox="[^"]*")[^>]*>', r"<svg \1>", svg, count=1, flags=re.DOTALL))


def _finite_report(report: dict[str, Any]) -> dict[str, Any]:
    """The same with None for NaN and infinity, which JSON does not have, and a note that names them."""
    lost: list[str] = []
    report = _finite(report, "", lost)
    note = [f"Not finite, therefore shown as {UNKNOWN}: {', '.join(lost)}."] if lost else []
    return {**report, "notes": [*report["notes"], *note]}


def _finite(value: Any, where: str, lost: list[str]) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        lost.append(where)
        return None
    if isinstance(value, dict):
        return {key: _finite(item, f"{where}.{key}".removeprefix("."), lost) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item, f"{where}[{i}]", lost) for i, item in enumerate(value)]
    return value
