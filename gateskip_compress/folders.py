"""Folders and files that are written whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target` that takes its name, and its place, once all inside the `with` went well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield fresh
        fresh.chmod(0o755)  # mkdtemp makes it private
        # the old folder goes aside first, so that a kill in between deletes neither
        old = fresh.with_name(f"{fresh.name}.old")
        if target.exists():
            target.rename(old)
        fresh.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def write_whole(path: Path, data: str | bytes) -> None:
    """Write a file beside, then in one move put it in place."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def disk_bytes(folder: Path) -> int:
    """Size of the weight files in a model folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
