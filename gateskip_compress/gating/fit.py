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
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import CalibrationError
from ..macs import branch_costs
from ..model import gated_mlp, watch, width
from ..precision import exact_products
from ..step import Context
from .closed_form import Moments, backward_elimination, effect, reduced_rank, regress
from .gate import Gate

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

    _choose_channels(model, gates, windows[:split], context)
    outputs = {
        key: Moments.zeros(gate.narrow.down.in_features if gate.surrogate == "narrow" else d, d, device)
        for key, gate in gates.items()
        if gate.surrogate != "zero"
    }
    if outputs:

        def see_outputs(layer: int, kind: str, x: Tensor, y: Tensor, residual: Tensor) -> None:
            del residual
            if (layer, kind) in outputs:
                gate = gates[layer, kind]
                outputs[layer, kind].add(gate.narrow.inner(x) if gate.surrogate == "narrow" else x, y)

        _watch(model, windows[:split], see_outputs, context, "fit surrogates")
        for key in list(outputs):
            _set_surrogate(gates[key], outputs.pop(key))

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


def _choose_channels(model: PreTrainedModel, gates: Gates, windows: Int[Tensor, "n t"], context: Context) -> None:
    """Copy into each `narrow` surrogate, in place, the channels from which the MLP's output is best predicted."""
    narrow = [layer for layer, kind in gates if gates[layer, kind].surrogate == "narrow"]
    if not narrow:
        return
    wide = {layer: gated_mlp(model, layer) for layer in narrow}
    grams = {layer: torch.zeros(len(mlp.up), len(mlp.up), device=mlp.up.device) for layer, mlp in wide.items()}

    def see_channels(layer: int, kind: str, x: Tensor, y: Tensor, residual: Tensor) -> None:
        del y, residual
        if kind == "mlp" and layer in wide:
            mlp = wide[layer]
            inner = (mlp.activation(F.linear(x, mlp.gate)) * F.linear(x, mlp.up)).float()
            with exact_products():
                grams[layer].addmm_(inner.T, inner)

    _watch(model, windows, see_channels, context, "choose channels")
    for layer, mlp in context.track(wide.items(), "eliminate channels"):
        surrogate = gates[layer, "mlp"].narrow
        best = backward_elimination(grams.pop(layer), mlp.down.detach().float(), surrogate.down.in_features, RIDGE)
        surrogate.gate.weight.data.copy_(mlp.gate[best])
        surrogate.up.weight.data.copy_(mlp.up[best])


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
