"""What a cell of the matrix is measured by, and goals written with those names.

    goal = condition {"and" condition};  condition = metric ("<=" | ">=" | "<" | ">") number
    perplexity_ratio <= 1.1 and decode_speedup >= 2

Ratios, speed-ups and shares are against the original: 1 is the original's own. A number may end in %.
"""

import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from ..names import nearest

Unit = Literal["×", "share", "nats", "tokens/s", "ms", "bytes", "s", ""]


@dataclass(frozen=True)
class Metric:
    """A number of a cell.

    Args:
        label: For people.
        unit: `×` is a factor, `share` a share of the original's or of all.
        more_is_better: Which way is good.
        about: What it is, in a line.
    """

    label: str
    unit: Unit
    more_is_better: bool
    about: str


METRICS: dict[str, Metric] = {
    "perplexity_ratio": Metric("perplexity", "×", False, "perplexity on held-out text, against the original's"),
    "kl_nats": Metric("KL", "nats", False, "mean KL divergence of next-token distributions from the original's"),
    "top1_agreement": Metric("same top token", "share", True, "tokens where both put the same token first"),
    "accuracy": Metric("accuracy", "share", True, "questions answered rightly, mean of the tasks"),
    "accuracy_change": Metric("accuracy change", "", True, "accuracy less the original's, on the same questions"),
    "macs_share": Metric("multiply-adds", "share", False, "multiply-adds per token that really run"),
    "disk_share": Metric("disk", "share", False, "bytes of weight files"),
    "memory_share": Metric("memory", "share", False, "peak memory while decoding, less what Python and torch hold"),
    "prefill_speedup": Metric("prefill", "×", True, "prompt tokens a second, paired with the original"),
    "decode_speedup": Metric("decode", "×", True, "new tokens a second, paired with the original"),
    "time_to_first_token_ms": Metric("first token", "ms", False, "one pass over the prompt"),
    "accepted_share": Metric("accepted", "share", True, "drafted tokens that stood"),
    "stacking_efficiency": Metric(
        "stacking", "×", True, "decode speed-up over the product of its parts' speed-ups; 1 is as good as the parts"
    ),
    "interaction_nats": Metric(
        "interaction", "nats", False, "log perplexity ratio less the sum of its parts'; above 0 parts harm each other"
    ),
    "cost_share": Metric(
        "cost", "share", False, "geometric mean of the shares of disk, memory, multiply-adds and decode time"
    ),
    "perplexity": Metric("perplexity, own", "", False, "perplexity on held-out text"),
    "prefill_tokens_per_s": Metric("prefill", "tokens/s", True, "prompt tokens a second"),
    "decode_tokens_per_s": Metric("decode", "tokens/s", True, "new tokens a second, all rows of a batch together"),
    "memory_bytes": Metric("memory", "bytes", False, "peak memory while decoding, less what Python and torch hold"),
    "disk_bytes": Metric("disk", "bytes", False, "bytes of weight files"),
    "macs_per_token": Metric("multiply-adds a token", "", False, "counted while running, output head included"),
    "compression_s": Metric("compression", "s", False, "seconds that all steps took"),
    "compression_peak_bytes": Metric("compression memory", "bytes", False, "most memory a step's process held"),
}
TIMED = ("prefill_speedup", "decode_speedup", "time_to_first_token_ms", "prefill_tokens_per_s", "decode_tokens_per_s")
"""Measured for each batch and prompt; of all but the first the names end in `_b4_t512` or so."""
COLUMNS = tuple(METRICS)[: tuple(METRICS).index("perplexity")]
"""What a report shows if nobody asks otherwise."""


def check_metric(name: str, known: Iterable[str]) -> None:
    """Raise ValueError, with the nearest name, where a metric is unknown."""
    known = list(known)
    if name not in known:
        raise ValueError(f"unknown metric {name!r}{nearest(name, known)}; metrics: {', '.join(known)}")


@dataclass(frozen=True)
class Condition:
    """`metric sign value`."""

    metric: str
    sign: str
    value: float

    def met(self, value: float) -> bool:
        """Whether a value of the metric satisfies it."""
        return _SIGNS[self.sign](value, self.value)

    def missed_by(self, value: float) -> float:
        """How far a value is from satisfying it, relative to the condition's own; 0 where it does."""
        return 0.0 if self.met(value) else abs(value - self.value) / (abs(self.value) or 1.0)

    def __str__(self) -> str:
        return f"{self.metric} {self.sign} {self.value:g}"


_SIGNS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
_CONDITION = re.compile(r"\s*(\w+)\s*(<=|>=|<|>)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*(%?)\s*")


@dataclass(frozen=True)
class Goal:
    """Conditions that must all be met."""

    conditions: tuple[Condition, ...]

    def __str__(self) -> str:
        return " and ".join(map(str, self.conditions))

    def verdict(self, values: Mapping[str, float | None], bounds: Mapping[str, tuple[float, float]]) -> str:
        """What a cell's numbers say: `yes`, `likely`, `no`, or `unknown`.

        Args:
            values: By metric.
            bounds: Intervals, where there are some; `likely` means that one of them reaches past its condition.
        """
        known = [(c, values.get(c.metric)) for c in self.conditions]
        if any(value is not None and not c.met(value) for c, value in known):
            return "no"
        if any(value is None for _, value in known):
            return "unknown"
        sure = all(c.met(end) for c in self.conditions for end in bounds.get(c.metric, ()))
        return "yes" if sure else "likely"


def parse_goal(text: str, known: Iterable[str] = METRICS) -> Goal:
    """A goal out of its text.

    Raises:
        ValueError: it is not written so, or a metric is unknown; the nearest is named.
    """
    known, conditions = list(known), []
    for part in re.split(r"\band\b", text):
        found = _CONDITION.fullmatch(part)
        if found is None:
            raise ValueError(
                f"goal {text!r}: {part.strip()!r} must be a metric, one of <= >= < >, and a number; "
                "conditions are joined by 'and', such as 'perplexity_ratio <= 1.1 and decode_speedup >= 2'"
            )
        metric, sign, value, percent = found.groups()
        check_metric(metric, known)
        conditions.append(Condition(metric, sign, float(value) / (100 if percent else 1)))
    return Goal(tuple(conditions))
