"""The GateSkip step: gates into a model, fitted in closed form, trained if asked, and calibrated."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModel
from ..model import BRANCH_KINDS, blocks, check_copying, family_of, gated_mlp, has_branch, width
from ..names import check_choice
from ..step import Context, Record, Stage
from .allocate import weigh
from .block import GatedBlock, gate_block
from .calibrate import ALLOCATIONS, CALIBRATION_TOKENS, Allocation, calibrate, first_tokens
from .dial import Dial, Setting, check_budget
from .fit import Gates, fit_gates
from .gate import KINDS, SHARING, SURROGATES, Gate, Kind, NarrowMlp, Surrogate
from .train import Training, train_gates, ungated
from .turning import dial_of, skipping

Where = Literal["branches", "attention", "mlp", "block"]
Placement = Literal["after", "before"]
KeyValues = Literal["dense", "copy"]
_WHOLE = 64
"""Channels of a `narrow` surrogate come in multiples of it, so that groups of weights fit."""
_WHERE: dict[str, tuple[str, ...]] = {
    "branches": BRANCH_KINDS,
    "attention": ("attention",),
    "mlp": ("mlp",),
    "block": BRANCH_KINDS,
}


@dataclass(frozen=True)
class GateSkip:
    """Let tokens skip the branches that they do not need (arXiv 2510.13876).

    By default we differ from the paper: `effect` gates fitted in closed form, scale 1, one calibrated threshold over
    all branches instead of a quantile of the batch, so that decoding one token of one sequence skips too, and a
    surrogate for what is skipped. The paper's own is `GateSkip(kind="vector", surrogate="zero", allocation="uniform",
    training=Training(train="all", cross_entropy=1, distillation=0, gate_loss="l2"))`.

    Args:
        budget: Share of the ungated model's multiply-adds that the model runs at from now on, above 0, at most 1. Other
            budgets stay a `with budget(model, share)` away.
        surrogate: What skipped tokens add: `zero`, `mean`, `lowrank`, or `narrow`, which for an MLP is one of few
            channels, and for attention `lowrank`.
        rank: Inner width of a `lowrank` surrogate, and of a `lowrank` gate.
        channels: Share of an MLP's channels that its `narrow` surrogate has, in multiples of 64 where it has so many,
            so that groups of weights fit.
        kind: What a gate is, see `gate.py`; all but `effect` want training.
        where: Gates on both `branches`, on `attention` or `mlp` alone, or one for a whole `block` on its attention.
        every: Gates in every n-th block, the n-th first.
        placement: Scales act `after` the branch, or `before` it.
        allocation: How the budget is spread over branches: `global`, `sensitivity` or `uniform`, see `calibrate.py`;
            None is `sensitivity` for `effect` gates, which takes a forward pass over 1024 tokens for each branch, and
            `global` for the others.
        training: How gates are trained after the closed form; None leaves them so.
        kv: Keys and values of tokens that skip attention: computed all the same (`dense`), or a `copy` of those of the
            block below at the same position (the paper's way): cheaper, and further from the ungated model.

    Raises:
        ValueError: A field is out of its range, or `budget` below what the calibrated gates can reach.
        UnsupportedModel: The family is unknown, it runs an attention kernel that cannot gather rows, or its blocks
            cannot copy keys and values from each other.
    """

    name: ClassVar[str] = "gateskip"
    stage: ClassVar[Stage] = Stage.GATE

    budget: float = 0.85
    surrogate: Surrogate = "lowrank"
    rank: int = 32
    channels: float = 0.25
    kind: Kind = "effect"
    where: Where = "branches"
    every: int = 1
    placement: Placement = "after"
    allocation: Allocation | None = None
    training: Training | None = None
    kv: KeyValues = "dense"

    def __post_init__(self) -> None:
        check_budget(self.budget)
        for field, value, known in (
            ("surrogate", self.surrogate, SURROGATES),
            ("kind", self.kind, KINDS),
            ("where", self.where, tuple(_WHERE)),
            ("placement", self.placement, ("after", "before")),
            ("allocation", self.allocation, (None, *ALLOCATIONS)),
            ("kv", self.kv, ("dense", "copy")),
        ):
            check_choice(field, value, known)
        if not 0 < self.channels < 1:
            raise ValueError(f"channels {self.channels} must be between 0 and 1: it is a share of an MLP's channels")
        for field, value in (("rank", self.rank), ("every", self.every)):
            if value < 1:
                raise ValueError(f"{field} {value} must be at least 1")
        if self.kind != "effect" and self.training is None and self.budget < 1:
            raise ValueError(f"{self.kind} gates know nothing before training: give training, or kind='effect'")
        if self.kind != "effect" and self.allocation == "sensitivity":
            raise ValueError("allocation 'sensitivity' weighs effects: use kind='effect', or 'global'")
        if self.kind == "effect" and self.training is not None and self.training.gate_loss != "none":
            raise ValueError("effect gates have no scale for a gate_loss to press on: use gate_loss='none'")

        if self.kv == "copy" and self.where == "mlp":
            raise ValueError("kv 'copy' is for tokens that skip attention, and where='mlp' skips none: use kv='dense'")
        if self.kv == "copy" and self.training is not None and self.training.checkpointing:
            raise ValueError(
                "kv 'copy' hands keys from block to block, and checkpointing recomputes blocks one by one: "
                "use training.checkpointing=False"
            )

    @property
    def spread(self) -> Allocation:
        """The allocation that is meant."""
        return self.allocation or ("sensitivity" if self.kind == "effect" else "global")

    def apply(self, model: PreTrainedModel, context: Context) -> Record:
        """Fit gates, put them into the model in place, calibrate thresholds and turn the dial to `budget`."""
        gates, dial = self.neutral(model, context.seed), Dial()
        # before fitting, which asks what a skip will save
        put_in(model, gates, dial, before=self.placement == "before", kv=self.kv)
        return self.fit(model, gates, context)

    def fit(
        self,
        model: PreTrainedModel,
        gates: Gates,
        context: Context,
        as_teacher: Callable[[PreTrainedModel], AbstractContextManager[None]] = ungated,
    ) -> Record:
        """Fit a model's neutral gates in place, train them if asked, calibrate, and turn the dial to `budget`.

        Args:
            model: Carries them.
            gates: All of its gates.
            context: As for `apply`.
            as_teacher: As in `train_gates`.
        """
        dial = dial_of(model)
        with skipping(model, "off"):
            fit_gates(model, gates, context)
        record: Record = {}
        if self.spread == "sensitivity":
            record["sensitivity"] = weigh(model, context)
        if self.training is not None:
            record["training"] = train_gates(
                model, self.training, self.budget, self.spread, context, as_teacher=as_teacher
            )
        if self.kind == "effect" or self.training is not None:  # neutral scores rank nothing
            dial.table = calibrate(
                model, first_tokens(context.calibration, CALIBRATION_TOKENS), self.spread, context.track
            )
        dial.set(self.budget)
        return {**record, "table": _json(dial.table)}

    def recalibrate(self, model: PreTrainedModel, record: Record, sequences: Iterable[Int[Tensor, " _t"]]) -> Record:
        """Find the thresholds of every budget anew, in place, on text of the kind that the model is to run on.

        Args:
            model: As `apply` or `rebuild` left it.
            record: What `apply` returned.
            sequences: As in `calibrate`.

        Returns:
            The record with the new table.
        """
        dial = dial_of(model)
        dial.table = calibrate(model, sequences, self.spread)
        dial.set(dial.budget)
        return {**record, "table": _json(dial.table)}

    def rebuild(self, model: PreTrainedModel, record: Record) -> None:
        """Put in empty gates and the calibrated table."""
        put_in(model, self.neutral(model), self.dial(record), before=self.placement == "before", kv=self.kv)

    def dial(self, record: Record) -> Dial:
        """The dial that `fit` left behind, out of its record."""
        return Dial.calibrated(record["table"], self.budget)

    def _check(self, model: PreTrainedModel) -> None:
        check_attention(model)
        if self.kv == "copy":
            check_copying(model)
        if self.training is not None:
            check_dropout(model, self.training)

    def neutral(self, model: PreTrainedModel, seed: int = 0) -> Gates:
        """Gates that change nothing yet, for a model that they fit; what is shared lies in the first."""
        self._check(model)
        if self.every > len(blocks(model)):
            raise ValueError(f"every {self.every} must be at most {len(blocks(model))}, the number of blocks")
        family_of(model)
        torch.manual_seed(seed)  # inner layers of `mlp` and `lowrank` gates start random
        parameter, gates, shared = next(model.parameters()), {}, {}
        for layer in range(self.every - 1, len(blocks(model)), self.every):
            there = [kind for kind in _WHERE[self.where] if has_branch(model, layer, kind)]
            for kind in there:
                follows = self.where == "block" and kind != there[0]
                own = None if follows else self.kind
                narrow = self._narrow(model, layer) if self.surrogate == "narrow" and kind == "mlp" else None
                surrogate = "lowrank" if self.surrogate == "narrow" and narrow is None else self.surrogate
                gate = Gate(width(model), own, surrogate, self.rank, narrow=narrow, shared=shared.get(kind))
                if own in SHARING and kind not in shared:
                    shared[kind] = gate.matrix
                gates[layer, kind] = gate.to(parameter.device, parameter.dtype)
        return gates

    def _narrow(self, model: PreTrainedModel, layer: int) -> NarrowMlp:
        wide = gated_mlp(model, layer)
        channels = self.channels * len(wide.up)
        whole = _WHOLE if channels >= _WHOLE else 1
        return NarrowMlp(width(model), max(1, whole * round(channels / whole)), wide.activation)


def _json(table: Sequence[Setting]) -> list[dict[str, Any]]:
    return [{**asdict(setting), "thresholds": list(setting.thresholds)} for setting in table]


def put_in(
    model: PreTrainedModel,
    gates: Gates,
    dial: Dial,
    *,
    before: bool = False,
    kv: KeyValues = "dense",
    form: type[GatedBlock] = GatedBlock,
) -> None:
    """Gate all blocks of a model in place; `kv` is as in `GateSkip`, the rest as in `gate_block`."""
    family = family_of(model)
    parallel = family.parallel is not None and getattr(model.config, family.parallel)
    copying = {layer for layer, kind in gates if kv == "copy" and kind == "attention" and layer > 0}
    for layer, block in enumerate(blocks(model)):
        own = nn.ModuleDict({kind: gate for (at, kind), gate in gates.items() if at == layer})
        gate_block(
            block,
            family,
            own,
            dial,
            layer,
            before=before,
            parallel=parallel,
            copies=layer in copying,
            feeds=layer + 1 in copying,
            form=form,
        )


def put_in_draft(model: PreTrainedModel, gates: Gates, dial: Dial) -> None:
    """Give all blocks of a gated model draft gates beside their own, in place; see `dial.drafting`."""
    for layer, block in enumerate(blocks(model)):
        block.draft_gates = nn.ModuleDict({kind: gate for (at, kind), gate in gates.items() if at == layer})
        block.draft_dial = dial


def check_attention(model: PreTrainedModel) -> None:
    """Raise UnsupportedModel where the attention kernel cannot gather rows."""
    kernel = model.config._attn_implementation
    if kernel not in ("sdpa", "eager"):
        raise UnsupportedModel(
            f"attention {kernel!r} cannot run a part of the rows; load with attn_implementation='sdpa'"
        )


def check_dropout(model: PreTrainedModel, training: Training) -> None:
    """Raise UnsupportedModel where training would drop out: transformers checkpoints blocks in training mode only."""
    name = family_of(model).dropout
    if name is None or not training.checkpointing:
        return
    rate = getattr(blocks(model)[0], name)
    if rate > 0:
        raise UnsupportedModel(f"checkpointing would drop out {rate} in each block: set its {name} to 0 first")
