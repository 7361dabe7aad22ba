"""From budgets to thresholds: run the gated model, see what a threshold really spends, move it, and keep the table.

Skipping early branches changes what later ones see, so thresholds are found on the model as it runs, budget by budget
from 1 downwards: each starts from the scores seen at the one before and is corrected once with its own.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from ..macs import branch_costs, head_macs, ungated_macs_per_token
from ..model import blocks
from ..step import Context
from .dial import Decision, Setting, decisions

BUDGETS = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4)
"""Budgets that thresholds are calibrated for; those in between are interpolated."""
CALIBRATION_TOKENS = 2048
_PASSES = 2


@dataclass(frozen=True)
class Spent:
    """What one pass over text spent: shares of multiply-adds and of branch executions."""

    budget: float
    executed: float


def calibrate(model: PreTrainedModel, context: Context) -> tuple[Setting, ...]:
    """Table of settings of a gated model, highest budget first; ends where even skipping everything spends more."""
    windows = context.calibration
    windows = windows[: max(1, CALIBRATION_TOKENS // windows.shape[1])].to(model.device)
    table: list[Setting] = []
    seen = observe(model, windows, threshold=float("-inf"))
    for target in context.track(BUDGETS, "calibrate thresholds"):
        threshold = 0.0
        for _ in range(_PASSES):
            found = threshold_for(model, seen, target, windows.shape[1])
            if found is None:
                return tuple(table)
            threshold = found
            seen = observe(model, windows, threshold)
        at = spent(model, seen, windows.shape[1])
        if not table or at.budget < table[-1].budget:
            table.append(Setting(at.budget, at.executed, threshold))
    return tuple(table)


@torch.inference_mode()
def observe(model: PreTrainedModel, windows: Int[Tensor, "n t"], threshold: float) -> list[Decision]:
    """Every branch's decisions over the windows at a threshold, window after window."""
    with decisions(model, threshold) as seen:
        for window in windows:
            model(window[None], use_cache=False, logits_to_keep=1)
        return list(seen)


def spent(model: PreTrainedModel, seen: list[Decision], context_tokens: int) -> Spent:
    """Shares that the decisions amount to."""
    costs = branch_costs(model, context_tokens)
    tokens = sum(decision.keep.numel() for decision in seen) / (len(blocks(model)) * len(costs))
    head = head_macs(model)
    ran = tokens * head
    for decision in seen:
        cost, kept = costs[decision.kind], int(decision.keep.sum())
        skipped = decision.keep.numel() - kept
        ran += decision.keep.numel() * (cost.always + cost.gate) + kept * cost.kept + skipped * cost.skipped
    executed = sum(int(d.keep.sum()) for d in seen) / sum(d.keep.numel() for d in seen)
    return Spent(ran / (tokens * ungated_macs_per_token(model, context_tokens)), executed)


def threshold_for(model: PreTrainedModel, seen: list[Decision], target: float, context_tokens: int) -> float | None:
    """The threshold that would spend `target` if scores stayed as seen; None where skipping everything spends more."""
    costs = branch_costs(model, context_tokens)
    layers, full = len(blocks(model)), ungated_macs_per_token(model, context_tokens)
    tokens = sum(decision.keep.numel() for decision in seen) / (layers * len(costs))
    # all kept: more than the ungated model, by the gates' own cost
    surplus = tokens * (full * (1 - target) + layers * sum(cost.gate for cost in costs.values()))
    scores, savings = _savings(seen, {kind: cost.kept - cost.skipped for kind, cost in costs.items()})
    total = savings.cumsum(0)
    if total[-1] < surplus:
        return None
    return float(scores[int(torch.searchsorted(total, surplus))])


def _savings(seen: list[Decision], saved: dict[str, int]) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Scores of all executions that may be skipped, lowest first, and what each skip would save."""
    movable = [decision.score[:, 1:].flatten() for decision in seen]  # first tokens never skip
    scores = torch.cat(movable)
    savings = torch.cat(
        [part.new_full(part.shape, saved[d.kind], dtype=torch.float64) for part, d in zip(movable, seen, strict=True)]
    )
    order = scores.argsort()
    return scores[order], savings[order]
