"""Seconds and bytes of one model: prefill and decode speed, peak memory, size on disk; and what machine it was."""

import platform
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from .speculation.decode import Acceptance, self_speculative


@dataclass(frozen=True)
class Speed:
    """Medians over the runs, with the raw samples."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    prefill_s: list[float]
    decode_s: list[float]
    peak_bytes: int
    accepted_share: float | None
    tokens_per_verify: float | None


def measure_speed(
    model: PreTrainedModel, prompt_tokens: int, new_tokens: int, *, runs: int = 3, speculate: bool = False
) -> Speed:
    """Time batch 1: one pass over the prompt (last logits only), and greedy decoding after it.

    Decoding starts from a cache that holds the prompt; its time is that of the whole `generate` call. The prompt is
    seeded random ids, a warm-up goes first, and end tokens do not stop it. Peak bytes are the process's own: for a
    clean number, use a fresh one.

    Args:
        model: At the budget it is set to.
        prompt_tokens: Length of the prompt.
        new_tokens: Tokens to decode.
        runs: Timed repetitions.
        speculate: Decode self-speculatively.
    """
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(model.config.get_text_config().vocab_size, (1, prompt_tokens), generator=generator)
    prompt, acceptance = prompt.to(model.device), Acceptance()
    extra: dict[str, Any] = {"custom_generate": self_speculative, "acceptance": acceptance} if speculate else {}
    settings = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt), **extra}

    def prefill() -> None:
        model(prompt, use_cache=True, logits_to_keep=1)

    def decode(tokens: int) -> float:
        cache = DynamicCache(config=model.config)
        model(prompt[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        length = {"min_new_tokens": tokens, "max_new_tokens": tokens}
        return _seconds(lambda: model.generate(prompt, past_key_values=cache, **length, **settings), model.device)

    with torch.inference_mode():
        prefill()
        prefill_s = [_seconds(prefill, model.device) for _ in range(runs)]
        decode(min(4, new_tokens))
        acceptance.drafted = acceptance.accepted = acceptance.verifies = 0
        decode_s = [decode(new_tokens) for _ in range(runs)]
    verifies = acceptance.verifies
    return Speed(
        prefill_tokens_per_s=prompt_tokens / median(prefill_s),
        decode_tokens_per_s=new_tokens / median(decode_s),
        prefill_s=prefill_s,
        decode_s=decode_s,
        peak_bytes=peak_bytes(model.device),
        accepted_share=acceptance.accepted_share,
        tokens_per_verify=(acceptance.accepted + verifies) / verifies if verifies else None,
    )


def peak_bytes(device: torch.device) -> int:
    """Most memory held so far: of the device on CUDA, else resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def disk_bytes(folder: Path) -> int:
    """Size of the weight files in a model folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def environment(model: PreTrainedModel) -> dict[str, Any]:
    """Versions and device, to stand beside numbers."""
    names = ("torch", "transformers")
    return {
        "package": version("gateskip-compress"),
        "python": platform.python_version(),
        **{name: version(name) for name in names},
        "device": _device_name(model.device),
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "date": time.strftime("%Y-%m-%d"),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.is_file()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
