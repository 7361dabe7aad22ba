"""A lowered model and its cache, call by call: what a pass over some tokens gives."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from ..gating.dial import Dial
from ..model import blocks
from .extension import extension
from .pack import vocabulary_size

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
class Lowered:
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
