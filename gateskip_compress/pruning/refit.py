"""Make branches narrower, block by block, and let what remains make up for what went.

The inputs of a branch's output projection are those of the model as already pruned before it. Where some go, the
projection of the others becomes the least-squares solution for what the whole branch gave. Fitting it to the stream of
the model as it came instead, so that it would also make up for all that went before, was no better on unseen text.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..gram import add_gram, mirrored, no_gram
from ..model import BRANCH_KINDS, Enough, Kept, blocks, branch_width, branches, narrow, out_projection, walk
from ..precision import exact_products
from ..step import Context
from .moments import damped, length_before, refitted, weighed


def narrow_and_refit(model: PreTrainedModel, kept: Kept, context: Context) -> dict[str, float]:
    """Narrow branches in place, and refit their output projections.

    Args:
        model: Runs as it is set.
        kept: What stays of each branch; others are left alone.
        context: Calibration windows.

    Returns:
        For each kind of branch, what its narrow outputs miss: mean over branches of |y - y'|² / |y|².
    """
    missed: dict[str, list[float]] = {}

    def visit(layer: int, run: Callable[[], None]) -> None:
        for kind in BRANCH_KINDS:  # attention first, so that the MLP's inputs are those behind it
            key, out = (layer, kind), out_projection(model, layer, kind)
            if out is None or len(kept.get(key, ())) in (0, branch_width(model, *key).units):
                if key in kept:
                    narrow(model, *key, kept[key])
                continue
            with _moments(model, layer, kind, out) as seen:
                run()
            width, xx = branch_width(model, *key), damped(seen[0], context.calibration.numel())
            inputs = width.columns(kept[key])
            weight, before = refitted(xx, out.weight.data, inputs.to(xx.device)), out.weight.data.double()
            narrow(model, *key, kept[key])
            out.weight.data.copy_(weight)
            error = before.clone()
            error[:, inputs] -= weight.double()
            whole = float(((before @ xx) * before).sum())
            missed.setdefault(kind, []).append(float(((error @ xx) * error).sum()) / whole if whole > 0 else 0.0)

    walk(model, context.calibration, visit, context.track)
    return {kind: sum(parts) / len(parts) for kind, parts in missed.items()}


@contextmanager
def _moments(model: PreTrainedModel, layer: int, kind: str, out: nn.Linear) -> Iterator[list[Tensor]]:
    """Weighed second moments of what an output projection reads inside the `with`."""
    branch = branches(model)[BRANCH_KINDS.index(kind)]
    block, seen = blocks(model)[layer], [no_gram(out.in_features, out.weight.device)]
    held: dict[str, Tensor] = {}

    def hold_stream(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        held["stream"] = args[0] if args else kwargs["hidden_states"]

    def hold_projection(_module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        held["x"], held["y"] = args[0], y

    def add(_module: nn.Module, _args: object, out: Tensor | tuple[Tensor, Any]) -> None:
        z = out[0] if isinstance(out, tuple) else out
        x = weighed(held["x"][0].float(), length_before((held["stream"] + z)[0], held["y"][0], z[0]))
        with exact_products():
            add_gram(seen[0], x)
        raise Enough

    # where no norm comes before the branch, it reads the stream itself
    entry = getattr(block, branch.norm) if branch.norm is not None else getattr(block, branch.body[0])
    handles = [
        entry.register_forward_pre_hook(hold_stream, with_kwargs=True),
        out.register_forward_hook(hold_projection),
        getattr(block, branch.post or branch.body[-1]).register_forward_hook(add),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        seen[0] = mirrored(seen[0])
