"""From budgets to thresholds: run the gated model, see what thresholds really spend, move them, and keep the table.

Skipping early branches changes what later ones see, so thresholds are found on the model as it runs, budget by budget
from 1 downwards: each from the scores seen at the one before. What they spent then stands in the table, not what was
aimed at.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import CalibrationError
from ..macs import branch_costs, ungated_macs_per_token
from ..model import BRANCH_KINDS, blocks
from ..track import untracked
from .dial import RUN_ALL, Setting, Thresholds
from .turning import Decision, branch_index, decisions

BUDGETS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5, 0.4)
"""Budgets that thresholds are calibrated for; those in between are interpolated."""
CALIBRATION_TOKENS = 2048
"""That a step calibrates on; more moves thresholds little."""

Allocation = Literal["global", "sensitivity", "uniform"]
ALLOCATIONS: tuple[str, ...] = get_args(Allocation)
"""How a budget is spread: one threshold over all branches, after their scores were weighted by measured loss or not; or
the same share of tokens in every branch (the paper's rule)."""


@dataclass(frozen=True)
class Spent:
    """What one pass over text spent: shares of multiply-adds and of branch executions."""

    budget: float
    executed: float


def calibrate(
    model: PreTrainedModel,
    sequences: Iterable[Int[Tensor, " _t"]],
    allocation: Allocation = "global",
    track: Callable[..., Iterable[Any]] = untracked,
    budgets: Sequence[float] = BUDGETS,
) -> tuple[Setting, ...]:
    """Table of settings of a gated model, highest budget first; ends where even skipping everything spends more.

    Args:
        model: With gates that tell tokens apart.
        sequences: Token ids, each run by itself. What a threshold spends depends on the text: budgets hold on text of
            this kind and of about these lengths.
        allocation: How budgets are spread over branches.
        track: As in `Context`.
        budgets: To calibrate for, from above; each takes a pass over the text.

    Raises:
        CalibrationError: no sequence has a token that may skip.
    """
    used = list(sequences)
    if not any(len(ids) > 1 for ids in used):
        raise CalibrationError("calibrating thresholds needs text: no sequence has more than one token")
    context_tokens = round(mean_keys(used))
    table: list[Setting] = []
    seen = observe(model, used, everywhere(model, RUN_ALL))
    for target in track(budgets, "calibrate thresholds"):
        thresholds = thresholds_for(model, seen, target, context_tokens, allocation)
        if thresholds is None:
            break
        seen = observe(model, used, thresholds)
        at = spent(model, seen, context_tokens)
        if not table or at.budget < table[-1].budget:
            table.append(Setting(at.budget, at.executed, thresholds))
    return tuple(table)


def first_tokens(sequences: Iterable[Int[Tensor, " _t"]], most_tokens: int) -> list[Int[Tensor, " _t"]]:
    """Whole sequences up to a number of tokens; the first one in any case."""
    used: list[Tensor] = []
    for ids in sequences:
        if used and sum(map(len, used)) + len(ids) > most_tokens:
            break
        used.append(ids)
    return used


def mean_keys(sequences: Sequence[Int[Tensor, " _t"]]) -> float:
    """Keys that a token attends to on average, where attention computes its full rectangle."""
    return sum(len(ids) ** 2 for ids in sequences) / sum(len(ids) for ids in sequences)


def everywhere(model: PreTrainedModel, threshold: float) -> Thresholds:
    """The same threshold for every branch."""
    return (threshold,) * (len(BRANCH_KINDS) * len(blocks(model)))


@torch.inference_mode()
def observe(
    model: PreTrainedModel, sequences: Iterable[Int[Tensor, " _t"]], thresholds: Thresholds | None
) -> list[Decision]:
    """Every branch's decisions, sequence after sequence; None leaves the thresholds as they are."""
    with decisions(model, thresholds) as seen:
        for ids in sequences:
            model(ids[None].to(model.device), use_cache=False, logits_to_keep=1)
        return list(seen)


def spent(model: PreTrainedModel, seen: list[Decision], context_tokens: int) -> Spent:
    """Shares that the decisions amount to; a branch without a gate ran."""
    costs = branch_costs(model, context_tokens)
    tokens, executed, executions = _tokens(seen), 0, 0
    ran = tokens * ungated_macs_per_token(model, context_tokens)
    full = ran
    for decision in seen:
        cost, count, kept = costs[decision.layer, decision.kind], decision.tokens, int(decision.keep.sum())
        ran += count * cost.gate - (count - kept) * (cost.kept - cost.skipped)
        executed, executions = executed + kept, executions + count
    return Spent(ran / full, executed / executions)


def floor(model: PreTrainedModel, seen: list[Decision], context_tokens: int) -> float:
    """What is spent where every token skips all that it may."""
    skipped = [replace(decision, keep=decision.keep & ~decision.free) for decision in seen]
    return spent(model, skipped, context_tokens).budget


def thresholds_for(
    model: PreTrainedModel, seen: list[Decision], target: float, context_tokens: int, allocation: Allocation = "global"
) -> Thresholds | None:
    """Thresholds that would spend `target` if scores stayed as seen; None where skipping everything spends more."""
    costs = branch_costs(model, context_tokens)
    scores: dict[int, list[Tensor]] = {}
    saved: dict[int, int] = {}
    for decision in seen:
        index = branch_index(decision.layer, decision.kind)
        scores.setdefault(index, []).append(decision.movable)
        cost = costs[decision.layer, decision.kind]
        saved[index] = cost.kept - cost.skipped
    movable = {index: torch.cat(parts) for index, parts in scores.items()}
    # all kept: more than the ungated model, by the gates' own cost
    gates = sum(decision.tokens * costs[decision.layer, decision.kind].gate for decision in seen)
    surplus = _tokens(seen) * ungated_macs_per_token(model, context_tokens) * (1 - target) + gates
    if surplus > sum(len(part) * saved[index] for index, part in movable.items()):
        return None
    if allocation == "uniform":
        share = surplus / sum(len(part) * saved[index] for index, part in movable.items())
        found = {index: float(part.float().quantile(share)) for index, part in movable.items()}
        return tuple(found.get(index, RUN_ALL) for index in range(len(everywhere(model, 0))))
    return everywhere(model, _one_threshold(movable, saved, surplus))


def _one_threshold(movable: dict[int, Float[Tensor, " n"]], saved: dict[int, int], surplus: float) -> float:
    """The score at which skipping everything at or below it saves `surplus` multiply-adds."""
    scores = torch.cat(list(movable.values()))
    savings = torch.cat([part.new_full(part.shape, saved[i], dtype=torch.float64) for i, part in movable.items()])
    order = scores.argsort()
    return float(scores[order][int(torch.searchsorted(savings[order].cumsum(0), surplus))])


def _tokens(seen: list[Decision]) -> int:
    """Tokens behind the decisions."""
    first = seen[0]
    return sum(d.tokens for d in seen if (d.layer, d.kind) == (first.layer, first.kind))
