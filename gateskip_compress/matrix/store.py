"""A results folder: one writer at a time, rows that are whole or absent, and results of one version only.

    matrix.json    the version that writes here; another is refused
    rows.jsonl     one JSON object a line, appended whole; the last line of a cell and part counts
    cache/KEY/     a node: its checkpoint in `model/`, and `facts.json`, written last

A kill can cut the last line short; it is dropped when the folder is opened again.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..errors import PipelineError
from ..folders import write_whole
from .cells import FORMAT, Cell

Row = dict[str, Any]


@contextmanager
def opened(out: Path) -> Iterator[None]:
    """Hold a results folder, made if it is not there, for one run; what a killed run left half done is cleared away.

    Raises:
        PipelineError: another run holds it, it is another version's, or it is not a results folder.
    """
    mark = out / "matrix.json"
    if out.exists() and not mark.is_file() and (not out.is_dir() or any(p.name != "lock" for p in out.iterdir())):
        raise PipelineError(f"{out} exists and is not a matrix of ours; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise PipelineError(
                f"{out} is in use by another run (process {lock.read().strip() or 'unknown'}); wait for it, or choose "
                "another --out"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        if mark.is_file():
            check_version(out)
        else:
            write_whole(mark, json.dumps({"format": FORMAT, "package": version("gateskip-compress")}) + "\n")
        for half in (*out.glob("cache/.*"), *out.glob("cache/*/.*"), *out.glob("cache/*/scratch")):
            shutil.rmtree(half, ignore_errors=True)
        _drop_torn_line(out / "rows.jsonl")
        yield


def check_version(out: Path) -> None:
    """Raise PipelineError where a results folder was written by another version, or is none."""
    path = out / "matrix.json"
    try:
        found = json.loads(path.read_text())
        written, form = found["package"], found["format"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise PipelineError(f"{path} is missing or damaged ({error}): not a results folder of ours") from None
    if (written, form) != (version("gateskip-compress"), FORMAT):
        raise PipelineError(
            f"{out} holds results of version {written} (format {form}), this is {version('gateskip-compress')} "
            f"(format {FORMAT}); choose another --out, or delete it"
        )


def new_row(cell: Cell, part: str, settings: str, status: str, seed: int, **content: Any) -> Row:
    """A row that says what it is about, for whoever reads the file without us."""
    steps = [{name: fields} for name, fields in cell.steps]
    about = {"model": cell.model, "steps": steps, "strength": cell.strength, "budget": cell.budget, "seed": seed}
    return {"cell": cell.id, "part": part, "settings": settings, "status": status, **about, **content}


def append(out: Path, row: Row) -> None:
    """Add a row: one write of one line, so that it is there whole or not at all."""
    line = (json.dumps(row, allow_nan=False) + "\n").encode()
    descriptor = os.open(out / "rows.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_rows(out: Path) -> dict[tuple[str, str, str], Row]:
    """The last row of each cell, part and settings."""
    path = out / "rows.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    rows = [json.loads(line) for line in lines if line.strip()]
    return {(row["cell"], row["part"], row["settings"]): row for row in rows}


def _drop_torn_line(path: Path) -> None:
    if not path.is_file():
        return
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        write_whole(path, whole)
