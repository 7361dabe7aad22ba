"""Packed weights beside the checkpoint that they come from: packed once, then read.

    native.avx2.packed   safetensors: a blueprint's arrays; the metadata has the blueprint, and says what it belongs to

A file is used only if it was packed by this version, for the same kernels and settings, from the checkpoint as it
stands: its manifest, which has the hash of every other file, is part of what must agree, and so must the SHA-256 of the
content itself. Any other file is replaced.
"""

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import numpy as np
from safetensors.numpy import save

from ..folders import write_whole
from ..manifest import MANIFEST
from .blueprint import Arrays, Blueprint

_LAYOUT = 7
"""Of the packed bytes; to be raised when `native/kernels.h` lays them out in another way, or others are kept."""
_TYPES = {"U8": np.uint8, "U16": np.uint16, "F32": np.float32}
_LINE = 64
"""Bytes of a cache line."""
_LOTS = 8
"""Of arrays, which threads take one by one."""
_Made = TypeVar("_Made")


class Sample(TypedDict):
    """Ids of a prompt, and their text, special tokens left out."""

    ids: list[int]
    text: str


@dataclass(frozen=True)
class Packed:
    """What a file holds.

    Args:
        plan: Of the model.
        arrays: That it names.
        sample: What the checkpoint's tokenizer made of `prompt.SAMPLE`; None where it had none.
    """

    plan: Blueprint
    arrays: Arrays
    sample: Sample | None

    def texts(self) -> dict[str, str]:
        """The part that is JSON."""
        return {"plan": json.dumps(self.plan, sort_keys=True), "sample": json.dumps(self.sample)}

    def in_one_piece(self) -> "Packed":
        """The same, with its arrays copied into a single one, for which numpy asks the system for huge pages.

        Decoding reads all of it at every token; in pages of 4 KB a tenth of a step goes to looking up addresses.
        """
        begins, size = {}, 0
        for name, array in self.arrays.items():
            begins[name] = size
            size += -(-array.nbytes // _LINE) * _LINE
        piece = np.empty(size + _LINE, np.uint8)
        piece = piece[-piece.ctypes.data % _LINE :]

        def copied(name: str) -> np.ndarray:
            array, begin = self.arrays[name], begins[name]
            place = piece[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
            place[...] = array
            return place

        return replace(self, arrays=_of_each(copied, self.arrays))


@dataclass(frozen=True)
class PackedFile:
    """Where one is, or would be.

    Args:
        path: Of the file.
        belongs: What its content is packed from and for.
    """

    path: Path
    belongs: str

    @classmethod
    def beside(cls, checkpoint: Path, kernels: str, *, floats: str, head: str) -> "PackedFile":
        """The file of a checkpoint of ours.

        Args:
            checkpoint: Its folder.
            kernels: That the bytes are laid out for.
            floats: As in `lower`.
            head: As there.
        """
        manifest = hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()
        facts = {"layout": _LAYOUT, "package": version("gateskip-compress"), "manifest": manifest, "kernels": kernels}
        belongs = json.dumps(facts | {"floats": floats, "head": head}, sort_keys=True)
        return cls(checkpoint / f"native.{kernels}.packed", belongs)

    def read(self) -> Packed | None:
        """Its content, in one piece; None where there is none, or it is damaged or of something else."""
        try:
            facts, arrays = _mapped(self.path)
            if facts["belongs"] != self.belongs:
                return None
            found = Packed(json.loads(facts["plan"]), arrays, json.loads(facts["sample"])).in_one_piece()
            return found if facts["sha256"] == _sha256(found) else None
        except (OSError, ValueError, KeyError, TypeError):  # not there, cut off, or no such file at all
            return None

    def write(self, content: Packed) -> None:
        """Keep what was packed; where the folder takes no file, all is packed again next time."""
        facts = {"belongs": self.belongs, "sha256": _sha256(content), **content.texts()}
        with suppress(OSError):
            write_whole(self.path, save({name: np.ascontiguousarray(a) for name, a in content.arrays.items()}, facts))


def _mapped(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metadata and arrays of a safetensors file, where they lie: its own library maps for torch alone."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > path.stat().st_size:
            raise ValueError(f"{path} is shorter than its header of {size} bytes")
        header = json.loads(file.read(size))
    facts, arrays, content = header.pop("__metadata__", {}), {}, np.memmap(path, np.uint8, "r", 8 + size)
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        arrays[name] = content[begin:end].view(_TYPES[entry["dtype"]]).reshape(entry["shape"])
    return facts, arrays


def _sha256(content: Packed) -> str:
    def own(name: str) -> str:
        return hashlib.sha256(np.ascontiguousarray(content.arrays[name])).hexdigest()

    of_arrays = _of_each(own, content.arrays)
    return hashlib.sha256(json.dumps([content.texts(), of_arrays], sort_keys=True).encode()).hexdigest()


def _of_each(make: Callable[[str], _Made], arrays: Arrays) -> dict[str, _Made]:
    """What is made of each array by its name, in lots, some at a time: copying and hashing leave others free to run."""
    names = sorted(arrays, key=lambda name: arrays[name].nbytes, reverse=True)
    with ThreadPoolExecutor(_LOTS) as pool:
        lots = pool.map(lambda lot: {name: make(name) for name in lot}, [names[i::_LOTS] for i in range(_LOTS)])
        return {name: made for lot in lots for name, made in lot.items()}
