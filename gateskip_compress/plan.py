"""What a recipe would do, from the model's config alone: no weight is read and nothing is written."""

import time
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from .errors import UnsupportedModel
from .gating.allocate import measured_windows
from .gating.calibrate import BUDGETS, CALIBRATION_TOKENS
from .gating.transform import GateSkip
from .macs import ungated_macs_per_token
from .model import blocks, branches, linears, vocabulary
from .pruning.transform import Prune
from .quantization.groups import check_group_size
from .quantization.transform import Quantize
from .recipe import Recipe
from .source import resolve


def plan_recipe(recipe: Recipe) -> dict[str, Any]:
    """Steps with estimated seconds, and memory and disk; a matrix product is timed for a second to judge the machine.

    Raises:
        UnsupportedModel: there is no such model, or its family is unknown.
        ValueError: a setting does not fit the model.
    """
    place = resolve(recipe.model)
    try:
        config = AutoConfig.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise UnsupportedModel(f"cannot read the config of {recipe.model!r}: {str(error).splitlines()[0]}") from error
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    branches(model)
    rate, context = _macs_per_s(), recipe.calibration.window_tokens
    measured = context * measured_windows(recipe.calibration.windows, context)
    per_token, layers = ungated_macs_per_token(model, context), len(blocks(model))
    float_bytes = torch.finfo(config.dtype or torch.float32).bits // 8
    kept, weights = 1.0, sum(linear.weight.numel() for linear in linears(model).values())
    parameters, disk = model.num_parameters(), model.num_parameters() * float_bytes
    tokens = recipe.calibration.windows * context

    def gating(step: GateSkip) -> float:
        passes = 2 * tokens + len(BUDGETS) * min(CALIBRATION_TOKENS, tokens)
        # for each of two branches, half the blocks on average, and all logits
        return passes + (
            1.5 * layers * measured_windows(recipe.calibration.windows, context) * context
            if step.spread == "sensitivity"
            else 0
        )

    work = {
        "gateskip": gating,
        "self_speculation": lambda step: gating(step.gates) if step.gates is not None else 0,
        "prune": lambda step: step.estimated_tokens(tokens, layers),
        "recover": lambda step: 4 * step.tokens,  # the original forwards; the model forwards and backwards
        "quantize": lambda step: 3 * tokens if step.solver == "gptq" else 0,  # two passes, and second moments
    }
    steps = []
    for step in recipe.pipeline():
        seconds = work.get(step.name, lambda _: 0)(step) * per_token * kept / rate
        if isinstance(step, Prune):
            if (step.blocks or 0) >= layers:
                raise ValueError(f"cannot drop {step.blocks} of {layers} blocks; at most {layers - 1}")
            gone = (step.share or 0) if step.blocks is None else step.blocks / layers
            disk -= kept * gone * weights * float_bytes
            kept *= 1 - gone
        if isinstance(step, Quantize):
            for linear in linears(model).values():
                check_group_size(step.group_size, linear.in_features, short=step.short_groups)
            mean = step.mean_bits or step.bits
            disk -= kept * weights * (float_bytes - mean / 8 - float_bytes / step.group_size)
            rows, asked = vocabulary(model), step.vocabulary_bits(model)
            for name, bits in asked.items():
                stored = rows.linears[name].weight.numel() / (2 if rows.tied else 1)
                disk -= stored * (float_bytes - bits / 8 - float_bytes / step.group_size)
        steps.append({"step": repr(step), "estimated_seconds": round(seconds, 1)})
    measured = recipe.evaluation.most_tokens * 2 * (len(steps) + 1) * per_token / rate
    return {
        "model": recipe.model,
        "parameters": parameters,
        "blocks": layers,
        "steps": steps,
        "calibration_tokens": tokens,
        "estimated_calibration_text_seconds": round(tokens * per_token / rate, 1)
        if recipe.calibration.text == "self"
        else 0,
        "estimated_measuring_seconds": round(measured, 1),
        "estimated_peak_bytes": int(2.5 * parameters * float_bytes),
        "estimated_disk_bytes": int(disk),
        "measured_macs_per_s": int(rate),
    }


def _macs_per_s() -> float:
    """Multiply-adds a second in a float32 matrix product of a block's size."""
    x, w = torch.randn(256, 1024), torch.randn(1024, 1024)
    torch.mm(x, w)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < 0.5:
        torch.mm(x, w)
        count += 1
    return count * 256 * 1024 * 1024 / (time.perf_counter() - began)
