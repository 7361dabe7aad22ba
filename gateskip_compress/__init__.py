"""Composable compression of decoder-only language models; importing it lets transformers load the results."""

from typing import TYPE_CHECKING

from .errors import CalibrationError as CalibrationError
from .errors import CheckpointError as CheckpointError
from .errors import GateSkipError as GateSkipError
from .errors import PipelineError as PipelineError
from .errors import RuntimeUnavailable as RuntimeUnavailable
from .errors import TrainingError as TrainingError
from .errors import UnsupportedModel as UnsupportedModel
from .late import join_transformers, late

if TYPE_CHECKING:
    from .checkpoint import manifest_of as manifest_of
    from .gating.train import Training as Training
    from .gating.transform import GateSkip as GateSkip
    from .gating.turning import budget as budget
    from .gating.turning import masked as masked
    from .macs import count_macs as count_macs
    from .pipeline import Pipeline as Pipeline
    from .pipeline import recalibrate as recalibrate
    from .pipeline import set_budget as set_budget
    from .pruning.transform import Prune as Prune
    from .quality import evaluate as evaluate
    from .quantization.transform import Quantize as Quantize
    from .recipe import read_recipe as read_recipe
    from .recovery import Recover as Recover
    from .source import load as load
    from .speculation.decode import self_speculative as self_speculative
    from .speculation.transform import SelfSpeculation as SelfSpeculation

_HOMES = {
    "GateSkip": ".gating.transform",
    "Pipeline": ".pipeline",
    "Prune": ".pruning.transform",
    "Quantize": ".quantization.transform",
    "Recover": ".recovery",
    "SelfSpeculation": ".speculation.transform",
    "Training": ".gating.train",
    "budget": ".gating.turning",
    "count_macs": ".macs",
    "evaluate": ".quality",
    "load": ".source",
    "manifest_of": ".checkpoint",
    "masked": ".gating.turning",
    "read_recipe": ".recipe",
    "recalibrate": ".pipeline",
    "self_speculative": ".speculation.decode",
    "set_budget": ".pipeline",
}
__getattr__ = late(__name__, _HOMES)
join_transformers()


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
