"""A picture of all cells of a matrix: perplexity against one other number, as SVG that needs nothing from anywhere.

    x   a metric against the original's; right, or left for shares, is better
    y   perplexity ratio, log scale; down is better

Bars are the cells' intervals. The front, where no other cell is better in both, is a line, and its cells have labels.
Colours are classes, so that a page's themes reach them.
"""

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup, escape

WIDTH, HEIGHT = 560, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 16, 14, 46
STYLE = (
    ".m{--ink:#6e7781;--dot0:#4c9be8;--dot1:#8f6fe0;--dot2:#d9480f;--dot3:#8a939c}"
    ".m text{font:12px system-ui,sans-serif;fill:var(--ink)}.m .grid{stroke:var(--ink);opacity:.22;stroke-width:.7}"
    ".m .line{fill:none;stroke:var(--ink);stroke-width:1.4;stroke-dasharray:4 3;opacity:.8}"
    ".m .bar{stroke-width:1.3;opacity:.45}.m .tag{font-weight:600;paint-order:stroke}"
    + "".join(f".m .c{i}{{fill:var(--dot{i});stroke:var(--dot{i})}}" for i in range(4))
    + ".m .ring{fill:none;stroke-width:2}"
)
"""For a picture that stands alone; a page sets the variables of its theme."""
Point = tuple[float, float]


def scatter(report: dict[str, Any], metric: str) -> Markup | None:
    """The picture of one metric, None where nothing of it is known.

    Args:
        report: As `matrix.derive.derive` returns it, with `tag` and `label` in each cell, see `report.matrix`.
        metric: Of the horizontal axis.
    """
    known = [c for c in report["cells"] if c["status"] == "done" and {metric, "perplexity_ratio"} <= c["values"].keys()]
    if len(known) < 2:
        return None
    xs = [x for c in known for x in (c["values"][metric], *c["bounds"].get(metric, ()))]
    ys = [y for c in known for y in (c["values"]["perplexity_ratio"], *c["bounds"].get("perplexity_ratio", ()))]
    ys = [min(y, 20.0) for y in ys]
    x_of, x_ticks = _linear(min(xs), max(xs))
    y_of, y_ticks = _log(min(*ys, 0.98), max(*ys, 1.1))
    fronts = report["fronts"].get(metric, [])
    share = report["metrics"][metric]["unit"] == "share"
    parts = [_axes(x_of, x_ticks, y_of, y_ticks, report["metrics"][metric]["label"], share)]
    dots = {c["id"]: (x_of(c["values"][metric]), y_of(c["values"]["perplexity_ratio"])) for c in known}
    for model in report["models"]:
        line = [dots[i] for i in fronts if i in dots and _of(known, i)["model"] == model]
        if len(line) > 1:
            parts.append(f'<polyline class="line" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in line)}"/>')
    for cell in sorted(known, key=lambda c: c["id"] in fronts):
        parts.append(_dot(cell, dots[cell["id"]], metric, x_of, y_of, report["strengths"]))
    parts += _tags([(dots[i], _of(known, i)) for i in fronts if i in dots], list(dots.values()))
    name = report["metrics"][metric]["label"]
    about = f"Perplexity against {name}, one dot a cell; the table holds the same numbers."
    body = "".join(parts)
    return Markup(f'<svg class="m" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(about)}">{body}</svg>')


def standalone(picture: Markup) -> str:
    """The same picture as a file."""
    head, rest = str(picture).split(">", 1)
    return f'{head} xmlns="http://www.w3.org/2000/svg"><style>{STYLE}</style>{rest}\n'


def _of(cells: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(cell for cell in cells if cell["id"] == name)


def _linear(low: float, high: float) -> tuple[Any, list[float]]:
    room = (high - low) * 0.07 or 0.05
    low, high = max(0.0, low - room), high + room
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(step * k for k in (1, 2, 2.5, 5, 10) if (high - low) / (step * k) <= 7)
    ticks = [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return lambda v: _LEFT + (v - low) / (high - low) * (WIDTH - _LEFT - _RIGHT), ticks


def _log(low: float, high: float) -> tuple[Any, list[float]]:
    room = 0.06 * math.log(high / low)
    bottom, top = math.log(low) - room, math.log(high) + room
    span = math.exp(top - bottom)
    steps = next(
        s
        for limit, s in (
            (1.3, [1 + 0.05 * i for i in range(-4, 8)]),
            (2.2, [0.8, 0.9, 1, 1.1, 1.2, 1.4, 1.6, 1.8, 2]),
            (6, [0.8, 1, 1.25, 1.5, 2, 3, 4, 5]),
            (math.inf, [0.5, 1, 1.5, 2, 3, 5, 7, 10, 15, 20]),
        )
        if span <= limit
    )
    ticks = [s for s in steps if bottom <= math.log(s) <= top]
    inner = HEIGHT - _TOP - _BOTTOM
    return lambda v: _TOP + (top - math.log(min(v, math.exp(top)))) / (top - bottom) * inner, ticks


def _axes(x_of: Any, x_ticks: list[float], y_of: Any, y_ticks: list[float], label: str, share: bool) -> str:
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    lines = [f'<path class="grid" d="M{_LEFT} {y_of(y):.1f}H{right}"/>' for y in y_ticks]
    lines += [f'<path class="grid" d="M{x_of(x):.1f} {_TOP}V{bottom}"/>' for x in x_ticks]
    lines += [f'<text x="{_LEFT - 7}" y="{y_of(y) + 4:.1f}" text-anchor="end">{y:g} ×</text>' for y in y_ticks]
    for x in x_ticks:
        text = f"{100 * x:.3g} %" if share else f"{x:.3g} ×"
        lines.append(f'<text x="{x_of(x):.1f}" y="{bottom + 17}" text-anchor="middle">{text}</text>')
    better = "← less is better" if share else "more is better →"
    of = f"{label}, share of the original's" if share else f"{label}, against the original"
    lines.append(f'<text x="{right}" y="{HEIGHT - 8}" text-anchor="end">{escape(of)} · {better}</text>')
    lines.append(f'<text x="{_LEFT + 6}" y="{_TOP + 12}">perplexity ratio · down is better</text>')
    return "".join(lines)


def _dot(cell: dict[str, Any], at: Point, metric: str, x_of: Any, y_of: Any, strengths: Sequence[str]) -> str:
    x, y = at
    color = color_of(cell, strengths)
    bars = ""
    if metric in cell["bounds"]:
        low, high = map(x_of, cell["bounds"][metric])
        bars += f'<path class="bar {color}" d="M{low:.1f} {y:.1f}H{high:.1f}"/>'
    if "perplexity_ratio" in cell["bounds"]:
        low, high = map(y_of, cell["bounds"]["perplexity_ratio"])
        bars += f'<path class="bar {color}" d="M{x:.1f} {low:.1f}V{high:.1f}"/>'
    if cell["kind"] == "original":
        mark = f'<circle class="ring {color}" style="fill:none" cx="{x:.1f}" cy="{y:.1f}" r="6"/>'
    elif cell["kind"] == "baseline":
        mark = f'<path class="{color}" d="M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6z"/>'
    else:
        mark = f'<circle class="{color}" cx="{x:.1f}" cy="{y:.1f}" r="4.6"/>'
    said = f"{cell['label']}: perplexity × {cell['values']['perplexity_ratio']:.3g}, {cell['values'][metric]:.3g}"
    return f'<g class="dot" data-id="{cell["id"]}">{bars}{mark}<title>{escape(said)}</title></g>'


def color_of(cell: dict[str, Any], strengths: Sequence[str]) -> str:
    """Class of a cell's colour: by strength, the last one for what has none."""
    place = list(strengths).index(cell["strength"]) if cell["strength"] in strengths else 3
    return f"c{min(place, 3)}"


def _tags(labelled: Sequence[tuple[Point, dict[str, Any]]], dots: Sequence[Point]) -> list[str]:
    """Labels beside their dots, each where it covers least; one that would cover another is left out."""
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in dots]
    written: list[Box] = []
    found = []
    for (x, y), cell in labelled:
        width = 7.4 * len(cell["tag"])
        spots = [(8, -7), (8, 15), (-8 - width, -7), (-8 - width, 15), (-width / 2, -13), (-width / 2, 22), (10, 4)]
        boxes = [(x + dx, y + dy - 11, x + dx + width, y + dy + 2) for dx, dy in spots]
        box = min(boxes, key=lambda box: _outside(box) + 5 * _hits(box, written) + _hits(box, taken))
        if _hits(box, written):
            continue
        written.append(box)
        found.append(f'<text class="tag" x="{box[0]:.1f}" y="{box[1] + 11:.1f}">{escape(cell["tag"])}</text>')
    return found


Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


def _outside(box: Box) -> int:
    return 20 * (box[0] < _LEFT or box[2] > WIDTH - 2 or box[1] < 0 or box[3] > HEIGHT - _BOTTOM)


def _hits(box: Box, others: Sequence[Box]) -> int:
    return sum(box[0] < o[2] and o[0] < box[2] and box[1] < o[3] and o[1] < box[3] for o in others)
