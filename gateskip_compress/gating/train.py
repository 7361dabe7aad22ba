"""Train gates by distillation: the model under a falling budget learns to say what it says ungated.

    loss = distillation · KL(ungated ‖ gated) + cross_entropy · CE + gate_weight · gate loss

per scored token. Skipping in training is as hard as it will be: skipped tokens take their surrogates. Where scores are
trained the gradient goes straight through the decision to the score (`block.py`); where they stay as fitted, only what
is kept is computed, in training too. Thresholds follow the scores: those of a step are set from
the scores of the step before, so that the budget of the schedule is what is really spent.

The paper (arXiv 2510.13876, sec. 3) trains the backbone too, with one learning rate, on cross-entropy and the gates'
L2 norm alone; that is `Training(train="all", distillation=0, cross_entropy=1, gate_loss="l2")`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..adapters import adapters, add_adapters, merge_adapters
from ..distillation import Distillation, predictions
from ..losses import gate_kl, gate_l1, gate_l2
from ..model import blocks
from ..names import check_choice
from ..step import Context, Record
from ..text import Passage
from ..training import Batch, train
from .calibrate import Allocation, everywhere, floor, observe, spent, thresholds_for
from .dial import RUN_ALL, How
from .gate import Gate
from .turning import Decision, branch_index, decisions, dial_of, skipping

What = Literal["gates", "surrogates", "lora", "all"]
GateLoss = Literal["none", "l1", "l2", "kl"]
FIRST_WINDOWS = 8
"""Calibration windows that the first step's thresholds come from; the same however many processes train."""


@dataclass(frozen=True)
class Training:
    """How gates are trained.

    Args:
        steps: Optimizer steps.
        batch: Passages a step, on each process.
        train: `gates` alone; and their `surrogates`; and `lora` adapters of the projections, merged at the end; or
            `all` weights. The last two need a second copy of the model to distil from.
        gate_rate: Learning rate of scales and scores; None is 0 for `effect` gates, whose scores are fitted (training
            them at 1e-4 undid the fit), and 1e-3 for the others, which know nothing at the start.
        surrogate_rate: Learning rate of surrogates.
        rate: Learning rate of adapters or weights.
        distillation: Weight of the distance from the ungated model.
        cross_entropy: Weight of the text's own next tokens.
        gate_loss: Pressure on the gates' scales: `l1`, `l2`, or `kl` to the budget.
        gate_weight: Weight of it.
        ramp: Share of the steps in which the budget falls from 1 to the one asked for.
        precision: `bf16` runs forward passes in autocast.
        checkpointing: Recompute blocks in the backward pass, for less memory.

    Raises:
        ValueError: A field is out of its range, or nothing is left to minimise.
    """

    steps: int = 100
    batch: int = 4
    train: What = "surrogates"
    gate_rate: float | None = None
    surrogate_rate: float = 3e-4
    rate: float = 5e-5
    distillation: float = 1.0
    cross_entropy: float = 0.0
    gate_loss: GateLoss = "none"
    gate_weight: float = 0.1
    ramp: float = 0.5
    precision: Literal["no", "bf16"] = "no"
    checkpointing: bool = False

    def __post_init__(self) -> None:
        for field, value, known in (
            ("train", self.train, get_args(What)),
            ("gate_loss", self.gate_loss, get_args(GateLoss)),
            ("precision", self.precision, ("no", "bf16")),
        ):
            check_choice(f"training.{field}", value, known)
        for field, value in (("steps", self.steps), ("batch", self.batch)):
            if value < 1:
                raise ValueError(f"training.{field} {value} must be at least 1")
        for field in ("gate_rate", "surrogate_rate", "rate", "distillation", "cross_entropy", "gate_weight"):
            if (getattr(self, field) or 0) < 0:
                raise ValueError(f"training.{field} {getattr(self, field)} must not be negative")
        if not 0 <= self.ramp <= 1:
            raise ValueError(f"training.ramp {self.ramp} must be between 0 and 1: it is a share of the steps")
        if self.distillation == 0 and self.cross_entropy == 0:
            raise ValueError("training has nothing to minimise: set distillation or cross_entropy above 0")

    def budget_at(self, step: int, final: float) -> float:
        """The schedule: straight down over the ramp, from just below 1 at step 0 to `final`.

        Never 1: with nothing skipped the gradient is rounding noise, which the optimizer would take at full size.
        """
        ramp = self.ramp * self.steps
        return final if step + 1 >= ramp else 1 - (1 - final) * (step + 1) / ramp


def ungated(model: PreTrainedModel) -> AbstractContextManager[None]:
    """The model as if it had no gates: what gates learn from."""
    return skipping(model, "off")


def train_gates(
    model: PreTrainedModel,
    training: Training,
    final: float,
    allocation: Allocation,
    context: Context,
    *,
    as_teacher: Callable[[PreTrainedModel], AbstractContextManager[None]] = ungated,
) -> Record:
    """Train a gated model in place, for a final budget; returns the curves of loss and budget.

    Args:
        model: Its gates are fitted.
        training: How.
        final: The budget at the end of the ramp.
        allocation: How budgets are spread over branches.
        context: Passages, or else calibration windows, are what is learnt from.
        as_teacher: The form in which the model says what is to be said.

    Raises:
        TrainingError: the loss is not finite.
    """
    accelerator = Accelerator(cpu=model.device.type == "cpu")
    passages = context.passages or [Passage.whole(window) for window in context.calibration]
    teacher = deepcopy(model) if training.train in ("lora", "all") else model
    if training.train == "lora":
        add_adapters(model, context.seed)
    distance = Distillation(passages, context.seed, training.distillation, training.cross_entropy)
    dial = dial_of(model)
    before, how = dial.thresholds, dial.how
    learning: How = "soft" if _gate_rate(model, training) > 0 else "compact"

    def aim(rows: list[Decision], step: int, context_tokens: int) -> list[float]:
        """Thresholds that would have spent a step's budget on tokens seen before it."""
        found = thresholds_for(model, rows, training.budget_at(step, final), context_tokens, allocation)
        if found is None:
            least = floor(model, rows, context_tokens)
            raise ValueError(f"budget {final} cannot be reached: with all skipped these gates still spend {least:.3f}")
        return list(found)

    windows = context.calibration[:FIRST_WINDOWS].to(model.device)
    first = observe(model, windows, everywhere(model, RUN_ALL)) if final < 1 else []
    start = aim(first, 0, windows.shape[1]) if final < 1 else list(everywhere(model, RUN_ALL))
    state: dict[str, Any] = {"thresholds": start, "spreads": _spreads(model, first), "budgets": []}

    def loss(batch: Batch, step: int) -> tuple[Tensor, int]:
        # not the accelerator's own autocast, whose precision is fixed for the whole process
        with torch.autocast(batch.ids.device.type, torch.bfloat16, enabled=training.precision == "bf16"):
            return forward(batch, step)

    def forward(batch: Batch, step: int) -> tuple[Tensor, int]:
        context_tokens = batch.ids.shape[1]
        with torch.no_grad(), as_teacher(teacher):
            reference = predictions(teacher, batch) if training.distillation > 0 else None
        # backward passes may recompute blocks: what they read of the dial must stay as it is now
        dial.how, dial.thresholds, dial.spreads = learning, tuple(state["thresholds"]), tuple(state["spreads"])
        with decisions(model) as seen:
            found = predictions(model, batch)
        targets = batch.ids[batch.scored]
        total = distance(found, reference, targets, step)
        target = training.budget_at(step, final)
        if training.gate_loss != "none":
            total = total + training.gate_weight * len(targets) * _gate_loss(training.gate_loss, seen, batch, target)
        rows = [row for part in gather_object(_rows(seen, batch)) for row in part]
        state["budgets"].append(spent(model, rows, context_tokens).budget)
        if final < 1:
            state["thresholds"], state["spreads"] = aim(rows, step + 1, context_tokens), _spreads(model, rows)
        return total, len(targets)

    def describe() -> str:
        return f"train gates, budget {state['budgets'][-1]:.2f}" if state["budgets"] else "train gates"

    for block in blocks(model):  # transformers checkpoints blocks in training mode only; their parts have no need of it
        block.training = training.checkpointing
    if training.checkpointing:
        _checkpointing(model, "enable")
    try:
        record = train(
            _groups(model, training),
            loss,
            passages,
            steps=training.steps,
            batch=training.batch,
            context=context,
            accelerator=accelerator,
            state=state,
            description=describe,
        )
    finally:
        dial.thresholds, dial.how = before, how
        if training.checkpointing:
            _checkpointing(model, "disable")
        model.eval()
        if training.train == "lora":
            merge_adapters(model)
    return {**record, "budgets": state["budgets"]}


def _spreads(model: PreTrainedModel, rows: list[Decision]) -> list[float]:
    """Standard deviation of each branch's scores over all processes' tokens; 1 for a branch that decides nothing."""
    scores: dict[int, list[Tensor]] = {}
    for row in rows:
        scores.setdefault(branch_index(row.layer, row.kind), []).append(row.movable)
    spreads = {index: float(torch.cat(parts).float().std()) for index, parts in scores.items()}
    return [spreads.get(index, 1.0) for index in range(len(everywhere(model, RUN_ALL)))]


def _checkpointing(model: PreTrainedModel, how: Literal["enable", "disable"]) -> None:
    """Turn activation checkpointing on or off, in place; the methods have another name in newer transformers."""
    new = f"activation_checkpointing_{how}"
    getattr(model, new if hasattr(model, new) else f"gradient_checkpointing_{how}")()


def _gate_rate(model: PreTrainedModel, training: Training) -> float:
    if training.gate_rate is not None:
        return training.gate_rate
    return 0.0 if any(gate.kind == "effect" for gate in _gates(model)) else 1e-3


def _gates(model: PreTrainedModel) -> list[Gate]:
    return [gate for block in blocks(model) for gate in block.gates.values()]  # pyright: ignore[reportReturnType]


def _groups(model: PreTrainedModel, training: Training) -> list[tuple[list[nn.Parameter], float]]:
    """What is trained, and how fast."""
    own = _gates(model)
    of_gates = {p for gate in own for p in gate.parameters()}
    surrogates = {p for gate in own for p in gate.surrogate_parameters}
    rate = _gate_rate(model, training)
    groups = []
    if rate > 0 or training.gate_rate is not None:
        groups.append(([p for p in model.parameters() if p in of_gates - surrogates], rate))
    if training.train != "gates":
        groups.append(([p for p in model.parameters() if p in surrogates], training.surrogate_rate))
    if training.train == "lora":
        groups.append(([p for _, learning in adapters(model) for p in learning], training.rate))
    if training.train == "all":
        groups.append(([p for p in model.parameters() if p not in of_gates], training.rate))
    if not any(parameters for parameters, _ in groups):
        raise ValueError(
            f"train {training.train!r} changes nothing here: `effect` gates keep their fitted scores unless "
            "gate_rate is given, and these have no surrogate to train"
        )
    return groups


def _rows(seen: list[Decision], batch: Batch) -> list[list[Decision]]:
    """The decisions row by row, without padding and without gradients, on the CPU, to be gathered from processes."""
    lengths = batch.real.sum(1).tolist()
    rows = [
        Decision(d.layer, d.kind, d.score[i : i + 1, :n].detach().float().cpu(), d.keep[i : i + 1, :n].cpu())
        for i, n in enumerate(lengths)
        for d in seen
    ]
    return [rows]


def _gate_loss(kind: GateLoss, seen: list[Decision], batch: Batch, target: float) -> Tensor:
    """Mean over branches of a loss on the scales of scored tokens."""
    parts = []
    for decision in seen:
        if decision.scale is None:
            continue
        opening = decision.scale[batch.scored].float()
        parts.append(
            gate_l1(opening) if kind == "l1" else gate_l2(opening) if kind == "l2" else gate_kl(opening, target)
        )
    return torch.stack(parts).mean()
