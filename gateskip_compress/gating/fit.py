"""Fit the gates of a model in closed form, from one pass over calibration text.

A score predicts what a skip loses against what it saves: the effect of `closed_form`, less half the log of the
multiply-adds that one skip saves. One threshold over all branches then removes the executions with the least squared
effect per multiply-add. Without the second term cheap attention goes first and far more branches must be skipped for
the same saving.

A `narrow` surrogate takes over those channels of the MLP from which its output is best predicted, and its output
projection is the least-squares solution from their values to what the MLP gave.

Surrogates are solved from the first windows, scores from the rest: so a score learns what its surrogate loses on tokens
that the surrogate has not seen.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import CalibrationError
from ..macs import branch_costs
from ..model import GatedMlp, gated_mlp, watch, width
from ..step import Context
from .closed_form import Moments, backward_elimination, effect, reduced_rank, regress
from .gate import Gate, NarrowMlp

SURROGATE_SHARE = 0.6
"""Share of the calibration windows that surrogates are solved from."""
RIDGE = 1e-3
"""Penalty of both regressions, as a share of the mean variance of their inputs."""

Gates = dict[tuple[int, str], Gate]
"""By layer and branch kind."""
See = Callable[[int, str, Tensor, Tensor, Tensor], None]


def fit_gates(model: PreTrainedModel, gates: Gates, context: Context) -> None:
    """Solve surrogates, and the scores of `effect` gates, in place.

    Args:
        model: Runs ungated; not changed.
        gates: Neutral gates; other kinds than `effect` stay neutral and want training.
        context: Calibration windows, two at least.

    Raises:
        CalibrationError: fewer than two windows.
    """
    windows = context.calibration
    split = round(len(windows) * SURROGATE_SHARE)
    if not 0 < split < len(windows):
        raise CalibrationError(f"fitting gates needs at least 2 windows of text, got {len(windows)}")
    d, device = width(model), next(model.parameters()).device

    wide = {key: gated_mlp(model, key[0]) for key, gate in gates.items() if gate.surrogate == "narrow"}
    outputs = {
        key: Moments.zeros(len(wide[key].up) if key in wide else d, d, device)
        for key, gate in gates.items()
        if gate.surrogate != "zero"
    }
    if outputs:

        def see_outputs(layer: int, kind: str, x: Tensor, y: Tensor, residual: Tensor) -> None:
            del residual
            key = layer, kind
            if key in outputs:
                outputs[key].add(wide[key].inner(x) if key in wide else x, y)

        _watch(model, windows[:split], see_outputs, context, "fit surrogates")
        for key in context.track(list(outputs), "solve surrogates"):
            moments = outputs.pop(key)
            if key in wide:
                moments = _choose_channels(gates[key].narrow, wide[key], moments)
            _set_surrogate(gates[key], moments)

    effects = {key: Moments.zeros(d, 1, device) for key, gate in gates.items() if gate.kind == "effect"}
    if not effects:
        return

    def see_effects(layer: int, kind: str, x: Tensor, y: Tensor, residual: Tensor) -> None:
        if (layer, kind) in effects:
            replaced = gates[layer, kind].replace(x)
            lost = effect(y if replaced is None else y - replaced, residual)
            effects[layer, kind].add(x, lost[:, None])

    _watch(model, windows[split:], see_effects, context, "fit scores")
    costs = branch_costs(model, windows.shape[1])
    for (layer, kind), moments in effects.items():
        gate = gates[layer, kind]
        slope, intercept = regress(moments, RIDGE)
        gate.score_weight.data.copy_(slope[:, 0])
        gate.score_bias.data.copy_(intercept - 0.5 * math.log(max(1, costs[layer, kind].kept - gate.replace_macs)))


def _choose_channels(narrow: NarrowMlp, wide: GatedMlp, moments: Moments) -> Moments:
    """Copy into a surrogate, in place, the channels from which the MLP's output is best predicted; their moments."""
    best = backward_elimination(moments.xx, wide.down.detach().float(), narrow.down.in_features, RIDGE)
    narrow.gate.weight.data.copy_(wide.gate[best])
    narrow.up.weight.data.copy_(wide.up[best])
    return Moments(moments.count, moments.x[best], moments.y, moments.xx[best][:, best], moments.xy[best])


def _set_surrogate(gate: Gate, outputs: Moments) -> None:
    """Solve one gate's surrogate and write it, in place."""
    if gate.surrogate == "mean":
        gate.offset.data.copy_(outputs.y / outputs.count)
        return
    if gate.surrogate == "narrow":
        slope, intercept = regress(outputs, RIDGE)
        gate.narrow.down.weight.data.copy_(slope.T)
        gate.narrow.down.bias.data.copy_(intercept)
        return
    down, up, offset = reduced_rank(outputs, gate.down.shape[0], RIDGE)
    gate.down.data.copy_(down.T)
    gate.up.data.copy_(up.T)
    gate.offset.data.copy_(offset)


@torch.inference_mode()
def _watch(model: PreTrainedModel, windows: Int[Tensor, "n t"], see: See, context: Context, description: str) -> None:
    """Run the windows and hand every branch's input, output and residual to `see`, first tokens left out."""

    def see_later(layer: int, kind: str, *parts: Tensor) -> None:
        # the first token is never skipped, and its huge norms would bend every fit
        see(layer, kind, *(part[:, 1:].flatten(0, 1) for part in parts))

    with watch(model, see_later):
        for window in context.track(windows, description):
            model(window[None].to(model.device), use_cache=False, logits_to_keep=1)
