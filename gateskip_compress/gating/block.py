"""How a gated block runs: everything and a mask (the reference), or only the tokens that are kept.

For each branch, with x = norm(h), a token is kept when score(x) > threshold, or when it is the first of its sequence
(the attention sink: skipping it ruins all later tokens), and

    h <- h + (post(body(x)) if kept else surrogate(x))

The decision reads the token alone, so it is causal and the same whatever else is in the batch. Keys and values are
computed for all tokens, skipped ones too: later tokens may attend to them.

A gated block is the model's own block whose class is swapped for a subclass made here. So parameter names, hooks and
`isinstance` checks of transformers stay as they are, and at budget 1 the original forward runs, bit for bit.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..model import Branch, attend, project_kv
from .dial import Decision, Dial
from .gate import Gate


class GatedBlock(nn.Module):
    """Mixed into a block's own class by `gate_block`; never built by itself."""

    gates: nn.ModuleDict
    branches: tuple[Branch, Branch]
    dial: Dial
    layer: int

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the block at the dial's threshold; without one, as transformers wrote it."""
        if self.dial.threshold is None:
            return super().forward(hidden_states, *args, **kwargs)
        if args:
            raise TypeError("a gated block takes its arguments by name, as the models of transformers 5 pass them")
        for branch in self.branches:
            hidden_states = self._run(branch, hidden_states, self.dial.threshold, kwargs)
        return hidden_states

    def _run(
        self, branch: Branch, hidden: Float[Tensor, "b t d"], threshold: float, given: dict[str, Any]
    ) -> Float[Tensor, "b t d"]:
        """One branch: decide, compute, add to the stream."""
        x = getattr(self, branch.norm)(hidden)
        gate: Gate = self.gates[branch.kind]  # pyright: ignore[reportAssignmentType]
        score = gate.score(x)
        keep = (score > threshold) | (given["position_ids"] == 0)
        if self.dial.decisions is not None:
            self.dial.decisions.append(Decision(self.layer, branch.kind, score, keep))
        if self.dial.masked or keep.all():
            return self._add_masked(branch, gate, hidden, x, keep, given)
        return self._add_kept(branch, gate, hidden, x, keep, given)

    def _add_masked(
        self, branch: Branch, gate: Gate, hidden: Tensor, x: Tensor, keep: Bool[Tensor, "b t"], given: dict[str, Any]
    ) -> Tensor:
        """Compute the branch for all tokens; skipped ones take their surrogate instead."""
        body = getattr(self, branch.body)
        out = self._post(branch, body(hidden_states=x, **given)[0] if branch.kind == "attention" else body(x))
        if keep.all():
            return hidden + out
        surrogate = gate.replace(x)
        return hidden + torch.where(keep[..., None], out, 0 if surrogate is None else surrogate)

    def _add_kept(
        self, branch: Branch, gate: Gate, hidden: Tensor, x: Tensor, keep: Bool[Tensor, "b t"], given: dict[str, Any]
    ) -> Tensor:
        """Compute the branch for the kept tokens alone, nothing at all where there are none."""
        body = getattr(self, branch.body)
        flat_x, flat_keep = x.flatten(0, 1), keep.flatten()
        kept, skipped = flat_keep.nonzero().squeeze(1), (~flat_keep).nonzero().squeeze(1)
        if branch.kind == "attention":
            rope, cache = given["position_embeddings"], given.get("past_key_values")
            keys, values = project_kv(body, x, rope, cache)
            out = None
            if len(kept):
                mask = given.get("attention_mask")
                out = attend(body, x, keep, keys, values, rope, mask, given["position_ids"])
        else:
            out = body(flat_x.index_select(0, kept)) if len(kept) else None
        flat = hidden.flatten(0, 1)
        if out is not None:
            flat = flat.index_add(0, kept, self._post(branch, out))
        surrogate = gate.replace(flat_x if out is None else flat_x.index_select(0, skipped))
        if surrogate is not None:
            flat = flat + surrogate if out is None else flat.index_add_(0, skipped, surrogate)
        return flat.view_as(hidden)

    def _post(self, branch: Branch, out: Tensor) -> Tensor:
        return out if branch.post is None else getattr(self, branch.post)(out)


def gate_block(block: nn.Module, branches: tuple[Branch, Branch], gates: nn.ModuleDict, dial: Dial, layer: int) -> None:
    """Give a block gates, in place: its class becomes a subclass of its own, its gates lie beside its other modules."""
    block.__class__ = type(f"Gated{type(block).__name__}", (GatedBlock, type(block)), {"__module__": __name__})
    block.gates = gates
    block.branches, block.dial, block.layer = branches, dial, layer
