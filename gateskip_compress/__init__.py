"""Composable compression of decoder-only language models; importing it lets transformers load the results."""

from .checkpoint import manifest_of as manifest_of
from .errors import CalibrationError as CalibrationError
from .errors import CheckpointError as CheckpointError
from .errors import GateSkipError as GateSkipError
from .errors import PipelineError as PipelineError
from .errors import RuntimeUnavailable as RuntimeUnavailable
from .errors import TrainingError as TrainingError
from .errors import UnsupportedModel as UnsupportedModel
from .evaluate import evaluate as evaluate
from .gating.dial import budget as budget
from .gating.dial import masked as masked
from .gating.train import Training as Training
from .gating.transform import GateSkip as GateSkip
from .macs import count_macs as count_macs
from .pipeline import Pipeline as Pipeline
from .pipeline import recalibrate as recalibrate
from .pipeline import set_budget as set_budget
from .pruning.transform import Prune as Prune
from .quantization.transform import Quantize as Quantize
from .recipe import read_recipe as read_recipe
from .recovery import Recover as Recover
from .source import load as load
from .speculation.decode import self_speculative as self_speculative
from .speculation.transform import SelfSpeculation as SelfSpeculation
