"""Decode and prefill, native runtime beside transformers, llama.cpp and OpenVINO GenAI: one model, 4 bits, one machine.

Timed: a whole call that reads a prompt and decodes greedily, no end token stopping it; prefill is the time to the first
token, as a streamer or the peer's own metrics tell it, decode the rest. All contestants take turns within one run, so
that drift of the machine hits all alike; ratios are medians of the turns' own ratios. Not timed: tokenizing; and
loading, which has a column of its own: from a fresh process, imports included, to the first token, ours with packed
weights kept beside the checkpoint, as `gateskip generate` starts, and as a session made of a Hugging Face model does.
Beside tokens/s stand the bytes that a token reads, weights and kept keys and values, times tokens/s, as a share of the
read bandwidth measured in the same turn; and the multiply-adds of a prompt, all of its tokens' in all layers and one
token's logits, as a share of the most that torch's own products of large matrices reach, in 8-bit integers, bfloat16 or
float32, measured in the same run.

    python benchmarks/decode.py runs/demo/model --gguf FILE --out benchmarks/results/decode.jsonl

Peers run in their own processes: --peers is a Python that has openvino-genai and llama-cpp-python, which may be another
than ours. Both read the same GGUF file (Q4_1 for the embedded model), OpenVINO also what it converts that to, which
loads faster, and once more without rounding activations to 8 bits (by 32), as it does unless told not to; ours are of
16 bits but for one row. Ours and transformers read the checkpoint. A peer that is missing is said, and has a row that
says so.
Prompts are the text's first tokens.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel, StoppingCriteriaList

import gateskip_compress as g
from gateskip_compress import runtime
from gateskip_compress.gating.turning import dial_of, is_gated
from gateskip_compress.macs import head_macs, ungated_macs_per_token
from gateskip_compress.measure import environment
from gateskip_compress.model import blocks, family_of, has_branch, key_value_features
from gateskip_compress.runtime.extension import extension
from gateskip_compress.runtime.watch import Times
from gateskip_compress.speculation.acceptance import Acceptance

BUDGETS = (0.75, 0.5)
PEERS = (
    "llama.cpp",
    "OpenVINO GenAI",
    "OpenVINO GenAI, converted",
    "OpenVINO GenAI, activations not in 8 bits",
)
LOADS = 3
# Runs in the peer's Python: prints its load seconds, then, for each line, [prompts, number of new tokens], the seconds
# to the first token and those from there on.
_SERVE = """
import time
start = time.perf_counter()
import json, sys
name, file, threads, batch = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
if name == "llama.cpp":
    from llama_cpp import Llama
    assert batch == 1, "llama-cpp-python's interface decodes one sequence at a time"
    model = Llama(file, n_ctx=4096, n_threads=threads, n_threads_batch=threads, verbose=False)
    def run(prompts, count):
        model.reset()
        start, seen = time.perf_counter(), []
        for _ in model.generate(prompts[0], top_k=1, temp=0.0, reset=True):
            seen.append(time.perf_counter())
            if len(seen) == count: return seen[0] - start, seen[-1] - seen[0]
else:
    import numpy, openvino, openvino_genai
    more = {"enable_save_ov_model": True} if len(sys.argv) > 5 else {}
    if name.endswith("not in 8 bits"): more["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0
    model = openvino_genai.LLMPipeline(file, "CPU", INFERENCE_NUM_THREADS=threads, **more)
    config = openvino_genai.GenerationConfig()
    config.ignore_eos, config.do_sample = True, False
    def run(prompts, count):
        config.max_new_tokens = count
        ids = numpy.array(prompts, dtype=numpy.int64)
        inputs = openvino_genai.TokenizedInputs(*(openvino.Tensor(part) for part in (ids, numpy.ones_like(ids))))
        start = time.perf_counter()
        first = model.generate(inputs, config).perf_metrics.get_ttft().mean / 1000
        return first, time.perf_counter() - start - first
run([[1, 2, 3]] * batch, 1)
print(json.dumps(time.perf_counter() - start), flush=True)
for line in sys.stdin:
    print(json.dumps(run(*json.loads(line))), flush=True)
"""
_LOADS = {
    "load_s": """
import time
start = time.perf_counter()
import sys
from gateskip_compress.runtime.ready import generate_ready
greedy = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0}
how = {"new_tokens": 1, "budget": None, "speculate": False, "put": None, "tell": print}
assert generate_ready(sys.argv[1], "Hello", **how, **greedy) is not None
print(time.perf_counter() - start)
""",
    "load_through_transformers_s": """
import time
start = time.perf_counter()
import sys, torch
from pathlib import Path
from gateskip_compress import load, runtime
session = runtime.lower(load(sys.argv[1])[0], context_tokens=512, beside=Path(sys.argv[1]))
session.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=1, do_sample=False, attention_mask=torch.ones(1, 3))
print(time.perf_counter() - start)
""",
}
Run = Callable[[list[list[int]], int], tuple[float, float]]
"""Seconds that a contestant takes to the first token of a batch of prompts, and for the rest of so many of each."""
APART = 37
"""Tokens between the beginnings of a batch's prompts."""


def main() -> None:
    """Run it."""
    with tempfile.TemporaryDirectory() as scratch:
        measure(Path(scratch))


def measure(scratch: Path) -> None:
    """Read the arguments, take the turns, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder of a gated, 4-bit checkpoint")
    parser.add_argument("--gguf", type=Path, required=True, help="the same model for the peers")
    parser.add_argument("--peers", default=sys.executable, help="a Python that has the peers; default: this one")
    parser.add_argument("--text", default="pipelines/text/instructions.jsonl")
    parser.add_argument("--prompts", type=int, nargs="+", default=[32, 512, 2048])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1, help="prompts at once; llama.cpp takes part at 1")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=None, help="of every contestant; default: one a core")
    parser.add_argument(
        "--dtype", default="bfloat16", help="of transformers; float32 where the processor has no bfloat16"
    )
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    model, tokenizer = g.load(given.model)
    lower = partial(
        runtime.lower,
        model,
        context_tokens=max(given.prompts) + given.new_tokens + 1,
        rows=given.batch,
        threads=given.threads,
    )
    session = lower()
    lower(beside=Path(given.model))  # packs
    loads = {
        "native": {name: median(_load_s(code, given.model) for _ in range(LOADS)) for name, code in _LOADS.items()}
    }
    threads = given.threads or runtime.doctor()["cores"]
    torch.set_num_threads(threads)
    variants = {"8-bit cache": lower(cache="int8"), "8-bit activations": lower(activation_bits=8)}
    contestants = _ours(session, variants, given.dtype)
    absent: dict[str, str] = {}
    for name in PEERS:
        try:
            contestants[name], seconds = _loaded(given.peers, name, given.gguf, threads, given.batch, scratch)
            loads[name] = {"load_s": seconds}
        except RuntimeError as error:
            absent[name] = str(error)
            print(f"{name} is missing: {error}")
    read, peak = partial(extension().read_bandwidth, threads, 512, 2), multiply_peak()
    text = _tokens(given.text, tokenizer, max(given.prompts) + given.runs + 1 + APART * given.batch)
    given.out.parent.mkdir(exist_ok=True)
    with given.out.open("a", buffering=1) as out:
        for length in given.prompts:
            rows, bandwidths = _measure(contestants, text, length, given.new_tokens, given.batch, given.runs, read)
            for row in rows:
                ours = row["contestant"] == "native"
                kept = given.batch * (length + given.new_tokens / 2) * position_bytes(session.model)
                head = head_macs(session.model)
                of_prompt = length * (ungated_macs_per_token(session.model, (length + 1) // 2) - head) + head
                multiplied = of_prompt * row["prefill_tokens_per_s"] / length
                bytes_read = given.new_tokens * (session.bytes_per_token + kept)
                turns = zip(row["decode_s"], bandwidths, strict=True)
                row |= {
                    "batch": given.batch,
                    "prompt_tokens": length,
                    "new_tokens": given.new_tokens,
                    **loads.get(row["contestant"], {"load_s": None}),
                    "read_bytes_per_s": bandwidths,
                    "weight_bytes_per_token": session.bytes_per_token if ours else None,
                    "cache_bytes_per_token": kept if ours else None,
                    "roofline_share": median(bytes_read / seconds / most for seconds, most in turns) if ours else None,
                    "peak_multiply_adds_per_s": peak,
                    "prefill_multiply_adds_per_s": multiplied if ours else None,
                    "prefill_share": multiplied / peak if ours else None,
                    "kernels": session.kernels,
                    "model": Path(given.model).name,
                    **environment(model),
                }
                out.write(json.dumps(row) + "\n")
                _print(row)
        for name, reason in absent.items():
            out.write(json.dumps({"benchmark": "decode", "contestant": name, "missing": reason}) + "\n")


def multiply_peak(size: int = 1024, runs: int = 20) -> float:
    """Multiply-adds a second of torch's own products, of the numbers that it is fastest with here."""
    floats, multiply = torch.randn(size, size), torch.ops.aten
    halves, whole = floats.bfloat16(), torch.randint(-127, 128, (size, size), dtype=torch.int8)
    best = float("inf")
    for product, matrix in ((multiply.mm, floats), (multiply.mm, halves), (multiply._int_mm, whole)):
        for _ in range(runs):
            start = time.perf_counter()
            product(matrix, matrix)
            best = min(best, time.perf_counter() - start)
    return size**3 / best


def position_bytes(model: PreTrainedModel) -> int:
    """Of a position's keys and values in all blocks, in float16."""
    family = family_of(model)
    attending = (block for layer, block in enumerate(blocks(model)) if has_branch(model, layer, "attention"))
    return sum(2 * key_value_features(family, block) for block in attending)


def _ours(session: runtime.Session, variants: dict[str, runtime.Session], dtype: str) -> dict[str, Run]:
    """The session at its budgets, its variants, and transformers with the model that was compressed."""
    model = session.model

    def call(generate: Callable[..., Any], budget: float, **settings: Any) -> Run:
        def run(prompts: list[list[int]], count: int) -> tuple[float, float]:
            prompt, times = torch.tensor(prompts), Times()
            hears = {"streamer": times} if len(prompts) == 1 else {"stopping_criteria": StoppingCriteriaList([times])}
            given = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}  # no end token: all have a length
            with g.budget(model, budget) if is_gated(model) else torch.no_grad():
                start = time.perf_counter()
                mask = torch.ones_like(prompt)
                generate(prompt, max_new_tokens=count, attention_mask=mask, **hears, **given, **settings)
            return times.seen[0] - start, times.seen[-1] - times.seen[0]

        return run

    found = {"native": call(session.generate, 1.0)}
    if is_gated(model):
        floor = dial_of(model).floor
        found |= {f"native, budget {b}": call(session.generate, b) for b in BUDGETS if b >= floor}
    found |= {f"native, {name}": call(variant.generate, 1.0) for name, variant in variants.items()}
    if session.rows == 1:
        found["native, speculative"] = call(session.generate, 1.0, speculate=True, acceptance=Acceptance())
    original = g.load(model.gateskip.original["source"], dtype=dtype)[0]
    found[f"transformers, {dtype}"] = call(original.generate, 1.0)
    return found


def _load_s(code: str, model: str) -> float:
    """Seconds of a fresh process to its first token."""
    done = subprocess.run([sys.executable, "-c", code, model], stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1])


def _loaded(python: str, name: str, file: Path, threads: int, batch: int, scratch: Path) -> tuple[Run, float]:
    """A peer, and the median of its load seconds; OpenVINO's converted model is made first.

    Raises:
        RuntimeError: it does not start; says why.
    """
    if name.endswith("converted"):
        shutil.copy(file, scratch / file.name)
        _peer(python, name, scratch / file.name, threads, batch, "save")
        file = scratch
    seconds = [_peer(python, name, file, threads, batch)[1] for _ in range(LOADS - 1)]
    run, last = _peer(python, name, file, threads, batch)
    return run, median([*seconds, last])


def _peer(python: str, name: str, file: Path, threads: int, batch: int, *more: str) -> tuple[Run, float]:
    """A peer in a process of its own, and its load seconds.

    Raises:
        RuntimeError: it does not start; says why.
    """
    command, pipe = [python, "-c", _SERVE, name, str(file), str(threads), str(batch), *more], subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    into, out, errors = process.stdin, process.stdout, process.stderr

    def answer(kind: type) -> Any:
        for line in out:  # peers print things of their own
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if isinstance(found, kind):
                return found
        last = errors.read().strip().splitlines() or ["it stopped"]
        raise RuntimeError(f"{python}: {last[-1]}")

    def run(prompts: list[list[int]], count: int) -> tuple[float, float]:
        into.write(json.dumps([prompts, count]) + "\n")
        into.flush()
        first, rest = answer(list)
        return first, rest

    return run, answer(float)


def _tokens(text: str, tokenizer: Any, count: int) -> list[int]:
    """The first tokens of a text, again from the start where it is too short."""
    from gateskip_compress.text import windows

    found = windows(text, tokenizer, min(256, count), count)
    ids = found.flatten().tolist()
    return (ids * (count // len(ids) + 1))[:count]


def _measure(
    contestants: dict[str, Run],
    text: list[int],
    length: int,
    new_tokens: int,
    batch: int,
    runs: int,
    bandwidth: Callable[[], float],
) -> tuple[list[dict[str, Any]], list[float]]:
    """Turn by turn, the read bandwidth besides, after ours; a first turn warms up.

    Each prompt begins elsewhere: OpenVINO remembers those it has read.
    """

    def prompts(first: int) -> list[list[int]]:
        return [text[first + row * APART :][:length] for row in range(batch)]

    prefill: dict[str, list[float]] = {name: [] for name in contestants}
    decode: dict[str, list[float]] = {name: [] for name in contestants}
    bandwidths: list[float] = []
    for turn in range(runs + 1):
        for name, run in contestants.items():
            first, rest = run(prompts(turn), new_tokens + 1)
            if turn > 0:
                prefill[name].append(first)
                decode[name].append(rest)
            if turn > 0 and name == "native":
                bandwidths.append(bandwidth())
    rows = [
        {
            "benchmark": "decode",
            "contestant": name,
            "missing": None,
            "prefill_tokens_per_s": batch * length / median(prefill[name]),
            "decode_tokens_per_s": batch * new_tokens / median(decode[name]),
            "prefill_speedup_of_native": median(a / b for a, b in zip(prefill[name], prefill["native"], strict=True)),
            "decode_speedup_of_native": median(a / b for a, b in zip(decode[name], decode["native"], strict=True)),
            "prefill_s": prefill[name],
            "decode_s": decode[name],
        }
        for name in contestants
    ]
    return rows, bandwidths


def _print(row: dict[str, Any]) -> None:
    share = ""
    if row["roofline_share"] is not None:
        share = f"; {row['roofline_share']:.0%} of the read bandwidth, {row['prefill_share']:.0%} of the multiply-adds"
    print(
        f"{row['prompt_tokens']:5} {row['contestant']:26} prefill {row['prefill_tokens_per_s']:6.0f} tok/s, "
        f"decode {row['decode_tokens_per_s']:6.1f} tok/s; native is {row['prefill_speedup_of_native']:.2f} × and "
        f"{row['decode_speedup_of_native']:.2f} × as fast{share}",
        flush=True,
    )


if __name__ == "__main__":
    main()
