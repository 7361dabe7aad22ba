"""One picture: quality against compute."""

from io import BytesIO
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, PercentFormatter, ScalarFormatter

_INK, _FAINT, _STAGE, _CURVE = "#7d8590", "#7d859040", "#e8590c", "#3b82f6"  # readable on white and on near-black


def draw(report: dict[str, Any], kind: str) -> bytes:
    """Stages in order as a path of markers, and the finished model's budget dial as a line.

    Args:
        report: As `write_report` takes it.
        kind: `svg` (transparent, text kept as text) or `png`.
    """
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "gateskip", "font.size": 11, "font.family": "sans-serif"}):
        figure = Figure(figsize=(7.5, 4.6), layout="constrained")
        if kind == "svg":
            FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        stages, curve = report["stages"], report["curve"]
        if curve:
            x, y = [row["macs_share"] for row in curve], [row["perplexity"] for row in curve]
            axes.plot(x, y, "-o", color=_CURVE, markersize=4, label="finished model, turning its budget")
        x, y = [stage["macs_share"] for stage in stages], [stage["perplexity"] for stage in stages]
        axes.plot(x, y, "--", color=_STAGE, linewidth=1)
        axes.plot(x, y, "D", color=_STAGE, markersize=7, label="stages of the pipeline")
        for place, names in _merged(stages).items():
            axes.annotate(names, place, xytext=(8, -14), textcoords="offset points", color=_STAGE, fontsize=9)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
        values = [*y, *(row["perplexity"] for row in curve)]
        low, high = min(values) * 0.85, max(values) * 1.12
        ticks = [
            tick for tick in (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 200, 500, 1000, 5000) if low < tick < high
        ]
        axes.set_yticks(ticks)
        axes.set_ylim(low, high)
        axes.set_xlim(right=max(1.0, *x) * 1.12)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_xlabel("multiply-adds that run, share of the original's")
        axes.set_ylabel("perplexity, held out (log scale, lower is better)")
        axes.grid(color=_FAINT, linewidth=0.6)
        axes.tick_params(colors=_INK, which="both")
        for item in (axes.xaxis.label, axes.yaxis.label):
            item.set_color(_INK)
        for spine in axes.spines.values():
            spine.set_color(_FAINT)
        axes.legend(frameon=False, labelcolor=_INK, fontsize=9)
        buffer = BytesIO()
        options: dict[str, Any] = {"transparent": True, "metadata": {"Date": None}} if kind == "svg" else {"dpi": 150}
        figure.savefig(buffer, format=kind, **options)
    return buffer.getvalue()


def _merged(stages: list[dict[str, Any]]) -> dict[tuple[float, float], str]:
    """Labels by place; stages at one place share a label."""
    places: dict[tuple[float, float], str] = {}
    for stage in stages:
        place = stage["macs_share"], stage["perplexity"]
        near = next((p for p in places if abs(p[0] - place[0]) < 0.02 and abs(p[1] / place[1] - 1) < 0.06), place)
        places[near] = f"{places[near]}, {stage['name']}" if near in places else stage["name"]
    return places
