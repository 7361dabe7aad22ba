"""The manifest of a checkpoint folder as it lies there: read, and held against the files it lists."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import CheckpointError

MANIFEST = "gateskip.json"
FORMAT = 1
METHOD = "gateskip"
"""How config.json names what transformers is to load by us."""


def manifest_content(folder: Path) -> dict[str, Any]:
    """The manifest's JSON: `steps`, `original`, `measured`, and the SHA-256 of `files`.

    Raises:
        CheckpointError: there is none, or it is damaged or of another format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {MANIFEST}: not a checkpoint of ours, or one only half copied")
    try:
        content = json.loads(path.read_text())
        form = content["format"]
        _ = content["files"], content["steps"], content["original"], content["measured"]
    except (json.JSONDecodeError, KeyError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); copy or make the checkpoint again") from error
    if form != FORMAT:
        raise CheckpointError(f"{path} has format {form}, this version reads {FORMAT}; use the version that wrote it")
    return content


def checked_manifest(folder: Path) -> dict[str, Any]:
    """The same, after all its files were held against their hashes.

    Raises:
        CheckpointError: as above, or a file is missing or changed.
    """
    content = manifest_content(folder)
    check_files(folder, content, content["files"])
    return content


def check_files(folder: Path, content: dict[str, Any], names: Iterable[str]) -> None:
    """Raise CheckpointError where one of a manifest's files is missing or changed."""
    for name in names:
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{folder} lacks {name}; copy or make the checkpoint again")
        if file_sha256(file) != content["files"][name]:
            raise CheckpointError(f"{file} is damaged: its SHA-256 is not the manifest's; copy or make it again")


def file_sha256(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
