"""Times the native runtime, as `measure.Stopwatch` times torch."""

from dataclasses import dataclass
from time import perf_counter

from jaxtyping import Bool, Int
from torch import Tensor, ones_like, zeros
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

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
        alone = len(self.prompt) == 1
        # without an end token, not by a processor that forbids it: plain greedy decoding has none
        settings = {
            "do_sample": False,
            "eos_token_id": None,
            "pad_token_id": 0,
            "attention_mask": ones_like(self.prompt),
            "max_new_tokens": tokens + 1,
            **({"streamer": times} if alone else {"stopping_criteria": StoppingCriteriaList([times])}),
        }
        if self.speculate:
            settings |= {"speculate": True, "acceptance": self.acceptance}
        self.session.generate(self.prompt, **settings)
        return times.seen[-1] - times.seen[0]  # the first token comes with the prompt


class Times(StoppingCriteria, BaseStreamer):
    """Keeps when tokens stood, and stops nothing.

    As a streamer it follows one sequence only, and costs less: sessions know by themselves when the usual criteria are
    met, and ask others at every token.
    """

    def __init__(self) -> None:
        self.seen: list[float] = []
        self._prompted = False

    def put(self, value: Int[Tensor, "..."]) -> None:
        """As a streamer: the prompt comes first."""
        del value
        if self._prompted:
            self.seen.append(perf_counter())
        self._prompted = True

    def end(self) -> None:
        """Nothing to do."""

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride] its BoolTensor is any
        self, input_ids: Int[Tensor, "b t"], scores: object, **kwargs: object
    ) -> Bool[Tensor, " b"]:
        """As a criterion: asked after each token."""
        del scores, kwargs
        self.seen.append(perf_counter())
        return zeros(len(input_ids), dtype=bool)
