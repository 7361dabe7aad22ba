"""The training loop, for gates and for recovery: seeded batches, a schedule, resume, and a stop when the loss breaks.

A loop knows nothing of what it trains. It is given parameters, and a function from one batch to a sum of losses over
tokens and their number; so the mean is over all scored tokens of all processes, and n processes with batch b take the
steps that one process takes with batch n · b.

Every `save_every` steps the parameters and the optimizer's moments go to one safetensors file, written aside and
renamed. An interrupted run that is started again continues there, with the batches that it would have seen.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .errors import TrainingError
from .step import Context
from .text import Passage

STATE = "training.safetensors"


@dataclass(frozen=True)
class Batch:
    """Passages side by side, padded on the right.

    Args:
        ids: Token ids.
        real: Which are not padding.
        scored: Tokens whose prediction counts.
    """

    ids: Int[Tensor, "b t"]
    real: Bool[Tensor, "b t"]
    scored: Bool[Tensor, "b t"]


Loss = Callable[[Batch, int], tuple[Tensor, int]]
"""Batch and step -> loss summed over the batch's scored tokens, and how many these are."""


def collate(passages: Sequence[Passage], device: torch.device) -> Batch:
    """A batch of passages."""
    longest = max(len(passage.ids) for passage in passages)
    ids = torch.zeros(len(passages), longest, dtype=torch.long)
    real, scored = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    for row, passage in enumerate(passages):
        ids[row, : len(passage.ids)] = passage.ids
        real[row, : len(passage.ids)] = True
        scored[row, : len(passage.ids)] = passage.scored
    return Batch(ids.to(device), real.to(device), scored.to(device))


def train(
    groups: Sequence[tuple[Sequence[nn.Parameter], float]],
    loss: Loss,
    passages: Sequence[Passage],
    *,
    steps: int,
    batch: int,
    context: Context,
    accelerator: Accelerator,
    save_every: int = 25,
    state: dict[str, Any] | None = None,
    description: Callable[[], str] | str = "train",
) -> dict[str, Any]:
    """Train parameters in place.

    AdamW without weight decay, betas 0.9 and 0.95, gradients clipped to norm 1, warm-up over a tenth of the steps, then
    a cosine to a tenth of the rate.

    Args:
        groups: Parameters with their learning rates.
        loss: Loss of a batch.
        passages: What batches are drawn from, in seeded order, each once an epoch.
        steps: Optimizer steps.
        batch: Passages a step and process.
        context: Its seed, progress, and the folder that keeps the state for a resume.
        accelerator: Device and processes.
        save_every: Steps between saved states.
        state: JSON that the loss keeps between steps; saved and restored with the rest.
        description: Of the progress; called anew each step where it can be.

    Returns:
        `losses` of every step, `tokens` scored and `seconds`, of this and of interrupted runs before it.

    Raises:
        TrainingError: the loss is not finite; the parameters are back at the last good state.
    """
    parameters = [parameter for group, _ in groups for parameter in group]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        [{"params": list(group), "lr": rate} for group, rate in groups], betas=(0.9, 0.95), weight_decay=0.0
    )
    path = context.scratch / STATE if context.scratch is not None else None
    done: dict[str, Any] = {"step": 0, "losses": [], "tokens": 0, "seconds": 0.0, "state": {}}
    if path is not None and path.is_file():
        done = _resume(path, parameters, optimizer)
    if state is not None:
        state.update(done["state"])
    good, good_step = [parameter.detach().clone() for parameter in parameters], done["step"]
    began = time.perf_counter() - done["seconds"]
    try:
        for step in context.track(range(done["step"], steps), description, steps - done["step"]):
            chosen = _draw(len(passages), step, batch, context.seed, accelerator)
            total, count = loss(collate([passages[i] for i in chosen], accelerator.device), step)
            counted = _sum(accelerator, torch.tensor(float(count), device=accelerator.device))
            value = _sum(accelerator, total.detach().float()) / counted
            if not math.isfinite(value.item()):
                for parameter, kept in zip(parameters, good, strict=True):
                    parameter.data.copy_(kept)
                raise TrainingError(
                    f"the loss became {value.item()} at step {step}; parameters are back at step {good_step}; "
                    "lower the learning rate"
                )
            (total / counted).backward()
            if accelerator.num_processes > 1:
                for parameter in parameters:
                    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                    parameter.grad = _sum(accelerator, gradient)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for group, (_, rate) in zip(optimizer.param_groups, groups, strict=True):
                group["lr"] = rate * _rate(step, steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done["losses"].append(value.item())
            done["tokens"] += int(counted.item())
            if (step + 1) % save_every == 0:
                done |= {"step": step + 1, "seconds": time.perf_counter() - began, "state": state or {}}
                good, good_step = [parameter.detach().clone() for parameter in parameters], step + 1
                if path is not None and accelerator.is_main_process:
                    _save(path, parameters, optimizer, done)
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
    return {"losses": done["losses"], "tokens": done["tokens"], "seconds": time.perf_counter() - began}


def _sum(accelerator: Accelerator, value: Tensor) -> Tensor:
    """Over all processes."""
    return accelerator.reduce(value, reduction="sum")  # pyright: ignore[reportReturnType] a tensor gives a tensor


def _rate(step: int, steps: int) -> float:
    """Share of the learning rate at a step."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _draw(count: int, step: int, batch: int, seed: int, accelerator: Accelerator) -> list[int]:
    """Which passages this process takes at a step: a fresh seeded order each epoch, the processes side by side."""
    processes, whole = accelerator.num_processes, batch * accelerator.num_processes
    order: list[int] = []
    chosen = []
    for place in range(step * whole + accelerator.process_index, (step + 1) * whole, processes):
        epoch, within = divmod(place, count)
        if not order or epoch != order[0]:
            generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
            order = [epoch, *torch.randperm(count, generator=generator).tolist()]
        chosen.append(order[1 + within])
    return chosen


def _save(path: Path, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, done: dict[str, Any]) -> None:
    """Write parameters, moments and counts; whole or not at all."""
    tensors = {}
    for i, parameter in enumerate(parameters):
        tensors[f"{i}.value"] = parameter.detach().contiguous()
        for name, moment in optimizer.state[parameter].items():
            tensors[f"{i}.{name}"] = moment.contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"done": json.dumps(done)})
    partial.replace(path)


def _resume(path: Path, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Read what `_save` wrote, into parameters and optimizer."""
    with safe_open(path, framework="pt") as file:
        for i, parameter in enumerate(parameters):
            parameter.data.copy_(file.get_tensor(f"{i}.value"))
            names = [key.split(".")[1] for key in file.keys() if key.startswith(f"{i}.")]  # noqa: SIM118 not a dict
            optimizer.state[parameter] = {
                name: file.get_tensor(f"{i}.{name}").to(parameter.device if name != "step" else "cpu")
                for name in names
                if name != "value"
            }
        return json.loads(file.metadata()["done"])
