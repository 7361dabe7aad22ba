"""What a native model is made of, without torch: JSON that names arrays, and the arrays.

`pack.py` draws it up from a Hugging Face model, `packed.py` keeps it in a file, and here it is built.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict

import numpy as np
from jaxtyping import Float

from .extension import extension

Arrays = Mapping[str, np.ndarray]
"""By the names that a blueprint gives them."""


class MatrixPlan(TypedDict):
    """A packed matrix. `packed` and `bias` name arrays, `rows` and `columns` count features out and in."""

    packed: str
    kind: str
    rows: int
    columns: int
    group: int
    bias: str | None


class SurrogatePlan(TypedDict, total=False):
    """What stands in a skipped branch's place; nothing where it is just left out."""

    offset: str
    gate: MatrixPlan
    up: MatrixPlan
    down: MatrixPlan


class BranchPlan(TypedDict):
    """A branch's norms and gate; `score` is None where it follows the other branch's decision, or has no gate.

    `norm` is None where the branch was taken out and nothing stands in its place, `post` where its output has no norm.
    """

    norm: str | None
    post: str | None
    gated: bool
    score: str | None
    bias: float
    surrogate: SurrogatePlan


class LayerPlan(TypedDict):
    """A block.

    `matrices` has none of a branch that was taken out. `rotation` is one of the model's, None turns nothing; `window`
    is how many positions a token sees, None being all.
    """

    matrices: dict[str, MatrixPlan]
    norms: dict[str, str]
    branches: dict[str, BranchPlan]
    rotation: int | None
    window: int | None
    copies: bool


class RotationPlan(TypedDict):
    """Rotary positions."""

    frequencies: str
    scale: float


class Blueprint(TypedDict):
    """A model.

    `embedding` and `exact_head` are float matrices by their arrays' names, or matrices of codes. Rows of the former are
    multiplied with `enlarged`, queries with `scale`.
    """

    sizes: dict[str, int]
    eps: float
    scale: float
    enlarged: float
    activation: str
    layers: list[LayerPlan]
    norm: str
    head: MatrixPlan
    quick_head: MatrixPlan | None
    embedding: str | MatrixPlan
    exact_head: str | MatrixPlan | None
    rotations: list[RotationPlan]
    bytes_per_token: int
    drafts: bool


@dataclass(frozen=True)
class Builder:
    """Builds native models of one blueprint.

    Args:
        plan: The blueprint.
        arrays: That it names; the native model points into them.
        kernels: That they were packed for.
        held: What the native model only points to.
    """

    plan: Blueprint
    arrays: Arrays
    kernels: str
    held: list[Any] = field(default_factory=list, repr=False)

    def model(self, *, context_tokens: int, rows: int, threads: int, cache: str, fine: bool) -> Any:
        """A native model with an empty cache; arguments are as in `lower`, `fine` being activations of 16 bits."""
        plan, native = self.plan, extension()
        rotations = [turns(self.arrays[r["frequencies"]], r["scale"], context_tokens) for r in plan["rotations"]]
        shape = native.Shape()
        for name, value in plan["sizes"].items():
            setattr(shape, name, value)
        shape.eps, shape.scale, shape.rotated = plan["eps"], plan["scale"], rotations[0][0].shape[1]
        shape.enlarged, shape.activation = plan["enlarged"], plan["activation"]
        shape.context, shape.rows, shape.element, shape.fine = context_tokens, rows, cache, fine
        head = self.matrix(plan["head"])
        quick = None if plan["quick_head"] is None else self.matrix(plan["quick_head"])
        model = native.Model(shape, self.kernels, threads)
        model.finish(
            [self.layer(layer) for layer in plan["layers"]],
            self.vector(plan["norm"]),
            head,
            quick,
            self.table(plan["embedding"], head),
            None if plan["exact_head"] is None else self.table(plan["exact_head"], head),
            rotations,
            self.held,
        )
        return model

    def layer(self, plan: LayerPlan) -> Any:
        """One block."""
        layer = extension().Layer()
        for name, matrix in plan["matrices"].items():
            setattr(layer, name, self.matrix(matrix))
        for name, norm in plan["norms"].items():
            setattr(layer, name, self.vector(norm))
        for name, branch in plan["branches"].items():
            setattr(layer, name, self.branch(branch))
        layer.rotation = -1 if plan["rotation"] is None else plan["rotation"]
        layer.window, layer.copies = plan["window"] or 0, plan["copies"]
        return layer

    def branch(self, plan: BranchPlan) -> Any:
        """A branch's norms and gate."""
        branch = extension().Branch()
        for name in ("norm", "post", "score"):
            if plan[name] is not None:
                setattr(branch, name, self.vector(plan[name]))
        branch.gated, branch.bias = plan["gated"], plan["bias"]
        branch.follows = plan["gated"] and plan["score"] is None
        surrogate = extension().Surrogate()
        for name, part in plan["surrogate"].items():
            setattr(surrogate, name, self.vector(part) if isinstance(part, str) else self.matrix(part))
        branch.surrogate = surrogate
        return branch

    def matrix(self, plan: MatrixPlan) -> Any:
        """A matrix, kept alive as long as the model."""
        bias = None if plan["bias"] is None else self.arrays[plan["bias"]]
        shape = plan["rows"], plan["columns"]
        made = extension().HeldMatrix(
            self.kernels, plan["kind"], *shape, plan["group"], self.arrays[plan["packed"]], bias
        )
        self.held.append(made)
        return made

    def table(self, plan: str | MatrixPlan, head: Any) -> Any:
        """Rows of floats, or of codes, which may be the head's own."""
        if isinstance(plan, str):
            return self.arrays[plan]
        return head if plan == self.plan["head"] else self.matrix(plan)

    def vector(self, name: str) -> list[float]:
        """A small array as numbers."""
        return self.arrays[name].tolist()


def turns(
    frequencies: Float[np.ndarray, " r"], scale: float, context_tokens: int
) -> tuple[Float[np.ndarray, "t d"], Float[np.ndarray, "t d"]]:
    """Cosines and sines of rotary positions, each frequency twice, as Llama's halves take them."""
    angles = np.arange(context_tokens, dtype=np.float32)[:, None] * frequencies
    twice = np.concatenate((angles, angles), axis=1)
    factor = np.float32(scale)
    return np.cos(twice) * factor, np.sin(twice) * factor
