"""Native or torch: which of them runs a model, and speeds of the native one."""

from collections.abc import Callable
from time import perf_counter

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from ..errors import RuntimeUnavailable, UnsupportedModel
from ..measure import Speed, random_prompt
from ..names import check_choice
from ..speculation.acceptance import Acceptance
from .lower import lower
from .session import Session

RUNTIMES = ("auto", "native", "torch")


def choose_runtime(
    model: PreTrainedModel, runtime: str, context_tokens: int, tell: Callable[[str], object]
) -> Session | None:
    """A session, or None where torch runs the model.

    Args:
        model: To run.
        runtime: Of RUNTIMES; `auto` takes the native one where it can, and else tells why not.
        context_tokens: Of the session's cache.
        tell: Gets that reason, once.

    Raises:
        RuntimeUnavailable: `native` was asked for and is not built.
        UnsupportedModel: `native` was asked for and does not know the model.
    """
    check_choice("runtime", runtime, RUNTIMES)
    if runtime == "torch":
        return None
    try:
        return lower(model, context_tokens=context_tokens)
    except (RuntimeUnavailable, UnsupportedModel) as error:
        if runtime == "native":
            raise
        tell(f"running on torch: {error}")
        return None


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


def measure_session(session: Session, prompt_tokens: int, new_tokens: int, *, runs: int, speculate: bool) -> Speed:
    """What `measure_speed` measures, of a session: a pass over the prompt, and tokens after the first one.

    Args:
        session: At the budget that its model is set to; its context holds the prompt, the tokens and one more.
        prompt_tokens: Of a seeded random prompt.
        new_tokens: To decode.
        runs: Timed repetitions, after a warm-up.
        speculate: Decode speculatively.
    """
    prompt = random_prompt(session.model.config.get_text_config().vocab_size, prompt_tokens)
    acceptance = Acceptance()
    settings = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    if speculate:
        settings |= {"speculate": True, "acceptance": acceptance}

    def prefill() -> float:
        began = perf_counter()
        session.prefill(prompt[0].numpy())
        return perf_counter() - began

    def decode(tokens: int) -> float:
        times = _Times()
        session.generate(prompt, streamer=times, min_new_tokens=tokens + 1, max_new_tokens=tokens + 1, **settings)
        return times.seen[-1] - times.seen[1]  # the prompt is put first, and the first token comes with it

    prefill()
    prefill_s = [prefill() for _ in range(runs)]
    decode(min(4, new_tokens))
    acceptance.clear()
    decode_s = [decode(new_tokens) for _ in range(runs)]
    return Speed.of(prompt, new_tokens, prefill_s, decode_s, acceptance)
