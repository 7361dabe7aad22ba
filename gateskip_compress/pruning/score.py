"""What branches would lose, unit by unit: by the loss's curvature, activations, magnitudes, gates or a try.

    second_order   of a branch's output y = W x the loss is quadratic with the Kronecker-factored Fisher matrix
                   E g gᵀ ⊗ E x xᵀ, g the loss's gradient at y; units go by backward elimination, what is left
                   refitted each time, see `elimination.py`; then one cut of each branch is tried, see `trial.py`.
                   In nats a token, and so the same for all branches
    activation     E |W_j x_j|² of each input j: what zeroing it changes (Wanda's product, arXiv 2306.11695, by columns)
    magnitude      sum of squares of the weights that a unit takes along; the usual baseline
    influence      1 - cos of the stream before and after the whole branch (ShortGPT, arXiv 2403.03853)
    perplexity     log perplexity with the whole branch left out, less without (BlockPruner, arXiv 2406.10594)
    gates          what a fitted gate predicts that skipping the branch loses, over all tokens

The stream of a first token, the attention sink, is up to a hundred times as long as others', and a few channels make
it so; losing them ruins every later token. So in `second_order`, x is divided by the length of the stream that it is
added to, g multiplied by it, which the next norm does anyway, and a window's first token counts as much as all others.
A post-norm (Gemma, OLMo2) makes g the longer the shorter y is, so products of the two moments say too much, of an MLP
of gemma3-270m hundreds of times as much as is lost; and g says nothing of the length of y, which the norm restores, so
that no branch would be missed. So both are taken as the stream sees them, see `moments.py`.

Activations and magnitudes compare units of one branch; between branches only their shares of it can be compared.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..elimination import eliminate
from ..folders import write_whole
from ..gating.calibrate import everywhere, observe
from ..gating.dial import RUN_ALL
from ..gating.turning import dial_of
from ..gram import add_gram, mirrored, no_gram
from ..macs import branch_costs
from ..model import (
    BRANCH_KINDS,
    blocks,
    branch_width,
    branches,
    out_projection,
    rows_of,
    watch,
    watch_gradients,
)
from ..precision import exact_products
from ..step import Context
from ..text import fingerprint
from .cut import Curve, Key, Scores
from .influence import influence
from .moments import damped, fixed_scale, length_before, weighed
from .perplexity import Tries
from .trial import TRIAL_TOKENS, corrected, trial

By = Literal["second_order", "activation", "magnitude", "influence", "perplexity", "gates"]
SCORING_TOKENS: dict[By, int] = {
    "second_order": 65536,
    "activation": 16384,
    "magnitude": 0,
    "influence": 4096,
    "perplexity": 1024,
    "gates": 1024,
}
"""Of the calibration text, at most."""
_FORM = 3
"""Of kept scores; to be raised when a score means something else."""
_TOGETHER = 1 / 16
"""Share of the channels left that go at a time."""


def cached_scores(model: PreTrainedModel, by: By, context: Context) -> Scores:
    """Scores, out of the context's cache folder where the same model was scored by the same text before.

    The file is `scores-<by>-<form>-<hash>-<hash>.json`, by the model's weights and the text.
    """
    if context.cache is None:
        return score(model, by, context)
    text = hashlib.sha256(context.calibration.cpu().numpy().tobytes()).hexdigest()[:16]
    path = context.cache / f"scores-{by}-{_FORM}-{fingerprint(model)}-{text}.json"
    if not path.is_file():
        _write(path, score(model, by, context))
    return _read(path)


def score(model: PreTrainedModel, by: By, context: Context) -> Scores:
    """Curves of all branches; of a branch that only goes as a whole, its end counts."""
    windows = context.calibration[: max(1, SCORING_TOKENS[by] // context.calibration.shape[1])].to(model.device)
    if by == "second_order":
        return _second_order(model, windows, context)
    if by in ("activation", "magnitude"):
        return _alone(model, windows, by, context)
    return {
        key: Curve(tuple(range(units)), tuple(whole * (unit + 1) / units for unit in range(units)))
        for key, whole in _whole(model, by, windows, context).items()
        if (units := branch_width(model, *key).units)
    }


def present(model: PreTrainedModel) -> dict[Key, nn.Linear]:
    """The output projections of all branches that are there."""
    keys = ((layer, kind) for layer in range(len(blocks(model))) for kind in BRANCH_KINDS)
    return {key: linear for key in keys if (linear := out_projection(model, *key)) is not None}


def _second_order(model: PreTrainedModel, windows: Int[Tensor, "n t"], context: Context) -> Scores:
    """By the Fisher matrix; its labels are the text's own, which for text that the model wrote is no approximation."""
    outs, names = present(model), {id(module): name for name, module in model.named_modules()}
    at = {names[id(linear)]: key for key, linear in outs.items()}
    post = {branch.kind: branch.post for branch in branches(model) if branch.post}
    posts = {names[id(getattr(blocks(model)[key[0]], post[key[1]]))]: key for key in outs if key[1] in post}
    xx = {key: no_gram(linear.in_features, linear.weight.device) for key, linear in outs.items()}
    gg = {key: no_gram(linear.out_features, linear.weight.device) for key, linear in outs.items()}
    added: dict[Key, tuple[Tensor, Tensor]] = {}
    normed: dict[Key, tuple[Tensor, Tensor]] = {}

    def see_stream(layer: int, kind: str, x: Tensor, y: Tensor, residual: Tensor) -> None:
        del x
        added[layer, kind] = (residual + y).detach()[0].float(), y.detach()[0].float()

    def see(name: str, x: Tensor, gradient: Tensor) -> None:
        inner, outer = x[0].float(), gradient[0].float()
        if name in posts:  # runs before the projection's own
            normed[posts[name]] = inner, outer
            return
        key = at[name]
        stream, z = added[key]
        y, at_z = normed.pop(key, (z, outer))
        length = length_before(stream, y, z)
        inner, outer = weighed(inner, length), (fixed_scale(outer, y, at_z, z) * length)[1:]
        with exact_products():
            add_gram(xx[key], inner)
            add_gram(gg[key], outer)

    with watch_gradients(model, [*posts, *at], see), watch(model, see_stream):
        for window in context.track(list(windows), "score by curvature"):
            logits = model(window[None], use_cache=False).logits[0, :-1].float()
            F.cross_entropy(logits, window[1:], reduction="sum").backward()
    found, tried = {}, {}
    some = windows[: max(1, TRIAL_TOKENS // windows.shape[1])]
    tries = Tries(model, some)
    for key, linear in context.track(list(outs.items()), "eliminate and try"):
        width = branch_width(model, *key)
        moments = damped(mirrored(xx.pop(key)) / windows.numel(), windows.numel())
        values, vectors = torch.linalg.eigh(mirrored(gg.pop(key)).double() / windows.numel())
        root = (values.clamp_min(0) / 2).sqrt()[:, None] * vectors.T
        gone = eliminate(
            moments,
            root @ linear.weight.detach().double(),
            group=width.inputs,
            share=_TOGETHER,
        )
        found[key] = Curve(tuple(gone.order.tolist()), tuple(gone.lost.tolist()))
        count, after = trial(linear, found[key], width, moments, partial(tries.changed, key[0]))
        tried[key] = count, after - tries.whole
    return corrected(found, tried)


@torch.inference_mode()
def _alone(model: PreTrainedModel, windows: Int[Tensor, "n t"], by: By, context: Context) -> Scores:
    """By activations or magnitudes, each unit by itself."""
    outs = present(model)
    squares = dict.fromkeys(outs, torch.ones(()))
    if by == "activation":
        squares = {key: torch.zeros(linear.in_features, device=linear.weight.device) for key, linear in outs.items()}

        def hook(key: Key) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def see(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
                squares[key] += args[0][:, 1:].float().square().sum((0, 1))

            return see

        handles = [linear.register_forward_pre_hook(hook(key)) for key, linear in outs.items()]
        try:
            for window in context.track(list(windows), "score by activations"):
                model(window[None], use_cache=False, logits_to_keep=1)
        finally:
            for handle in handles:
                handle.remove()
    found = {}
    for key, linear in outs.items():
        width = branch_width(model, *key)
        lost = (linear.weight.float().square().sum(0) * squares[key]).view(width.units, -1).sum(1)
        if by == "magnitude":
            for projection, rows in rows_of(model, *key, range(width.units)):
                lost = lost + projection.weight.float().square().sum(1)[rows].view(width.units, -1).sum(1)
        order = lost.argsort()
        shares = lost[order].double().cumsum(0) / lost.double().sum()
        found[key] = Curve(tuple(order.tolist()), tuple(shares.tolist()))
    return found


@torch.inference_mode()
def _whole(model: PreTrainedModel, by: By, windows: Int[Tensor, "n t"], context: Context) -> dict[Key, float]:
    """Of branches as a whole."""
    if by == "gates":
        return gate_scores(model, windows)
    if by == "influence":
        return _branch_influence(model, windows)
    tries, keys = Tries(model, windows), present(model)
    return {key: tries.without_branch(*key) - tries.whole for key in context.track(keys, "leave out branches")}


def _branch_influence(model: PreTrainedModel, windows: Int[Tensor, "n t"]) -> dict[Key, float]:
    """Mean influence of each branch; first tokens are left out, as sinks."""
    totals = dict.fromkeys(present(model), 0.0)

    def see(layer: int, kind: str, x: Tensor, y: Tensor, residual: Tensor) -> None:
        del x
        if (layer, kind) in totals:
            before = residual[:, 1:].flatten(0, 1)
            turned = influence(before, before + y[:, 1:].flatten(0, 1))
            totals[layer, kind] += float(turned.mean()) / len(windows)

    with watch(model, see):
        for window in windows:
            model(window[None], use_cache=False, logits_to_keep=1)
    return totals


@torch.inference_mode()
def gate_scores(model: PreTrainedModel, windows: Int[Tensor, "n t"]) -> dict[Key, float]:
    """What gates predict that skipping each branch loses, its multiply-adds taken back out: mean of exp(2 score).

    Branches without a gate of their own are not in it.

    Raises:
        ValueError: the gates are none of `effect`: what other kinds score is no loss.
    """
    if any(gate.kind not in ("effect", None) for block in blocks(model) for gate in dict(block.gates).values()):
        raise ValueError("by 'gates' reads what `effect` gates predict: use kind='effect' in GateSkip")
    costs, found = branch_costs(model, windows.shape[1]), {}
    dial_of(model)
    for decision in observe(model, windows, everywhere(model, RUN_ALL)):
        key = decision.layer, decision.kind
        gate = dict(blocks(model)[decision.layer].gates)[decision.kind]
        if gate.kind == "effect":
            saved = max(1, costs[key].kept - gate.replace_macs)
            lost = float((2 * decision.movable.float()).exp().mean()) * saved
            found[key] = found.get(key, 0.0) + lost / len(windows)
    return found


def _write(path: Path, scores: Scores) -> None:
    content = [[*key, asdict(curve)] for key, curve in scores.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content))


def _read(path: Path) -> Scores:
    return {
        (layer, kind): Curve(tuple(curve["order"]), tuple(curve["lost"]))
        for layer, kind, curve in json.loads(path.read_text())
    }
