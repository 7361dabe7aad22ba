"""What this machine has for the native runtime."""

import platform
import sys
from shutil import which
from typing import Any

from ..errors import RuntimeUnavailable
from ..processor import cores, processor_name
from .extension import extension

_READ_MEGABYTES = 256
"""Beyond the last-level cache of most machines."""


def doctor() -> dict[str, Any]:
    """Processor, kernels, compiler, cores, and how fast memory is read, by one thread and by one on each core."""
    facts: dict[str, Any] = {
        "processor": processor_name(),
        "architecture": platform.machine(),
        "cores": cores(),
        "python": sys.version.split()[0],
        "compiler_found": next((name for name in ("g++", "clang++", "c++") if which(name)), None),
    }
    try:
        native = extension()
    except RuntimeUnavailable as error:
        return {**facts, "native": False, "reason": str(error)}
    return {
        **facts,
        "native": True,
        "reason": None,
        "built_with": native.COMPILER,
        "kernels": [name for name, _ in native.kernels()],
        "read_bytes_per_s": {
            threads: round(native.read_bandwidth(threads, _READ_MEGABYTES, 5)) for threads in sorted({1, cores()})
        },
    }
