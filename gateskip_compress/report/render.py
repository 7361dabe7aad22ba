"""Files out of a run's numbers. The dict that `run.run_recipe` returns is the only input."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from .picture import draw

UNKNOWN = "–"


@dataclass(frozen=True)
class StageRow:
    """One stage as text: name, perplexity, multiply-adds, disk, prefill and decode speed."""

    cells: tuple[str, ...]


def summary_rows(report: dict[str, Any]) -> list[StageRow]:
    """One row a stage, for a terminal."""
    return [
        StageRow(
            (
                stage["name"],
                number(stage["perplexity"], 2),
                share(stage["macs_share"]),
                megabytes(stage["disk_bytes"]),
                number(stage["prefill_tokens_per_s"], 0),
                number(stage["decode_tokens_per_s"], 1),
            )
        )
        for stage in report["stages"]
    ]


def write_report(report: dict[str, Any], folder: Path) -> dict[str, Path]:
    """Write report.json, report.md, report.html and the picture; each file is whole or not there.

    Args:
        report: See `run.run_recipe`; a number may be None, and is shown as –.
        folder: Exists.

    Returns:
        Paths by what they are.
    """
    svg = draw(report, "svg").decode()
    environment = Environment(
        loader=PackageLoader("gateskip_compress", "report"),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "share": share, "megabytes": megabytes, "millions": millions}
    values = {**report, "verdict": verdict(report), "picture": Markup(svg[svg.index("<svg") :])}
    content = {
        "report.json": json.dumps(report, indent=1).encode() + b"\n",
        "report.md": environment.get_template("report.md.j2").render(values).encode(),
        "report.html": environment.get_template("report.html.j2").render(values).encode(),
        "quality.svg": svg.encode(),
        "quality.png": draw(report, "png"),
    }
    for name, data in content.items():
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            file.write(data)
        Path(file.name).chmod(0o644)
        Path(file.name).replace(folder / name)
    return {name: folder / name for name in content}


def verdict(report: dict[str, Any]) -> list[str]:
    """What was gained and what was lost, in sentences; a loss of speed is said as such."""
    first, last = report["stages"][0], report["stages"][-1]
    sentences = []
    if first["disk_bytes"] and last["disk_bytes"]:
        sentences.append(
            f"On disk {megabytes(first['disk_bytes'])} MB became {megabytes(last['disk_bytes'])} MB "
            f"({first['disk_bytes'] / last['disk_bytes']:.1f} × smaller)."
        )
    sentences.append(f"It runs {share(last['macs_share'])} of the original's multiply-adds per token.")
    for kind, unit in (("prefill", 0), ("decode", 1)):
        before, after = first[f"{kind}_tokens_per_s"], last[f"{kind}_tokens_per_s"]
        if before and after:
            word = "faster" if after >= before else "slower"
            factor = max(after / before, before / after)
            speeds = f"{number(before, unit)} to {number(after, unit)} tokens/s"
            sentences.append(f"{kind.capitalize()} went from {speeds} ({factor:.2f} × {word}).")
    sentences.append(
        f"Held-out perplexity went from {number(first['perplexity'], 2)} to {number(last['perplexity'], 2)}"
        + (
            f"; {share(last['top1_agreement'])} of next tokens agree with the original."
            if last["top1_agreement"]
            else "."
        )
    )
    return sentences


def number(value: float | None, decimals: int) -> str:
    """A number with separators; unknown is a dash."""
    return UNKNOWN if value is None else f"{value:,.{decimals}f}"


def share(value: float | None) -> str:
    """A share as per cent."""
    return UNKNOWN if value is None else f"{value:.1%}".replace("%", " %")


def megabytes(value: float | None) -> str:
    """Bytes as MB (10⁶)."""
    return UNKNOWN if value is None else f"{value / 1e6:,.0f}"


def millions(value: float | None) -> str:
    """A count in millions."""
    return UNKNOWN if value is None else f"{value / 1e6:,.1f}"
