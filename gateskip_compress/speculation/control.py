"""Whether to draft, with what, and how far: by measured time and acceptance.

Costs are in plain steps: passes of the model over one token, as plain decoding makes them. A draft of k tokens that
stand with chances a_1, a_1 a_2, .. yields 1 + sum of these on average, and costs k drafting steps and a verify pass of
k + 1 tokens. It is lengthened while the next token's chance is worth more than its cost at the present rate, which
maximises tokens by time. Chances are counted by evidence that is there before a token is drafted or judged: the draft's
own confidence, or how long a passage was found again.

Passages are free, and what their lengths are worth is known beforehand: they are verified wherever that is expected to
gain. What gates lose against plain steps is their debt, which only their own gains pay back: budgets that lose may be
tried again as long as all debts are below half a step and 1 % of the tokens that passages left so far. So over some
hundred tokens and more, what is tried in vain costs some hundredth of the time. None of this can change the text, or
its distribution where it is sampled: it looks at tokens before the one in question, never at that one.
"""

import time
from bisect import bisect
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from math import ceil
from statistics import median
from typing import Literal

from ..gating.dial import Dial
from .acceptance import Acceptance

Drafts = Literal["both", "gates", "look-up"]

_PATIENCE = 64
"""Tokens after which a plain step renews the yardstick."""
_FIRST_LOSS, _LOSS = 0.5, 0.01
_KEEP_ROUND, _KEEP_PASS, _KEEP_ODDS = 0.8, 0.97, 0.99
"""What a new observation leaves of the older ones' weight."""
_TRIALS = 2
_LITTLE = 1.05
"""A gain that is expected of a passage, and is within the errors of what is expected."""
NO_GATES = "no gates to draft with: passages of the text are looked up alone"
DRAFT_TOKENS = 8
"""The longest draft, where nobody says otherwise."""
_APART = 0.05


@dataclass
class Drafter:
    """A way to draft, and how it fares.

    Args:
        budget: Of the gates; None looks passages up instead.
        debt: Plain steps lost and not won back.
        rounds: Drafts judged so far.
        tokens: Gained of late.
        steps: Paid for them, in plain steps.
        tried: Tokens judged of late.
        stood: Of these.
        step_s: Seconds of the last drafting steps.
    """

    budget: float | None
    debt: float = 0.0
    rounds: int = 0
    tokens: float = 0.0
    steps: float = 0.0
    tried: float = 1.0
    stood: float = 0.5
    step_s: deque[float] = field(default_factory=lambda: deque(maxlen=15))

    @property
    def rate(self) -> float:
        """Tokens per plain step's time."""
        return self.tokens / self.steps if self.steps else 1.0

    @property
    def known(self) -> bool:
        """Whether it was tried."""
        return self.rounds >= _TRIALS


_FOUND = (1, 2, 3, 4, 5, 7, 10, 16)
_STANDS = (0.28, 0.63, 0.69, 0.78, 0.83, 0.88, 0.91, 0.98)
"""How often a looked-up token stood where so many before it were found again: SmolLM2-135M-Instruct's own 500 greedy
answers to instructions, Dolly's questions and GSM8K's. Tokens of the draft that stand lengthen what was found."""


def looked_up(found: int) -> Hashable:
    """Evidence of a looked-up token: how many before it were found again, those of the draft included."""
    return "look up", bisect(_FOUND, found)


def sure(budget: float, share: float) -> Hashable:
    """Evidence of a token that gates drafted: the largest share in the draft's distribution."""
    return budget, min(4, int(5 * share))


_GUESSES = {looked_up(found): chance for found, chance in zip(_FOUND, _STANDS, strict=True)}


class Odds:
    """How often drafted tokens stood, by evidence; what was long ago is forgotten, back to a guess.

    The guess is an even chance, or for passages what it was elsewhere.
    """

    def __init__(self) -> None:
        self._seen: dict[Hashable, list[float]] = {}

    def of(self, evidence: Hashable) -> float:
        """Chance that such a token stands."""
        tried, stood = self._seen.get(evidence, (0.0, 0.0))
        guess = _GUESSES.get(evidence, 0.5)
        return (stood + guess) / (tried + 1)

    def learn(self, evidence: list[Hashable], stands: int) -> None:
        """One draft's tokens, of which `stands` stood; those after the first that fell were not judged."""
        for counts in self._seen.values():
            counts[:] = (count * _KEEP_ODDS for count in counts)
        for place, key in enumerate(evidence[: stands + 1]):
            counts = self._seen.setdefault(key, [0.0, 0.0])
            counts[0], counts[1] = counts[0] + 1, counts[1] + (place < stands)


class PassCost:
    """Seconds of a pass by the number of drafted tokens, 0 being a plain step.

    They are means of the same last passes for all numbers, as what is compared is to be alike where the machine's pace
    changes. Where a number was seldom seen, a straight line through all helps out.
    """

    def __init__(self) -> None:
        self._seen: dict[int, list[float]] = {}

    def learn(self, drafted: int, seconds: float) -> None:
        """One pass. The first is to be a plain step."""
        for sums in self._seen.values():
            sums[:] = (_KEEP_PASS * x for x in sums)
        sums = self._seen.setdefault(drafted, [0.0, 0.0])
        sums[0], sums[1] = sums[0] + 1, sums[1] + seconds

    def upto(self, most: int) -> list[float]:
        """Seconds of passes over 0 to `most` drafted tokens; the line counts as one that was seen."""
        base, slope = self.line()
        seen = (self._seen.get(drafted, (0.0, 0.0)) for drafted in range(most + 1))
        return [(seconds + base + slope * drafted) / (count + 1) for drafted, (count, seconds) in enumerate(seen)]

    def line(self) -> tuple[float, float]:
        """Base and slope. At first a pass over eight drafted tokens is taken to cost 3.1 plain steps."""
        count, plain_s = self._seen[0]
        # beside a tenth of an observation of each
        sums = [0.2, 0.8, 6.4, 0.41 * plain_s / count, 2.48 * plain_s / count]
        for k, (count, seconds) in self._seen.items():
            new = (count, k * count, k * k * count, seconds, k * seconds)
            sums = [old + x for old, x in zip(sums, new, strict=True)]
        count, k, kk, t, kt = sums
        slope = max(0.0, (count * kt - k * t) / (count * kk - k * k))
        return (t - slope * k) / count, slope


class Control:
    """Chooses, and learns from what came of it.

    Args:
        drafters: To choose from.
        most_tokens: The longest draft.
        adapt: False drafts as much as it can, always.

    Attributes:
        tokens: So far, but for those that passages gave.
    """

    def __init__(self, drafters: list[Drafter], most_tokens: int, *, adapt: bool = True) -> None:
        self.drafters, self.most_tokens, self.adapt = drafters, most_tokens, adapt
        self.odds, self.costs = Odds(), PassCost()
        self.tokens = self.since_plain = 0.0
        self.plain_steps = 0

    @classmethod
    def over(cls, drafts: Drafts, budgets: Sequence[float], most_tokens: int, *, adapt: bool) -> "Control":
        """One that has passages, gates at some budgets, or both to choose from."""
        looking = [Drafter(None)] if drafts != "gates" else []
        return cls([*looking, *map(Drafter, budgets)], most_tokens, adapt=adapt)

    @property
    def plain_s(self) -> float:
        """Seconds of a plain step."""
        return self.costs.upto(0)[0]

    @property
    def idle(self) -> int:
        """Tokens for which no gates will draft, whatever they are: what passages leave may be decoded plainly."""
        if not self.adapt or not self._ready:
            return 0
        gates = (drafter for drafter in self.drafters if drafter.budget is not None)
        waits = (0.0 if self._gains(d) else (self._debts - _FIRST_LOSS) / _LOSS - self.tokens for d in gates)
        return int(min([*waits, self.patience]))

    @property
    def patience(self) -> int:
        """Tokens until the next plain step is due."""
        return ceil(_PATIENCE - self.since_plain)

    @property
    def looks(self) -> bool:
        """Whether the next draft may be a passage: else it need not be searched for."""
        return any(drafter.budget is None for drafter in self.drafters) and (not self.adapt or self._ready)

    @property
    def _ready(self) -> bool:
        """Whether what a plain step costs is known, and was seen of late."""
        return self.plain_steps >= _TRIALS and self.since_plain < _PATIENCE

    def choose(self, found: int) -> Drafter | None:
        """Who drafts next; None is nobody, a plain step.

        Args:
            found: Tokens of the passage that was found again; 0 is none.
        """
        looking = next((d for d in self.drafters if d.budget is None and found), None)
        if not self.adapt:
            return looking or next((d for d in self.drafters if d.budget is not None), None)
        if not self._ready:
            return None
        gain = self.look_up_length(found, self.most_tokens)[1] if looking is not None else 0.0
        return looking if gain > self._other_gain else self._best_gates

    @property
    def _best_gates(self) -> Drafter | None:
        """Who of those that may draft is to."""
        gates = (drafter for drafter in self.drafters if drafter.budget is not None and self._may(drafter))
        return max(gates, key=lambda d: d.rate if d.known else float("inf"), default=None)

    @property
    def _other_gain(self) -> float:
        """What a passage must gain more than."""
        best = self._best_gates
        return max(_LITTLE, best.rate) if best is not None and best.known else _LITTLE

    def _may(self, drafter: Drafter) -> bool:
        """Whether gates at a budget gain, or their losses can be borne."""
        return self._gains(drafter) or self._debts <= _FIRST_LOSS + _LOSS * self.tokens

    @staticmethod
    def _gains(drafter: Drafter) -> bool:
        return drafter.known and drafter.rate > 1

    @property
    def _debts(self) -> float:
        """Of gates, at all budgets."""
        return sum(drafter.debt for drafter in self.drafters if drafter.budget is not None)

    def look_up_length(self, found: int, most: int) -> tuple[int, float]:
        """How many tokens of a passage to take, and the tokens per plain step's time to be expected."""
        if not self.adapt:
            return most, 1.0
        chances = [self.odds.of(looked_up(found + place)) for place in range(most)]
        return _best_length(chances, self.costs.upto(most))

    def look_up_lengths(self, longest: int) -> list[int]:
        """How many tokens of a passage to take, where from 0 to `longest` tokens were found again."""
        most, least = self.most_tokens, self._other_gain
        costs, chances = self.costs.upto(most), [self.odds.of(looked_up(found)) for found in range(longest + most)]
        lengths = (_best_length(chances[found:][:most], costs) for found in range(1, longest + 1))
        return [0, *(count if gain > least else 0 for count, gain in lengths)]

    def goes_on(self, drafter: Drafter, chance: float) -> bool:
        """Whether another token by the gates is worth its cost, after tokens that all stand with a chance."""
        if not self.adapt:
            return True
        if not drafter.step_s:  # the first draft is to show what one token costs
            return False
        cost = (median(drafter.step_s) + self.costs.line()[1]) / self.plain_s
        return chance * drafter.stood / drafter.tried > cost * max(1.0, drafter.rate)

    def plain(self, seconds: float, steps: int = 1) -> None:
        """Plain steps were made, that many together; `seconds` are one's."""
        self.costs.learn(0, seconds)
        self.tokens, self.since_plain, self.plain_steps = self.tokens + steps, 0.0, self.plain_steps + steps

    def learn(
        self, drafter: Drafter, evidence: list[list[Hashable]], stands: list[int], draft_s: float, verify_s: float
    ) -> None:
        """A draft was judged.

        Args:
            drafter: Who made it.
            evidence: Of each drafted token of each row.
            stands: How many of a row's tokens stood.
            draft_s: Seconds of all its drafting steps.
            verify_s: Seconds of the verify pass, and of accepting.
        """
        gained, drafted = 1 + sum(stands) / len(stands), max(map(len, evidence))
        self.since_plain += gained
        for row, stood in zip(evidence, stands, strict=True):
            self.odds.learn(row, stood)
            judged = min(stood + 1, len(row))
            drafter.tried, drafter.stood = 0.9 * drafter.tried + judged, 0.9 * drafter.stood + stood
        if drafter.budget is not None:
            self.tokens += gained
            drafter.step_s.append(draft_s / drafted)
        if not self.plain_steps:
            return
        self.costs.learn(drafted, verify_s)
        steps = (draft_s + verify_s) / self.plain_s
        drafter.rounds += 1
        drafter.debt = max(0.0, drafter.debt + steps - gained)
        drafter.tokens = _KEEP_ROUND * drafter.tokens + gained
        drafter.steps = _KEEP_ROUND * drafter.steps + steps


def _best_length(chances: list[float], seconds: list[float]) -> tuple[int, float]:
    """Of drafts whose tokens stand with these chances, each if those before it do: the length that gains most.

    Args:
        chances: Of up to k tokens.
        seconds: Of passes over 0 to k.

    Returns:
        The length, and tokens per plain step's time; 0 and 1 where little is to be gained.
    """
    best, chance, tokens = (0, _LITTLE), 1.0, 1.0
    for k, own in enumerate(chances, 1):
        chance *= own
        tokens += chance
        if (gain := tokens * seconds[0] / seconds[k]) > best[1]:
            best = k, gain
    return best if best[0] else (0, 1.0)


def draft_budgets(dial: Dial, own: Dial, given: float | None) -> list[float]:
    """Budgets that gates are to draft at.

    Args:
        dial: Of the gates that verify.
        own: Of those that draft, which may be the same.
        given: The only one; None is up to three that were calibrated below the verifier's.

    Raises:
        ValueError: there is none below the budget that verifies, or the gates cannot go so low.
    """
    if given is not None:
        if given >= dial.budget:
            raise ValueError(f"draft_budget {given} must be below the budget that verifies, {dial.budget}")
        own.thresholds_of(given)
        return [given]
    below = [setting.budget for setting in dial.table if setting.budget < dial.budget - _APART]
    if not below:
        raise ValueError(
            f"no budget was calibrated more than {_APART} below {dial.budget}, which the model runs at: "
            "use drafts='look-up'"
        )
    # the first costs nearly what plain steps do, the last is rarely right
    return below if len(below) < 4 else [below[len(below) * quarter // 4] for quarter in (1, 2, 3)]


def take_in(
    control: Control,
    counts: Acceptance,
    drafter: Drafter | None,
    evidence: list[list[Hashable]],
    stands: list[int],
    draft_s: float,
    rest_s: float,
    pass_s: float | None = None,
) -> None:
    """Count what a round came to, and tell the control.

    Args:
        control: Learns.
        counts: Are added to.
        drafter: Who drafted; None is a plain step.
        evidence: As in `Control.learn`.
        stands: As there; one a row for plain steps too.
        draft_s: Seconds of drafting.
        rest_s: Of the pass, and of what followed.
        pass_s: Of the pass alone, where plain decoding spends next to nothing around it; None is all of the above.
    """
    if drafter is None:
        counts.plain_steps += len(stands)
        counts.plain_s += draft_s + rest_s
        control.plain(draft_s + rest_s if pass_s is None else pass_s)
        return
    control.learn(drafter, evidence, stands, draft_s, rest_s)
    counts.verifies += len(stands)
    counts.drafted += sum(map(len, evidence))
    counts.accepted += sum(stands)
    counts.draft_s += draft_s
    counts.verify_s += rest_s


class Clock:
    """Seconds since it was last read."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Read it."""
        before, self._last = self._last, time.perf_counter()
        return self._last - before
