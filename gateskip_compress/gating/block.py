"""How a gated block runs: everything and a mask (the reference), or only the tokens that are kept.

For each branch, with x = norm(h), a token is kept when score(x) > threshold, or when it is the first of its sequence
(the attention sink: skipping it ruins all later tokens), and

    h <- h + (scale(x) · post(body(x)) if kept else surrogate(x))

or, with the gate before the branch, post(body(scale(x) · x)). The scale acts after the post-norm, which would undo it.
The decision reads the token alone, so it is causal and the same whatever else is in the batch. Keys and values are
computed for all tokens, skipped ones too: later tokens may attend to them.

A gated block is the model's own block whose class is swapped for a subclass made here. So parameter names, hooks and
`isinstance` checks of transformers stay as they are, and where nothing is gated the original forward runs, bit for bit.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..model import BRANCH_KINDS, Branch, attend, project_kv
from .dial import RUN_ALL, Decision, Dial
from .gate import Gate


@dataclass(frozen=True)
class _Call:
    """One branch at work: hidden (b, t, d), normalised x, what the body reads, the output's scale, and decisions."""

    branch: Branch
    gate: Gate
    hidden: Float[Tensor, "b t d"]
    x: Float[Tensor, "b t d"]
    inputs: Float[Tensor, "b t d"]
    scale: Tensor | None
    keep: Bool[Tensor, "b t"]
    given: dict[str, Any]


class GatedBlock(nn.Module):
    """Mixed into a block's own class by `gate_block`; never built by itself."""

    gates: nn.ModuleDict
    branches: tuple[Branch, Branch]
    dial: Dial
    layer: int
    before: bool

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the block at the dial's thresholds; with nothing to gate, as transformers wrote it."""
        scaled = any(gate.kind not in ("effect", None) for gate in self.gates.values())
        idle = len(self.gates) == 0 or (self.dial.thresholds is None and not scaled)
        if idle or self.dial.how == "off":
            return super().forward(hidden_states, *args, **kwargs)
        if args:
            raise TypeError("a gated block takes its arguments by name, as the models of transformers 5 pass them")
        decision = None
        for branch in self.branches:
            hidden_states, decision = self._run(branch, hidden_states, decision, kwargs)
        return hidden_states

    def _run(
        self, branch: Branch, hidden: Float[Tensor, "b t d"], earlier: Decision | None, given: dict[str, Any]
    ) -> tuple[Float[Tensor, "b t d"], Decision | None]:
        """One branch: decide, compute, add to the stream."""
        x = getattr(self, branch.norm)(hidden)
        if branch.kind not in self.gates:
            return hidden + self._out(branch, x, given), None
        gate: Gate = self.gates[branch.kind]  # pyright: ignore[reportAssignmentType]
        decision = self.decide(branch, x, earlier, given)
        keep, scale = decision.keep, decision.scale
        if self.dial.decisions is not None:
            self.dial.decisions.append(decision)
        inputs = x * scale if scale is not None and self.before else x
        call = _Call(branch, gate, hidden, x, inputs, None if self.before else scale, keep, given)
        if self.dial.how == "soft":
            return self._add_masked(call, _straight_through(decision.score, self._threshold(branch), keep)), decision
        if keep.all():
            return hidden + self._scaled(call, self._out(branch, inputs, given)), decision
        compact = self.dial.how == "compact"
        return self._add_kept(call) if compact else self._add_masked(call, keep[..., None]), decision

    def decide(
        self, branch: Branch, x: Float[Tensor, "b t d"], earlier: Decision | None, given: dict[str, Any]
    ) -> Decision:
        """Which tokens run the branch, and its output's scale; `baselines` decide otherwise."""
        gate: Gate = self.gates[branch.kind]  # pyright: ignore[reportAssignmentType]
        scale = gate.scale(x)
        if gate.kind is None and earlier is not None:
            score, keep = earlier.score, earlier.keep
        else:
            score = gate.score(x, scale)
            keep = (score > self._threshold(branch)) | (given["position_ids"] == 0)
        return Decision(self.layer, branch.kind, score, keep, scale)

    def _threshold(self, branch: Branch) -> float:
        if self.dial.thresholds is None:
            return RUN_ALL
        return self.dial.thresholds[2 * self.layer + BRANCH_KINDS.index(branch.kind)]

    def _out(self, branch: Branch, x: Tensor, given: dict[str, Any]) -> Tensor:
        """The branch for all tokens, as transformers runs it."""
        body = getattr(self, branch.body)
        return self._post(branch, body(hidden_states=x, **given)[0] if branch.kind == "attention" else body(x))

    def _add_masked(self, call: _Call, share: Tensor) -> Tensor:
        """Compute the branch for all tokens; skipped ones, whose share is 0, take their surrogate instead."""
        out = self._scaled(call, self._out(call.branch, call.inputs, call.given))
        surrogate = call.gate.replace(call.x)
        if share.dtype != torch.bool:
            return call.hidden + share * out + (0 if surrogate is None else (1 - share) * surrogate)
        return call.hidden + torch.where(share, out, 0 if surrogate is None else surrogate)

    def _add_kept(self, call: _Call) -> Tensor:
        """Compute the branch for the kept tokens alone, nothing at all where there are none."""
        body, kept = getattr(self, call.branch.body), call.keep.flatten().nonzero().squeeze(1)
        flat, flat_x = call.hidden.flatten(0, 1), call.x.flatten(0, 1)
        out = None
        if call.branch.kind == "attention":
            rope, cache = call.given["position_embeddings"], call.given.get("past_key_values")
            keys, values = project_kv(body, call.inputs, rope, cache)
            if len(kept):
                mask, positions = call.given.get("attention_mask"), call.given["position_ids"]
                out = attend(body, call.inputs, call.keep, kept, keys, values, rope, mask, positions)
        elif len(kept):
            out = body(call.inputs.flatten(0, 1).index_select(0, kept))
        if out is None:
            surrogate = call.gate.replace(flat_x)
            return call.hidden if surrogate is None else call.hidden + surrogate.view_as(call.hidden)
        out = self._post(call.branch, out)
        if call.scale is not None:
            out = out * call.scale.flatten(0, 1).index_select(0, kept)
        flat = flat.index_add(0, kept, out)
        if call.gate.surrogate != "zero":
            skipped = (~call.keep).flatten().nonzero().squeeze(1)
            flat.index_add_(0, skipped, call.gate.replace(flat_x.index_select(0, skipped)))
        return flat.view_as(call.hidden)

    def _post(self, branch: Branch, out: Tensor) -> Tensor:
        return out if branch.post is None else getattr(self, branch.post)(out)

    def _scaled(self, call: _Call, out: Tensor) -> Tensor:
        return out if call.scale is None else out * call.scale


def gate_block(
    block: nn.Module,
    branches: tuple[Branch, Branch],
    gates: nn.ModuleDict,
    dial: Dial,
    layer: int,
    before: bool = False,
    form: type[GatedBlock] = GatedBlock,
) -> None:
    """Give a block gates, in place: its class becomes a subclass of its own, its gates lie beside its other modules.

    Args:
        block: A decoder layer.
        branches: Its branches' names.
        gates: By branch kind; a branch that has none runs always.
        dial: Shared by the model's blocks.
        layer: The block's place in the model.
        before: Scales act on the branch's input instead of its output.
        form: GatedBlock, or a subclass that decides otherwise.
    """
    block.__class__ = type(f"Gated{type(block).__name__}", (form, type(block)), {"__module__": __name__})
    block.gates = gates
    block.branches, block.dial, block.layer, block.before = branches, dial, layer, before


def _straight_through(score: Tensor, threshold: float, keep: Bool[Tensor, "b t"]) -> Float[Tensor, "b t 1"]:
    """1 where kept, else 0; backwards, the slope of a sigmoid as wide as the scores are spread (arXiv 1308.3432)."""
    away = score - max(threshold, torch.finfo(score.dtype).min)
    soft = (away / score.detach().std().clamp_min(1e-6)).sigmoid()
    return (keep.to(score.dtype) + (soft - soft.detach()))[..., None]
