"""A small matrix on a tiny model, and rows as a run would write them, with numbers that tests choose."""

import json
import random

import yaml
from tiny_models import tiny, tiny_tokenizer

from gateskip_compress.matrix.cells import list_cells, quality_settings, timing_settings
from gateskip_compress.matrix.spec import Spec

PARTS = {
    "prune": {"light": {"blocks": 1}},
    "gateskip": {"light": {"budget": 0.9, "rank": 4}},
    "quantize": {"light": {"bits": 4, "group_size": 32}},
    "self_speculation": {"light": {"draft_budget": 0.7, "draft_tokens": 2, "adapt": False}},
}
TIMING = {"prompt_tokens": [8], "batches": [1, 2], "new_tokens": 3, "runs": 2}


def matrix_file(folder, **changes):
    """A model, a text and a matrix.yaml in a folder; returns the file."""
    tiny().save_pretrained(folder / "plain")
    tiny_tokenizer().save_pretrained(folder / "plain")
    draw = random.Random(0)
    texts = [" ".join(f"w{draw.randint(3, 95)}" for _ in range(24)) for _ in range(8)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    content = {
        "models": [str(folder / "plain")],
        "evaluation": {"text": "text.jsonl", "window_tokens": 24, "most_tokens": 192},
        "calibration": {"text": "text.jsonl", "windows": 4, "window_tokens": 24},
        "parts": PARTS,
        "timing": TIMING,
        **changes,
    }
    path = folder / "matrix.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def made_up(losses, seconds, **changes):
    """A matrix that was never run.

    Args:
        losses: By a cell's parts joined with +, nats of two passages of 10 tokens each.
        seconds: By the same, of one decode; the original takes 6.
        changes: Of the spec.

    Returns:
        Spec, cells and rows, as `derive` takes them.
    """
    spec = Spec.model_validate({"models": ["none"], "evaluation": {"text": "none"}, "parts": PARTS, **changes})
    cells, rows = list_cells(spec), {}
    settings = {"quality": quality_settings(spec), "speed": timing_settings(spec)}
    environment = dict.fromkeys(("device", "dtype", "threads", "package", "torch", "transformers", "python"), "1")
    for cell in cells:
        name = "+".join(cell.parts)
        if name not in losses:
            continue
        first, second = losses[name]
        quality = {"perplexity": 2.718281828459045 ** ((first + second) / 20), "kl_nats": 0.1, "top1_agreement": 0.8}
        quality |= {"macs_per_token": 100.0 - 10 * len(cell.parts)}
        rows[cell.id, "quality", settings["quality"]] = {
            "status": "done",
            "samples": {
                "tokens": [10, 10],
                "losses_nats": [first, second],
                "divergences_nats": [1.0, 1.0] if name else [],
                "agreements": [8, 8] if name else [],
            },
            "quality": {**quality, "perplexity_low": 1.0, "perplexity_high": 9.0},
            "disk_bytes": 1000 // (1 + len(cell.parts)),
            "answers": {},
            "compression": {"seconds": 1.0, "peak_bytes": None, "steps": []},
            "environment": {**environment, "commit": None, "date": "2000-01-01"},
        }
        if name in seconds:
            own = seconds[name]
            size = {"batch": 1, "prompt_tokens": 8, "new_tokens": 3, "accepted_share": None, "tokens_per_verify": None}
            size |= {"prefill_s": [own, own], "original_prefill_s": [6.0, 6.0]}
            size |= {"decode_s": [own, 2 * own, own], "original_decode_s": [6.0, 12.0, 6.0]}
            memory = 100 - 20 * len(cell.parts)
            rows[cell.id, "speed", settings["speed"]] = {
                "status": "done",
                "runtime": "torch",
                "not_native": None,
                "sizes": [size],
                "memory_bytes": memory,
            }
    return spec, cells, rows
