"""Look for the stack that meets a goal at the least cost, by Optuna, in the same folder and rows as a matrix.

    value of a trial    1 + what its conditions are missed by, each relative to its own number; where all are met,
                        c / (1 + c) with the cost share c, which is below 1

Every trial is a cell like any other: what it was measured as stands in rows.jsonl, and a trial that was measured before
costs nothing. The study is a file beside them; a killed search goes on with it.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import GateSkipError, PipelineError
from ..folders import write_whole
from ..processor import cores
from ..track import untracked
from ..transforms import transform_named
from .cells import digest, list_cells
from .derive import derive
from .metrics import Goal, parse_goal
from .run import Matrix, in_processes, report_matrix
from .spec import Spec, Step
from .store import opened

MISSED = 1.0
"""Values from here on are of trials that do not meet the goal."""


def search(
    spec: Spec,
    out: Path,
    goal_text: str,
    *,
    most_s: float = 3600.0,
    most_trials: int | None = None,
    command: str = "",
    track: Any = untracked,
) -> dict[str, Any]:
    """Try stacks until time or trials are over, and write the report of all that were tried.

    Args:
        spec: Its `search.ranges` say what may change; the rest is measured as in a matrix.
        out: Results folder, a matrix's own or another.
        goal_text: Conditions as in `metrics`.
        most_s: No trial starts after so many seconds.
        most_trials: Trials at most, those of earlier runs included.
        command: What repeats it, for the report.
        track: As in `Context`.

    Returns:
        The report's content; its only goal is the one that was searched for.

    Raises:
        PipelineError: the spec has no ranges, a range cannot be read, or `out` is in use or holds something else.
        ValueError: the goal is wrong.
        GateSkipError: Optuna is not installed.
    """
    goal = parse_goal(goal_text, spec.known_metrics)
    if spec.search is None:
        raise PipelineError("this matrix has no search: add one, such as {ranges: {prune: {blocks: [1, 4]}}}")
    if len(spec.models) > 1:
        raise PipelineError(f"a search is for one model, and models has {len(spec.models)}; leave one")
    optuna = _optuna()
    for part, fields in spec.search.ranges.items():
        transform_named(part)
        for field, given in fields.items():
            _check_range(f"search.ranges.{part}.{field}", given)
    with opened(out):
        study = _study(optuna, spec, goal, out)
        complete = optuna.trial.TrialState.COMPLETE
        tried = [_steps(spec, trial.params) for trial in study.trials if trial.state == complete]
        ends, rounds = time.monotonic() + most_s, most_trials or 10**9
        for _ in track(range(max(0, rounds - len(tried))), "search"):
            if time.monotonic() > ends:
                break
            trial = study.ask()
            steps = _suggest(trial, spec.search.ranges)
            tried.append(steps)
            study.tell(trial, measured_value(spec, out, goal, steps))
        whole = _with_trials(spec, tried).model_copy(update={"goals": [str(goal)]})
        write_whole(out / "spec.json", json.dumps({"spec": whole.model_dump(), "command": command}, indent=1) + "\n")
        return report_matrix(out)


def measured_value(spec: Spec, out: Path, goal: Goal, steps: list[Step]) -> float:
    """Measure one stack, if it was not measured before, and say how good it is; a refused one is as bad as can be."""
    own = _with_trials(spec, [steps])
    matrix = Matrix(own, out)
    matrix.keep_refused()
    with in_processes(1, matrix.keep) as submit:
        for _ in matrix.measure_quality(submit, cores()):
            pass
    for cell in matrix.untimed() if spec.timing is not None else []:
        matrix.time(cell)
    report = derive(own, list_cells(own), matrix.rows, [goal], "")
    return value_of(goal, report["cells"][-1]["values"])


def value_of(goal: Goal, values: dict[str, float]) -> float:
    """What Optuna makes small; see above."""
    if any(condition.metric not in values for condition in goal.conditions):
        return MISSED + 10
    missed = sum(condition.missed_by(values[condition.metric]) for condition in goal.conditions)
    cost = values.get("cost_share", 1.0)
    return MISSED + min(missed, 10) if missed > 0 or not _met(goal, values) else cost / (1 + cost)


def _met(goal: Goal, values: dict[str, float]) -> bool:
    return all(condition.met(values[condition.metric]) for condition in goal.conditions)


def _with_trials(spec: Spec, tried: Sequence[list[Step]]) -> Spec:
    """The matrix of the original and these stacks."""
    named = {f"trial {i}": [{part: fields} for part, fields in steps] for i, steps in enumerate(tried, 1) if steps}
    return spec.model_copy(update={"stacks": [], "orders": None, "budgets": [], "baselines": named})


def _suggest(trial: Any, ranges: dict[str, dict[str, Any]]) -> list[Step]:
    """A stack that Optuna proposes: which parts, in the order of their stages, and their fields."""
    steps: list[Step] = []
    for part in sorted(ranges, key=lambda part: transform_named(part).stage):
        if not trial.suggest_categorical(part, [True, False]):
            continue
        fields = {}
        for field, given in ranges[part].items():
            name = f"{part}.{field}"
            if isinstance(given, dict) and len(given["of"]) == 1:
                (fields[field],) = given["of"]
            elif isinstance(given, dict):
                fields[field] = trial.suggest_categorical(name, given["of"])
            elif all(isinstance(end, int) for end in given):
                fields[field] = trial.suggest_int(name, *given)
            else:
                fields[field] = round(trial.suggest_float(name, *given), 3)
        steps.append((part, fields))
    return steps


def _steps(spec: Spec, params: dict[str, Any]) -> list[Step]:
    """A finished trial's stack."""
    assert spec.search is not None
    parts = sorted(spec.search.ranges, key=lambda part: transform_named(part).stage)
    found = [part for part in parts if params[part]]
    rounded = {name: round(value, 3) if isinstance(value, float) else value for name, value in params.items()}

    def chosen(part: str, field: str, given: Any) -> Any:
        return given["of"][0] if f"{part}.{field}" not in rounded else rounded[f"{part}.{field}"]

    ranges = spec.search.ranges
    return [(part, {field: chosen(part, field, given) for field, given in ranges[part].items()}) for part in found]


def _check_range(where: str, given: Any) -> None:
    whole = isinstance(given, dict) and list(given) == ["of"] and isinstance(given["of"], list) and given["of"]
    numbers = isinstance(given, list) and len(given) == 2 and all(isinstance(end, int | float) for end in given)
    if not whole and not (numbers and given[0] < given[1]):
        raise PipelineError(f"{where} = {given!r} must be [lowest, highest] or {{of: [one, another]}}")


def _study(optuna: Any, spec: Spec, goal: Goal, out: Path) -> Any:
    """The study of this goal and these ranges; a trial that a kill interrupted is tried again."""
    assert spec.search is not None
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(out / "search.log")))
    name = digest([str(goal), spec.search.ranges, spec.models, spec.seed])
    study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
    study.sampler = optuna.samplers.TPESampler(seed=spec.seed + len(study.trials))
    for trial in study.trials:
        if not trial.state.is_finished():
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            study.enqueue_trial(trial.params)
    return study


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise GateSkipError("gateskip search needs Optuna: pip install 'gateskip-compress[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
