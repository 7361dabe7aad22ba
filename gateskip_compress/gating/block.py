"""How a gated block runs: everything and a mask (the reference), or only the tokens that are kept.

For each branch, with x = norm(h), a token is kept when score(x) > threshold, or when it is the first of its sequence
(the attention sink: skipping it ruins all later tokens), and

    h <- h + (scale(x) · post(body(x)) if kept else surrogate(x))

or, with the gate before the branch, post(body(scale(x) · x)). The scale acts after the post-norm, which would undo it.
Families without a norm before the branch have x = h; in parallel blocks both branches read the h that enters the block.
The decision reads the token alone, so it is causal and the same whatever else is in the batch.

Later tokens may attend to a skipped one. Its keys and values are computed as if it ran (`dense`), or they are those of
the block below at the same position, copied or not (`copy`, arXiv 2510.13876, sec. 3). The first block's are always its
own, and at budget 1 all are.

Padding, where the model gave a mask that shows it, adds nothing to its stream and runs no branch; its scores, and its
keys and values where those are dense, are computed with the others'.

A gated block is the model's own block whose class is swapped for a subclass made here. So parameter names, hooks and
`isinstance` checks of transformers stay as they are, and where nothing is gated the original forward runs, bit for bit.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..model import Branch, Family
from ..model.attention import Overlay, Sight, attend, keys_values, overlay, queries, rope_of, sight
from .dial import RUN_ALL, Dial
from .gate import Gate
from .turning import Decision, branch_index

_LEAST_SPREAD = 1e-6


@dataclass(frozen=True)
class _Call:
    """One branch at work: hidden (b, t, d), normalised x, what the body reads, the output's scale, and decisions.

    A fresh `hidden` was made by the block itself, nobody else has it, and it is not needed for gradients.
    """

    branch: Branch
    gate: Gate
    hidden: Float[Tensor, "b t d"]
    x: Float[Tensor, "b t d"]
    inputs: Float[Tensor, "b t d"]
    scale: Tensor | None
    keep: Bool[Tensor, "b t"]
    seen: Sight
    given: dict[str, Any]
    fresh: bool


class GatedBlock(nn.Module):
    """Mixed into a block's own class by `gate_block`; never built by itself."""

    gates: nn.ModuleDict
    draft_gates: nn.ModuleDict  # of models that have some: see `dial.drafting`
    draft_dial: Dial
    family: Family
    dial: Dial
    layer: int
    before: bool
    parallel: bool
    copies: bool
    feeds: bool
    arguments: tuple[str, ...]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the block at the dial's thresholds; with nothing to gate, as transformers wrote it."""
        scaled = any(gate.kind not in ("effect", None) for gate in self.gates.values())
        idle = (len(self.gates) == 0 and not self.feeds) or (self.dial.thresholds is None and not scaled)
        if idle or self.dial.how == "off":
            return super().forward(hidden_states, *args, **kwargs)
        given = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        attention = getattr(self, self.family.attention.body[0])
        cache = given.get(self.family.layout.cache)
        seen = sight(given.get("attention_mask"), cache, attention.layer_idx, hidden_states)
        stream, decision = hidden_states, None
        for branch in self.family.branches:
            reads = hidden_states if self.parallel else stream
            stream, decision = self._run(branch, reads, stream, decision, seen, given)
        return stream

    def _run(
        self,
        branch: Branch,
        reads: Float[Tensor, "b t d"],
        hidden: Float[Tensor, "b t d"],
        earlier: Decision | None,
        seen: Sight,
        given: dict[str, Any],
    ) -> tuple[Float[Tensor, "b t d"], Decision | None]:
        """One branch: decide, compute, add to the stream."""
        x = reads if branch.norm is None else getattr(self, branch.norm)(reads)
        if branch.kind not in self.gates:
            return hidden + self._out(branch, x, given), None
        gate: Gate = self.gates[branch.kind]  # pyright: ignore[reportAssignmentType]
        decision = self.decide(branch, x, earlier, seen, given)
        keep, scale = decision.keep, decision.scale
        if self.dial.decisions is not None:
            self.dial.decisions.append(decision)
        inputs = x * scale if scale is not None and self.before else x
        fresh = branch is not self.family.branches[0] and not torch.is_grad_enabled()
        call = _Call(branch, gate, hidden, x, inputs, None if self.before else scale, keep, seen, given, fresh)
        if self.dial.how == "soft":
            spread = self.dial.spreads[branch_index(self.layer, branch.kind)]
            share = _straight_through(decision.score, self._threshold(branch), keep, spread)
            return self._add_masked(call, share), decision
        kept = keep.flatten().nonzero().squeeze(1)
        if len(kept) == keep.numel():
            return hidden + self._scaled(call, self._out(branch, inputs, given)), decision
        compact = self.dial.how == "compact"
        return self._add_kept(call, kept) if compact else self._add_masked(call, keep[..., None]), decision

    def decide(
        self, branch: Branch, x: Float[Tensor, "b t d"], earlier: Decision | None, seen: Sight, given: dict[str, Any]
    ) -> Decision:
        """Which tokens run the branch, and its output's scale; `baselines` decide otherwise.

        Args:
            branch: Of this block.
            x: Its normalised input.
            earlier: What this block's branch before it decided, if there is one with a gate.
            seen: First tokens, which always run, and padding, which never does.
            given: The other arguments of the block.
        """
        del given
        gate: Gate = self.gates[branch.kind]  # pyright: ignore[reportAssignmentType]
        scale = gate.scale(x)
        if gate.kind is None and earlier is not None:
            score, keep = earlier.score, earlier.keep
        else:
            score = gate.score(x, scale)
            keep = self._keep(branch, score, seen)
        return Decision(self.layer, branch.kind, score, keep, scale, seen.real)

    def _keep(self, branch: Branch, score: Float[Tensor, "b t"], seen: Sight) -> Bool[Tensor, "b t"]:
        """Tokens above the branch's threshold and first tokens, but no padding."""
        return ((score > self._threshold(branch)) | seen.first) & seen.real

    def _threshold(self, branch: Branch) -> float:
        if self.dial.thresholds is None:
            return RUN_ALL
        return self.dial.thresholds[branch_index(self.layer, branch.kind)]

    def _out(self, branch: Branch, x: Tensor, given: dict[str, Any], keep: Bool[Tensor, "b t"] | None = None) -> Tensor:
        """The branch for all tokens, as transformers runs it; keys and values outside `keep` are as if skipped."""
        if branch.kind == "mlp":
            return self._post(branch, self._mlp(x))
        attention, name = getattr(self, branch.body[0]), self.family.layout.cache
        below = self._take_below()
        if below is None and not self.feeds:
            return self._post(branch, attention(hidden_states=x, **given)[0])
        cache = Overlay(given.get(name), below, keep)
        out = attention(hidden_states=x, **{**given, name: cache})[0]
        self._feed(cache.new)
        return self._post(branch, out)

    def _take_below(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values of the block below, for skipped tokens; None where none are copied."""
        below, self.dial.below = self.dial.below, None
        assert below is not None or not self.copies or self.dial.thresholds is None
        return below if self.copies else None

    def _feed(self, new: tuple[Tensor, Tensor] | None) -> None:
        """Leave this block's keys and values for the block above, if that skips and copies."""
        if self.feeds and self.dial.thresholds is not None:
            self.dial.below = new

    def _mlp(self, x: Tensor) -> Tensor:
        for name in self.family.mlp.body:
            x = getattr(self, name)(x)
        return x

    def _add_masked(self, call: _Call, share: Tensor) -> Tensor:
        """Compute the branch for all tokens; skipped ones, whose share is 0, take their surrogate instead."""
        out = self._scaled(call, self._out(call.branch, call.inputs, call.given, call.keep))
        surrogate = call.gate.replace(call.x)
        surrogate = 0 if surrogate is None else surrogate * call.seen.real[..., None]
        if share.dtype != torch.bool:
            return call.hidden + share * out + (1 - share) * surrogate
        return call.hidden + torch.where(share, out, surrogate)

    def _add_kept(self, call: _Call, kept: Int[Tensor, " n"]) -> Tensor:
        """Compute the branch for the kept tokens alone, nothing at all where there are none."""
        skipped = (~call.keep & call.seen.real).flatten().nonzero().squeeze(1)
        flat_inputs = call.inputs.flatten(0, 1)
        flat = (call.hidden if call.fresh else call.hidden.clone()).flatten(0, 1)
        out = None
        if call.branch.kind == "attention":
            out = self._attend_kept(call, flat_inputs, kept)
        elif len(kept):
            out = self._mlp(flat_inputs.index_select(0, kept))
        if out is not None:
            out = self._post(call.branch, out)
            if call.scale is not None:
                out = out * call.scale.flatten(0, 1).index_select(0, kept)
            flat.index_add_(0, kept, out.to(flat.dtype))  # autocast may have made it narrower
        if call.gate.surrogate != "zero":
            replaced = call.gate.replace(call.x.flatten(0, 1).index_select(0, skipped))
            assert replaced is not None
            flat.index_add_(0, skipped, replaced.to(flat.dtype))
        return flat.view_as(call.hidden)

    def _attend_kept(
        self, call: _Call, flat_inputs: Float[Tensor, "m d"], kept: Int[Tensor, " n"]
    ) -> Float[Tensor, "n d"] | None:
        """Attention of the kept tokens, None where there are none; keys and values of all go to the cache."""
        layout, attention = self.family.layout, getattr(self, call.branch.body[0])
        rope, cache, below = call.given.get("position_embeddings"), call.given.get(layout.cache), self._take_below()
        rows, rope_rows = flat_inputs.index_select(0, kept), rope_of(rope, len(call.keep), kept)
        if below is None:
            keys, values = (part.transpose(1, 2) for part in keys_values(layout, attention, call.inputs, rope))
        elif len(kept) == 0:
            keys, values = below
        else:
            new = keys_values(layout, attention, rows, rope_rows)
            keys, values = overlay(below[0], kept, new[0]), overlay(below[1], kept, new[1])
        self._feed((keys, values))
        if cache is not None:
            keys, values = cache.update(keys, values, attention.layer_idx)
        if len(kept) == 0:
            return None
        query = queries(layout, attention, rows, rope_rows)
        return attend(layout, attention, query, call.keep, kept, keys, values, call.seen)

    def _post(self, branch: Branch, out: Tensor) -> Tensor:
        return out if branch.post is None else getattr(self, branch.post)(out)

    def _scaled(self, call: _Call, out: Tensor) -> Tensor:
        return out if call.scale is None else out * call.scale


def gate_block(
    block: nn.Module,
    family: Family,
    gates: nn.ModuleDict,
    dial: Dial,
    layer: int,
    *,
    before: bool = False,
    parallel: bool = False,
    copies: bool = False,
    feeds: bool = False,
    form: type[GatedBlock] = GatedBlock,
) -> None:
    """Give a block gates, in place: its class becomes a subclass of its own, its gates lie beside its other modules.

    Args:
        block: A decoder layer.
        family: Where its parts are.
        gates: By branch kind; a branch that has none runs always.
        dial: Shared by the model's blocks.
        layer: The block's place in the model.
        before: Scales act on the branch's input instead of its output.
        parallel: Both branches read the stream as it enters the block.
        copies: Tokens that skip attention take over keys and values of the block below.
        feeds: The block above copies.
        form: GatedBlock, or a subclass that decides otherwise.
    """
    # GPT-2 passes arguments by place
    block.arguments = tuple(inspect.signature(type(block).forward).parameters)[2:]
    block.__class__ = type(f"Gated{type(block).__name__}", (form, type(block)), {"__module__": __name__})
    block.gates, block.dial = gates, dial
    block.family, block.layer, block.before, block.parallel = family, layer, before, parallel
    block.copies, block.feeds = copies, feeds


def _straight_through(
    score: Tensor, threshold: float, keep: Bool[Tensor, "b t"], spread: float
) -> Float[Tensor, "b t 1"]:
    """1 where kept, else 0; backwards, the slope of a sigmoid as wide as the scores are spread (arXiv 1308.3432)."""
    away = score - max(threshold, torch.finfo(score.dtype).min)
    soft = (away / max(spread, _LEAST_SPREAD)).sigmoid()
    return (keep.to(score.dtype) + (soft - soft.detach()))[..., None]
