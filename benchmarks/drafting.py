"""Gates for drafting alone, before and after training: how many of the tokens they draft stand, and what that allows.

A gated model that verifies at full budget gets draft gates: fitted in closed form, and then trained besides, for a
stated time, to say what the full model says on text that it wrote itself. Both are then judged on the same prompts at
all of their budgets, as `speculation.py` does; its docstring has the theory that the allowed speed-up comes from.

    python benchmarks/drafting.py runs/demo/steps/2-gateskip --prompts-file FILE --steps 100 \
        --out benchmarks/results/drafting.jsonl --save runs/drafting
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from time import perf_counter

import torch
from speculation import LONGEST, RUNS, read_prompts, theory

import gateskip_compress as g
from gateskip_compress import runtime
from gateskip_compress.measure import environment
from gateskip_compress.pipeline import apply
from gateskip_compress.processor import cores
from gateskip_compress.source import cache_folder
from gateskip_compress.step import Context
from gateskip_compress.text import self_written

VERIFY = 1.0


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a gated checkpoint")
    parser.add_argument("--prompts-file", required=True, help="Spec-Bench questions, .jsonl")
    parser.add_argument("--prompts", type=int, default=2, help="of each kind")
    parser.add_argument("--prompt-tokens", type=int, default=768, help="longer ones are left out")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--windows", type=int, default=192, help="of 256 tokens that the model writes to learn from")
    parser.add_argument("--budget", type=float, default=0.5, help="that drafts are trained for")
    parser.add_argument("--surrogate", default="narrow")
    parser.add_argument("--steps", type=int, default=100, help="of training, four windows each")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--save", type=Path, help="folder for the model with trained draft gates")
    given = parser.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    for training in (None, g.Training(steps=given.steps)):
        model, tokenizer = g.load(given.model)
        g.set_budget(model, VERIFY)
        prompts = read_prompts(given.prompts_file, tokenizer, given.prompts, given.prompt_tokens)
        written = self_written(model, tokenizer, count=given.windows, cache=cache_folder())
        gates = g.GateSkip(budget=given.budget, surrogate=given.surrogate, training=training)
        began = perf_counter()
        record = apply(g.SelfSpeculation(gates=gates), model, Context(written))
        seconds = perf_counter() - began
        losses = record["gates"].get("training", {}).get("losses")
        if training is not None and given.save is not None:
            model.save_pretrained(given.save)
        session = runtime.lower(model, context_tokens=given.prompt_tokens + given.new_tokens + LONGEST + RUNS)
        common = {"benchmark": "drafting", "gates": asdict(gates), "fit_s": seconds, "losses": losses}
        common |= {"learnt_from_tokens": written.numel(), "verify_budget": VERIFY, **environment(model)}
        with given.out.open("a") as out:
            for row in theory(model, session, [ids for kind in prompts.values() for ids in kind], given.new_tokens):
                out.write(json.dumps({**common, **row}) + "\n")
                print(
                    f"{'closed form' if training is None else 'trained':12} draft budget {row['draft_budget']:.2f}: "
                    f"acceptance {row['acceptance']:.3f}, draft cost {row['draft_cost']:.2f}: allows "
                    f"{row['allowed_speedup']:.2f} × at {row['best_draft_tokens']} tokens (fitted in {seconds:.0f} s)",
                    flush=True,
                )


if __name__ == "__main__":
    torch.set_num_threads(cores())
    main()
