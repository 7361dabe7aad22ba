"""Self-speculative decoding: draft a few tokens cheaply, verify them all in one pass, keep what stands.

Draft and verifier are one model with one cache. The draft's keys and values are dropped before the verify pass writes
its own, so the cache always holds what full passes wrote.

What the text is equal to:

    greedy, float32, one sequence   plain greedy decoding, token for token. Kernels for k tokens and for one round
                                    differently, which shows where two tokens, or a gate's score and its threshold, are
                                    nearly tied. Where they are nearer than `TIE` and `GATE_TIE`, the text is read again
                                    as plain decoding reads it, token by token from the last clean column on
                                    (`rows.py`), and that decides.
    greedy, float32, batches        each row's plain decoding, but for such ties: the rows of plain decoding do not
                                    round alike in other batches either.
    greedy, 16 bits                 the choices of the verify pass at every place. Roundings exceed the distance
                                    between the first two tokens there too often to look again each time.
    sampling                        the distribution of the verify pass, see `accept.py`.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer
from transformers.generation.streamers import BaseStreamer

from ..gating.turning import branch_index, budget, decisions, dial_of, drafting, is_gated
from .accept import stand_by_chance, stand_greedily
from .acceptance import Acceptance
from .control import Clock, Control, Drafter, take_in
from .draft import Draft, draft_by_gates, draft_passages
from .lookup import look_up
from .rows import Rows
from .scores import check_processors, of_rows, processed
from .transform import control_of, settings_of

TIE, GATE_TIE = 32, 8
"""How near the first two scores count as tied, in float32's epsilons of the largest logit; and how near a gate's score
to its threshold, in epsilons of the threshold. On SmolLM2-135M, passes over five tokens instead of one moved the first
distance by at most 6 of these (768 tokens), and a gate's score by at most 4 (395 tokens of 60 branches)."""
_EPSILON = torch.finfo(torch.float32).eps


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
    drafts: str | None = None,
    adapt: bool | None = None,
    acceptance: Acceptance | None = None,
    streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> Int[Tensor, "b u"]:
    """Decode; pass it as `model.generate(ids, custom_generate=self_speculative, draft_budget=0.6)`.

    Fields of `SelfSpeculation` that are not given are those of the model's own step; without a step, gates draft and
    passages are looked up, or these alone where there are no gates.

    Args:
        model: Verifies at the budget it is set to. What is learnt of its costs and chances stays with it.
        input_ids: The prompts, whole, also where the cache holds a part of them.
        logits_processor: Applied alike in draft and verify.
        stopping_criteria: Checked after every token that stands.
        generation_config: Greedy or sampling, one beam.
        draft_budget: As in `SelfSpeculation`.
        draft_tokens: As there.
        drafts: As there.
        adapt: As there.
        acceptance: Counts are added to it.
        streamer: Gets tokens as they stand; one sequence. `generate` (transformers 5.23) shows it the prompt, and
            forgets to hand it and `tokenizer` on to a function. So give both `streamer=streamer` and
            `custom_generate=partial(self_speculative, streamer=streamer)`; and stop strings as
            `stopping_criteria=[StopStringCriteria(tokenizer, strings)]`.
        model_kwargs: What `generate` prepared, the cache among it. A cache given for several rows is used up.

    Returns:
        Prompts and new tokens, ended rows padded on the right.

    Raises:
        ValueError: beams, a cache that cannot be rolled back, processors that remember earlier calls, a draft budget
            not below the model's own, or a setting that is left out here.
        UnsupportedModel: gates are to draft, and the model has none.
    """
    given = {"draft_budget": draft_budget, "draft_tokens": draft_tokens, "drafts": drafts, "adapt": adapt}
    sampled = bool(generation_config.do_sample)
    control = control_of(model, settings_of(model, given), len(input_ids), sampled=sampled)
    _check(input_ids, generation_config, streamer, model_kwargs)
    check_processors(logits_processor, input_ids, model.config.get_text_config().vocab_size)
    cache: DynamicCache = model_kwargs["past_key_values"]
    rows = Rows(model, cache, model_kwargs.get("attention_mask"))
    sample = bool(generation_config.do_sample)
    counts = acceptance if acceptance is not None else Acceptance()
    decoder = _Decoder(rows, of_rows(logits_processor, len(input_ids)), sample, control, counts)
    texts, active = list(input_ids), list(range(len(input_ids)))
    new = decoder.begin(input_ids, model_kwargs["position_ids"])
    while True:
        ends = []
        for row, tokens in zip(active, new, strict=True):
            texts[row], ended = _extend(texts[row], tokens, stopping_criteria, streamer)
            ends.append(ended)
        if all(ends):
            break
        if any(ends):
            going = [not ended for ended in ends]
            decoder.select(going)
            active = [row for row, goes in zip(active, going, strict=True) if goes]
        new = decoder.round([texts[row] for row in active], generation_config.max_length)
    if len(texts) == 1:  # what came after the end goes out of a cache that may be used again
        rows.take_back(input_ids.new_tensor([cache.get_seq_length() - len(texts[0]) + 1]))
    if streamer is not None:
        streamer.end()
    return side_by_side(texts, generation_config)


@dataclass
class _Decoder:
    """What the rounds of one generation share."""

    rows: Rows
    processors: list[LogitsProcessorList]
    sample: bool
    control: Control
    acceptance: Acceptance

    def begin(self, prompts: Int[Tensor, "b t"], places: Int[Tensor, "b t"]) -> list[Tensor]:
        """Read the prompts; each one's first token."""
        logits = self.rows.begin(prompts, places)
        scores = processed(self.processors, list(prompts), prompts[:, :0], logits)[:, 0]
        return list(torch.multinomial(scores.softmax(-1), 1) if self.sample else scores.argmax(-1, keepdim=True))

    def select(self, going: list[bool]) -> None:
        """Go on with a part of the rows."""
        self.rows.select(torch.tensor(going, device=self.rows.place.device))
        self.processors = [own for own, goes in zip(self.processors, going, strict=True) if goes]

    def round(self, texts: list[Tensor], max_length: int) -> list[Tensor]:
        """Draft, verify, and leave in the cache what stands.

        Args:
            texts: The cache holds all of them but their last tokens.
            max_length: Of a text.

        Returns:
            Each text's new tokens.
        """
        clock = Clock()
        drafter, draft = self._draft(texts, min(self.control.most_tokens, max_length - max(map(len, texts)) - 1))
        k, draft_s = draft.tokens.shape[1], clock.lap()
        fed = torch.cat((_last(texts), draft.tokens), dim=1)
        logits, tied = self._verify(fed)
        scores = processed(self.processors, texts, draft.tokens, logits)
        if self.sample:
            target = scores.softmax(-1)
            certain = torch.nn.functional.one_hot(draft.tokens, target.shape[-1]).to(target.dtype)
            shares = certain if draft.shares is None else draft.shares
            stands, after = stand_by_chance(draft.tokens, shares, target, draft.lengths)
            self.rows.take_back(k - stands)
        else:
            stands, after = self._greedily(texts, draft, scores, tied)
        counts = stands.tolist()
        take_in(self.control, self.acceptance, drafter, draft.evidence, counts, draft_s, clock.lap())
        return [torch.cat((draft.tokens[row, :n], after[row, None])) for row, n in enumerate(counts)]

    def _draft(self, texts: list[Tensor], most: int) -> tuple[Drafter | None, Draft]:
        """A draft by whom the control chooses; None and an empty one where that is nobody."""
        last = _last(texts)
        nothing = Draft(last[:, :0], last.new_zeros(len(texts)), None, [[] for _ in texts])
        if most < 1:
            return None, nothing
        passages = [look_up(text.cpu().numpy(), most) for text in texts] if self.control.looks else []
        drafter = self.control.choose(max((passage.found for passage in passages), default=0))
        if drafter is None:
            return None, nothing
        if drafter.budget is None:
            draft = draft_passages(passages, self.control, most, last.device)
            return (drafter, draft) if draft.tokens.shape[1] else (None, nothing)
        with drafting(self.rows.model), budget(self.rows.model, drafter.budget):
            draft = draft_by_gates(
                self.rows,
                last,
                most,
                drafter,
                self.control,
                lambda tokens, logits: processed(self.processors, texts, tokens, logits),
                sample=self.sample,
            )
        return drafter, draft

    def _verify(self, tokens: Int[Tensor, "b m"]) -> tuple[Float[Tensor, "b m v"], Float[Tensor, " m"] | None]:
        """Logits; and how near scores must be to count as tied at each place, None where nothing has to."""
        if self.sample or len(tokens) > 1 or (tokens.shape[1] == 1 and self.rows.is_clean):
            return self.rows.feed(tokens), None
        model = self.rows.model
        thresholds = dial_of(model).thresholds if is_gated(model) else None
        with nullcontext([]) if thresholds is None else decisions(model) as seen:
            logits = self.rows.feed(tokens)
        if logits.dtype != torch.float32:  # see above
            return logits, None
        near = TIE * _EPSILON * logits[0].abs().amax(-1)
        for decision in seen:
            threshold = (thresholds or ())[branch_index(decision.layer, decision.kind)]
            near.masked_fill_((decision.score[0] - threshold).abs() < GATE_TIE * _EPSILON * abs(threshold), torch.inf)
        return logits, near

    def _greedily(
        self, texts: list[Tensor], draft: Draft, scores: Float[Tensor, "b m v"], near: Float[Tensor, " m"] | None
    ) -> tuple[Int[Tensor, " b"], Int[Tensor, " b"]]:
        """How many drafted tokens stand, and the one after; the cache then holds what stands."""
        chosen, k = scores.argmax(-1), draft.tokens.shape[1]
        stands = stand_greedily(draft.tokens, chosen, draft.lengths)
        tied = None if near is None else _first_tie(scores[0], near, int(stands[0]) + 1)
        if tied is None:
            self.rows.take_back(k - stands)
            return stands, chosen.gather(1, stands[:, None])[:, 0]
        text = torch.cat((texts[0], draft.tokens[0, :tied]))
        scores = processed(self.processors, [text], draft.tokens[:, :0], self._read_again(text))
        return stands.new_tensor([tied]), scores[:, 0].argmax(-1)

    def _read_again(self, text: Int[Tensor, " t"]) -> Float[Tensor, "1 1 v"]:
        """Logits after the text as plain decoding computes them: token by token after the last clean column."""
        clean = self.rows.clean
        self.rows.take_back(text.new_tensor([self.rows.cache.get_seq_length() - clean]))
        self.acceptance.repeated += len(text) - clean
        return [self.rows.feed(token[None]) for token in text[clean:].split(1)][-1]


def _first_tie(scores: Float[Tensor, "m v"], near: Float[Tensor, " m"], places: int) -> int | None:
    """The first place where other roundings could choose another token."""
    best = scores[:places].topk(2, dim=-1).values
    tied = (best[:, 0] - best[:, 1] <= near[:places]).nonzero()
    return int(tied[0]) if len(tied) else None


def _last(texts: Sequence[Tensor]) -> Int[Tensor, "b 1"]:
    return torch.stack([text[-1:] for text in texts])


def _extend(
    text: Int[Tensor, " t"],
    tokens: Int[Tensor, " n"],
    stopping_criteria: StoppingCriteriaList,
    streamer: BaseStreamer | None,
) -> tuple[Int[Tensor, " u"], bool]:
    """A text with new tokens, up to the one that ends it; and whether one did."""
    for token in tokens.split(1):
        text = torch.cat((text, token))
        if streamer is not None:
            streamer.put(token.cpu())
        if bool(stopping_criteria(text[None], None)[0]):  # pyright: ignore[reportArgumentType] as transformers does
            return text, True
    return text, False


def side_by_side(texts: list[Tensor], generation_config: GenerationConfig) -> Int[Tensor, "b u"]:
    """Texts as rows of one tensor."""
    padding: Any = generation_config._pad_token_tensor
    value = 0 if padding is None else int(padding)
    return torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=value)


def _check(
    input_ids: Int[Tensor, "b t"],
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None,
    model_kwargs: dict[str, Any],
) -> None:
    """Refuse what is left out; never decode otherwise than asked."""
    if (generation_config.num_beams or 1) > 1:
        raise ValueError(f"self-speculation has no beams: set num_beams {generation_config.num_beams} to 1")
    for name in ("return_dict_in_generate", "prefill_chunk_size", "token_healing"):
        if getattr(generation_config, name, None):
            raise ValueError(f"self-speculation leaves out {name}: unset it, or decode plainly")
    if streamer is not None and len(input_ids) > 1:
        raise ValueError(f"a streamer follows one sequence, got {len(input_ids)}")
    unknown = sorted(name for name in model_kwargs if name not in _KNOWN and model_kwargs[name] is not None)
    if unknown:
        raise ValueError(f"self-speculation does not pass on {', '.join(unknown)}: leave it out, or decode plainly")
    cache: Any = model_kwargs.get("past_key_values")
    if not isinstance(cache, DynamicCache) or any(type(layer) is not DynamicLayer for layer in cache.layers):
        kinds = sorted({type(layer).__name__ for layer in getattr(cache, "layers", ())})
        raise ValueError(
            f"{type(cache).__name__} ({', '.join(kinds) or 'no layers'}) cannot be rolled back here; "
            "use a DynamicCache without sliding windows"
        )
    if cache.get_seq_length() >= input_ids.shape[1]:
        raise ValueError(
            f"the cache holds {cache.get_seq_length()} tokens and input_ids {input_ids.shape[1]}: "
            "give the whole text, what is cached included, and one token more at least"
        )


_KNOWN = ("attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep")
