"""Time a checkpoint, or let it write: what `gateskip bench` and `generate` do, and a run does in fresh processes."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, TextStreamer

from .folders import disk_bytes
from .gating.turning import budget as turned_to
from .gating.turning import is_gated
from .manifest import MANIFEST
from .measure import Stopwatch, environment, measure_speed
from .quantization.linear import unpacked
from .runtime.choose import choose_runtime
from .runtime.session import Session
from .runtime.watch import SessionWatch
from .source import load
from .speculation.acceptance import Acceptance
from .speculation.control import NO_GATES
from .speculation.decode import self_speculative
from .text import Passage, chat_prompt, documents, windowed

Tell = Callable[[str], object]


def _silent(_message: str) -> None:
    """Tells nobody."""


def bench(
    source: str,
    text: str | Int[Tensor, " _"],
    *,
    prompt_tokens: int,
    new_tokens: int,
    runs: int,
    budget: float | None = None,
    speculate: bool = False,
    unpack: bool = False,
    runtime: str = "auto",
    device: str = "auto",
    keep: bool = False,
    tell: Tell = _silent,
) -> dict[str, Any]:
    """Time prefill and decode at batch 1.

    Args:
        source: As in `source.load`.
        text: What prompts are cut from: as in `text.documents`, or token ids.
        prompt_tokens: Of each prompt.
        new_tokens: To decode.
        runs: Timed repetitions, after a warm-up, each of the next prompt; from the first again where the text ends.
        budget: Share of multiply-adds to run; None leaves the model's own.
        speculate: Decode self-speculatively.
        unpack: Hold quantized weights as float.
        runtime: As in `choose_runtime`; `native` runs on the CPU.
        device: As in `source.device_named`.
        keep: Packed weights beside a checkpoint of ours, for the next time.
        tell: As in `choose_runtime`.

    Raises:
        ValueError: a number is out of range.
        GateSkipError: the model cannot be loaded, or not run so; or the text is shorter than a prompt.
    """
    for name, value, least in (("prompt-tokens", prompt_tokens, 2), ("new-tokens", new_tokens, 2), ("runs", runs, 1)):
        if value < least:
            raise ValueError(f"--{name} {value} must be at least {least}")
    model, tokenizer = _load(source, runtime, device)
    found = documents(text, tokenizer) if isinstance(text, str) else [Passage.whole(text)]
    prompts = windowed(found, prompt_tokens, runs * prompt_tokens, text if isinstance(text, str) else "the text")
    context_tokens = prompt_tokens + new_tokens + 1
    session = _session(
        model, runtime, context_tokens, tell, unpack=unpack, speculate=speculate, beside=source if keep else None
    )
    with turned(model, budget), unpacked(model) if unpack else nullcontext():
        if session is None:
            prompts = prompts.to(model.device)
            watch = Stopwatch(prompts[:1], new_tokens, model, speculate=speculate)
        else:
            watch = SessionWatch(prompts[:1], new_tokens, session, speculate=speculate)
        speed = measure_speed(watch, runs, prompts)
    folder = Path(source)
    return {
        **asdict(speed),
        "disk_bytes": disk_bytes(folder) if folder.is_dir() else None,
        "batch": 1,
        "text": text if isinstance(text, str) else None,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "runtime": "torch" if session is None else f"native, {session.kernels}",
        **environment(model),
    }


def generate(
    source: str,
    prompt: str,
    *,
    new_tokens: int,
    budget: float | None = None,
    speculate: bool = False,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    unpack: bool = False,
    runtime: str = "auto",
    device: str = "auto",
    keep: bool = False,
    stream: bool = False,
    tell: Tell = _silent,
) -> tuple[dict[str, Any], Acceptance]:
    """Decode after a prompt.

    Args:
        source: As in `source.load`.
        prompt: Goes through the chat template where there is one.
        new_tokens: To decode, at most.
        budget: As in `bench`.
        speculate: As in `bench`.
        temperature: 0 takes the likeliest token; above, tokens are drawn.
        top_k: From so many of the likeliest ones; 0 is all.
        top_p: From the likeliest ones that have this share together.
        min_p: From those that have this part of the likeliest one's share.
        seed: Of what is drawn.
        unpack: As in `bench`.
        runtime: As in `bench`.
        device: As in `bench`.
        keep: As in `bench`.
        stream: Print the text as it comes.
        tell: As in `choose_runtime`.

    Returns:
        Text and counts; and how drafts fared.

    Raises:
        ValueError: a number is out of range.
        GateSkipError: the model cannot be loaded, or not run so.
    """
    if new_tokens < 1:
        raise ValueError(f"--new-tokens {new_tokens} must be at least 1")
    if not temperature >= 0:
        raise ValueError(f"--temperature {temperature} must not be negative")
    for name, value, fits, fit in (
        ("top-k", top_k, top_k >= 0, "not be negative; 0 is all tokens"),
        ("top-p", top_p, 0 < top_p <= 1, "be above 0 and at most 1"),
        ("min-p", min_p, 0 <= min_p <= 1, "be from 0 to 1"),
    ):
        if not fits:
            raise ValueError(f"--{name} {value} must {fit}")
    if temperature == 0 and (top_k, top_p, min_p) != (0, 1, 0):
        raise ValueError("--top-k, --top-p and --min-p say which tokens are drawn from: give --temperature too")
    model, tokenizer = _load(source, runtime, device)
    ids = chat_prompt(tokenizer, prompt).to(model.device)
    context_tokens = ids.shape[1] + new_tokens
    session = _session(
        model, runtime, context_tokens, tell, unpack=unpack, speculate=speculate, beside=source if keep else None
    )
    counts, run = Acceptance(), model.generate if session is None else session.generate
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None  # pyright: ignore[reportArgumentType]
    extra: dict[str, Any] = {"do_sample": False}
    if temperature > 0:  # nothing but these, whatever the model's own config says
        extra = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p or None}
        torch.manual_seed(seed)
    if speculate and session is None:  # transformers does not hand the streamer on
        extra |= {"custom_generate": partial(self_speculative, streamer=streamer), "acceptance": counts}
    elif speculate:
        extra |= {"speculate": True, "acceptance": counts}
    with turned(model, budget), unpacked(model) if unpack else nullcontext():
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": new_tokens, "pad_token_id": pad}
        out: Any = run(ids, streamer=streamer, **settings, **extra)  # pyright: ignore[reportArgumentType]
    new = out[0, ids.shape[1] :].tolist()
    return {"text": tokenizer.decode(new, skip_special_tokens=True), "token_ids": new, **counts.facts()}, counts


def _load(source: str, runtime: str, device: str) -> Any:
    """Model and tokenizer, where the runtime needs them."""
    return load(source, device="cpu" if runtime == "native" and device == "auto" else device)


def turned(model: PreTrainedModel, share: float | None) -> AbstractContextManager[object]:
    """The model at a budget inside the `with`; at its own where none is given."""
    return nullcontext() if share is None else turned_to(model, share)


def _session(
    model: PreTrainedModel,
    runtime: str,
    context_tokens: int,
    tell: Tell,
    *,
    unpack: bool,
    speculate: bool,
    beside: str | None,
) -> Session | None:
    """A native session, or None for torch; why not native is told. Only checkpoints of ours keep packed weights."""
    if speculate and not is_gated(model):
        tell(NO_GATES)
    if unpack and runtime == "native":
        raise ValueError("--unpack is for torch: the native runtime reads packed weights as they are")
    folder = Path(beside) if beside is not None and (Path(beside) / MANIFEST).is_file() else None
    return choose_runtime(model, "torch" if unpack else runtime, context_tokens, tell, beside=folder, release=True)
