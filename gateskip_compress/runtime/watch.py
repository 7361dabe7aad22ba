"""Times the native runtime, as `measure.Stopwatch` times torch."""

from dataclasses import dataclass, field
from time import perf_counter

from jaxtyping import Int
from torch import Tensor, ones_like
from transformers.generation.streamers import BaseStreamer

from ..speculation.acceptance import Acceptance
from .session import Session


@dataclass
class SessionWatch:
    """Times a session on one prompt; each call of `prefill` or `decode` gives one sample, in seconds.

    Args:
        session: At the budget that its model is set to; its context holds the prompt, the new tokens and one more.
        prompt: Token ids.
        new_tokens: Tokens that `decode` adds to each row; end tokens do not stop it.
        speculate: Decode speculatively.
        acceptance: What was drafted and accepted since the warm-up.
    """

    session: Session
    prompt: Int[Tensor, "b t"]
    new_tokens: int
    speculate: bool = False
    acceptance: Acceptance = field(default_factory=Acceptance)

    def prefill(self) -> float:
        """One pass over the prompt."""
        began = perf_counter()
        for row, ids in enumerate(self.prompt.numpy()):
            self.session.prefill(ids, row)
        return perf_counter() - began

    def decode(self) -> float:
        """The tokens after the first one, which comes with the prompt."""
        return self._decode(self.new_tokens)

    def warm_up(self) -> None:
        """Run both for a moment; counts of acceptance start after it."""
        self.prefill()
        self._decode(min(4, self.new_tokens))
        self.acceptance.clear()

    def _decode(self, tokens: int) -> float:
        times = _Times()
        settings = {"do_sample": False, "pad_token_id": 0, "attention_mask": ones_like(self.prompt)}
        if self.speculate:
            settings |= {"speculate": True, "acceptance": self.acceptance}
        length = {"min_new_tokens": tokens + 1, "max_new_tokens": tokens + 1}
        self.session.generate(self.prompt, streamer=times, **length, **settings)
        return times.seen[-1] - times.seen[1]  # the prompt is put first, and the first token comes with it


class _Times(BaseStreamer):
    """Keeps when what was put came."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def put(self, value: Tensor) -> None:
        """The prompt, then tokens."""
        del value
        self.seen.append(perf_counter())

    def end(self) -> None:
        """Nothing."""
