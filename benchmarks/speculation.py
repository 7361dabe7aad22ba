"""Self-speculative decoding against plain decoding of the same model, and transformers' own assisted generation.

Timed: decoding at batch 1, from the first new token to the last, end tokens ignored, all variants of a prompt one after
the other, in an order that turns from prompt to prompt, so that drift of the machine hits all alike; beside it the
whole `generate` call, prompt included. Not timed: loading, tokenizing, a warm-up of each variant. Greedy, where every
token that differs from plain decoding is counted, and at temperature 1, where texts differ by chance on torch, and not
at all natively.

    python benchmarks/speculation.py runs/demo/model --prompts-file FILE --out benchmarks/results/speculation.jsonl

Ours run in the native runtime, or with --runtime torch beside transformers' own on the same footing.

The theory beside it: for each draft budget, with acceptance a of a drafted token, cost c of a drafting step and cost
v(k) of a verify pass over k + 1 tokens, in plain steps, drafts of k tokens allow a speed-up of

    (1 - a^(k+1)) / (1 - a) / (k c + v(k)).                     (Leviathan et al., arXiv 2211.17192, theorem 3.8)

a is solved from the mean number that stand of drafts of four, judged on the same prompts.
"""

import argparse
import json
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, StoppingCriteriaList

import gateskip_compress as g
from gateskip_compress import runtime
from gateskip_compress.gating.turning import dial_of, drafting
from gateskip_compress.measure import environment
from gateskip_compress.quantization.linear import unpacked
from gateskip_compress.runtime.watch import Times
from gateskip_compress.speculation.acceptance import Acceptance
from gateskip_compress.text import chat_prompt

KINDS = ("translation", "summarization", "qa", "math_reasoning", "rag")
"""The other categories of Spec-Bench are MT-bench's conversations."""
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gates": {"drafts": "gates"},
    "look-up": {"drafts": "look-up"},
    "both": {"drafts": "both"},
    "transformers' look-up": {"prompt_lookup_num_tokens": 10},
    "transformers' early exit": {"assistant_early_exit": None},
}
DRAFT = 4
"""Tokens of the drafts that acceptance is judged by."""
LONGEST, RUNS = 8, 9


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a gated checkpoint")
    parser.add_argument("--prompts-file", required=True, help="Spec-Bench questions, .jsonl")
    parser.add_argument("--prompts", type=int, default=80, help="of each kind")
    parser.add_argument("--prompt-tokens", type=int, default=768, help="longer ones are left out")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--budget", type=float, help="that verifies; default: the model's own")
    parser.add_argument("--runtime", default="native", choices=["native", "torch"])
    parser.add_argument("--theory-prompts", type=int, default=12, help="that acceptance is measured on")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    model, tokenizer = g.load(given.model)
    VARIANTS["transformers' early exit"]["assistant_early_exit"] = max(1, model.config.num_hidden_layers // 3)
    prompts = read_prompts(given.prompts_file, tokenizer, given.prompts, given.prompt_tokens)
    given.out.parent.mkdir(exist_ok=True, parents=True)
    native = given.runtime == "native"
    longest = given.prompt_tokens + given.new_tokens + LONGEST + RUNS
    session = runtime.lower(model, context_tokens=longest) if native else None
    with given.out.open("a", buffering=1) as out, unpacked(model), budget(model, given.budget):
        common = {"benchmark": "speculation", "model": Path(given.model).name, "batch": 1, **environment(model)}
        common |= {"runtime": given.runtime if session is None else f"native, {session.kernels}"}
        common |= {"verify_budget": dial_of(model).budget, "new_tokens": given.new_tokens}
        for temperature in given.temperatures:
            for row in compare(model, session, prompts, given.variants, given.new_tokens, temperature):
                out.write(json.dumps({**common, "temperature": temperature, **row}) + "\n")
                print(told(row, temperature), flush=True)
        all_of = [ids for kind in prompts.values() for ids in kind]
        some = all_of[:: max(1, len(all_of) // given.theory_prompts)]
        for row in theory(model, session, some, given.new_tokens):
            out.write(json.dumps({**common, **row}) + "\n")
            print(
                f"draft budget {row['draft_budget']:.2f}: acceptance {row['acceptance']:.2f}, draft cost "
                f"{row['draft_cost']:.2f}, verify costs {[round(v, 2) for v in row['verify_costs']]}: allows "
                f"{row['allowed_speedup']:.2f} × at {row['best_draft_tokens']} tokens",
                flush=True,
            )


def budget(model: Any, share: float | None) -> Any:
    """The model at a budget, or as it is."""
    return nullcontext() if share is None else g.budget(model, share)


def read_prompts(path: str, tokenizer: Any, count: int, most_tokens: int) -> dict[str, list[torch.Tensor]]:
    """First turns in the chat template, by kind, spread over each kind's questions."""
    found: dict[str, list[torch.Tensor]] = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        question = json.loads(line)
        kind = question["category"] if question["category"] in KINDS else "conversation"
        ids = chat_prompt(tokenizer, question["turns"][0])
        if ids.shape[1] <= most_tokens:
            found.setdefault(kind, []).append(ids)
    return {kind: all_of[:: max(1, len(all_of) // count)][:count] for kind, all_of in found.items()}


def written(
    model: Any,
    session: runtime.Session | None,
    name: str,
    ids: torch.Tensor,
    counts: Acceptance,
    times: Times | None = None,
    **settings: Any,
) -> torch.Tensor:
    """What one variant writes."""
    whole = {"attention_mask": torch.ones_like(ids), "eos_token_id": None, "pad_token_id": 0, **settings}
    theirs = name.startswith("transformers")
    drafts = {} if name == "plain" or theirs else {**VARIANTS[name], "acceptance": counts}
    if session is not None and not theirs:
        return session.generate(ids, streamer=times, **whole, speculate=bool(drafts), **drafts)
    whole["stopping_criteria"] = StoppingCriteriaList([] if times is None else [times])
    if theirs:
        return model.generate(ids, **whole, **VARIANTS[name])
    how = {"custom_generate": g.self_speculative, **drafts} if drafts else {}
    return model.generate(ids, **whole, **how)


def compare(
    model: Any,
    session: runtime.Session | None,
    prompts: dict[str, list[torch.Tensor]],
    variants: list[str],
    new_tokens: int,
    temperature: float,
) -> list[dict[str, Any]]:
    """Every variant on every prompt; a row for each variant and kind, and for all kinds together."""
    sampling = {"do_sample": False} if temperature == 0 else {"do_sample": True, "temperature": temperature, "top_k": 0}
    runs: list[dict[str, Any]] = []
    turn = 0
    for kind, all_of in prompts.items():
        for number, ids in enumerate(all_of):
            texts: dict[str, torch.Tensor] = {}
            turn += 1
            for name in variants[turn % len(variants) :] + variants[: turn % len(variants)]:
                counts = Acceptance()
                if turn == 1:
                    written(model, session, name, ids, Acceptance(), max_new_tokens=4, **sampling)
                torch.manual_seed(number)
                began = time.perf_counter()
                times = Times()
                texts[name] = written(model, session, name, ids, counts, times, max_new_tokens=new_tokens, **sampling)
                runs.append(
                    {
                        "kind": kind,
                        "prompt": number,
                        "variant": name,
                        "whole_s": time.perf_counter() - began,
                        "s": times.seen[-1] - times.seen[0],
                        **asdict(counts),
                    }
                )
            for run in runs[-len(variants) :]:
                differs = (texts[run["variant"]] != texts["plain"]).sum() if temperature == 0 else None
                run["differing"] = None if differs is None else int(differs)
    return [summary(runs, name, kind, new_tokens) for name in variants for kind in (*prompts, "all")]


def summary(runs: list[dict[str, Any]], name: str, kind: str, new_tokens: int) -> dict[str, Any]:
    """One variant on one kind of prompt, or on all."""

    def of(variant: str) -> list[dict[str, Any]]:
        return [r for r in runs if r["variant"] == variant and kind in (r["kind"], "all")]

    own, plain = of(name), of("plain")
    total = Acceptance(**{field: sum(r[field] for r in own) for field in asdict(Acceptance())})
    seconds, differing = [r["s"] for r in own], [r["differing"] for r in own]
    return {
        "variant": name,
        "kind": kind,
        "prompts": len(own),
        "tokens_per_s": (new_tokens - 1) * len(own) / sum(seconds),
        "whole_speedup": sum(r["whole_s"] for r in plain) / sum(r["whole_s"] for r in own),
        "speedup": sum(r["s"] for r in plain) / sum(seconds),
        "median_speedup": median(p["s"] / r["s"] for p, r in zip(plain, own, strict=True)),
        "differing_tokens": None if None in differing else sum(differing),
        "accepted_share": total.accepted_share,
        "tokens_per_verify": total.tokens_per_verify,
        "plain_steps": total.plain_steps,
        "reread_tokens": total.repeated,
        **total.time_shares,
        "samples_s": seconds,
    }


def told(row: dict[str, Any], temperature: float) -> str:
    """A row for the screen."""
    share = row["accepted_share"]
    fared = "" if share is None else f", {share:.0%} stood, {row['tokens_per_verify']:.2f} tokens a verify"
    differs = "" if row["differing_tokens"] is None else f", {row['differing_tokens']} tokens differ"
    return (
        f"T={temperature:g} {row['kind']:14} {row['variant']:25} {row['speedup']:.2f} × "
        f"(median {row['median_speedup']:.2f}; whole {row['whole_speedup']:.2f}), {row['tokens_per_s']:.1f} tok/s"
        f"{fared}{differs}"
    )


def theory(
    model: Any, session: runtime.Session | None, prompts: list[torch.Tensor], new_tokens: int
) -> list[dict[str, Any]]:
    """Acceptance and costs by draft budget, and the speed-up that they allow."""
    verifies, rows = dial_of(model).budget, []
    # what gates skip depends on the text: passes over what the model itself goes on with
    text = written(model, session, "plain", prompts[0], Acceptance(), max_new_tokens=LONGEST + RUNS, do_sample=False)
    after = prompts[0].shape[1]
    plain = step_s(model, session, text, after, 1)
    verify = [step_s(model, session, text, after, k + 1) / plain for k in range(1, LONGEST + 1)]
    with drafting(model):
        shares = [setting.budget for setting in dial_of(model).table if setting.budget < verifies - 0.02]
    step = getattr(model, "self_speculation", g.SelfSpeculation())
    for share in shares:
        if session is not None:
            cost = step_s(model, session, text, after, 1, draft=share) / plain
        else:
            with drafting(model), g.budget(model, share):
                cost = step_s(model, session, text, after, 1) / plain
        own = {"draft_budget": share} if step.gates is None else {"gates": replace(step.gates, budget=share)}
        model.self_speculation = replace(step, drafts="gates", draft_tokens=DRAFT, adapt=False, **own)
        counts = Acceptance()
        for prompt in prompts:
            written(model, session, "gates", prompt, counts, max_new_tokens=new_tokens, do_sample=False)
        a = acceptance(counts.accepted / counts.verifies)
        allowed = [sum(a**i for i in range(k + 1)) / (k * cost + v) for k, v in enumerate(verify, 1)]
        best = max(range(len(allowed)), key=allowed.__getitem__)
        row = {"draft_budget": share, "acceptance": a, "draft_cost": cost, "verify_costs": verify}
        row |= {"allowed_speedup": allowed[best], "best_draft_tokens": best + 1}
        rows.append({"variant": "theory", **row, "plain_step_s": plain, "own_gates": step.gates is not None})
    model.self_speculation = step
    return rows


def acceptance(mean: float) -> float:
    """The chance a that gives a mean number of a + .. + a^DRAFT tokens that stand."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**i for i in range(1, DRAFT + 1)) < mean else (low, middle)
    return low


@torch.inference_mode()
def step_s(
    model: Any,
    session: runtime.Session | None,
    ids: torch.Tensor,
    after: int,
    tokens: int,
    *,
    draft: float | None = None,
) -> float:
    """Median seconds of a pass over some tokens of a text, each begun at another of its places from `after` on.

    A session may draft one instead, at a budget.
    """
    seconds = []
    if session is not None:
        text = ids[0].numpy()
        session.prefill(text)
        for run in range(5 * RUNS + 1):
            at = after + run % RUNS
            began, some = time.perf_counter(), text[at : at + tokens]
            if draft is not None:
                session.draft(some, np.zeros(1, dtype=np.int32), np.array([at], dtype=np.int32), draft)
            else:
                session.run_row(some, 0, at, wanted=len(some))
            seconds.append(time.perf_counter() - began)
        return median(seconds[1:])
    cache = DynamicCache(config=model.config)
    model(ids[:, :after], past_key_values=cache, use_cache=True, logits_to_keep=1)
    for run in range(RUNS + 1):
        began = time.perf_counter()
        model(ids[:, after + run :][:, :tokens], past_key_values=cache, use_cache=True)
        seconds.append(time.perf_counter() - began)
        if tokens > 1:
            cache.crop(1 - tokens)
    return median(seconds[1:])


if __name__ == "__main__":
    main()
