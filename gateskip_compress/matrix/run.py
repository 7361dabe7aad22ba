"""Run a matrix into a folder: quality cells in processes or on a Ray cluster, then timed cells one at a time.

A killed run goes on where it was: finished cells have their rows, finished nodes their checkpoints. What failed is
tried again by the next run, what was refused is not.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from ..errors import CalibrationError, GateSkipError, PipelineError
from ..folders import write_whole
from ..fresh import ProcessFailed, fresh_rows
from ..processor import cores
from ..report.matrix import write_matrix
from ..text import SELF, passages
from ..track import untracked
from .cells import Cell, Node, list_cells, nodes_of, quality_settings, timing_settings
from .derive import derive
from .harness import check_hub
from .job import Job, changes_only_decoding, run_job
from .spec import Spec
from .store import Row, append, check_version, new_row, opened, read_rows
from .timing import Prompts, Subject, rival, time_pair

FINAL = ("done", "refused")
"""Statuses that another run does not try again."""
Outcome = tuple[list[Row], str | None]
"""Rows that are not kept yet, and why the rest is missing."""
Submit = Callable[[Job], "Future[Outcome]"]


def run_matrix(
    spec: Spec,
    out: Path,
    *,
    workers: int = 1,
    ray_address: str | None = None,
    goals: Sequence[str] = (),
    command: str = "",
    track: Any = untracked,
) -> dict[str, Any]:
    """Measure what is not yet measured, and write the report.

    Args:
        spec: The matrix.
        out: Results folder; one of an earlier run of this version goes on.
        workers: Processes for quality, each with its share of the cores. Timed cells always have the machine.
        ray_address: Spread quality over this Ray cluster instead, whose machines all see `out`.
        goals: In place of the spec's.
        command: What repeats it, for the report.
        track: As in `Context`.

    Returns:
        The report's content.

    Raises:
        PipelineError: `out` is in use, or holds something else.
        CalibrationError: tasks are at a hub, and there is none.
        ValueError: a goal or `workers` is wrong.
    """
    if workers < 1:
        raise ValueError(f"workers {workers} must be at least 1")
    spec.parsed_goals(list(goals))
    if spec.tasks is not None and spec.tasks.folder is None:
        check_hub(spec.tasks.names)
    with opened(out):
        matrix = Matrix(spec, out)
        write_whole(out / "spec.json", json.dumps({"spec": spec.model_dump(), "command": command}, indent=1) + "\n")
        matrix.keep_refused()
        threads = max(1, cores() // workers)
        pool = on_ray(ray_address, threads) if ray_address else in_processes(workers, matrix.keep)
        with pool as submit:
            for _ in track(matrix.measure_quality(submit, threads), "make and measure", len(matrix.nodes_to_do)):
                pass
        if spec.timing is not None:
            for cell in track(matrix.untimed(), "time"):
                matrix.time(cell)
        return report_matrix(out, goals)


def report_matrix(out: Path, goals: Sequence[str] = ()) -> dict[str, Any]:
    """Write the report of what a folder holds by now; returns its content.

    Raises:
        PipelineError: it is another version's, or no results folder.
        ValueError: a goal is wrong.
    """
    check_version(out)
    if not (out / "spec.json").is_file():
        raise PipelineError(f"{out} has no spec.json: its matrix never began")
    saved = json.loads((out / "spec.json").read_text())
    spec = Spec.model_validate(saved["spec"])
    report = derive(spec, list_cells(spec), read_rows(out), spec.parsed_goals(list(goals)), saved["command"])
    write_matrix(report, out)
    return report


@dataclass
class Matrix:
    """A matrix and its folder, while it runs."""

    spec: Spec
    out: Path

    def __post_init__(self) -> None:
        self.cells = list_cells(self.spec)
        self.nodes = nodes_of(self.cells, self.spec)
        self.settings = {"quality": quality_settings(self.spec), "speed": timing_settings(self.spec)}
        self.rows = read_rows(self.out)
        self.nodes_to_do = self._needed()

    def keep(self, row: Row) -> None:
        """Append a row, and know it."""
        append(self.out, row)
        self.rows[row["cell"], row["part"], row["settings"]] = row

    def row(self, cell: Cell, part: str) -> Row | None:
        """What is known of a cell."""
        return self.rows.get((cell.id, part, self.settings[part]))

    def keep_refused(self) -> None:
        """Rows for what the pipeline does not build."""
        for cell in self.cells:
            if cell.refusal is not None and self.row(cell, "quality") is None:
                self._missed(cell, "quality", "refused", cell.refusal)

    def measure_quality(self, submit: Submit, threads: int) -> Iterator[Node]:
        """Make nodes, parents first, and measure their cells; yields each node that is over, made or not."""
        waiting = [self.nodes[key] for key in self.nodes_to_do]
        running: dict[Future[Outcome], Node] = {}
        lost: dict[str, tuple[str, str]] = {}
        while waiting or running:
            held = {node.key for node in (*waiting, *running.values())}
            for node in [
                node for node in waiting if node.parent not in held and node.original not in held - {node.key}
            ]:
                waiting.remove(node)
                if node.parent in lost:
                    status, reason = lost[node.key] = lost[node.parent]
                    self._lose(node, status, f"a step before its last: {reason}")
                    yield node
                else:
                    running[submit(self._job(node, threads))] = node
            finished, _ = wait(running, return_when=FIRST_COMPLETED) if running else (set(), None)
            for future in finished:
                node = running.pop(future)
                outcome = self._finish(node, future)
                if outcome is not None:
                    lost[node.key] = outcome
                yield node

    def untimed(self) -> list[Cell]:
        """Cells to time."""
        able = [c for c in self.cells if (row := self.row(c, "quality")) is not None and row["status"] == "done"]
        return [c for c in able if (row := self.row(c, "speed")) is None or row["status"] not in FINAL]

    def time(self, cell: Cell) -> None:
        """Time one cell, with nothing beside it, and keep its row."""
        timing, cache = self.spec.timing, self.out / "cache"
        assert timing is not None
        node = self.nodes[cell.node]
        subject = Subject(cache / node.key / "model", cell.budget, cores())
        beside = Subject(cache / node.original / "model", None, cores())
        try:
            prompts = self._prompts(cache / node.original)
            with rival(subject, timing) as own, rival(beside, timing) as original:
                found = time_pair(own, original, timing, prompts)
        except (GateSkipError, ValueError) as error:
            self._missed(cell, "speed", "refused", str(error))
        except ProcessFailed as error:
            self._missed(cell, "speed", "failed", str(error))
        else:
            self.keep(new_row(cell, "speed", self.settings["speed"], "done", self.spec.seed, **found))

    def _needed(self) -> list[str]:
        """Keys of the nodes to visit, parents first: those with cells to measure, and what these stand on."""
        made = {key for key in self.nodes if (self.out / "cache" / key / "facts.json").is_file()}
        untimed = {cell.node for cell in self.cells if self.spec.timing and not self._final(cell, "speed")}
        needed: set[str] = set()
        for node in reversed(self.nodes.values()):
            missing = node.key not in made and (node.key in needed or node.key in untimed)
            if self._unmeasured(node) or missing:
                above = {node.parent} if node.parent and node.key not in made else set()
                needed |= {node.key} | {key for key in {node.original} | above if key not in made}
        return [key for key in self.nodes if key in needed]

    def _final(self, cell: Cell, part: str) -> bool:
        row = self.row(cell, part)
        refused = cell.refusal is not None or (
            (q := self.row(cell, "quality")) is not None and q["status"] == "refused"
        )
        return refused or (row is not None and row["status"] in FINAL)

    def _unmeasured(self, node: Node) -> tuple[Cell, ...]:
        return tuple(c for c in self.cells if c.node == node.key and not self._final(c, "quality"))

    def _job(self, node: Node, threads: int) -> Job:
        cells = self._unmeasured(node)
        same = None
        if changes_only_decoding(node):
            before = next((c for c in self.cells if c.node == node.parent and c.budget is None), None)
            same = self.row(before, "quality") if before is not None else None
            same = same if same is not None and same["status"] == "done" else None
        return Job(self.spec, self.out / "cache", node, cells, self.settings["quality"], same, threads)

    def _finish(self, node: Node, future: "Future[Outcome]") -> tuple[str, str] | None:
        """Keep a job's rows; returns status and reason where the node was not made."""
        rows, failure = future.result()
        status = "failed"
        for row in rows:
            if row["part"] == "node":
                status, failure = row["status"], row["reason"]
            else:
                self.keep(row)
        if failure is None:
            return None
        self._lose(node, status, failure)
        made = (self.out / "cache" / node.key / "facts.json").is_file()
        return None if made else (status, failure)

    def _lose(self, node: Node, status: str, reason: str) -> None:
        for cell in self._unmeasured(node):
            self._missed(cell, "quality", status, reason)

    def _missed(self, cell: Cell, part: str, status: str, reason: str) -> None:
        self.keep(new_row(cell, part, self.settings[part], status, self.spec.seed, reason=reason))

    def _prompts(self, original: Path) -> Prompts:
        """Held-out text, cut into prompts of every size.

        Raises:
            CalibrationError: it is too short for one.
        """
        text, timing = self.spec.evaluation, self.spec.timing
        assert timing is not None
        if text.text == SELF:
            ids = torch.tensor(json.loads((original / "calibration.json").read_text())).flatten()
        else:
            tokenizer = AutoTokenizer.from_pretrained(original / "model")
            found = passages(text.text, tokenizer, text.window_tokens, text.most_tokens)
            ids = torch.cat([passage.ids for passage in found])
        prompts: Prompts = []
        for batch, tokens in timing.sizes:
            if len(ids) < batch * tokens:
                raise CalibrationError(
                    f"timing batch {batch} of {tokens} prompt tokens: the evaluation text, which prompts are cut from, "
                    f"has {len(ids)} tokens; lower timing.prompt_tokens, or raise evaluation.most_tokens"
                )
            count = len(ids) // (batch * tokens)
            prompts.append(ids[: count * batch * tokens].view(count, batch, tokens).tolist())
        return prompts


@contextmanager
def in_processes(workers: int, keep: Callable[[Row], None]) -> Iterator[Submit]:
    """Jobs on this machine, each in a fresh process; rows are kept as they come."""
    with ThreadPoolExecutor(workers) as pool:
        try:
            yield lambda job: pool.submit(_collect, job, keep)
        except BaseException:  # Ctrl-C above all: what runs is ended, not waited for
            pool.shutdown(wait=False, cancel_futures=True)
            for process in active_children():
                process.kill()
            raise


def _collect(job: Job, keep: Callable[[Row], None] | None) -> Outcome:
    rows: list[Row] = []
    try:
        for row in fresh_rows(run_job, job):
            if row["part"] == "node" or keep is None:
                rows.append(row)
            else:
                keep(row)
    except ProcessFailed as error:
        return rows, str(error)
    return rows, None


def on_ray(address: str, threads: int) -> AbstractContextManager[Submit]:
    """Jobs on a Ray cluster, each in a process of its own that takes `threads` of a machine's cores.

    Raises:
        GateSkipError: ray is not installed, or there is no cluster at the address.
    """
    from .on_ray import cluster

    return cluster(address, threads, partial(_collect, keep=None))
