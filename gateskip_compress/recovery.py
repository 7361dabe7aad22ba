"""The Recover step: after any other, learn from the original model what that step lost.

    loss = KL(original ‖ model) + cross_entropy · CE

per scored token, the model as it will run: gates at the budget it is set to. CE is that of the text's own next tokens:
with it perplexity falls further in few steps, on other texts too (`benchmarks/recovery.py`), and the model may learn
what the original does not know of texts like these.

`all` trains every weight; `lora` adapters of the blocks' projections, which are added to them in the end; `norms` only
norms, biases, and what gates scale and replace branches by: little memory, and the only one that may follow Quantize,
whose codes stay as they are. Fitted scores of gates are left alone, since training undoes the fit; their thresholds are
found anew afterwards (`pipeline.apply`), since what they read has moved.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from .adapters import adapters, add_adapters, merge_adapters
from .distillation import Distillation, predictions
from .errors import PipelineError
from .gating.gate import Gate
from .names import check_choice
from .quantization.linear import QuantizedLinear, unpacked
from .step import Context, Record, Stage
from .text import Passage
from .training import Batch, train

What = Literal["lora", "norms", "all"]
RATES: dict[What, float] = {"lora": 1e-2, "norms": 1e-3, "all": 1e-3}
"""Learning rates where none is given: shares but for norms, see `Recover`."""
_SMALL = 1e-3
"""Below this a tensor's size says nothing of how fast it may learn: biases begin at 0."""


@dataclass(frozen=True)
class Recover:
    """Distil the model from the original, in place, for a number of tokens.

    Args:
        tokens: Of text, in all; every passage counts whole.
        what: `lora`, `norms` or `all`.
        batch: Passages a step, on each process.
        rate: Learning rate; None is that of `RATES`. It is times the root mean square of each weight that learns, or
            is adapted (arXiv 1804.04235 sec. 8), as what suits SmolLM2, whose weights are 0.2, ruins Gemma 3, whose are
            0.04. With `norms` it is the rate itself.
        cross_entropy: Weight of the text's own next tokens, beside 1 for the distance from the original.

    Raises:
        ValueError: A field is out of its range.
        PipelineError: There is no original to learn from, or weights are quantized and `what` is not `norms`.
        TrainingError: The loss is not finite.
    """

    name: ClassVar[str] = "recover"
    stage: ClassVar[Stage] = Stage.RECOVER

    tokens: int = 200_000
    what: What = "lora"
    batch: int = 4
    rate: float | None = None
    cross_entropy: float = 1.0

    def __post_init__(self) -> None:
        check_choice("what", self.what, get_args(What))
        for field, value in (("tokens", self.tokens), ("batch", self.batch)):
            if value < 1:
                raise ValueError(f"{field} {value} must be at least 1")
        if self.rate is not None and self.rate <= 0:
            raise ValueError(f"rate {self.rate} must be above 0")
        if self.cross_entropy < 0:
            raise ValueError(f"cross_entropy {self.cross_entropy} must not be negative")

    def apply(self, model: PreTrainedModel, context: Context) -> Record:
        """Train in place; the record has the curve of the loss."""
        original = context.original
        if original is None:
            raise PipelineError("Recover needs the original model: run it in a Pipeline, or give Context(original=...)")
        if self.what != "norms" and any(isinstance(module, QuantizedLinear) for module in model.modules()):
            raise PipelineError(f"weights of few bits cannot be trained: use what='norms' instead of {self.what!r}")
        passages = context.passages or [Passage.whole(window) for window in context.calibration]
        accelerator = Accelerator(cpu=model.device.type == "cpu")
        whole = self.batch * accelerator.num_processes * sum(len(passage.ids) for passage in passages) / len(passages)

        distance = Distillation(passages, context.seed, 1.0, self.cross_entropy)

        def loss(batch: Batch, step: int) -> tuple[Tensor, int]:
            with torch.no_grad():
                reference = predictions(original, batch)
            targets = batch.ids[batch.scored]
            return distance(predictions(model, batch), reference, targets, step), len(targets)

        if self.what == "lora":
            add_adapters(model, context.seed)
        try:
            with unpacked(model):
                record = train(
                    self._groups(model),
                    loss,
                    passages,
                    steps=max(1, round(self.tokens / whole)),
                    batch=self.batch,
                    context=context,
                    accelerator=accelerator,
                    description="recover",
                )
        finally:
            if self.what == "lora":
                merge_adapters(model)
        return record

    def rebuild(self, model: PreTrainedModel, record: Record) -> None:
        """Nothing: only weights changed."""

    def _groups(self, model: PreTrainedModel) -> list[tuple[list[nn.Parameter], float]]:
        """What learns, and how fast."""
        rate = self.rate or RATES[self.what]
        gates = [module for module in model.modules() if isinstance(module, Gate)]
        scores = {p for gate in gates for name, p in gate.named_parameters() if name.startswith("score_")}
        if self.what == "lora":
            return [(learning, rate * _size(weight)) for weight, learning in adapters(model)]
        if self.what == "all":
            return [([p], rate * _size(p)) for p in model.parameters() if p not in scores]
        of_gates = {p for gate in gates for p in gate.parameters()}
        return [([p for p in model.parameters() if (p.ndim == 1 or p in of_gates) and p not in scores], rate)]


def _size(weight: Tensor) -> float:
    """Root mean square."""
    return max(_SMALL, float(weight.detach().float().square().mean().sqrt()))
