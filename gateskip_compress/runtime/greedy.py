"""Greedy decoding, some steps to a call of the native model."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig

from ..speculation.control import Clock
from .lowered import Lowered
from .texts import Text

_CALL_S = 0.05
"""Of steps in one call: streamed text still flows, and Ctrl-C is heard."""


class Greedy:
    """Decodes texts.

    After each call, all that Python needs comes back into the processor's caches, out of which the weights drove it:
    a tenth of a small model's step. What was decoded behind a text's end is dropped.

    Args:
        session: Its cache holds what `Text` says.
        config: Knows which tokens end a text.
    """

    def __init__(self, session: Lowered, config: GenerationConfig) -> None:
        self.session, self.step_s = session, _CALL_S
        ends: Tensor | None = getattr(config, "_eos_token_tensor", None)  # `generate` prepared it
        self.ends: Int[np.ndarray, " e"] = np.zeros(0, np.int32) if ends is None else ends.numpy().astype(np.int32)

    @property
    def together(self) -> int:
        """Steps that go into one call."""
        return max(1, int(_CALL_S / self.step_s))

    def round(self, texts: Sequence[Text]) -> list[int]:
        """One call."""
        return self.steps(texts, self.together)

    def steps(self, texts: Sequence[Text], most: int) -> list[int]:
        """Some steps, at most; how many were made, for each text."""
        clock, lasts = Clock(), [text.length - 1 for text in texts]
        rows = np.array([text.row for text in texts], dtype=np.int32)
        ids = np.array([text.ids[at] for text, at in zip(texts, lasts, strict=True)])
        places = np.array([at - text.padding for text, at in zip(texts, lasts, strict=True)], dtype=np.int32)
        most = min(most, *(text.room for text in texts))
        found = self.session.follow(ids, rows, places, most, self.ends)
        self.step_s = clock.lap() / len(found)
        for text, tokens in zip(texts, found.T.tolist(), strict=True):
            text.append(tokens)
        return [len(found)] * len(texts)
