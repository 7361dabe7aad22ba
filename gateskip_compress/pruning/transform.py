"""The Prune step: whole blocks, whole branches, KV groups or MLP channels out, by a score."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModel
from ..macs import branch_costs
from ..model import (
    BRANCH_KINDS,
    Kept,
    blocks,
    branch_width,
    check_unshared,
    check_widths,
    describe,
    family_of,
    narrow,
    plain_config,
    remove_blocks,
    rows_of,
)
from ..names import check_choice
from ..step import Context, Record, Stage
from .cut import Key, sizes, uneven, uniform
from .gates import forget_block, replace_by_surrogate
from .influence import influence
from .perplexity import Tries
from .refit import narrow_and_refit
from .score import SCORING_TOKENS, By, cached_scores, gate_scores, present
from .trial import TRIAL_TOKENS

Cut = Literal["blocks", "branches", "width", "attention", "channels"]
Of = Literal["parameters", "macs", "bytes"]
Shape = Literal["uniform", "uneven"]
SCORES: dict[Cut, tuple[By, ...]] = {
    "blocks": ("influence", "perplexity", "gates"),
    "branches": ("perplexity", "gates", "influence", "second_order"),
    "width": ("second_order", "activation", "magnitude"),
    "attention": ("second_order", "activation", "magnitude"),
    "channels": ("second_order", "activation", "magnitude"),
}
"""What can be scored how, the default first."""
_KINDS: dict[Cut, tuple[str, ...]] = {"attention": ("attention",), "channels": ("mlp",)}


@dataclass(frozen=True)
class Prune:
    """Make a model smaller: blocks, branches, attention groups or MLP channels go, those first that are missed least.

    By default a share of the width goes by `second_order`, and what remains is refitted, block by block, to make up for
    it. `Prune(blocks=n)` is ShortGPT (arXiv 2403.03853), except that influence is measured again
    after each removal, since blocks that are redundant one by one are not redundant together.

    Args:
        blocks: How many whole blocks to drop, 0 up to all but one; instead of `share`.
        share: What is to go, above 0 and below 1, of all blocks together; at least that much goes.
        of: What the share is of: `parameters`, `macs` (a token's multiply-adds, over as many keys as the calibration
            windows have tokens) or `bytes`.
        cut: `blocks`; `branches`, attention or an MLP as a whole; `attention`, by KV groups, whose query heads go
            along; `channels` of MLPs; or `width`, both of these.
        by: Score, see `score.py`; None is the default for what is cut, the first in `SCORES`. `gates` reads those that
            a GateSkip step fitted, and leaves their surrogates in the place of the branches. Branches by `influence`
            ruin SmolLM2-135M: it takes eight MLPs, most of them neighbours, each of which alone would be missed little.
        shape: `uniform` widths, which leave a plain Hugging Face model; or `uneven` ones, cut where the score says that
            the least is lost, for which the model loads through this package: by `second_order`, a fifth of
            SmolLM2-135M's blocks costs a tenth less perplexity so. None is uniform, but uneven for branches.
        multiple: What output projections read is a multiple of it, or as wide as it was, so that groups of weights fit.

    Raises:
        ValueError: A field is out of its range, or two do not go together; or the share cannot be reached.
        UnsupportedModel: Blocks have no such parts, or two share a weight.
    """

    name: ClassVar[str] = "prune"
    stage: ClassVar[Stage] = Stage.PRUNE

    blocks: int | None = None
    share: float | None = None
    of: Of = "parameters"
    cut: Cut | None = None
    by: By | None = None
    shape: Shape | None = None
    multiple: int = 64

    def __post_init__(self) -> None:
        if (self.blocks is None) == (self.share is None):
            raise ValueError("say what to cut: either blocks, a number of them, or share, such as share=0.2")
        if self.blocks is not None and self.blocks < 0:
            raise ValueError(f"blocks {self.blocks} must be at least 0")
        if self.share is not None and not 0 < self.share < 1:
            raise ValueError(f"share {self.share} must be above 0 and below 1: something has to go, and some to stay")
        check_choice("of", self.of, get_args(Of))
        check_choice("cut", self.cut, (None, *SCORES))
        if self.blocks is not None and self.cuts != "blocks":
            raise ValueError(f"blocks {self.blocks} says how many blocks go, and cut={self.cut!r} none: give share")
        check_choice(f"for cut {self.cuts!r}, by", self.by, (None, *SCORES[self.cuts]))
        check_choice("shape", self.shape, (None, *get_args(Shape)))
        if self.cuts == "blocks" and self.shape == "uneven":
            raise ValueError("without whole blocks the rest stays as even as it was: leave shape out")
        if self.cuts == "branches" and self.shape == "uniform":
            raise ValueError("no plain config can say that branches are missing: use shape='uneven', or cut='blocks'")
        if self.multiple < 1:
            raise ValueError(f"multiple {self.multiple} must be at least 1")

    @property
    def cuts(self) -> Cut:
        """What is cut."""
        return self.cut or ("blocks" if self.share is None else "width")

    @property
    def scored(self) -> By:
        """The score that is meant."""
        return self.by or SCORES[self.cuts][0]

    def apply(self, model: PreTrainedModel, context: Context) -> Record:
        """Cut in place; the record says what went, and widths where the config cannot."""
        before = _parameters(model)
        if self.cuts == "blocks":
            record = self._drop_blocks(model, context)
        else:
            record = self._narrow(model, context)
        return {**record, "parameters_left": _parameters(model) / before}

    def rebuild(self, model: PreTrainedModel, record: Record) -> None:
        """Make branches as narrow as the record says, if it does; else the saved config already does."""
        for layer, widths in enumerate(record.get("widths", ())):
            for kind, units in zip(BRANCH_KINDS, widths, strict=True):
                if self.scored == "gates" and units == 0:
                    replace_by_surrogate(model, layer, kind)
                else:
                    narrow(model, layer, kind, range(units))

    def estimated_tokens(self, calibration_tokens: int, layers: int) -> int:
        """How many tokens' forward passes through the model `apply` takes, about; a backward pass counts twice."""
        tokens = min(SCORING_TOKENS[self.scored], calibration_tokens)
        if self.cuts == "blocks":
            count = round((self.share or 0) * layers) if self.blocks is None else self.blocks
            return count * tokens * (layers // 2 + 2 if self.scored == "perplexity" else 1)
        if self.scored == "perplexity":
            return (layers + 2) * tokens
        trials = (layers + 2) * min(TRIAL_TOKENS, calibration_tokens)
        return 3 * tokens + trials + 3 * calibration_tokens if self.scored == "second_order" else tokens

    def _drop_blocks(self, model: PreTrainedModel, context: Context) -> Record:
        """Remove blocks one at a time, scored anew each time; the record names them by their original indices."""
        family_of(model)
        left, by = list(range(len(blocks(model)))), self.scored
        costs, total = _costs(model, self.of, context.calibration.shape[1])
        shares = {layer: sum(costs[layer, kind] for kind in BRANCH_KINDS) / total for layer in left}
        count = self.blocks
        if count is None:  # the lightest first would need the most
            assert self.share is not None
            count = next((n for n in left if sum(sorted(shares.values())[:n]) >= self.share - 1e-9), len(left))
            if count == len(left):
                most = 1 - max(shares.values())
                raise ValueError(f"share {self.share} is out of reach: the nearest that can go is {most:.4g}")
        if count >= len(left):
            raise ValueError(f"cannot drop {count} of {len(left)} blocks; at most {len(left) - 1}")
        windows = context.calibration[: max(1, SCORING_TOKENS[by] // context.calibration.shape[1])].to(model.device)
        removed = []
        for _ in context.track(range(count), "drop blocks"):
            scores = _block_scores(model, by, windows)
            weakest = int(scores.argmin())
            remove_blocks(model, [weakest])
            forget_block(model, weakest)
            removed.append({"block": left.pop(weakest), by: float(scores[weakest])})
        return {"removed": removed, "left": len(left)}

    def _narrow(self, model: PreTrainedModel, context: Context) -> Record:
        """Cut branches or parts of them."""
        check_widths(model)
        check_unshared(model)
        self._check_heads(model)
        scores = cached_scores(model, self.scored, context)
        widths = {key: branch_width(model, *key) for key in present(model)}
        costs, total = _costs(model, self.of, context.calibration.shape[1])
        shares = {key: costs[key] / total / width.units for key, width in widths.items()}
        kinds = _KINDS.get(self.cuts, BRANCH_KINDS)
        own = {key: width for key, width in widths.items() if key[1] in kinds and key in scores}
        if self.cuts == "branches":
            allowed = {key: [0, width.units] for key, width in own.items()}
        else:
            least = 1 if self.plain else 0
            allowed = {key: sizes(width, self.multiple, least) for key, width in own.items()}
        assert self.share is not None
        if self.plain:
            gone = self._evenly(model, scores, shares, allowed)
        else:
            gone = uneven(scores, shares, self.share, allowed)
        kept = {key: scores[key].left(count) for key, count in gone.items()}
        lost = sum(scores[key].after(count) for key, count in gone.items())
        record: Record = {"by": self.scored, "predicted": lost}
        if self.scored == "second_order":
            record["missed"] = narrow_and_refit(model, kept, context)
        else:
            self._take_out(model, kept)
        final = {key: branch_width(model, *key) for key in widths}
        if self.plain:
            attention, mlp = final[0, "attention"], final[0, "mlp"]
            describe(model, attention.units, attention.inputs, mlp.units)
            return {**record, "groups": attention.units, "channels": mlp.units}
        return {
            **record,
            "widths": [
                [final[layer, kind].units if (layer, kind) in final else 0 for kind in BRANCH_KINDS]
                for layer in range(len(blocks(model)))
            ],
        }

    @property
    def plain(self) -> bool:
        """Whether the config can say it all."""
        return self.cuts == "blocks" or (self.cuts != "branches" and self.shape != "uneven")

    def _check_heads(self, model: PreTrainedModel) -> None:
        """Refuse, before anything is scored, attention that cannot be cut so."""
        if self.cuts not in ("attention", "width"):
            return
        for layer in (layer for layer, kind in present(model) if kind == "attention"):
            rows_of(model, layer, "attention", [0])
        if not self.plain and family_of(model).layout.fused is not None:
            raise UnsupportedModel(
                f"attention of {model.config.model_type} models asks its config for the number of heads, which is one "
                "for all blocks: use shape='uniform', or cut='channels'"
            )

    def _evenly(
        self, model: PreTrainedModel, scores: Any, shares: Mapping[Key, float], allowed: Mapping[Key, list[int]]
    ) -> dict[Key, int]:
        """How many units every branch of a kind gives up."""
        layers = range(len(blocks(model)))
        widths = {kind: {branch_width(model, layer, kind) for layer in layers} for kind in BRANCH_KINDS}
        if any(len(found) > 1 for found in widths.values()):
            raise UnsupportedModel("blocks differ in width already, which no plain config can say: use shape='uneven'")
        (attention,), (mlp,) = widths["attention"], widths["mlp"]

        def fits(gone: Mapping[str, int]) -> bool:
            groups, channels = attention.units - gone.get("attention", 0), mlp.units - gone.get("mlp", 0)
            try:
                plain_config(model, groups, attention.inputs, channels)
            except ValueError:
                return False
            return True

        assert self.share is not None
        return uniform(scores, shares, self.share, allowed, fits)

    def _take_out(self, model: PreTrainedModel, kept: Kept) -> None:
        for (layer, kind), units in kept.items():
            if self.scored == "gates" and not units:
                replace_by_surrogate(model, layer, kind)
            else:
                narrow(model, layer, kind, units)


def _parameters(model: PreTrainedModel) -> int:
    """Of all blocks."""
    return sum(parameter.numel() for block in blocks(model) for parameter in block.parameters())


def _costs(model: PreTrainedModel, of: Of, context_tokens: int) -> tuple[dict[Key, float], float]:
    """Of each branch, and of all blocks together."""
    costs: dict[Key, float] = {}
    if of == "macs":
        for key, cost in branch_costs(model, context_tokens).items():
            costs[key] = cost.always + cost.kept
        return costs, sum(costs.values())
    family = family_of(model)
    for layer, block in enumerate(blocks(model)):
        for branch in family.branches:
            parts = [p for name in branch.body for p in getattr(block, name).parameters()]
            costs[layer, branch.kind] = sum(p.numel() * (p.element_size() if of == "bytes" else 1) for p in parts)
    rest = [p for block in blocks(model) for p in block.parameters()]
    return costs, sum(p.numel() * (p.element_size() if of == "bytes" else 1) for p in rest)


def _block_scores(model: PreTrainedModel, by: By, windows: Int[Tensor, "n t"]) -> Tensor:
    """What each block would be missed, (blocks,)."""
    if by == "influence":
        return block_influence(model, windows)
    if by == "gates":
        found = gate_scores(model, windows)
        return torch.tensor(
            [
                sum(found.get((layer, kind), float("inf")) for kind in BRANCH_KINDS)
                for layer in range(len(blocks(model)))
            ]
        )
    tries = Tries(model, windows)
    return torch.tensor([tries.without_block(layer) for layer in range(len(blocks(model)))])


@torch.inference_mode()
def block_influence(model: PreTrainedModel, windows: Int[Tensor, "n t"]) -> Tensor:
    """Mean influence of each block over the windows' tokens, (blocks,); first tokens are left out, as sinks."""
    totals = torch.zeros(len(blocks(model)), dtype=torch.float64)

    def see(index: int, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        del module
        totals[index] += influence(args[0][:, 1:].flatten(0, 1), out[:, 1:].flatten(0, 1)).double().mean().cpu()

    handles = [
        block.register_forward_hook(lambda *seen, index=index: see(index, *seen))
        for index, block in enumerate(blocks(model))
    ]
    try:
        for window in windows:
            model(window[None].to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return totals / len(windows)
