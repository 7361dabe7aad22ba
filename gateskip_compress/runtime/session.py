"""Decoding with a lowered model: `generate` takes what transformers' own takes, and gives what that would give.

The loop is transformers' `custom_generate`: prompts, processors, stopping criteria and streamers are theirs, the model
is ours. One call decodes a token for every sequence; prompts go in a window at a time, so that Ctrl-C stops them too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ..gating.dial import Dial
from ..model import blocks
from ..speculation.acceptance import Acceptance
from ..speculation.control import control_of
from ..speculation.decode import extend, side_by_side
from ..speculation.scores import check_processors, of_rows
from ..speculation.transform import SelfSpeculation
from .extension import extension
from .pack import vocabulary_size
from .speculate import Speculator, Text, choose

_LIKELY = 4096


@dataclass(frozen=True)
class Step:
    """What one call gave.

    Args:
        best: The most likely next token of each wanted token.
        logits: Theirs, where asked for.
        kept: Which branch ran which token, in the order of thresholds, where asked for.
        scores: Of the gates that were evaluated, likewise; others are NaN.
    """

    best: Int[np.ndarray, " w"]
    logits: Float[Tensor, "w v"] | None
    kept: Bool[Tensor, "n t"] | None
    scores: Float[Tensor, "n t"] | None


@dataclass(frozen=True)
class Session:
    """A lowered model and its cache. It runs at the budget that the model's dial is set to.

    Args:
        model: The Hugging Face model it was made from, for its configuration, dial and generation loop.
        native: The lowered one.
        context_tokens: Positions of the cache.
        rows: Sequences that decode together at most.
        kernels: Which run.
        bytes_per_token: Of weights that a token reads at full budget.
        drafts: Whether it has gates for drafting alone.
    """

    model: PreTrainedModel
    native: Any = field(repr=False)
    context_tokens: int
    rows: int
    kernels: str
    bytes_per_token: int
    drafts: bool = False

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
            draft_budget: As in `SelfSpeculation`, like the next three; None takes the pipeline step's, and a model
                without a step looks up alone.
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
                settings = self._speculation({name: value for name, value in given.items() if value is not None})
                self._check_speculation(input_ids, logits_processor, streamer, settings)
                counts = acceptance if acceptance is not None else Acceptance()
                control = control_of(self.model, settings, len(input_ids), runtime="native")
                speculator = Speculator(self, control, counts, sampled=sampled)
                texts = self._texts(input_ids, padding, logits_processor)
                grown = _follow(speculator, texts, input_ids, stopping_criteria, streamer)
                return side_by_side(grown, generation_config)
            prompts = [row[hidden:].numpy() for row, hidden in zip(input_ids, padding, strict=True)]
            processed = sampled or len(logits_processor) > 0
            steps = [self.prefill(prompt, row, logits=processed) for row, prompt in enumerate(prompts)]
            positions = np.array([len(prompt) for prompt in prompts], dtype=np.int32)
            rows = np.arange(len(prompts), dtype=np.int32)
            ids, alive = input_ids, torch.ones(len(rows), dtype=torch.bool)
            logits = torch.cat([step.logits for step in steps]) if processed else None
            best = np.concatenate([step.best for step in steps])
            while True:
                greedy = torch.from_numpy(best).long()
                chosen = greedy if logits is None else choose(ids, logits, logits_processor, sampled)
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
                step = self.run(chosen.numpy(), rows, positions, rows, logits=processed)
                positions, best, logits = positions + 1, step.best, step.logits

    def _speculation(self, given: dict[str, Any]) -> SelfSpeculation:
        """The model's step with what is given instead; without a step, and gates to draft with, it looks up."""
        step = getattr(self.model, "self_speculation", None)
        if step is None:
            step = SelfSpeculation(drafts="both" if "draft_budget" in given else "look-up")
        return replace(step, **given)

    def _texts(self, ids: Int[Tensor, "b t"], padding: list[int], processors: LogitsProcessorList) -> list[Text]:
        """Prompts to speculate on; the cache then holds them but for their last tokens."""
        texts, own = [], of_rows(processors, len(ids))
        for row, (prompt, hidden) in enumerate(zip(ids.numpy(), padding, strict=True)):
            room = np.empty(self.context_tokens + hidden + 1, dtype=np.int64)
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

    def prefill(self, prompt: Int[np.ndarray, " t"], row: int = 0, first: int = 0, *, logits: bool = False) -> Step:
        """Run a prompt, a window at a time; what its last token gives.

        Args:
            prompt: Token ids.
            row: Of the cache.
            first: Position of the first of them.
            logits: Wanted besides the best token.
        """
        window = extension().WINDOW
        last = (len(prompt) - 1) // window * window
        for begin in range(0, last, window):
            self.run_row(prompt[begin : begin + window], row, first + begin, wanted=0)
        return self.run_row(prompt[last:], row, first + last, wanted=1, logits=logits)

    def run_row(self, ids: Int[np.ndarray, " t"], row: int, first: int, *, wanted: int, **how: Any) -> Step:
        """Run neighbouring tokens of one sequence; what the last `wanted` of them give. `how` is as in `run`."""
        places = np.arange(len(ids), dtype=np.int32)
        return self.run(ids, np.full_like(places, row), places + first, places[len(ids) - wanted :], **how)

    @cached_property
    def vocabulary(self) -> int:
        """Entries of it."""
        return vocabulary_size(self.model)

    @cached_property
    def likely(self) -> int:
        """Entries of the vocabulary that drafts choose from: the first quarter, if that is not too few.

        Merges are numbered as they were learnt, the frequent ones first: nine of ten tokens of running text are there
        (SmolLM2), and reading all of the output head would take a draft as long as reading the blocks that it runs.
        """
        size = self.vocabulary
        return min(size, max(_LIKELY, -(-size // (4 * extension().CHUNK)) * extension().CHUNK))

    def draft(
        self, ids: Int[np.ndarray, " b"], rows: Int[np.ndarray, " b"], positions: Int[np.ndarray, " b"]
    ) -> Float[Tensor, "b v"]:
        """A drafting step for some sequences, by the gates that draft: logits of `likely` entries after each token."""
        want = np.arange(len(ids), dtype=np.int32)
        step = self.run(ids, rows, positions, want, logits=True, draft=self.drafts, vocabulary=self.likely)
        assert step.logits is not None  # they were asked for
        return step.logits

    def run(
        self,
        ids: Int[np.ndarray, " t"],
        rows: Int[np.ndarray, " t"],
        positions: Int[np.ndarray, " t"],
        want: Int[np.ndarray, " w"],
        *,
        logits: bool = False,
        decisions: bool = False,
        draft: bool = False,
        vocabulary: int | None = None,
    ) -> Step:
        """One call of the native model at the dial's thresholds; the cache's positions up to each token must be filled.

        Args:
            ids: At most a window of them.
            rows: Of the cache, of each.
            positions: Of each in its row.
            want: Places in `ids` of tokens whose continuation is wanted.
            logits: Wanted besides the best tokens.
            decisions: Wanted besides.
            draft: By the gates for drafting, where the model has some of their own and is set to them.
            vocabulary: Entries to choose from, the first ones, whole chunks of them; None is all.
        """
        entries = self.vocabulary if vocabulary is None else vocabulary
        best, all_logits, kept, scores = self.native.run(
            ids.astype(np.int32), rows, positions, self._thresholds(), want, logits, decisions, draft, entries
        )
        return Step(
            best,
            torch.from_numpy(all_logits) if logits else None,
            torch.from_numpy(kept).bool() if decisions else None,
            torch.from_numpy(scores) if decisions else None,
        )

    @cached_property
    def _first(self) -> Any:
        return blocks(self.model)[0]

    def _thresholds(self) -> Float[np.ndarray, " n"] | None:
        dial: Dial | None = getattr(self._first, "dial", None)  # changes while the model drafts
        if dial is None or dial.thresholds is None or dial.how == "off":
            return None
        return np.array(dial.thresholds, dtype=np.float32)


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
    speculator: Speculator,
    going: list[Text],
    ids: Int[Tensor, "b t"],
    stopping: StoppingCriteriaList,
    streamer: BaseStreamer | None,
) -> list[Int[Tensor, " _"]]:
    """Texts as they end, round by round; those that have ended wait for nobody."""
    grown = list(ids)
    while going:
        ended = []
        for text, new in zip(going, speculator.round(going), strict=True):
            grown[text.row], ends = extend(grown[text.row], torch.tensor(new), stopping, streamer)
            ended.append(ends)
        going = [text for text, ends in zip(going, ended, strict=True) if not ends]
    if streamer is not None:
        streamer.end()
    return grown


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
