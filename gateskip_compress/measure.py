"""Seconds and bytes of one model: prefill and decode speed, peak memory, size on disk; and what machine it was."""

import platform
import resource
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from .processor import processor_name
from .speculation.acceptance import Acceptance
from .speculation.decode import self_speculative


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

    @classmethod
    def of(
        cls,
        prompt: Int[Tensor, "1 t"],
        new_tokens: int,
        prefill_s: list[float],
        decode_s: list[float],
        acceptance: Acceptance,
    ) -> "Speed":
        """Samples summed up, with the peak memory by now."""
        return cls(
            prefill_tokens_per_s=prompt.shape[1] / median(prefill_s),
            decode_tokens_per_s=new_tokens / median(decode_s),
            prefill_s=prefill_s,
            decode_s=decode_s,
            peak_bytes=peak_bytes(prompt.device),
            accepted_share=acceptance.accepted_share,
            tokens_per_verify=acceptance.tokens_per_verify,
        )


@dataclass
class Watch(ABC):
    """Times a model on one prompt; each call of `prefill` or `decode` gives one sample, in seconds.

    Args:
        prompt: Token ids.
        new_tokens: Tokens that `decode` adds to each row; end tokens do not stop it.
        speculate: Decode self-speculatively.
        acceptance: What was drafted and accepted since the warm-up.
    """

    prompt: Int[Tensor, "b t"]
    new_tokens: int
    speculate: bool = field(default=False, kw_only=True)
    acceptance: Acceptance = field(default_factory=Acceptance, kw_only=True)

    @abstractmethod
    def prefill(self) -> float:
        """One pass over the prompt, last logits only: also the time to the first token."""

    def decode(self) -> float:
        """The new tokens, greedily."""
        return self._decode(self.new_tokens)

    def warm_up(self) -> None:
        """Run both for a moment; counts of acceptance start after it."""
        self.prefill()
        self._decode(min(4, self.new_tokens))
        self.acceptance.clear()

    @abstractmethod
    def _decode(self, tokens: int) -> float: ...


@dataclass
class Stopwatch(Watch):
    """Times a model on torch. Decoding is the whole `generate` call, from a cache of all but the prompt's last token.

    Args:
        model: At the budget it is set to.
    """

    model: PreTrainedModel

    @torch.inference_mode()
    def prefill(self) -> float:
        """One pass over the prompt, last logits only: also the time to the first token."""
        return _seconds(lambda: self.model(self.prompt, use_cache=True, logits_to_keep=1), self.model.device)

    @torch.inference_mode()
    def _decode(self, tokens: int) -> float:
        extra = {"custom_generate": self_speculative, "acceptance": self.acceptance} if self.speculate else {}
        settings: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, **extra}
        past = DynamicCache(config=self.model.config)
        self.model(self.prompt[:, :-1], past_key_values=past, use_cache=True, logits_to_keep=1)
        whole = {"attention_mask": torch.ones_like(self.prompt), "past_key_values": past}
        call = lambda: self.model.generate(self.prompt, max_new_tokens=tokens, **whole, **settings)  # noqa: E731
        return _seconds(call, self.model.device)


def measure_speed(watch: Watch, runs: int, prompts: Int[Tensor, "n t"]) -> Speed:
    """Time each of the prompts in turn, as long as there are runs; what gates skip and drafts gain depends on the text.

    Peak bytes are the process's own: for a clean number, use a fresh one.
    """
    watch.warm_up()
    prefill_s, decode_s = [], []
    for run in range(runs):
        watch.prompt = prompts[run % len(prompts)][None]
        prefill_s.append(watch.prefill())
        decode_s.append(watch.decode())
    return Speed.of(watch.prompt, watch.new_tokens, prefill_s, decode_s, watch.acceptance)


def peak_bytes(device: torch.device) -> int:
    """Most memory held so far, or since `forget_peak`: of the device on CUDA, else resident memory of the process.

    Linux tells it in /proc; its `ru_maxrss` would also count what the parent held when it started this process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.is_file():
        return _status_bytes("VmHWM")
    return _peak_rusage_bytes()


def held_bytes(device: torch.device) -> int:
    """Memory held now; where the system tells only the most so far, that."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status_bytes("VmRSS") if _STATUS.is_file() else _peak_rusage_bytes()


def forget_peak(device: torch.device) -> bool:
    """Let `peak_bytes` count from now on; False where the system cannot."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


_STATUS = Path("/proc/self/status")


def _status_bytes(key: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])


def _peak_rusage_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def environment(model: PreTrainedModel) -> dict[str, Any]:
    """Versions and device, to stand beside numbers."""
    names = ("torch", "transformers")
    return {
        "package": version("gateskip-compress"),
        "commit": commit(),
        "python": platform.python_version(),
        **{name: version(name) for name in names},
        "device": device_name(model.device),
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "date": time.strftime("%Y-%m-%d"),
    }


@cache
def commit() -> str | None:
    """The commit this package runs from, with `-dirty` where files differ from it; None outside a checkout."""
    home = Path(__file__).parents[1]
    if not (home / ".git").exists():
        return None
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        done = subprocess.run(command, cwd=home, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def device_name(device: torch.device) -> str:
    """What the processor or GPU calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor_name()


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
