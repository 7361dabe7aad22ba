"""Packed weights beside the checkpoint that they come from: packed once, then mapped, so that processes share them.

    native.avx2.packed   safetensors: the bytes of each matrix under its name; the metadata says what they belong to

A file is used only if it was packed by this version, for the same kernels and settings, from the checkpoint as it
stands: its manifest, which has the hash of every other file, is part of what must agree, and so must the SHA-256 of the
bytes themselves. Any other file is replaced.
"""

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..checkpoint import MANIFEST
from ..folders import write_whole

_LAYOUT = 3
"""Of the packed bytes; to be raised when `native/kernels.h` lays them out in another way, or others are kept."""
Bytes = UInt8[np.ndarray, " n"]


@dataclass
class PackedFile:
    """Reads matrices from a file, or takes what was packed and writes it there.

    Args:
        path: Of the file; None keeps nothing.
        belongs: What the bytes were packed from and for.
        found: Mapped matrices of a file that is there and belongs; None where there is none.
        made: Packed because there is none.
    """

    path: Path | None = None
    belongs: str = ""
    found: dict[str, Bytes] | None = None
    made: dict[str, Bytes] = field(default_factory=dict)

    @classmethod
    def beside(cls, checkpoint: Path, kernels: str, **settings: str) -> "PackedFile":
        """The file of a checkpoint of ours.

        Args:
            checkpoint: Its folder.
            kernels: That the bytes are laid out for.
            settings: Of the packing.
        """
        manifest = hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()
        facts = {"layout": _LAYOUT, "package": version("gateskip-compress"), "manifest": manifest, "kernels": kernels}
        path, belongs = checkpoint / f"native.{kernels}.packed", json.dumps(facts | settings, sort_keys=True)
        return cls(path, belongs, _mapped(path, belongs))

    def get(self, name: str, pack: Callable[[], Bytes]) -> Bytes:
        """A matrix as it was packed before, or packed now."""
        if self.found is not None:
            return self.found[name]
        packed = pack()
        if self.path is not None:
            self.made[name] = packed
        return packed

    def keep(self) -> None:
        """Write what was packed; where the folder takes no file, all is packed again next time."""
        if self.path is None or not self.made:
            return
        with suppress(OSError):
            write_whole(self.path, save(self.made, {"belongs": self.belongs, "sha256": _sha256(self.made)}))
        self.made = {}


def _mapped(path: Path, belongs: str) -> dict[str, Bytes] | None:
    """The matrices of a file, if it is whole and belongs."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:  # of the frameworks, torch alone maps
            facts = file.metadata() or {}
            if facts.get("belongs") != belongs:
                return None
            found = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
            return found if facts.get("sha256") == _sha256(found) else None
    except SafetensorError:  # cut off, or no such file at all
        return None


def _sha256(matrices: dict[str, Bytes]) -> str:
    digest = hashlib.sha256()
    for name in sorted(matrices):
        digest.update(matrices[name])
    return digest.hexdigest()
