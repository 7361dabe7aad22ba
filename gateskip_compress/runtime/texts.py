"""Texts that grow side by side in one session: how they begin, how tokens are chosen, and when they end."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from .lowered import Draws, Lowered, Step

Tell = Callable[[int], object]
"""Gets tokens as they stand."""


class Chooser(ABC):
    """Chooses among logits otherwise than by the largest."""

    @property
    @abstractmethod
    def processes(self) -> bool:
        """Whether drafts are to ask it too: else a draft's best token is the largest logit's."""
        ...

    @property
    def draws(self) -> Draws | None:
        """Where a choice is nothing but a draw, how; the native model makes it then."""
        return None

    @abstractmethod
    def choose(self, ids: Int[np.ndarray, " t"], logits: Float[np.ndarray, " v"]) -> int:
        """The token after a text."""
        ...

    @abstractmethod
    def likeliest(self, ids: Int[np.ndarray, " t"], logits: Float[np.ndarray, " u"]) -> tuple[int, float]:
        """A draft's best token, out of the first entries of the vocabulary, and its share of the softmax."""
        ...


@dataclass
class Text:
    """A sequence that grows.

    Args:
        row: Of the cache, which holds all of it but the padding and the last token.
        ids: Room for the longest text there may be; as long for all texts.
        length: Of what stands.
        padding: Tokens before the first real one.
        chooser: Of its tokens; None takes the best.
    """

    row: int
    ids: Int[np.ndarray, " most"]
    length: int
    padding: int
    chooser: Chooser | None = None

    @property
    def wants_logits(self) -> bool:
        """Whether the best token alone does not say what comes next."""
        return self.chooser is not None

    @property
    def known(self) -> Int[np.ndarray, " t"]:
        """All of it, without padding."""
        return self.ids[self.padding : self.length]

    @property
    def room(self) -> int:
        """Tokens that may still come."""
        return len(self.ids) - self.length

    def upto(self, guessed: int) -> Int[np.ndarray, " t"]:
        """The text and some guessed tokens, where they lie."""
        return self.ids[: self.length + guessed]

    def guess(self, count: int) -> list[int]:
        """The tokens behind it."""
        return self.ids[self.length :][:count].tolist()

    def append(self, tokens: list[int]) -> None:
        """Tokens that stand."""
        self.ids[self.length : self.length + len(tokens)] = tokens
        self.length += len(tokens)


def prompts(
    ids: Sequence[Int[np.ndarray, " t"]], padding: Sequence[int], longest: int, choosers: Sequence[Chooser | None]
) -> list[Text]:
    """Texts that are to grow from prompts, to a length."""
    texts = []
    for row, (prompt, hidden, chooser) in enumerate(zip(ids, padding, choosers, strict=True)):
        room = np.empty(longest, dtype=np.int64)
        room[: len(prompt)] = prompt
        texts.append(Text(row, room, len(prompt), hidden, chooser))
    return texts


def chosen_inside(texts: Sequence[Text]) -> bool:
    """Whether the native model chooses their tokens by itself, step after step."""
    chooser = texts[0].chooser
    return chooser is None or (len(texts) == 1 and chooser.draws is not None)


def lasts(
    texts: Sequence[Text], guessed: int = 0
) -> tuple[Int[np.ndarray, " b"], Int[np.ndarray, " b"], Int[np.ndarray, " b"]]:
    """The last token of each text and of some guessed behind it, its row of the cache, and its position there."""
    at = [text.length + guessed - 1 for text in texts]
    ids = np.array([text.ids[place] for text, place in zip(texts, at, strict=True)])
    rows = np.array([text.row for text in texts], dtype=np.int32)
    return ids, rows, np.array([place - t.padding for t, place in zip(texts, at, strict=True)], dtype=np.int32)


def grow(
    session: Lowered, texts: list[Text], decode: Callable[[list[Text]], list[int]], ends: "Ends", tell: Tell
) -> list[Int[np.ndarray, " _"]]:
    """Texts as they end; those that have ended wait for nobody.

    Args:
        session: Its cache is written over.
        texts: Prompts.
        decode: Lets each text grow, by one token at least and no further than it has room; by how many it did.
        ends: Asked after every token.
        tell: Gets tokens as they stand.
    """
    going, new = texts, [1] * len(texts)
    for text in texts:
        step = session.prefill(text.ids[text.padding : text.length], text.row, logits=text.wants_logits)
        text.append([choice(step, 0, text, 0)])
    while going := [text for text, count in zip(going, new, strict=True) if not ends.within(text, count, tell)]:
        new = decode(going)
    return [text.upto(0) for text in texts]


@dataclass(frozen=True)
class Ends:
    """When a text ends.

    Args:
        length: Tokens of the longest one, prompt and padding included.
        tokens: That end it.
        others: What else may; asked with the text as it stands.
    """

    length: int
    tokens: frozenset[int]
    others: Callable[[Int[np.ndarray, " t"]], bool] | None = None

    def within(self, text: Text, new: int, tell: Tell) -> bool:
        """Whether one of a text's last tokens ends it; what comes after that one goes."""
        for length in range(text.length - new + 1, text.length + 1):
            text.length = length
            tell(int(text.ids[length - 1]))
            if self.after(text):
                return True
        return False

    def after(self, text: Text) -> bool:
        """Whether its last token ends it."""
        if text.length >= self.length or int(text.ids[text.length - 1]) in self.tokens:
            return True
        return self.others is not None and self.others(text.upto(0))


def choice(step: Step, at: int, text: Text, guessed: int) -> int:
    """The token after a text and some guessed ones, out of place `at` of a call."""
    if text.chooser is None:
        return int(step.best[at])
    assert step.logits is not None  # as `wants_logits` says
    return text.chooser.choose(text.upto(guessed), step.logits[at])
