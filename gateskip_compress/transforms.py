"""The four transforms by the names they have in recipes, checkpoints and reports."""

from .errors import PipelineError
from .gating.transform import GateSkip
from .names import nearest
from .pruning.transform import Prune
from .quantization.transform import Quantize
from .speculation.transform import SelfSpeculation

AnyTransform = Prune | GateSkip | Quantize | SelfSpeculation
TRANSFORMS: dict[str, type[AnyTransform]] = {t.name: t for t in (Prune, GateSkip, Quantize, SelfSpeculation)}


def transform_named(name: str) -> type[AnyTransform]:
    """The transform of a name.

    Raises:
        PipelineError: there is none; the nearest name is told.
    """
    if name not in TRANSFORMS:
        raise PipelineError(f"unknown step {name!r}{nearest(name, TRANSFORMS)}; steps: {', '.join(TRANSFORMS)}")
    return TRANSFORMS[name]
