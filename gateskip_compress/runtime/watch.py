"""Times the native runtime, as `measure.Stopwatch` times torch."""

from dataclasses import dataclass
from time import perf_counter

from jaxtyping import Bool, Int
from torch import Tensor, ones_like, zeros
from transformers import StoppingCriteria, StoppingCriteriaList

from ..measure import Watch
from .session import Session


@dataclass
class SessionWatch(Watch):
    """Times a session. Decoding is the tokens after the first one, which comes with the prompt.

    Args:
        session: At the budget that its model is set to; its context holds the prompt, the new tokens and one more.
    """

    session: Session

    def prefill(self) -> float:
        """One pass over the prompt."""
        began = perf_counter()
        for row, ids in enumerate(self.prompt.numpy()):
            self.session.prefill(ids, row)
        return perf_counter() - began

    def _decode(self, tokens: int) -> float:
        times = Times()
        # without an end token, not by a processor that forbids it: plain greedy decoding has none
        settings = {
            "do_sample": False,
            "eos_token_id": None,
            "pad_token_id": 0,
            "attention_mask": ones_like(self.prompt),
            "max_new_tokens": tokens + 1,
            "stopping_criteria": StoppingCriteriaList([times]),
        }
        if self.speculate:
            settings |= {"speculate": True, "acceptance": self.acceptance}
        self.session.generate(self.prompt, **settings)
        return times.seen[-1] - times.seen[0]  # the first token comes with the prompt


class Times(StoppingCriteria):
    """Keeps when tokens stood, and stops nothing; a streamer would follow one sequence only."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride] its BoolTensor is any
        self, input_ids: Int[Tensor, "b t"], scores: object, **kwargs: object
    ) -> Bool[Tensor, " b"]:
        """Asked after each token."""
        del scores, kwargs
        self.seen.append(perf_counter())
        return zeros(len(input_ids), dtype=bool)
