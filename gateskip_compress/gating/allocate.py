"""The `sensitivity` allocation: weigh each branch's scores by what skipping it really costs.

A score predicts a relative error of the stream, and the same error is worse in one branch than in another. We measure:
branch by branch, the tokens that score lowest skip it, all else runs, and

    sensitivity = KL(ungated ‖ skipped) / mean squared error that the scores predict

per token. Half of its log goes into the branch's scores, so that one threshold over all branches removes the executions
with the least predicted KL per multiply-add.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from ..losses import kl_divergence
from ..macs import branch_costs
from ..model import BRANCH_KINDS, blocks, entering, resumable, resumed
from ..step import Context
from .calibrate import everywhere, observe
from .dial import RUN_ALL
from .gate import Gate
from .turning import branch_index, decisions

MEASURED_TOKENS = 1024
MEASURED_SHARE = 1 / 16
"""At most so many tokens, and so much of the calibration text, at least one window."""
SKIPPED_SHARE = 0.5
"""Share of the tokens that skip the branch that is measured."""


@torch.inference_mode()
def weigh(model: PreTrainedModel, context: Context) -> list[float]:
    """Measure every gated branch and shift its scores, in place; returns what was added to each."""
    windows = context.calibration[: measured_windows(*context.calibration.shape)].to(model.device)
    run_all = everywhere(model, RUN_ALL)
    seen = observe(model, windows, run_all)
    with entering(model) as streams:
        original = [_logits(model, window) for window in windows]
    costs = branch_costs(model, windows.shape[1])
    shifts = [0.0] * len(run_all)
    # a branch that follows another has no score of its own
    scoring = {(d.layer, d.kind) for d in seen if _gate(model, d.layer, d.kind).kind is not None}
    gated = sorted(branch_index(*key) for key in scoring)
    for index in context.track(gated, "measure sensitivity"):
        kind = BRANCH_KINDS[index % 2]
        scores = torch.cat([d.movable for d in seen if branch_index(d.layer, d.kind) == index])
        threshold = float(scores.quantile(SKIPPED_SHARE))
        gate = _gate(model, index // 2, kind)
        saved = max(1, costs[index // 2, kind].kept - gate.replace_macs)
        predicted = (2 * scores[scores <= threshold]).exp().sum().item() * saved / scores.numel()
        begin, lost = resumable(model, index // 2), 0.0
        with decisions(model, (*run_all[:index], threshold, *run_all[index + 1 :])):
            for window, stream, reference in zip(windows, streams[begin], original, strict=True):
                with resumed(model, begin, stream):
                    lost += kl_divergence(reference, _logits(model, window)).mean().item()
        measured = max(lost / len(windows), 1e-9)  # rounding may give less than nothing
        shifts[index] = 0.5 * math.log(measured / predicted)
    mean = sum(shifts) / max(1, len(gated))
    for index in gated:
        shifts[index] -= mean
        _gate(model, index // 2, BRANCH_KINDS[index % 2]).score_bias.data.add_(shifts[index])
    return shifts


def measured_windows(windows: int, window_tokens: int) -> int:
    """How many of a text's windows sensitivities are measured on."""
    return max(1, min(MEASURED_TOKENS // window_tokens, int(windows * MEASURED_SHARE)))


def _logits(model: PreTrainedModel, window: Int[Tensor, " t"]) -> Float[Tensor, "t v"]:
    return model(window[None], use_cache=False).logits[0].float()


def _gate(model: PreTrainedModel, layer: int, kind: str) -> Gate:
    return blocks(model)[layer].gates[kind]  # pyright: ignore[reportReturnType, reportCallIssue, reportArgumentType]
