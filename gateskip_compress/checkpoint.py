"""A compressed model on disk: safetensors and a manifest, loaded by transformers itself.

    config.json        the model's own; `quantization_config` carries the steps where structure must be rebuilt
    model.safetensors  every tensor, under the model's own parameter names; gates, codes and scales beside them
    gateskip.json      the manifest: steps, measured numbers, and the SHA-256 of every other file but the card
    README.md          model card

Writing goes to a hidden sibling folder that is renamed at the end, so a folder is whole or absent. Loading checks the
hashes first. A model that was only pruned needs nothing rebuilt, gets no `quantization_config`, and loads without us.
"""

import json
import os
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .errors import CheckpointError
from .folders import written_whole
from .manifest import FORMAT, MANIFEST, METHOD, checked_manifest, file_sha256
from .model import keep_softcap
from .quantization.linear import QuantizedLinear
from .step import Stage, Transform
from .transforms import build

CARD = "README.md"
_ALIGNMENT_BYTES = 64


@dataclass
class Manifest:
    """What was done to a model.

    Args:
        steps: One dict a step: `name`, `settings`, `record`.
        original: Facts of the model before the first step: `source`, `parameters`, `linear_macs_per_token`,
            `attention_macs_per_token_and_key`.
        measured: Numbers of the run that made it, for the card; may be empty.
        tokenizer: Saved beside the model; never part of the JSON.
    """

    steps: list[dict[str, Any]] = field(default_factory=list)
    original: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    tokenizer: PreTrainedTokenizerBase | None = field(default=None, repr=False)

    @property
    def transforms(self) -> list[Transform]:
        """The steps as transforms."""
        return [build(step["name"], step["settings"]) for step in self.steps]

    @property
    def needs_rebuilding(self) -> bool:
        """Whether plain transformers cannot load the model without us."""
        return any(
            transform.stage not in (Stage.PRUNE, Stage.RECOVER) or "widths" in step["record"]
            for transform, step in zip(self.transforms, self.steps, strict=True)
        )

    @property
    def imported(self) -> bool:
        """Whether the model came quantized out of another library, and nothing was done to it since."""
        return len(self.steps) == 1 and "imported" in self.steps[0]["record"]

    def to_json(self) -> dict[str, Any]:
        """The JSON part."""
        return {"steps": self.steps, "original": self.original, "measured": self.measured}


def attach(model: PreTrainedModel, manifest: Manifest) -> None:
    """Let a model, in place, carry its manifest as `model.gateskip` and save itself as a checkpoint of ours."""
    keep_softcap(model)
    model.gateskip = manifest
    model.save_pretrained = partial(save, model)
    if manifest.needs_rebuilding:
        config = GateSkipConfig(steps=manifest.steps, original=manifest.original)
        model.config.quantization_config = config
        model.hf_quantizer = GateSkipQuantizer(config)


def manifest_of(model: PreTrainedModel) -> Manifest | None:
    """The manifest of a compressed model, None of any other."""
    return getattr(model, "gateskip", None)


def save(model: PreTrainedModel, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
    """Write a compressed model as a checkpoint, whole or not at all.

    Args:
        model: A model with a manifest.
        save_directory: New, empty, or an older checkpoint, which is replaced.
        kwargs: For `PreTrainedModel.save_pretrained`.

    Raises:
        CheckpointError: the folder exists and holds something else.
    """
    target = Path(save_directory)
    check_target(target)
    manifest: Manifest = model.gateskip  # pyright: ignore[reportAssignmentType]
    with written_whole(target) as folder:
        type(model).save_pretrained(model, folder, **kwargs)
        if manifest.tokenizer is not None:
            manifest.tokenizer.save_pretrained(folder)
        files = {path.name: file_sha256(path) for path in sorted(folder.iterdir())}
        content = {"format": FORMAT, "package": version("gateskip-compress"), **manifest.to_json(), "files": files}
        (folder / MANIFEST).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
        (folder / CARD).write_text(card(manifest))


def check_target(folder: Path) -> None:
    """Raise CheckpointError where a checkpoint cannot be written: the folder exists and holds something else."""
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or (folder / MANIFEST).is_file())):
        raise CheckpointError(f"{folder} exists and is not a checkpoint of ours; choose another folder")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder, after its files' hashes were checked.

    Raises:
        CheckpointError: there is none, it is of another format, or a file is missing or changed.
    """
    content = checked_manifest(folder)
    return Manifest(content["steps"], content["original"], content["measured"])


def card(manifest: Manifest) -> str:
    """The model card in Markdown."""
    source = manifest.original.get("source", "unknown")
    lines = ["---", "library_name: transformers", "tags: [gateskip-compress]", "---", "", f"# {source}, compressed", ""]
    lines += ["Made by gateskip-compress. Steps, in order:", ""]
    lines += [f"{i}. `{transform!r}`" for i, transform in enumerate(manifest.transforms, 1)]
    if manifest.needs_rebuilding:
        lines += [
            "",
            "Load it with `import gateskip_compress` and then `AutoModelForCausalLM.from_pretrained(folder)`.",
        ]
        lines += [
            "Plain transformers, vLLM and GPTQModel cannot load it: gates and codes are this package's own. "
            "`gateskip export` writes what they can load."
        ]
    else:
        lines += ["", "A plain model: transformers loads it without this package."]
    if manifest.measured:
        lines += ["", "| measured | original | this model |", "|---|---|---|"]
        original, final = manifest.measured["original"], manifest.measured["final"]
        lines += [f"| {key} | {_shown(original.get(key))} | {_shown(value)} |" for key, value in final.items()]
    return "\n".join(lines) + "\n"


def _align(model: PreTrainedModel) -> None:
    """Move tensors off odd addresses of the mapped file, in place: products there may differ in their last bit.

    If one moves, all do: then the file is no longer mapped, and no tensor is in memory twice.
    """
    tensors = [*model.parameters(), *model.buffers()]
    if any(tensor.data_ptr() % _ALIGNMENT_BYTES for tensor in tensors):
        for tensor in tensors:
            tensor.data = tensor.data.clone()


def _shown(value: Any) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


class GateSkipConfig(QuantizationConfigMixin):
    """What config.json says of a compressed model: enough to build its structure again.

    Args:
        steps: As in `Manifest`.
        original: As in `Manifest`.
    """

    def __init__(self, steps: list[dict[str, Any]], original: dict[str, Any] | None = None, **_: Any) -> None:
        self.quant_method = METHOD  # pyright: ignore[reportAttributeAccessIssue] transformers' enum lists only its own
        self.steps, self.original = steps, original or {}


class GateSkipQuantizer(HfQuantizer):
    """Lets `AutoModelForCausalLM.from_pretrained` rebuild a compressed model; transformers calls it while loading."""

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        del kwargs
        if checkpoint_files:
            self._manifest = read_manifest(Path(checkpoint_files[0]).parent)
        else:
            self._manifest = Manifest(self.quantization_config.steps, self.quantization_config.original)
        for transform, step in zip(self._manifest.transforms, self._manifest.steps, strict=True):
            transform.rebuild(model, step["record"])

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        del kwargs
        _align(model)
        attach(model, self._manifest)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """All tensors; scales of groups in float16 where that loses nothing, whatever dtype they are loaded to."""
        state = model.state_dict()
        for name, layer in model.named_modules():
            if isinstance(layer, QuantizedLinear) and torch.equal(layer.scale.half().to(layer.scale), layer.scale):
                state[f"{name}.scale"] = layer.scale.half()
        return state, {}

    def is_serializable(self, *_: Any, **__: Any) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Yes."""
        return True

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gates and norms are plain parameters."""
        return True
