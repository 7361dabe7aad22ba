"""The processor, and how much of it there is to use."""

import os
import platform
from pathlib import Path


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def checked_threads(threads: int | None) -> int:
    """So many; None is one for each core.

    Raises:
        ValueError: there are not so many cores.
    """
    if threads is not None and not 1 <= threads <= cores():
        raise ValueError(f"threads {threads} must be from 1 to {cores()}, the cores here: more wait for each other")
    return cores() if threads is None else threads


def processor_name() -> str:
    """What the processor calls itself."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.is_file()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()
