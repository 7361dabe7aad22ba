"""Decoding with a lowered model: `generate` takes what transformers' own takes, and gives what that would give.

The loop is transformers' `custom_generate`: prompts, processors, stopping criteria and streamers are theirs, the model
is ours. One call decodes a token for every sequence; prompts go in a window at a time, so that Ctrl-C stops them too.
"""

import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

from ..speculation.acceptance import Acceptance
from ..speculation.control import Clock, control_of
from ..speculation.decode import side_by_side
from ..speculation.scores import check_processors, of_rows
from ..speculation.transform import SelfSpeculation, settings_of
from .extension import extension
from .lowered import Lowered
from .speculate import BURST_S, Speculator, Text, choose


class Session(Lowered):
    """A lowered model that decodes, as its Hugging Face model would."""

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
            stopping_criteria: From transformers; asked after every token.
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
            if speculate:
                given = {"draft_budget": draft_budget, "draft_tokens": draft_tokens, "drafts": drafts, "adapt": adapt}
                settings = settings_of(self.model, given)
                self._check_speculation(input_ids, logits_processor, streamer, settings)
                counts = acceptance if acceptance is not None else Acceptance()
                control = control_of(self.model, settings, len(input_ids), runtime="native")
                speculator = Speculator(self, control, counts, end_tokens(generation_config), sampled=sampled)
                texts = self._texts(input_ids, padding, logits_processor, generation_config.max_length)
                grown = _follow(speculator, texts, stopping_criteria, streamer)
                return side_by_side(grown, generation_config)
            prompts = [row[hidden:].numpy() for row, hidden in zip(input_ids, padding, strict=True)]
            processed = sampled or len(logits_processor) > 0
            steps = [self.prefill(prompt, row, logits=processed) for row, prompt in enumerate(prompts)]
            positions = np.array([len(prompt) for prompt in prompts], dtype=np.int32)
            rows = np.arange(len(prompts), dtype=np.int32)
            ids, alive = input_ids, torch.ones(len(rows), dtype=torch.bool)
            logits = torch.cat([step.logits for step in steps]) if processed else None
            best = np.concatenate([step.best for step in steps])
            burst = Burst(self, rows, generation_config.max_length - input_ids.shape[1] - 1, generation_config)
            while True:
                greedy = torch.from_numpy(best).long()
                chosen = greedy if logits is None else choose(self, ids, logits, logits_processor, sampled)
                if not alive.all():
                    chosen = torch.where(alive, chosen, generation_config._pad_token_tensor)
                ids = torch.cat((ids, chosen[:, None]), dim=1)
                if streamer is not None:
                    streamer.put(chosen)
                alive = alive & ~stopping_criteria(ids, None)
                if not alive.any():
                    if streamer is not None:
                        streamer.end()
                    return ids
                if processed:
                    step = self.run(chosen.numpy(), rows, positions, rows, logits=True)
                    best, logits = step.best, step.logits
                else:
                    best = burst.after(chosen.numpy(), positions)
                positions = positions + 1

    def _texts(
        self, ids: Int[Tensor, "b t"], padding: list[int], processors: LogitsProcessorList, most: int
    ) -> list[Text]:
        """Prompts to speculate on; the cache then holds them but for their last tokens."""
        texts, own = [], of_rows(processors, len(ids))
        for row, (prompt, hidden) in enumerate(zip(ids.numpy(), padding, strict=True)):
            room = np.empty(most, dtype=np.int64)
            room[: len(prompt)] = prompt
            texts.append(Text(row, room, len(prompt), hidden, own[row]))
            if len(prompt) - hidden > 1:
                self.prefill(prompt[hidden:-1], row)
        return texts

    def _check_speculation(
        self,
        ids: Int[Tensor, "b t"],
        processors: LogitsProcessorList,
        streamer: BaseStreamer | None,
        settings: SelfSpeculation,
    ) -> None:
        check_processors(processors, ids, self.vocabulary)
        if streamer is not None and len(ids) > 1:
            raise ValueError(f"a streamer follows one sequence, got {len(ids)}")
        most = extension().WINDOW - 1
        if settings.draft_tokens > most:
            raise ValueError(f"draft_tokens {settings.draft_tokens} must be from 1 to {most}")

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


class Burst:
    """Greedy steps, some to a call.

    After each call, all that Python needs comes back into the processor's caches, out of which the weights drove it:
    a tenth of a small model's step. What was decoded behind a text's end is dropped.

    Args:
        session: Decodes.
        rows: Of its cache, one for each sequence.
        left: Steps that are left at most.
        config: Knows which tokens end a text.
    """

    def __init__(self, session: Lowered, rows: Int[np.ndarray, " b"], left: int, config: GenerationConfig) -> None:
        self.session, self.rows, self.left = session, rows, left
        self.ends = end_tokens(config)
        self.ahead: deque[Int[np.ndarray, " b"]] = deque()
        self.steps = 1

    def after(self, ids: Int[np.ndarray, " b"], positions: Int[np.ndarray, " b"]) -> Int[np.ndarray, " b"]:
        """The best tokens after the last ones, which are those that it gave, where a text goes on."""
        if not self.ahead:
            clock, steps = Clock(), min(self.steps, self.left)
            self.ahead.extend(self.session.follow(ids, self.rows, positions, steps, self.ends))
            self.steps = max(1, int(BURST_S * len(self.ahead) / clock.lap()))
            self.left -= len(self.ahead)
        return self.ahead.popleft()


def end_tokens(config: GenerationConfig) -> Int[np.ndarray, " e"]:
    """Tokens that end a text, as `generate` prepared them."""
    ends: Tensor | None = getattr(config, "_eos_token_tensor", None)
    return np.zeros(0, dtype=np.int32) if ends is None else ends.numpy().astype(np.int32)


@contextmanager
def _torch_in_one_thread() -> Iterator[None]:
    """Keep torch's other threads asleep: after each operation they would spin, on cores that the native ones need."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _follow(
    speculator: Speculator, texts: list[Text], stopping: StoppingCriteriaList, streamer: BaseStreamer | None
) -> list[Int[Tensor, " _"]]:
    """Texts as they end, round by round; those that have ended wait for nobody."""
    going, ends = texts, Ends(stopping)
    while going:
        new = speculator.round(going)
        going = [t for t, tokens in zip(going, new, strict=True) if not _ends(t, len(tokens), ends, streamer)]
    if streamer is not None:
        streamer.end()
    return [text.upto(0)[0] for text in texts]


class Ends:
    """Stopping criteria, of which the two that nearly always are there are asked without tensors."""

    def __init__(self, criteria: StoppingCriteriaList) -> None:
        lengths = [c.max_length for c in criteria if type(c) is MaxLengthCriteria]
        self.length = min(lengths, default=sys.maxsize)
        self.tokens = {id for c in criteria if type(c) is EosTokenCriteria for id in c.eos_token_id.tolist()}
        known = (MaxLengthCriteria, EosTokenCriteria)
        self.others = StoppingCriteriaList([c for c in criteria if type(c) not in known])

    def after(self, text: Text) -> bool:
        """Whether its last token ends it."""
        if text.length >= self.length or int(text.ids[text.length - 1]) in self.tokens:
            return True
        return len(self.others) > 0 and bool(self.others(text.upto(0), None)[0])  # pyright: ignore[reportArgumentType] as transformers does


def _ends(text: Text, new: int, ends: Ends, streamer: BaseStreamer | None) -> bool:
    """Whether one of a text's last tokens ends it; what comes after that one goes."""
    for length in range(text.length - new + 1, text.length + 1):
        text.length = length
        if streamer is not None:
            streamer.put(text.upto(0)[0, -1:])
        if ends.after(text):
            return True
    return False


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
