"""A stack of transforms: order checked when it is built, run by a loop."""

from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .checkpoint import Manifest, attach, manifest_of
from .errors import PipelineError, UnsupportedModel
from .gating.calibrate import CALIBRATION_TOKENS, first_tokens
from .gating.transform import GateSkip
from .gating.turning import dial_of, is_gated
from .macs import ungated_macs_per_token
from .precision import quick_products
from .pruning.transform import Prune
from .quantization.transform import Quantize
from .recovery import Recover
from .speculation.transform import SelfSpeculation
from .step import Context, Record, Stage, Transform
from .text import Passage, self_written

_REASONS = {
    (Stage.GATE, Stage.PRUNE): "gates are fitted to the blocks that are there, and removing blocks makes them stale",
    (Stage.QUANTIZE, Stage.PRUNE): "pruning needs float weights",
    (Stage.QUANTIZE, Stage.GATE): "surrogates are fitted to float branches, and are not quantized afterwards",
    (Stage.DECODE, Stage.PRUNE): "drafting rests on the gates of the finished model",
    (Stage.DECODE, Stage.GATE): "drafting needs gates that are there already",
    (Stage.DECODE, Stage.QUANTIZE): "how to decode is settled on the finished model",
}


class Pipeline:
    """Transforms in the order in which they are applied.

    Args:
        steps: Each kind once at most; Prune, GateSkip, Quantize, SelfSpeculation in this order. Prune(by="gates")
            follows GateSkip; Recover may follow any step.

    Raises:
        PipelineError: steps out of order, twice, or lacking one they rest on; says both steps, the reason and the mend.
    """

    def __init__(self, *steps: Transform) -> None:
        self.steps = steps
        for step in steps:
            if not isinstance(step, Transform):
                raise PipelineError(
                    f"{step!r} is not a step; use Prune, GateSkip, Quantize, SelfSpeculation or Recover"
                )
        self._check_gates()
        for before, after in pairwise(step for step in steps if not isinstance(step, Recover)):
            self._check_pair(before, after)
        self._check_recovery()
        self._check_draft()

    def _check_pair(self, before: Transform, after: Transform) -> None:
        by_gates = [isinstance(step, Prune) and step.scored == "gates" for step in (before, after)]
        # pruning by gates stands between gates and what follows them
        places = [step.stage + (1.5 if gates else 0) for step, gates in zip((before, after), by_gates, strict=True)]
        if places[0] == places[1]:
            raise PipelineError(f"{before!r} and {after!r} are the same kind of step; keep one of them")
        if places[1] > places[0]:
            return
        if after.stage == before.stage or by_gates[0]:
            raise PipelineError(f"{after!r} cannot follow {before!r}: the gates would be stale; put it before GateSkip")
        reason = _REASONS[before.stage, after.stage]
        first = f"GateSkip and {after.name}" if by_gates[1] else after.name
        raise PipelineError(f"{after!r} cannot follow {before!r}: {reason}; put {first} first")

    def _check_gates(self) -> None:
        for at, step in enumerate(self.steps):
            if not isinstance(step, Prune) or step.scored != "gates":
                continue
            gate = next((before for before in self.steps[:at] if isinstance(before, GateSkip)), None)
            if gate is None:
                raise PipelineError(f"{step!r} needs a GateSkip step before it, whose gates it reads; add one")
            if gate.kind != "effect" or gate.where == "block" or gate.kv == "copy" or gate.every > 1:
                raise PipelineError(
                    f"{step!r} cannot read the gates of {gate!r}: each branch must have one that predicts a loss, and "
                    "keys of its own; use kind='effect', where='branches', kv='dense', every=1"
                )

    def _check_recovery(self) -> None:
        for at, step in enumerate(self.steps):
            if not isinstance(step, Recover):
                continue
            if at == 0:
                raise PipelineError(f"{step!r} has nothing to recover from; put it after another step")
            before = self.steps[at - 1]
            if isinstance(before, Recover):
                raise PipelineError(f"{before!r} and {step!r} are the same kind of step; keep one of them")
            quantize = next((done for done in self.steps[:at] if isinstance(done, Quantize)), None)
            if quantize is not None and step.what != "norms":
                raise PipelineError(
                    f"{step!r} cannot follow {quantize!r}: weights of few bits cannot be trained; "
                    "use what='norms', or put it before quantize"
                )

    def _check_draft(self) -> None:
        gate = next((step for step in self.steps if isinstance(step, GateSkip)), None)
        draft = next((step for step in self.steps if isinstance(step, SelfSpeculation)), None)
        if draft is None:
            return
        if gate is None and draft.drafts != "look-up":
            raise PipelineError(
                f"{draft!r} needs a GateSkip step before it: it drafts with the gates; add one, or use drafts='look-up'"
            )
        low = draft.gates.budget if draft.gates is not None else draft.draft_budget
        if gate is not None and low is not None and low >= gate.budget:
            raise PipelineError(
                f"{draft!r} must draft below the budget of {gate!r}, or drafts cost what they save; "
                f"lower draft_budget under {gate.budget}"
            )

    def __iter__(self) -> Iterator[Transform]:
        """The steps, first to last."""
        return iter(self.steps)

    def __repr__(self) -> str:
        return f"Pipeline({', '.join(map(repr, self.steps))})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pipeline) and self.steps == other.steps

    def __hash__(self) -> int:
        return hash(self.steps)

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        calibration: Int[Tensor, "n t"] | None = None,
        training: Sequence[Passage] = (),
        seed: int = 0,
    ) -> PreTrainedModel:
        """Compress a model in place.

        Args:
            model: A Hugging Face model of a supported family, not compressed before.
            tokenizer: Its tokenizer; saved with it.
            calibration: Windows of token ids; None lets the model write its own (see `text.self_written`).
            training: What steps that train learn from (see `text.packed`); none means the calibration windows.
            seed: The same seed, model and machine give the same result, bit for bit.

        Returns:
            The same model, with its manifest as `model.gateskip`, and saving itself as a checkpoint.

        Raises:
            ValueError: a step's setting does not fit this model.
            UnsupportedModel: its family is unknown, or it is compressed or quantized already.
        """
        start(model, tokenizer)
        if calibration is None:
            calibration = self_written(model, tokenizer, seed=seed)
        learns = any(isinstance(step, Recover) for step in self.steps)
        context = Context(calibration, seed, passages=training, original=deepcopy(model) if learns else None)
        for step in self.steps:
            apply(step, model, context)
        return model


def start(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str | None = None) -> None:
    """Attach an empty manifest to a model that is to be compressed, in place; facts of the original go into it."""
    manifest = manifest_of(model)
    if manifest is not None and not manifest.imported:
        raise UnsupportedModel("this model is compressed already; start from the original")
    drop_gguf(model)
    model.eval()
    if manifest is not None:  # read from another library's checkpoint: what it was is all that is known
        manifest.tokenizer = tokenizer
        return
    if getattr(model, "hf_quantizer", None) is not None:
        method = model.hf_quantizer.quantization_config.quant_method
        raise UnsupportedModel(f"this model is quantized by {method}; start from float weights")
    attach(model, Manifest(original=facts(model, source or model.config._name_or_path), tokenizer=tokenizer))


def facts(model: PreTrainedModel, source: str) -> dict[str, Any]:
    """What a manifest says of the original."""
    linear = ungated_macs_per_token(model, 0)
    return {
        "source": source,
        "parameters": model.num_parameters(),
        "linear_macs_per_token": linear,
        "attention_macs_per_token_and_key": ungated_macs_per_token(model, 1) - linear,
    }


def apply(step: Transform, model: PreTrainedModel, context: Context) -> Record:
    """Apply one step in place, with quick products, and write it into the model's manifest.

    Where it changed a model under its gates, their thresholds are found anew.
    """
    with quick_products():
        record = step.apply(model, context)
    manifest: Manifest = model.gateskip  # pyright: ignore[reportAssignmentType]
    manifest.steps.append({"name": step.name, "settings": settings(step), "record": record})
    if step.stage in (Stage.PRUNE, Stage.RECOVER) and is_gated(model):
        recalibrate(model, first_tokens(context.calibration, CALIBRATION_TOKENS))
    attach(model, manifest)
    return record


def recalibrate(model: PreTrainedModel, sequences: Iterable[Int[Tensor, " _t"]]) -> None:
    """Find the thresholds of every budget anew, in place, on text of the kind that a compressed model is to run on.

    How much a threshold skips depends on the text, so a budget holds on text like that of its calibration. Weights stay
    as they are; saved, the model keeps its new table.

    Args:
        model: A compressed model with gates, as it came out of a pipeline or was loaded.
        sequences: Token ids, each run by itself, as long as those to come; a few thousand tokens.

    Raises:
        UnsupportedModel: the model has no gates of ours.
        CalibrationError: nothing in the text may skip.
        ValueError: the budget the model is set to is below what its gates can reach on this text.
    """
    manifest, transform, step = _gates_of(model)
    with quick_products():
        step["record"] = transform.recalibrate(model, step["record"], sequences)
    attach(model, manifest)


def set_budget(model: PreTrainedModel, share: float) -> None:
    """Turn a compressed model's dial in place and for good: saved, it runs at this budget when it is loaded.

    Args:
        model: A compressed model with gates, as it came out of a pipeline or was loaded.
        share: As in `budget`, which turns it for a while.

    Raises:
        UnsupportedModel: the model has no gates of ours.
        ValueError: `share` is out of range.
    """
    manifest, _, step = _gates_of(model)
    dial_of(model).set(share)
    step["settings"]["budget"] = share
    attach(model, manifest)


def _gates_of(model: PreTrainedModel) -> tuple[Manifest, GateSkip, dict[str, Any]]:
    """A compressed model's manifest, its GateSkip step, and what the manifest says of that."""
    manifest = manifest_of(model)
    if manifest is not None:
        for transform, step in zip(manifest.transforms, manifest.steps, strict=True):
            if isinstance(transform, GateSkip):
                return manifest, transform, step
    raise UnsupportedModel("this model has no gates; put a GateSkip step into its pipeline first")


def settings(step: Transform) -> dict[str, Any]:
    """A step's fields, as JSON types."""
    return asdict(step)  # pyright: ignore[reportArgumentType] a protocol cannot say that it is a dataclass


def drop_gguf(model: PreTrainedModel) -> None:
    """Forget, in place, that float weights came out of a GGUF file, so that the model saves as what it is."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and quantizer.quantization_config.quant_method == "gguf":
        quantizer.remove_quantization_config(model)
