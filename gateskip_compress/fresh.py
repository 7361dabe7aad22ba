"""Processes that nothing went before in: forked from a server that has imported the library and done nothing else.

They start in a moment, their peak memory is their own, and they end when the process that started them does, however
that ended.
"""

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from .errors import GateSkipError

_FORKS = "forkserver" in multiprocessing.get_all_start_methods()
_SERVER: Any = multiprocessing.get_context("forkserver" if _FORKS else "spawn")
_SERVER.set_forkserver_preload(
    ["gateskip_compress.jobs", "gateskip_compress.matrix.job", "gateskip_compress.matrix.timing"]
)


class ProcessFailed(Exception):
    """A process ended without doing its work; the message says how."""


def ended(process: BaseProcess) -> ProcessFailed:
    """What to raise about a process that is silent for good."""
    process.join(10)
    code = process.exitcode
    if code is None or code >= 0:
        return ProcessFailed(f"its process ended early, with code {code}")
    hint = "; was memory short?" if code == -signal.SIGKILL else ""
    return ProcessFailed(f"killed by {signal.Signals(-code).name}{hint}")


def start_server() -> None:
    """Let the server begin its imports now, beside what goes on here; else it starts with the first process."""
    if _FORKS:
        forkserver.ensure_running()


def fresh_process(work: Callable[..., None], *arguments: Any) -> tuple[BaseProcess, Any]:
    """Start `work(connection, *arguments)` and return the process and this end of the connection."""
    ours, theirs = _SERVER.Pipe()
    process = _SERVER.Process(target=_run, args=(work, theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def stop(process: BaseProcess) -> None:
    """End a process now, if it has not ended."""
    process.kill()
    process.join()


def fresh_rows(work: Callable[..., Iterator[Any]], *arguments: Any) -> Iterator[Any]:
    """What a generator yields when it runs in a process of its own.

    Raises:
        ProcessFailed: it ended early or raised an error; what came before is yielded first.
    """
    process, ends = fresh_process(_yield_all, work, *arguments)
    try:
        while True:
            kind, value = ends.recv()
            if kind == "row":
                yield value
            elif kind == "error":
                raise ProcessFailed(value)
            else:
                return
    except (EOFError, OSError):
        raise ended(process) from None
    finally:
        stop(process)


def fresh_value(work: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """What a function returns when it runs in a process of its own.

    Raises:
        ProcessFailed: it ended early or raised an error.
    """
    return next(fresh_rows(partial(_only, work), arguments, named))


def _only(work: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]) -> Iterator[Any]:
    yield work(*arguments, **named)


def _yield_all(ends: Connection, work: Callable[..., Iterator[Any]], *arguments: Any) -> None:
    for row in work(*arguments):
        ends.send(("row", row))
    ends.send(("end", None))


def _run(work: Callable[..., None], ends: Connection, *arguments: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer; this process ends with it
    threading.Thread(target=_follow_parent, daemon=True).start()
    from .source import quiet_transformers

    quiet_transformers()
    try:
        work(ends, *arguments)
    except GateSkipError as error:
        ends.send(("error", str(error)))
    except Exception as error:  # noqa: BLE001 told to the parent as what it is, whatever it is
        traceback.print_exc(file=sys.stderr)
        ends.send(("error", f"{type(error).__name__}: {error}"))


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
