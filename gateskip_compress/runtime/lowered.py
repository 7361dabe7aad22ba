"""A lowered model and its cache, call by call: what a pass over some tokens gives."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from ..gating.dial import Dial
from .extension import extension

_LIKELY = 4096


@dataclass(frozen=True)
class Step:
    """What one call gave.

    Args:
        best: The most likely next token of each wanted token.
        logits: Theirs, where asked for.
        kept: Which branch ran which token, in the order of thresholds, where asked for.
        scores: Of the gates that were evaluated, likewise; others are NaN.
        shares: What the softmax of the logits gives the best, of drafting steps.
    """

    best: Int[np.ndarray, " w"]
    logits: Float[np.ndarray, "w v"] | None
    kept: Bool[np.ndarray, "n t"] | None
    scores: Float[np.ndarray, "n t"] | None
    shares: Float[np.ndarray, " w"] | None


@dataclass(frozen=True)
class Passes:
    """What passes over a text's last token and what was guessed behind it gave, one after the other.

    Args:
        tokens: That came: of each pass those guessed that stand, and one more.
        found: Of the text's last tokens before each pass, how many stood there before.
        guessed: In each pass.
        stood: Of these.
        seconds: Of each pass, with what led to it.
    """

    tokens: Int[np.ndarray, " t"]
    found: Int[np.ndarray, " p"]
    guessed: Int[np.ndarray, " p"]
    stood: Int[np.ndarray, " p"]
    seconds: Float[np.ndarray, " p"]


class Draws(ABC):
    """Chances by which tokens are drawn, and the limits that `draw` takes besides."""

    limits: dict[str, float]

    @abstractmethod
    def ahead(self, count: int) -> Float[np.ndarray, " c"]:
        """The next chances, from 0 to below 1; they stay the next ones."""
        ...

    @abstractmethod
    def spend(self, count: int) -> None:
        """Go on behind so many."""
        ...


@dataclass(frozen=True, kw_only=True)
class Lowered(ABC):
    """A lowered model and its cache. It runs at the budget that its dial is set to.

    Args:
        native: The model.
        context_tokens: Positions of the cache.
        rows: Sequences that decode together at most.
        kernels: Which run.
        vocabulary: Entries of it.
        bytes_per_token: Of weights that a token reads at full budget.
        drafts: Whether it has gates for drafting alone.
    """

    native: Any = field(repr=False)
    context_tokens: int
    rows: int
    kernels: str
    vocabulary: int
    bytes_per_token: int
    drafts: bool = False

    @abstractmethod
    def dial(self, *, drafts: bool) -> Dial | None:
        """Of the gates, or of those that draft; None where there are none."""
        ...

    def prefill(self, prompt: Int[np.ndarray, " t"], row: int = 0, first: int = 0, *, logits: bool = False) -> Step:
        """Run a prompt, in windows as few and as equal as can be; what its last token gives.

        Args:
            prompt: Token ids.
            row: Of the cache.
            first: Position of the first of them.
            logits: Wanted besides the best token.
        """
        windows = max(1, -(-len(prompt) // self.native.window))
        cuts = [len(prompt) * i // windows for i in range(windows)]
        for begin, end in pairwise(cuts):
            self.run_row(prompt[begin:end], row, first + begin, wanted=0, prompt=True)
        return self.run_row(prompt[cuts[-1] :], row, first + cuts[-1], wanted=1, logits=logits, prompt=True)

    def run_row(self, ids: Int[np.ndarray, " t"], row: int, first: int, *, wanted: int, **how: Any) -> Step:
        """Run neighbouring tokens of one sequence; what the last `wanted` of them give. `how` is as in `run`."""
        count, numbers = len(ids), self._numbers
        rows = self._rows[row, :count]
        return self.run(ids, rows, numbers[first : first + count], numbers[count - wanted : count], **how)

    @cached_property
    def _numbers(self) -> Int[np.ndarray, " n"]:
        """Positions, ready to be cut out of."""
        return np.arange(max(self.context_tokens, self.native.window), dtype=np.int32)

    @cached_property
    def _rows(self) -> Int[np.ndarray, "r w"]:
        """Each row's number, as often as a call may need it."""
        return np.repeat(np.arange(self.rows, dtype=np.int32)[:, None], self.native.window, axis=1)

    @cached_property
    def likely(self) -> int:
        """Entries of the vocabulary that drafts choose from: the first quarter, if that is not too few.

        Merges are numbered as they were learnt, the frequent ones first: nine of ten tokens of running text are there
        (SmolLM2), and reading all of the output head would take a draft as long as reading the blocks that it runs.
        """
        size = self.vocabulary
        return min(size, max(_LIKELY, -(-size // (4 * extension().CHUNK)) * extension().CHUNK))

    def draft(
        self,
        ids: Int[np.ndarray, " b"],
        rows: Int[np.ndarray, " b"],
        positions: Int[np.ndarray, " b"],
        share: float,
        *,
        logits: bool = False,
    ) -> Step:
        """A drafting step for some sequences at a budget of the gates that draft: one of `likely` tokens after each."""
        want = self._numbers[: len(ids)]
        return self.run(ids, rows, positions, want, logits=logits, draft=share, vocabulary=self.likely)

    def run(
        self,
        ids: Int[np.ndarray, " t"],
        rows: Int[np.ndarray, " t"],
        positions: Int[np.ndarray, " t"],
        want: Int[np.ndarray, " w"],
        *,
        logits: bool = False,
        decisions: bool = False,
        draft: float | None = None,
        prompt: bool = False,
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
            draft: A budget to run at instead, of the gates for drafting where the model has some.
            prompt: They are neighbours in one row and may go a faster way, whose bits are not those of single steps.
            vocabulary: Entries to choose from, the first ones, whole chunks of them; None is all.
        """
        entries = self.vocabulary if vocabulary is None else vocabulary
        drafts, thresholds = draft is not None, self._thresholds(draft)
        best, all_logits, kept, scores, shares = self.native.run(
            ids.astype(np.int32),
            rows,
            positions,
            thresholds,
            want,
            logits,
            decisions,
            drafts,
            drafts and self.drafts,
            prompt,
            entries,
        )
        return Step(
            best,
            all_logits,
            kept.astype(bool) if decisions else None,
            scores,
            shares,
        )

    def follow(
        self,
        ids: Int[np.ndarray, " b"],
        rows: Int[np.ndarray, " b"],
        positions: Int[np.ndarray, " b"],
        steps: int,
        ends: Int[np.ndarray, " e"],
    ) -> Int[np.ndarray, "s b"]:
        """Greedy steps in one call: the best token after each sequence's last one, then after that, and so on.

        Args:
            ids: Last tokens.
            rows: Of the cache, of each.
            positions: Of each in its row.
            steps: To make, at most.
            ends: Tokens after which no more steps are made, whichever row they stand in.
        """
        return self.native.follow(ids.astype(np.int32), rows, positions, self._thresholds(None), steps, ends)

    def speculate(
        self,
        text: Int[np.ndarray, " t"],
        row: int,
        guesses: Int[np.ndarray, " f"],
        plainly: bool,
        most: int,
        seconds: float,
        ends: Int[np.ndarray, " e"],
        draws: Draws | None = None,
    ) -> Passes:
        """Decode one text in one call, verifying what followed when the text's last tokens stood there before.

        Args:
            text: One token at least; the cache holds the others.
            row: Of the cache.
            guesses: How many tokens to guess where 0, 1, .. of the last tokens were found again.
            plainly: Go on where that is none; else it ends there.
            most: Tokens to come, at most.
            seconds: After which no pass begins.
            ends: Tokens after which none begins either.
            draws: How tokens are drawn; None takes the best.
        """
        thresholds, drawing = self._thresholds(None), {}
        if draws is not None:
            drawing = {"chances": draws.ahead(most), **draws.limits}
        tokens, passes, took = self.native.speculate(
            text.astype(np.int32), row, thresholds, guesses, plainly, most, seconds, ends, **drawing
        )
        if draws is not None:
            draws.spend(len(tokens))
        return Passes(tokens, *passes.T, took)

    def _thresholds(self, draft: float | None) -> Float[np.ndarray, " n"] | None:
        """Of the dial as it is set, or of the one for drafting at a budget."""
        dial = self.dial(drafts=draft is not None and self.drafts)
        if dial is None or dial.how == "off" or (draft is None and dial.thresholds is None):
            return None
        source = dial.thresholds if draft is None else dial.table
        seen, found = self._found.get(draft, (None, None))
        if seen is not source:  # the dial was turned, or calibrated anew
            found = np.array(dial.thresholds if draft is None else dial.thresholds_of(draft), dtype=np.float32)
            self._found[draft] = source, found
        return found

    @cached_property
    def _found(self) -> dict[float | None, tuple[object, Float[np.ndarray, " n"] | None]]:
        """Thresholds by draft budget, None being the dial as it is set, and what they were taken from."""
        return {}
