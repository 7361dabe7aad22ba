"""Multiply-adds: counted while a model runs, and computed from shapes; the two are checked against each other in tests.

One multiply-add (MAC) is one product and one sum in a matrix product; norms, activations, rotary embeddings and
look-ups are not counted. Causal attention counts its full rectangle of queries × keys, whichever part of it a kernel
leaves out.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count
from transformers import PreTrainedModel

from .model import NoMlp, blocks, family_of, features, key_value_features, projections, width
from .model.attention import whole_rectangles


@dataclass(frozen=True)
class BranchCost:
    """Multiply-adds of one branch for one token.

    Args:
        always: Keys and values, where skipped tokens need them too.
        kept: The rest of the branch, over a given number of keys.
        gate: The score, wherever a gate is evaluated.
        skipped: The surrogate.
    """

    always: int
    kept: int
    gate: int
    skipped: int


@contextmanager
def counted_macs() -> Iterator[Callable[[], int]]:
    """Counts the multiply-adds that really happen inside the `with`; what it yields tells their number."""
    counter = _Counter()
    with whole_rectangles(), counter:
        yield lambda: counter.flops // 2


class _Counter(TorchDispatchMode):
    """Counts as torch's FlopCounterMode and by its formulas, with less to do: it does not tell modules apart."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self._whole: set[Any] = {torch.ops.prim.device.default}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, or what it is made of."""
        del types
        given = kwargs or {}
        formula = _FORMULAS.get(getattr(func, "_overloadpacket", None))
        if formula is None and func not in self._whole:
            with self:
                out = func.decompose(*args, **given)
            if out is not NotImplemented:
                return out
            self._whole.add(func)
        out = func(*args, **given)
        if formula is not None:
            self.flops += formula(*args, **given, out_val=out)
        return out


def count_macs(model: PreTrainedModel, ids: Int[Tensor, "b t"]) -> int:
    """Run the model on `ids` as it stands and count the multiply-adds, all logits included."""
    with torch.inference_mode(), counted_macs() as macs:
        model(ids, use_cache=False)
    return macs()


def branch_costs(model: PreTrainedModel, context_tokens: int) -> dict[tuple[int, str], BranchCost]:
    """What a token costs in each branch, by layer and kind."""
    family, costs = family_of(model), {}
    for layer, block in enumerate(blocks(model)):
        for branch in family.branches:
            parts, body = projections(block, branch), getattr(block, branch.body[0])
            if isinstance(body, NoMlp):  # taken out
                instead = body.instead.replace_macs if body.instead is not None else 0
                costs[layer, branch.kind] = BranchCost(always=0, kept=instead, gate=0, skipped=0)
                continue
            total = sum(d * o for d, o in filter(None, map(features, parts.values())))
            always = products = 0
            if branch.kind == "attention":
                heads, _ = features(parts[f"{branch.body[0]}.{family.layout.out}"]) or (0, 0)
                products = 2 * heads * context_tokens
                if not getattr(block, "copies", False):
                    always = key_value_features(family, block) * width(model)
            gate = dict(getattr(block, "gates", {})).get(branch.kind)
            costs[layer, branch.kind] = BranchCost(
                always=always,
                kept=total - always + products,
                gate=gate.score_macs if gate else 0,
                skipped=gate.replace_macs if gate else 0,
            )
    return costs


def ungated_macs_per_token(model: PreTrainedModel, context_tokens: int) -> int:
    """Multiply-adds of one token without any gate, output head included, over `context_tokens` keys."""
    return sum(c.always + c.kept for c in branch_costs(model, context_tokens).values()) + head_macs(model)


def head_macs(model: PreTrainedModel) -> int:
    """Multiply-adds of one token's logits."""
    columns, rows = features(model.get_output_embeddings()) or (0, 0)
    return rows * columns


def _sdpa_flop(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> int:
    heads = query.shape[:2]  # grouped keys are shared, but every query head does its own products
    return sdpa_flop_count(query.shape, (*heads, *key.shape[2:]), (*heads, *value.shape[2:]))


def _bmm_flop(left: Tensor, right: Tensor, *_: object, **__: object) -> int:
    # with nothing to sum it is how some versions of transformers find rotary angles
    return 2 * left.numel() * right.shape[2] if left.shape[2] > 1 else 0


# torch's table has no entry for the attention kernel that CPUs use
_FORMULAS = {
    **flop_registry,
    torch.ops.aten.bmm: _bmm_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_flop,
}
