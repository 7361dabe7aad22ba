"""From scores to what stays. Pure functions: another target cuts anew without scoring anew.

A branch's units are its KV groups or its MLP channels. Its curve says in which order they would go, and what is lost by
then; curves of different branches are in the same unit of loss, as far as the score that made them can say.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from ..model import Width

Key = tuple[int, str]
"""Layer and branch kind."""


@dataclass(frozen=True)
class Curve:
    """What a branch loses, unit by unit.

    Args:
        order: All units, the first to go first.
        lost: What is lost once that unit and all before it are gone.
    """

    order: tuple[int, ...]
    lost: tuple[float, ...]

    def after(self, gone: int) -> float:
        """What is lost once the first `gone` units are."""
        return self.lost[gone - 1] if gone else 0.0

    def left(self, gone: int) -> list[int]:
        """Units that stay once the first `gone` are gone, ascending."""
        return sorted(self.order[gone:])


Scores = Mapping[Key, Curve]
_ROUNDING = 1e-9
"""Of sums of shares."""


def sizes(width: Width, multiple: int, least: int) -> list[int]:
    """How many units of a branch may go, ascending: what its output projection still reads is a multiple, or all.

    Args:
        width: Of the branch.
        multiple: Of the output projection's inputs.
        least: Units that stay in any case; at 0 the branch may go altogether.
    """
    return [
        gone
        for gone in range(width.units - least + 1)
        if gone == 0 or (width.units - gone) * width.inputs % multiple == 0
    ]


def uneven(
    scores: Scores, costs: Mapping[Key, float], target: float, allowed: Mapping[Key, Sequence[int]]
) -> dict[Key, int]:
    """How many units each branch gives up, so that they cost `target` together and the least is lost for it.

    Curves are taken at their lower convex hulls; so the slopes, loss for each unit of cost, rank all steps of all
    branches at once.

    Args:
        scores: By branch.
        costs: Of one unit, by branch.
        target: What is to be saved at least.
        allowed: From `sizes`, by branch; others give up nothing.

    Raises:
        ValueError: all that may go is less.
    """
    hulls = [
        (slope, key, end) for key, counts in allowed.items() for slope, _, end in _hull(scores[key], costs[key], counts)
    ]
    gone = dict.fromkeys(allowed, 0)

    def saved() -> float:
        return sum(count * costs[key] for key, count in gone.items())

    for _, key, end in sorted(hulls):
        if saved() >= target - _ROUNDING:
            break
        gone[key] = max(gone[key], end)  # equal slopes may come in any order
    if saved() < target - _ROUNDING:
        raise ValueError(_unreachable(target, saved()))
    for key in sorted(gone, key=lambda key: -scores[key].after(gone[key])):  # the last step may have been a long one
        for fewer in (count for count in allowed[key] if count < gone[key]):
            if saved() - (gone[key] - fewer) * costs[key] >= target - _ROUNDING:
                gone[key] = fewer
                break
    return gone


def uniform(
    scores: Scores,
    costs: Mapping[Key, float],
    target: float,
    allowed: Mapping[Key, Sequence[int]],
    fits: Callable[[Mapping[str, int]], bool],
) -> dict[Key, int]:
    """As `uneven`, with the same number of units for all branches of a kind.

    Args:
        scores: As in `uneven`.
        costs: As in `uneven`.
        target: As in `uneven`.
        allowed: As in `uneven`; the same for all branches of a kind.
        fits: Whether a plain config can have so many units less, by kind.

    Raises:
        ValueError: none that saves enough fits.
    """
    counts = {kind: allowed[key] for key in allowed for kind in key[1:]}
    best: tuple[float, dict[str, int]] | None = None
    most = 0.0
    for chosen in product(*counts.values()):
        gone = dict(zip(counts, chosen, strict=True))
        saved = sum(gone[key[1]] * costs[key] for key in allowed)
        if saved > most and fits(gone):
            most = saved
        lost = sum(scores[key].after(gone[key[1]]) for key in allowed)
        if saved >= target - _ROUNDING and (best is None or lost < best[0]) and fits(gone):
            best = lost, gone
    if best is None:
        raise ValueError(_unreachable(target, most))
    return {key: best[1][key[1]] for key in allowed}


def _hull(curve: Curve, cost: float, counts: Sequence[int]) -> list[tuple[float, int, int]]:
    """Slope, begin and end of each piece of a curve's lower convex hull over the allowed counts."""
    pieces, at = [], 0
    while at < counts[-1]:
        slope, end = min(
            ((curve.after(end) - curve.after(at)) / ((end - at) * cost), end) for end in counts if end > at
        )
        pieces.append((slope, at, end))
        at = end
    return pieces


def _unreachable(target: float, most: float) -> str:
    return f"share {target:.4g} is out of reach: the nearest that can go is {most:.4g}"
