"""Self-speculative decoding: draft a few tokens under a low budget, verify them all in one pass, keep what stands.

Draft and verifier are one model with one cache. The draft's keys and values are dropped before the verify pass writes
its own, so the cache always holds what plain decoding would hold, and the text is plain greedy decoding's, token for
token, at the budget the model runs at. Greedy, one sequence at a time; sampling and batches are refused.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from ..gating.dial import budget, dial_of
from .accept import accepted_tokens


@dataclass
class Acceptance:
    """Counts of one generation; a decoder adds to them in place."""

    drafted: int = 0
    accepted: int = 0
    verifies: int = 0

    @property
    def accepted_share(self) -> float | None:
        """Share of drafted tokens that stood; None where none was drafted."""
        return self.accepted / self.drafted if self.drafted else None


@torch.inference_mode()
def self_speculative(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "b t"],
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    draft_budget: float | None = None,
    draft_tokens: int | None = None,
    acceptance: Acceptance | None = None,
    streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> Int[Tensor, "b u"]:
    """Decode greedily; pass it as `model.generate(ids, custom_generate=self_speculative, draft_budget=0.6)`.

    Args:
        model: A gated model; it verifies at the budget it is set to.
        input_ids: The prompt.
        logits_processor: Applied alike in draft and verify.
        stopping_criteria: Checked after every token that stands.
        generation_config: Greedy, one beam.
        draft_budget: Budget of the draft, below the model's own; None takes the pipeline step's.
        draft_tokens: Tokens a draft has; None takes the pipeline step's.
        acceptance: Counts are added to it.
        streamer: Gets tokens as they stand.
        model_kwargs: What `generate` prepared, the cache among it.

    Returns:
        Prompt and new tokens, equal to plain greedy decoding's.

    Raises:
        ValueError: sampling, beams, a batch, a cache that cannot be rolled back, or a draft budget not below the
            model's own.
        UnsupportedModel: the model has no gates.
    """
    step = getattr(model, "self_speculation", None)
    draft_budget = draft_budget if draft_budget is not None else getattr(step, "draft_budget", None)
    draft_tokens = draft_tokens if draft_tokens is not None else getattr(step, "draft_tokens", None)
    cache: Any = model_kwargs.get("past_key_values")
    _check(model, input_ids, generation_config, cache, draft_budget, draft_tokens)
    acceptance = acceptance if acceptance is not None else Acceptance()
    ids, mask = input_ids, model_kwargs.get("attention_mask")

    def forward(tokens: Int[Tensor, "1 k"]) -> Float[Tensor, "1 k v"]:
        """Feed tokens after what the cache holds; returns their logits."""
        seen = cache.get_seq_length() + tokens.shape[1]
        attended = None if mask is None else torch.cat((mask, mask.new_ones(1, seen - mask.shape[1])), dim=1)
        return model(tokens, attention_mask=attended, past_key_values=cache, use_cache=True).logits

    def choose(prefix: Int[Tensor, "1 t"], logits: Float[Tensor, "1 v"]) -> Int[Tensor, "1 1"]:
        """The greedy token after `prefix`."""
        return logits_processor(prefix, logits.float()).argmax(dim=-1, keepdim=True)

    # prompts may come with a part of them cached; all but the last token are needed before the first draft
    if cache.get_seq_length() < ids.shape[1] - 1:
        forward(ids[:, cache.get_seq_length() : -1])
    while True:
        room = generation_config.max_length - ids.shape[1]
        drafted = ids
        with budget(model, draft_budget):
            for _ in range(min(draft_tokens, room - 1)):
                drafted = torch.cat((drafted, choose(drafted, forward(drafted[:, -1:])[:, -1])), dim=1)
        k = drafted.shape[1] - ids.shape[1]
        cache.crop(-k)
        logits = forward(drafted[:, ids.shape[1] - 1 :])
        verified = torch.cat([choose(drafted[:, : ids.shape[1] + i], logits[:, i]) for i in range(k + 1)], dim=1)
        stands = accepted_tokens(drafted[0, ids.shape[1] :], verified[0])
        acceptance.drafted, acceptance.accepted = acceptance.drafted + k, acceptance.accepted + stands
        acceptance.verifies += 1
        cache.crop(-(k - stands))
        for token in verified[:, : stands + 1].split(1, dim=1):
            ids = torch.cat((ids, token), dim=1)
            if streamer is not None:
                streamer.put(token[0].cpu())
            if bool(stopping_criteria(ids, None).all()):
                if streamer is not None:
                    streamer.end()
                return ids


def _check(
    model: PreTrainedModel,
    input_ids: Tensor,
    generation_config: GenerationConfig,
    cache: Cache | None,
    draft_budget: float | None,
    draft_tokens: int | None,
) -> None:
    dial = dial_of(model)
    if generation_config.do_sample or (generation_config.num_beams or 1) > 1:
        raise ValueError("self-speculation decodes greedily: set do_sample=False and num_beams=1")
    if input_ids.shape[0] != 1:
        raise ValueError(f"self-speculation decodes one sequence at a time, got a batch of {input_ids.shape[0]}")
    if draft_budget is None or draft_tokens is None:
        raise ValueError("this model has no SelfSpeculation step: give draft_budget and draft_tokens")
    if draft_tokens < 1:
        raise ValueError(f"draft_tokens {draft_tokens} must be at least 1")
    if draft_budget >= dial.budget:
        raise ValueError(f"draft_budget {draft_budget} must be below the budget that verifies, {dial.budget}")
    if not isinstance(cache, DynamicCache) or any(getattr(layer, "is_sliding", False) for layer in cache.layers):
        raise ValueError(
            f"{type(cache).__name__} cannot be rolled back here; use a DynamicCache without sliding windows"
        )
