"""The picture of a run: quality against compute.

    x   share of the original's multiply-adds that run
    y   perplexity on held-out text, log scale

The stages are markers joined in the order they were applied; the finished model's budget dial is a line. Points whose
numbers are unknown are left out. Confidence intervals are left to the table: stages share one text, so that bars around
them would overlap where their differences are certain.
"""

import math
from io import BytesIO
from itertools import pairwise
from typing import Any, Literal

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

INK, STAGE, CURVE = "#6e7781", "#d9480f", "#2b7de0"
"""Readable on white and on near-black; the HTML page swaps them for its own colours."""

_SETTINGS = {
    "svg.fonttype": "none",  # text stays text: it can be searched, read aloud and coloured by the page
    "svg.hashsalt": "gateskip",  # the same numbers give the same bytes
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 10.5,
}
_NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))

Point = tuple[float, float]


def draw(report: dict[str, Any]) -> dict[str, bytes]:
    """Draw stages and budget dial.

    Args:
        report: As `write_report` takes it.

    Returns:
        The same picture as `svg`, transparent, and as `png`, on white and 1125 pixels wide.
    """
    stages, curve = _known(report["stages"]), sorted(_known(report["curve"]), key=lambda row: row["macs_share"])
    path, dial = [_point(stage) for stage in stages], [_point(row) for row in curve]
    svg, png = BytesIO(), BytesIO()
    with rc_context(_SETTINGS):
        figure = Figure(figsize=(7.5, 4.7), layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        if dial:
            axes.plot(*zip(*dial, strict=True), "-o", color=CURVE, markersize=4.5, label="finished model, by budget")
        if path:
            look: dict[str, Any] = {"color": STAGE, "linewidth": 1.2, "markersize": 6.5}
            axes.plot(*zip(*path, strict=True), "-D", **look, label="stages, in order")
        if path or dial:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, labelcolor=INK, borderpad=0.2)
        _frame(axes, [*path, *dial])
        canvas.draw()  # settles the layout, which the places of labels depend on
        figure.set_layout_engine("none")
        names = [(point, name, INK) for point, name in _merged(axes, [stage["name"] for stage in stages], path)]
        shares = [(point, f"{row['budget']:g}", CURVE) for point, row in zip(dial, curve, strict=True)]
        _label(axes, [*names, *shares], [*_trail(axes, path), *_trail(axes, dial)])
        figure.savefig(svg, format="svg", transparent=True, metadata=_NO_METADATA)
        figure.savefig(png, format="png", dpi=150)
    return {"svg": svg.getvalue(), "png": png.getvalue()}


def _known(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["macs_share"] is not None and row["perplexity"] is not None]


def _point(row: dict[str, Any]) -> Point:
    return row["macs_share"], row["perplexity"]


def _frame(axes: Axes, points: list[Point]) -> None:
    """Set scales, limits, ticks and greys, in place."""
    x, y = [x for x, _ in points] or [1.0], [y for _, y in points] or [1.0]
    low, high = min(y), max(y)
    room = max(math.log(high / low) * 0.14, 0.04)
    axes.set_yscale("log")
    axes.set_ylim(low * math.exp(-room), high * math.exp(room))
    side = max((max(x) - min(x)) * 0.12, 0.02)
    axes.set_xlim(min(x) - side, max(x) + side)
    axes.xaxis.set_major_locator(MaxNLocator(7, steps=(1, 2, 5, 10)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    fine, coarse = (1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5)
    ticks = LogLocator(subs=fine if high < 15 * low else coarse if high < 500 * low else (1,))
    axes.yaxis.set_major_locator(ticks if high > 2 * low else MaxNLocator(6))  # a short log axis is nearly even
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1000 else f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("multiply-adds that run, share of the original's", color=INK)
    axes.set_ylabel("perplexity, lower is better (log scale)", color=INK)
    axes.grid(color=INK, alpha=0.22, linewidth=0.6)
    axes.tick_params(color=INK, labelcolor=INK, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    if not points:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "nothing measured", color=INK, ha="center", transform=axes.transAxes)


Box = tuple[float, float, float, float]
"""Left, bottom, right, top, in pixels."""


def _label(axes: Axes, labels: list[tuple[Point, str, str]], drawn: list[Box]) -> None:
    """Write labels in their colours where nothing else is, in place, with a thin line to a marker that is far.

    Spots around a marker are tried from near to far; the first with the fewest collisions is taken.
    """
    scale, (left, bottom, right, top) = axes.figure.dpi / 72, axes.bbox.extents.tolist()
    written: list[Box] = []
    for point, name, color in labels:
        text = axes.annotate(name, point, (0, 0), textcoords="offset points", va="center", color=color, fontsize=9.5)
        text.set_parse_math(False)
        (width, height), dot = text.get_window_extent().size.tolist(), _pixels(axes, point)
        tried: list[tuple[int, Point, Box]] = []
        for spot in _SPOTS:
            x = dot[0] + spot[0] * scale - width * _SHIFT[_side(spot)]
            y = dot[1] + spot[1] * scale - height / 2
            edge = 2.5 * scale
            box = (x - edge, y - edge, x + width + edge, y + height + edge)
            outside = box[0] < left or box[1] < bottom or box[2] > right or box[3] > top
            tried.append((_overlaps(box, drawn) + 100 * _overlaps(box, written) + 1000 * outside, spot, box))
            if tried[-1][0] == 0:
                break
        _, best, box = min(tried, key=lambda attempt: attempt[0])
        written.append(box)
        text.set_position(best)
        text.set_horizontalalignment(_side(best))
        if math.hypot(*best) > 16:
            line = {"arrowstyle": "-", "color": INK, "alpha": 0.6, "linewidth": 0.7, "shrinkA": 2, "shrinkB": 5}
            axes.annotate("", point, best, textcoords="offset points", arrowprops=line)


_SHIFT = {"left": 0, "center": 0.5, "right": 1}
_SPOTS: list[Point] = [
    (distance * x, distance * y)
    for distance in (10, 14, 20, 30, 44, 62, 84, 110)
    for x, y in ((0.8, 0.9), (0.8, -0.9), (-0.8, 0.9), (-0.8, -0.9), (1, 0), (-1, 0), (0, 1.2), (0, -1.2))
]
"""Offsets from a marker in points, nearest first."""


def _side(spot: Point) -> Literal["left", "center", "right"]:
    """The edge of a label that faces its marker."""
    return "left" if spot[0] > 0 else "right" if spot[0] < 0 else "center"


def _overlaps(box: Box, others: list[Box]) -> int:
    return sum(box[0] < o[2] and o[0] < box[2] and box[1] < o[3] and o[1] < box[3] for o in others)


def _merged(axes: Axes, names: list[str], path: list[Point]) -> list[tuple[Point, str]]:
    """Places with their labels; stages that land on one spot share it."""
    places: list[tuple[Point, str]] = []
    for point, name in zip(path, names, strict=True):
        for i, (other, others) in enumerate(places):
            if math.dist(_pixels(axes, point), _pixels(axes, other)) < 5:
                places[i] = other, f"{others}, {name}"
                break
        else:
            places.append((point, name))
    return places


def _trail(axes: Axes, points: list[Point]) -> list[Box]:
    """Small boxes along a drawn line, and larger ones at its markers: what a label should not cover."""
    dots = [_pixels(axes, point) for point in points]
    steps = [i / 40 for i in range(41)]
    between = [(x0 + s * (x1 - x0), y0 + s * (y1 - y0)) for (x0, y0), (x1, y1) in pairwise(dots) for s in steps]
    return [_square(dot, 6) for dot in dots] + [_square(spot, 1) for spot in between]


def _pixels(axes: Axes, point: Point) -> Point:
    x, y = axes.transData.transform(point).tolist()
    return x, y


def _square(middle: Point, half: float) -> Box:
    return middle[0] - half, middle[1] - half, middle[0] + half, middle[1] + half
