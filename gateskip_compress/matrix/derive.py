"""From rows to what a report says: ratios with their intervals, what stacking gained and cost, fronts, goals.

    speed-up               original's seconds over the cell's, median over pairs; its bounds are the least and the most
    stacking efficiency    speed-up of a stack over the product of its parts' speed-ups
    interaction            log perplexity ratio of a stack less the sum of its parts'
    a part's own effect    in the smallest of the stack's subsets that was measured with the part and without it

All cells of a model read the same passages, so quality is compared passage by passage: intervals come from resampling
passages, with one draw for all cells. Pure functions; no model is touched.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations, product
from statistics import geometric_mean, median
from typing import Any

import torch
from torch import Tensor

from ..quality import bootstrap_means, interval
from .cells import Cell, quality_settings, timing_settings
from .metrics import Goal
from .spec import Spec, Step
from .store import Row

FRONTS = ("decode_speedup", "disk_share", "memory_share", "macs_share")
"""What perplexity is plotted against; a front holds the cells that no other beats in both."""
SAVES_MEMORY, SAVES_SPEED = 0.95, 1.05
"""A share of the original's memory below the one, a decode speed-up above the other, is a saving; the rest is noise."""
_COSTS = ("disk_share", "memory_share", "macs_share")
Entry = dict[str, Any]


def derive(
    spec: Spec, cells: Sequence[Cell], rows: Mapping[tuple[str, str, str], Row], goals: Sequence[Goal], command: str
) -> dict[str, Any]:
    """The content of a report, as JSON types.

    Args:
        spec: The matrix.
        cells: Its cells.
        rows: As `store.read_rows` gives them.
        goals: To judge cells by.
        command: What repeats the run.
    """
    settings = quality_settings(spec), timing_settings(spec)
    entries: list[Entry] = []
    for model in spec.models:
        own = [cell for cell in cells if cell.model == model]
        quality = [rows.get((cell.id, "quality", settings[0])) for cell in own]
        speed = [rows.get((cell.id, "speed", settings[1])) for cell in own]
        entries += _entries(spec, own, quality, speed)
    known = spec.known_metrics
    judged = [judge(goal, entries) for goal in goals]
    for entry in entries:
        entry["verdicts"] = [goal.verdict(entry["values"], entry["bounds"]) for goal in goals]
    done = [entry for entry in entries if entry["status"] == "done"]
    columns = [name for name in spec.metrics if any(name in entry["values"] for entry in done)]
    return {
        "models": spec.models,
        "command": command,
        "environment": next((e["environment"] for e in done), {}),
        "evaluation": spec.evaluation.model_dump(),
        "tasks": spec.tasks and spec.tasks.model_dump(),
        "timing": spec.timing and spec.timing.model_dump(),
        "runtimes": sorted({e["speed"]["runtime"] for e in done if (e["speed"] or {}).get("status") == "done"}),
        "metrics": {name: asdict(metric) for name, metric in known.items()},
        "columns": columns,
        "parts": list(spec.parts),
        "strengths": spec.strengths,
        "cells": entries,
        "pairs": pairs(spec.parts, entries, spec.orders),
        "orders": order_study(entries),
        "goals": judged,
        "fronts": {name: _front(done, name) for name in FRONTS},
        "counts": {status: sum(e["status"] == status for e in entries) for status in _STATUSES},
    }


_STATUSES = ("done", "refused", "failed", "missing")


def _entries(
    spec: Spec, cells: Sequence[Cell], quality: Sequence[Row | None], speed: Sequence[Row | None]
) -> list[Entry]:
    """One entry a cell of one model."""
    first = next((q for c, q in zip(cells, quality, strict=True) if c.kind == "original"), None)
    original = first if first is not None and first["status"] == "done" else None
    timed = next((s for c, s in zip(cells, speed, strict=True) if c.kind == "original"), None)
    entries: list[Entry] = []
    for cell, q, s in zip(cells, quality, speed, strict=True):
        status, reason = _status(cell, q)
        values: dict[str, float] = {}
        bounds: dict[str, tuple[float, float]] = {}
        if q is not None and status == "done":
            _quality_values(q, original, values, bounds)
        if s is not None and s["status"] == "done":
            _speed_values(s, timed, values, bounds)
        entries.append(_entry(spec, cell, status, reason, values, bounds, q, s))
    stacked(entries)
    costs = [name for name in _COSTS if all(name in e["values"] for e in entries if e["status"] == "done")]
    decoded = all("decode_speedup" in e["values"] for e in entries if e["status"] == "done")
    for entry in entries:
        if entry["status"] == "done" and (costs or decoded):
            parts = [entry["values"][name] for name in costs]
            parts += [1 / entry["values"]["decode_speedup"]] if decoded else []
            entry["values"]["cost_share"] = geometric_mean(parts)
    return entries


def _status(cell: Cell, row: Row | None) -> tuple[str, str | None]:
    if cell.refusal is not None:
        return "refused", cell.refusal
    return ("missing", "not measured yet") if row is None else (row["status"], row.get("reason"))


def _entry(
    spec: Spec,
    cell: Cell,
    status: str,
    reason: str | None,
    values: dict[str, float],
    bounds: dict[str, tuple[float, float]],
    quality: Row | None,
    speed: Row | None,
) -> Entry:
    recipe = spec.recipe(cell.model, list(cell.steps)).model_dump()
    untimed = None if speed is None or speed["status"] == "done" else f"{speed['status']}: {speed['reason']}"
    return {
        "id": cell.id,
        "name": name_of(cell),
        "model": cell.model,
        "kind": cell.kind,
        "strength": cell.strength,
        "parts": list(cell.parts),
        "steps": [{name: fields} for name, fields in cell.steps],
        "budget": cell.budget,
        "status": status,
        "reason": reason,
        "untimed": untimed,
        "values": values,
        "bounds": bounds,
        "saves": saves(values),
        "environment": (quality or {}).get("environment", {}),
        "recipe": recipe,
        "quality": quality,
        "speed": speed,
    }


def name_of(cell: Cell) -> str:
    """What people call a cell; its strength stands apart."""
    if cell.kind == "baseline":
        return cell.strength
    name = " + ".join(cell.parts) or "original"
    return name if cell.budget is None else f"{name} at budget {cell.budget:g}"


def saves(values: Mapping[str, float]) -> str | None:
    """`memory`, `speed`, `both` or `neither`; None where it was not timed."""
    memory, speed = values.get("memory_share"), values.get("decode_speedup")
    if memory is None or speed is None:
        return None
    less, faster = memory < SAVES_MEMORY, speed > SAVES_SPEED
    return "both" if less and faster else "memory" if less else "speed" if faster else "neither"


def _quality_values(
    row: Row, original: Row | None, values: dict[str, float], bounds: dict[str, tuple[float, float]]
) -> None:
    quality, samples = row["quality"], row["samples"]
    values |= {"perplexity": quality["perplexity"], "macs_per_token": quality["macs_per_token"]}
    bounds["perplexity"] = quality["perplexity_low"], quality["perplexity_high"]
    values |= {"disk_bytes": row["disk_bytes"], "compression_s": row["compression"]["seconds"]}
    if row["compression"]["peak_bytes"] is not None:
        values["compression_peak_bytes"] = row["compression"]["peak_bytes"]
    counts = torch.tensor(samples["tokens"])
    for name, key in (("kl_nats", "divergences_nats"), ("top1_agreement", "agreements")):
        if samples[key]:
            values[name] = quality[name]
            bounds[name] = interval(bootstrap_means(torch.tensor(samples[key]).double(), counts))
    for name, right in row["answers"].items():
        values[f"accuracy_{name}"] = _mean([normalised for _, normalised in right])
    if original is None:
        return
    values["perplexity_ratio"] = quality["perplexity"] / original["quality"]["perplexity"]
    bounds["perplexity_ratio"] = interval((_loss_draws(row) - _loss_draws(original)).exp())
    values["macs_share"] = quality["macs_per_token"] / original["quality"]["macs_per_token"]
    values["disk_share"] = row["disk_bytes"] / original["disk_bytes"]
    if row["answers"]:
        values["accuracy"], bounds["accuracy"] = _accuracy(row["answers"], None)
        values["accuracy_change"], bounds["accuracy_change"] = _accuracy(row["answers"], original["answers"])


def _accuracy(
    answers: Mapping[str, Sequence[Any]], less: Mapping[str, Sequence[Any]] | None
) -> tuple[float, tuple[float, float]]:
    """Mean over tasks of the share answered rightly, or of the change from other answers to the same items."""
    draws, shares = [], []
    for name, given in answers.items():
        right = torch.tensor([float(normalised) for _, normalised in given]).double()
        if less is not None:
            right = right - torch.tensor([float(normalised) for _, normalised in less[name]]).double()
        draws.append(bootstrap_means(right, torch.ones(len(right), dtype=torch.long)))
        shares.append(float(right.mean()))
    return _mean(shares), interval(torch.stack(draws).mean(0))


def _speed_values(
    row: Row, original: Row | None, values: dict[str, float], bounds: dict[str, tuple[float, float]]
) -> None:
    values["memory_bytes"] = row["memory_bytes"]
    if original is not None and original["status"] == "done":
        values["memory_share"] = row["memory_bytes"] / original["memory_bytes"]
    for index, size in enumerate(row["sizes"]):
        if "refused" in size:
            continue
        at = "" if index == 0 else f"_b{size['batch']}_t{size['prompt_tokens']}"
        for kind, tokens in (("prefill", size["prompt_tokens"]), ("decode", size["new_tokens"])):
            own, base = size[f"{kind}_s"], size[f"original_{kind}_s"]
            ratios = [o / c for c, o in zip(own, base, strict=True)]
            values[f"{kind}_speedup{at}"], bounds[f"{kind}_speedup{at}"] = median(ratios), (min(ratios), max(ratios))
            all_tokens = size["batch"] * tokens
            values[f"{kind}_tokens_per_s{at}"] = all_tokens / median(own)
            bounds[f"{kind}_tokens_per_s{at}"] = all_tokens / max(own), all_tokens / min(own)
        first = [1000 * s for s in size["prefill_s"]]
        values[f"time_to_first_token_ms{at}"] = median(first)
        bounds[f"time_to_first_token_ms{at}"] = min(first), max(first)
        if index == 0 and size["accepted_share"] is not None:
            values["accepted_share"] = size["accepted_share"]


def stacked(entries: Sequence[Entry]) -> None:
    """Add stacking efficiency and interaction to the entries of stacks of one model, in place."""
    found = {_key(e["steps"]): e for e in entries if e["status"] == "done" and e["budget"] is None}
    for entry in found.values():
        steps = entry["steps"]
        if len(steps) < 2:
            continue
        effects = [_effect(steps, index, found) for index in range(len(steps))]
        if any(effect is None for effect in effects):
            continue
        known = [effect for effect in effects if effect is not None]
        entry["parts_from"] = [[with_["id"], without["id"]] for with_, without in known]
        speeds = [(w["values"].get("decode_speedup"), o["values"].get("decode_speedup")) for w, o in known]
        own = entry["values"].get("decode_speedup")
        if own is not None and all(w is not None and o is not None for w, o in speeds):
            entry["values"]["stacking_efficiency"] = own / math.prod(_relative(w, o) for w, o in known)
        original = found.get(_key([]))
        if original is not None:
            terms = [(1.0, entry), (-1.0, original), *((-1.0, w) for w, _ in known), *((1.0, o) for _, o in known)]
            draws = torch.stack([sign * _loss_draws(e["quality"]) for sign, e in terms]).sum(0)
            entry["values"]["interaction_nats"] = sum(sign * math.log(e["values"]["perplexity"]) for sign, e in terms)
            entry["bounds"]["interaction_nats"] = interval(draws)


def _relative(with_: Entry, without: Entry) -> float:
    """A part's own speed-up; against the original, whose pair with itself is noise, that of the part alone."""
    own = with_["values"]["decode_speedup"]
    return own if not without["steps"] else own / without["values"]["decode_speedup"]


def _effect(steps: Sequence[Any], index: int, found: Mapping[str, Entry]) -> tuple[Entry, Entry] | None:
    """Entries with a step and without it: the smallest subset of the stack that was measured both ways."""
    others = [i for i in range(len(steps)) if i != index]
    for size in range(len(steps)):
        for some in combinations(others, size):
            with_ = found.get(_key([steps[i] for i in sorted((*some, index))]))
            without = found.get(_key([steps[i] for i in some]))
            if with_ is not None and without is not None:
                return with_, without
    return None


def pairs(parts: Iterable[str], entries: Sequence[Entry], strength: str | None) -> list[Entry]:
    """Every ordered pair of parts: what running it gave, or why it does not run; the given strength goes first."""
    found = []
    for first, second in product(parts, repeat=2):
        ran = [e for e in entries if e["parts"] == [first, second] and e["budget"] is None and e["kind"] != "baseline"]
        ran.sort(key=lambda e: (_STATUSES.index(e["status"]), e["strength"] != strength))
        entry = ran[0] if ran else None
        found.append(
            {
                "first": first,
                "second": second,
                "status": "not run" if entry is None else "works" if entry["status"] == "done" else entry["status"],
                "reason": entry and entry["reason"],
                "cell": entry and entry["id"],
            }
        )
    return found


def order_study(entries: Sequence[Entry]) -> list[Entry]:
    """Stacks of the same parts, at the same settings, that were tried in more than one order."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        if len(entry["parts"]) > 1 and entry["budget"] is None and len(set(entry["parts"])) == len(entry["parts"]):
            same = _key(sorted(entry["steps"], key=lambda step: next(iter(step))))
            groups.setdefault(entry["model"] + same, []).append(entry)
    return [
        {"parts": sorted(group[0]["parts"]), "strength": group[0]["strength"], "cells": [e["id"] for e in group]}
        for group in groups.values()
        if len(group) > 1
    ]


def judge(goal: Goal, entries: Sequence[Entry]) -> Entry:
    """Which cells meet a goal, and which of them is cheapest; where none does, which comes nearest.

    Those that surely meet it go before those whose interval reaches past it. Cheapest is the lowest `cost_share`.
    """
    able = [e for e in entries if e["status"] == "done" and e["kind"] != "original"]
    verdicts = {e["id"]: goal.verdict(e["values"], e["bounds"]) for e in able}
    best = None
    for verdict in ("yes", "likely"):
        met = [e for e in able if verdicts[e["id"]] == verdict]
        if met and best is None:
            best = min(met, key=lambda e: e["values"].get("cost_share", math.inf))
    near = [
        (sum(c.missed_by(e["values"][c.metric]) for c in goal.conditions), e["id"])
        for e in able
        if all(c.metric in e["values"] for c in goal.conditions)
    ]
    return {
        "text": str(goal),
        "conditions": [asdict(condition) for condition in goal.conditions],
        "met": [i for i, verdict in verdicts.items() if verdict in ("yes", "likely")],
        "recommended": best and best["id"],
        "verdict": best and verdicts[best["id"]],
        "nearest": min(near)[1] if near and best is None else None,
    }


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points, lower is better in both, that no other point beats; from left to right."""
    best, kept = math.inf, []
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        if points[index][1] < best:
            best = points[index][1]
            kept.append(index)
    return kept


def _front(entries: Sequence[Entry], metric: str) -> list[str]:
    known = [e for e in entries if metric in e["values"] and "perplexity_ratio" in e["values"]]
    found: list[str] = []
    for model in dict.fromkeys(e["model"] for e in known):
        own = [e for e in known if e["model"] == model]
        sign = -1 if metric.endswith("speedup") else 1
        chosen = front([(sign * e["values"][metric], e["values"]["perplexity_ratio"]) for e in own])
        found += [own[i]["id"] for i in chosen]
    return found


def _loss_draws(row: Row) -> Tensor:
    """Resampled mean losses; the draw depends only on the number of passages, so rows of one text are paired."""
    samples = row["samples"]
    return bootstrap_means(torch.tensor(samples["losses_nats"]).double(), torch.tensor(samples["tokens"]))


def _key(steps: Sequence[Step] | Sequence[Any]) -> str:
    return json.dumps(steps, sort_keys=True)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
