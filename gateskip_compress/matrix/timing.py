"""Timed cells: one at a time, each sample paired with one of the original, taken right after it.

Cell and original each have a process of their own; while one runs, the other waits. A drift of the machine hits both,
and drops out of the ratio of a pair. Peak memory is the cell process's own while it decodes, from the loaded (natively:
and lowered) model on, less what the process held before there was a model; the peak until then is in the row too.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from ..errors import GateSkipError
from ..fresh import ProcessFailed, ended, fresh_process, stop
from ..gating.turning import budget
from ..measure import Stopwatch, Watch, environment, forget_peak, held_bytes, peak_bytes
from ..quantization.linear import unpacked
from ..runtime.choose import why_not_native
from ..runtime.extension import kernel_names
from ..runtime.lowering import lower
from ..runtime.session import Session
from ..runtime.watch import SessionWatch
from ..source import device_named, load
from .spec import Timing
from .store import Row

Prompts = list[list[list[list[int]]]]
"""For each of `Timing.sizes` the batches that are read in turn, sample by sample: token ids."""


@dataclass(frozen=True)
class Subject:
    """A model to time: its checkpoint, the budget to turn to, and the threads of torch."""

    folder: Path
    budget: float | None
    threads: int


class Rival:
    """A process that holds one model and takes one sample whenever it is asked.

    Args:
        process: It.
        ends: Our end of the connection.
    """

    def __init__(self, process: Any, ends: Connection) -> None:
        self.process, self.ends = process, ends

    def ask(self, *question: Any) -> Any:
        """Send a request and wait for what comes of it.

        Raises:
            ValueError: the model refuses it, with the reason.
            ProcessFailed: the process ended, or an error ended it.
        """
        self.begin(*question)
        return self.answer()

    def begin(self, *question: Any) -> None:
        """Send a request, whose answer must be taken before the next: so two processes work side by side."""
        try:
            self.ends.send(question)
        except OSError:
            raise ended(self.process) from None

    def answer(self) -> Any:
        """What came of a request; raises as `ask` does."""
        try:
            kind, answer = self.ends.recv()
        except (EOFError, OSError):
            raise ended(self.process) from None
        if kind == "refused":
            raise ValueError(answer)
        if kind == "error":
            raise ProcessFailed(answer)
        return answer


@contextmanager
def rival(subject: Subject, timing: Timing) -> Iterator[Rival]:
    """A process that is at loading a model; what keeps the native runtime from it is its first answer."""
    process, ends = fresh_process(_serve, subject, timing)
    try:
        found = Rival(process, ends)
        found.begin("load")
        yield found
    finally:
        stop(process)


def time_pair(cell: Rival, original: Rival, timing: Timing, prompts: Prompts) -> Row:
    """Samples of every size, cell and original in turn, and the cell's memory; a size that is refused says why.

    They load side by side, and are timed in turn. Both read a passage, then both the next: what gates skip and drafts
    gain depends on the text.

    Raises:
        ValueError: the native runtime was asked for, and cannot run one of them.
    """
    why_not = next((said for said in [cell.answer(), original.answer()] if said is not None), None)
    if timing.runtime == "native" and why_not is not None:
        raise ValueError(why_not)
    native = timing.runtime != "torch" and why_not is None
    for who in (cell, original):
        who.begin("take", native)
    runtime, _ = [who.answer() for who in (cell, original)]
    sizes = []
    for (batch, prompt_tokens), passages in zip(timing.sizes, prompts, strict=True):
        size: Row = {"batch": batch, "prompt_tokens": prompt_tokens, "new_tokens": timing.new_tokens}
        try:
            samples: dict[str, list[float]] = {}
            for who in (cell, original):
                who.ask("prepare", passages[0])
            for run in range(timing.runs):
                for kind in ("prefill", "decode"):
                    for name, who in (("", cell), ("original_", original)):
                        seconds = who.ask(kind, passages[run % len(passages)])
                        samples.setdefault(f"{name}{kind}_s", []).append(seconds)
            size |= {**samples, **cell.ask("accepted")}
        except ValueError as error:
            size["refused"] = str(error)
        sizes.append(size)
    said = why_not if timing.runtime == "auto" else None
    return {"runtime": runtime, "not_native": said, "sizes": sizes, **cell.ask("memory")}


@dataclass
class _Stand:
    """What a timed process keeps between requests."""

    subject: Subject
    timing: Timing
    held: ExitStack = field(default_factory=ExitStack)
    before_bytes: int = 0
    session: Session | None = None
    watch: Watch | None = None
    loading_bytes: int = 0
    whole: bool = False

    def load(self) -> str | None:
        torch.set_num_threads(self.subject.threads)
        self.before_bytes = held_bytes(device_named("auto"))
        self.model, _ = load(str(self.subject.folder), device="auto")
        if self.subject.budget is not None:
            self.held.enter_context(budget(self.model, self.subject.budget))
        return why_not_native(self.model)

    def take(self, native: bool) -> str:
        if native:
            rows, threads = max(batch for batch, _ in self.timing.sizes), self.subject.threads
            self.session = lower(self.model, context_tokens=self._context, rows=rows, threads=threads, release=True)
        elif self.timing.unpack:
            self.held.enter_context(unpacked(self.model))
        self.loading_bytes = peak_bytes(self.model.device)
        self.whole = not forget_peak(self.model.device)
        return f"native, {kernel_names()[0]}" if native else "torch"

    def prepare(self, ids: list[list[int]]) -> None:
        prompt = torch.tensor(ids, device=self.model.device)
        self.watch = None  # its memory goes before there is another
        if self.session is not None:
            self.watch = SessionWatch(prompt, self.timing.new_tokens, self.session, speculate=self.speculates)
        else:
            self.watch = Stopwatch(prompt, self.timing.new_tokens, self.model, speculate=self.speculates)
        self.watch.warm_up()

    def prefill(self, ids: list[list[int]]) -> float:
        return self._at(ids).prefill()

    def decode(self, ids: list[list[int]]) -> float:
        return self._at(ids).decode()

    def accepted(self) -> Row:
        counts = self._ready.acceptance
        per_verify = (counts.accepted + counts.verifies) / counts.verifies if counts.verifies else None
        return {"accepted_share": counts.accepted_share, "tokens_per_verify": per_verify}

    def memory(self) -> Row:
        peak = peak_bytes(self.model.device)
        return {
            "memory_bytes": peak - self.before_bytes,
            "process_peak_bytes": peak,
            "loading_peak_bytes": self.loading_bytes,
            "peak_includes_loading": self.whole,
            "environment": environment(self.model),
        }

    @property
    def speculates(self) -> bool:
        return getattr(self.model, "self_speculation", None) is not None

    @property
    def _context(self) -> int:
        return max(tokens for _, tokens in self.timing.sizes) + self.timing.new_tokens + 1

    @property
    def _ready(self) -> Watch:
        if self.watch is None:
            raise ValueError("a prompt comes first")
        return self.watch

    def _at(self, ids: list[list[int]]) -> Watch:
        """Set to another prompt of the same size."""
        self._ready.prompt = torch.tensor(ids, device=self.model.device)
        return self._ready


def _serve(ends: Connection, subject: Subject, timing: Timing) -> None:
    """Answer requests until the other end is closed."""
    stand = _Stand(subject, timing)
    while True:
        try:
            name, *arguments = ends.recv()
        except EOFError:
            return
        try:
            ends.send(("done", getattr(stand, name)(*arguments)))
        except (GateSkipError, ValueError) as error:
            ends.send(("refused", str(error)))
