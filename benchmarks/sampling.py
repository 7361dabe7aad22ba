"""What drawing tokens costs beside taking the best ones, in the native runtime.

Timed: decoding at batch 1, from the first new token to the last, end tokens ignored, all ways of a prompt one after the
other, in an order that turns from prompt to prompt, so that drift of the machine hits all alike. `processors` are the
same limits by transformers' own logits processors, a token at a time: another one stands behind them that the runtime
leaves to transformers, which normalises logits and changes no chance. Tokens that differ from what `processors` draws
by the same seed are counted. One JSON object a way goes to --out.

    python benchmarks/sampling.py runs/demo/model --prompts-file FILE --out benchmarks/results/sampling.jsonl
"""

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

import torch
from speculation import read_prompts

import gateskip_compress as g
from gateskip_compress import runtime
from gateskip_compress.measure import environment
from gateskip_compress.runtime.watch import Times

LIMITS: dict[str, dict[str, Any]] = {
    "temperature 1": {"temperature": 1.0, "top_k": 0},
    "top-k 50": {"temperature": 1.0, "top_k": 50},
    "top-p 0.9": {"temperature": 0.7, "top_k": 0, "top_p": 0.9},
    "min-p 0.05": {"temperature": 1.0, "top_k": 0, "min_p": 0.05},
}


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a checkpoint")
    parser.add_argument("--prompts-file", required=True, help="Spec-Bench questions, .jsonl")
    parser.add_argument("--prompts", type=int, default=2, help="of each kind")
    parser.add_argument("--prompt-tokens", type=int, default=256, help="longer ones are left out")
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    model, tokenizer = g.load(given.model)
    prompts = read_prompts(given.prompts_file, tokenizer, given.prompts, given.prompt_tokens)
    session = runtime.lower(model, context_tokens=given.prompt_tokens + given.new_tokens + 1)
    given.out.parent.mkdir(exist_ok=True, parents=True)
    common = {"benchmark": "sampling", "model": Path(given.model).name, "kernels": session.kernels}
    common |= {"new_tokens": given.new_tokens, **environment(model)}
    with given.out.open("a", buffering=1) as out:
        for row in compare(session, [ids for kind in prompts.values() for ids in kind], given.new_tokens):
            out.write(json.dumps({**common, **row}) + "\n")
            print(
                f"{row['limits']:14s} {row['way']:12s} {row['tokens_per_s']:4.0f} tok/s, {row['of_greedy']:.2f} × "
                f"greedy, {row['differing_tokens']} tokens differ"
            )


def compare(session: runtime.Session, prompts: list[torch.Tensor], new_tokens: int) -> list[dict[str, Any]]:
    """Every way on every prompt; a row for each way."""
    ways: dict[tuple[str, str], dict[str, Any]] = {("none", "greedy"): {"do_sample": False}}
    for name, limits in LIMITS.items():
        ways[name, "processors"] = {"do_sample": True, **limits, "renormalize_logits": True}
        ways[name, "native"] = {"do_sample": True, **limits}
        ways[name, "speculating"] = {"do_sample": True, **limits, "speculate": True, "drafts": "look-up"}
    seconds: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
    differing = dict.fromkeys(ways, 0)
    for turn, ids in enumerate([prompts[0], *prompts]):  # the first to warm up
        texts, order = {}, list(ways)
        for way in order[turn % len(order) :] + order[: turn % len(order)]:
            torch.manual_seed(turn)
            times = Times()
            settings = {"max_new_tokens": new_tokens, "eos_token_id": None, "pad_token_id": 0, **ways[way]}
            texts[way] = session.generate(ids, attention_mask=torch.ones_like(ids), streamer=times, **settings)
            if turn:
                seconds[way].append(times.seen[-1] - times.seen[0])
        for way in ways if turn else ():
            differing[way] += int((texts[way] != texts.get((way[0], "processors"), texts[way])).sum())
    greedy = seconds["none", "greedy"]
    return [
        {
            "limits": name,
            "way": how,
            "tokens_per_s": (new_tokens - 1) / median(own),
            "of_greedy": median(a / b for a, b in zip(greedy, own, strict=True)),
            "differing_tokens": differing[name, how],
            "samples_s": own,
        }
        for (name, how), own in seconds.items()
    ]


if __name__ == "__main__":
    main()
