"""The GateSkip step: gates into every block, fitted and calibrated without training."""

from dataclasses import asdict, dataclass
from typing import ClassVar

from torch import nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModel
from ..model import blocks, branches, width
from ..step import Context, Record, Stage
from .block import gate_block
from .calibrate import calibrate
from .dial import Dial, Setting
from .fit import fit_gates
from .gate import SURROGATES, Gate, Surrogate


@dataclass(frozen=True)
class GateSkip:
    """Let tokens skip the branches that they do not need (arXiv 2510.13876), with closed-form `effect` gates.

    We differ from the paper: no training, scale 1, one calibrated threshold over all branches instead of a quantile of
    the batch, so that decoding one token of one sequence skips too, and a surrogate for what is skipped.

    Args:
        budget: Share of the ungated model's multiply-adds that the model runs at from now on, above 0, at most 1. Other
            budgets stay a `with budget(model, share)` away.
        surrogate: What skipped tokens add: `zero`, `mean` or `lowrank`.
        rank: Inner width of a `lowrank` surrogate.

    Raises:
        ValueError: A field is out of its range, or `budget` below what the calibrated gates can reach.
        UnsupportedModel: The family is unknown, or it runs an attention kernel that cannot gather rows.
    """

    name: ClassVar[str] = "gateskip"
    stage: ClassVar[Stage] = Stage.GATE

    budget: float = 0.85
    surrogate: Surrogate = "lowrank"
    rank: int = 32

    def __post_init__(self) -> None:
        if not 0 < self.budget <= 1:
            raise ValueError(
                f"budget {self.budget} must be above 0 and at most 1: it is the share of multiply-adds that run"
            )
        if self.surrogate not in SURROGATES:
            raise ValueError(f"surrogate {self.surrogate!r} must be one of {', '.join(SURROGATES)}")
        if self.rank < 1:
            raise ValueError(f"rank {self.rank} must be at least 1")

    def apply(self, model: PreTrainedModel, context: Context) -> Record:
        """Fit gates, put them into the model in place, calibrate thresholds and turn the dial to `budget`."""
        _check_attention(model)
        dial = Dial()
        _put_in(model, fit_gates(model, self.surrogate, self.rank, context), dial)
        dial.table = calibrate(model, context)
        dial.set(self.budget)
        return {"table": [asdict(setting) for setting in dial.table]}

    def rebuild(self, model: PreTrainedModel, record: Record) -> None:
        """Put in empty gates and the calibrated table."""
        _check_attention(model)
        branches(model)
        dial = Dial(table=tuple(Setting(**row) for row in record["table"]))
        gates = [
            nn.ModuleDict({b.kind: Gate(width(model), self.surrogate, self.rank) for b in branches(model)})
            for _ in blocks(model)
        ]
        _put_in(model, gates, dial)
        dial.set(self.budget)


def _put_in(model: PreTrainedModel, gates: list[nn.ModuleDict], dial: Dial) -> None:
    for layer, (block, gate) in enumerate(zip(blocks(model), gates, strict=True)):
        gate_block(block, branches(model), gate, dial, layer)


def _check_attention(model: PreTrainedModel) -> None:
    kernel = model.config._attn_implementation
    if kernel not in ("sdpa", "eager"):
        raise UnsupportedModel(
            f"attention {kernel!r} cannot run a part of the rows; load with attn_implementation='sdpa'"
        )
