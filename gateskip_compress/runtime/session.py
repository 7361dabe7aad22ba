"""Decoding with a lowered model: `generate` takes what transformers' own takes, and gives what that would give.

The loop is transformers' `custom_generate`: prompts, processors, stopping criteria and streamers are theirs, the model
is ours. Prompts go in a window at a time, so that Ctrl-C stops them too.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ..gating.dial import Dial
from ..model import blocks
from ..speculation.acceptance import Acceptance
from ..speculation.decode import side_by_side
from ..speculation.scores import check_processors
from ..speculation.transform import control_of, settings_of
from .choosing import apart, choose, choosers, ends_of
from .lowered import Lowered, Step
from .plain import Plain
from .speculate import Speculator
from .texts import Text, grow, prompts


@dataclass(frozen=True, kw_only=True)
class Session(Lowered):
    """A lowered model that decodes, as its Hugging Face model would.

    Args:
        model: The Hugging Face model it was made from, for its configuration, dial and generation loop.
    """

    model: PreTrainedModel

    def dial(self, *, drafts: bool) -> Dial | None:
        """The model's."""
        return getattr(self._first, "draft_dial" if drafts else "dial", None)

    @cached_property
    def _first(self) -> Any:
        return blocks(self.model)[0]

    def generate(
        self, ids: Int[Tensor, "b t"], *, streamer: BaseStreamer | None = None, **settings: Any
    ) -> Int[Tensor, "b u"]:
        """Prompt and new tokens, as `model.generate(ids, **settings)` gives them.

        Args:
            ids: Prompts; shorter ones are padded on the left, with an `attention_mask` among the settings.
            streamer: Gets tokens as they stand.
            settings: Of `model.generate`: `max_new_tokens`, `do_sample`, `temperature` and so on; and of `decode`.

        Raises:
            ValueError: token ids out of range, more tokens than the cache holds, more rows than it has, or beams.
        """
        # transformers keeps the streamer from loops that are not its own
        loop = partial(self.decode, streamer=streamer)
        return self.model.generate(ids, custom_generate=loop, streamer=streamer, **settings)  # pyright: ignore[reportReturnType]

    @torch.inference_mode()
    def decode(
        self,
        model: PreTrainedModel,
        input_ids: Int[Tensor, "b t"],
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        *,
        streamer: BaseStreamer | None = None,
        speculate: bool = False,
        draft_budget: float | None = None,
        draft_tokens: int | None = None,
        drafts: str | None = None,
        adapt: bool | None = None,
        acceptance: Acceptance | None = None,
        **model_kwargs: Any,
    ) -> Int[Tensor, "b u"]:
        """The loop; pass it as `model.generate(ids, custom_generate=session.decode)`.

        Args:
            model: The session's own.
            input_ids: Prompts.
            logits_processor: From transformers.
            stopping_criteria: From transformers; asked after every token, greedily of each sequence by itself.
            generation_config: Greedy, or with sampling.
            streamer: Gets tokens as they stand.
            speculate: Guess tokens and verify them, see `speculate.py`; the text stays the same.
            draft_budget: As in `self_speculative`, like the next three.
            draft_tokens: As there.
            drafts: As there.
            adapt: As there.
            acceptance: Counts are added to it.
            model_kwargs: What `generate` prepared.
        """
        del model
        self.check(input_ids, generation_config)
        sampled = bool(generation_config.do_sample)
        padding = _padding(input_ids, model_kwargs.get("attention_mask"))
        with _torch_in_one_thread():
            ends = ends_of(stopping_criteria)
            plain = Plain(self, ends)
            decode: Callable[[list[Text]], list[int]] = plain.round
            if speculate:
                given = {"draft_budget": draft_budget, "draft_tokens": draft_tokens, "drafts": drafts, "adapt": adapt}
                settings = settings_of(self.model, given)
                check_processors(logits_processor, input_ids, self.vocabulary)
                if streamer is not None and len(input_ids) > 1:
                    raise ValueError(f"a streamer follows one sequence, got {len(input_ids)}")
                counts = acceptance if acceptance is not None else Acceptance()
                control = control_of(self.model, settings, len(input_ids), sampled=sampled, runtime="native")
                decode = Speculator(plain, control, counts).round
            elif (len(input_ids) > 1 and (sampled or streamer is not None)) or apart(logits_processor)[0]:
                return self._together(
                    input_ids, padding, logits_processor, stopping_criteria, generation_config, streamer
                )
            own = choosers(self, logits_processor, len(input_ids), sampled=sampled)
            texts = prompts(list(input_ids.numpy()), padding, generation_config.max_length, own)
            grown = grow(self, texts, decode, ends, _heard(streamer))
            if streamer is not None:
                streamer.end()
            return side_by_side([torch.from_numpy(text) for text in grown], generation_config)

    def _together(
        self,
        ids: Int[Tensor, "b t"],
        padding: list[int],
        processors: LogitsProcessorList,
        stopping: StoppingCriteriaList,
        config: GenerationConfig,
        streamer: BaseStreamer | None,
    ) -> Int[Tensor, "b u"]:
        """A token of every sequence at a time, as in transformers' own loop: processors may remember what they saw."""
        sampled = bool(config.do_sample)
        starts = [row[hidden:].numpy() for row, hidden in zip(ids, padding, strict=True)]
        logits = torch.cat([_asked(self.prefill(start, row, logits=True)) for row, start in enumerate(starts)])
        positions = np.array([len(start) for start in starts], dtype=np.int32)
        rows, alive = np.arange(len(starts), dtype=np.int32), torch.ones(len(starts), dtype=torch.bool)
        while True:
            chosen = choose(self, ids, logits, processors, sampled=sampled)
            if not alive.all():
                chosen = torch.where(alive, chosen, config._pad_token_tensor)
            ids = torch.cat((ids, chosen[:, None]), dim=1)
            if streamer is not None:
                streamer.put(chosen)
            alive = alive & ~stopping(ids, None)  # pyright: ignore[reportArgumentType] as transformers does
            if not alive.any():
                if streamer is not None:
                    streamer.end()
                return ids
            logits, positions = _asked(self.run(chosen.numpy(), rows, positions, rows, logits=True)), positions + 1

    def check(self, ids: Int[Tensor, "b t"], config: GenerationConfig) -> None:
        """Refuse what would fail later, when work would be lost."""
        if (config.num_beams or 1) > 1:
            raise ValueError(f"num_beams {config.num_beams}: the native runtime decodes greedily or by sampling")
        if len(ids) > self.rows:
            raise ValueError(f"{len(ids)} sequences, and the cache has {self.rows} rows: lower(model, rows={len(ids)})")
        if config.max_length > self.context_tokens:
            raise ValueError(
                f"{ids.shape[1]} prompt and {config.max_length - ids.shape[1]} new tokens do not fit into a cache of "
                f"{self.context_tokens}: lower(model, context_tokens={config.max_length})"
            )
        size = self.vocabulary
        outside = ids[(ids < 0) | (ids >= size)]
        if len(outside):
            raise ValueError(f"token id {int(outside[0])} is out of range: the vocabulary has {size} entries")


@contextmanager
def _torch_in_one_thread() -> Iterator[None]:
    """Keep torch's other threads asleep: after each operation they would spin, on cores that the native ones need."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _asked(step: Step) -> Float[Tensor, "w v"]:
    """Logits that were asked for."""
    assert step.logits is not None
    return torch.from_numpy(step.logits)


def _heard(streamer: BaseStreamer | None) -> Callable[[int], object]:
    """Who gets tokens as they stand: a streamer, or nobody."""
    return (lambda _: None) if streamer is None else lambda token: streamer.put(torch.tensor([token]))


def _padding(ids: Int[Tensor, "b t"], mask: Tensor | None) -> list[int]:
    """Tokens before each row's first real one.

    Raises:
        ValueError: a mask hides others.
    """
    if mask is None:
        return [0] * len(ids)
    hidden = (mask == 0).sum(dim=1)
    if not (mask.bool() == (torch.arange(ids.shape[1]) >= hidden[:, None])).all():
        raise ValueError("the attention mask hides tokens between others: pad prompts on the left")
    return hidden.tolist()
