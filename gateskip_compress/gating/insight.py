"""Where a gated model skips: by branch, by kind of token, by position, and where its multiply-adds go.

A branch execution is one token in one gated branch; a *kept share* is the mean of kept over executions, each counting
alike whatever it costs. Tokens belong to one class each, the first of these that fits:

    first token             position 0 of its passage; it is kept by rule
    special tokens          what the tokenizer calls special, the chat template's marks among them
    shared opening          what all passages begin with, as a template's fixed system prompt
    newline or whitespace   nothing else in it
    digits                  nothing else in it
    punctuation             no letter and no digit in it
    rare words              the token occurs `RARE` times at most among the text's words
    frequent words          the fewest most frequent of the rest that make up half of the text's words
    other words             the rest

"Words" are tokens with a letter in them, pieces of words too. Intervals are bootstraps over passages, as in `evaluate`:
None where fewer than two passages hold such tokens. Left out: decoding with a cache, which decides the same.
"""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import count, pairwise, takewhile
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..macs import BranchCost, branch_costs, head_macs
from ..model import BRANCH_KINDS, blocks
from ..quality import bootstrap_interval
from ..text import Passage
from ..track import untracked
from .calibrate import observe
from .turning import Decision, branch_index, dial_of

FIRST, WORDS = "first token", ("frequent words", "other words", "rare words")
CLASSES = (FIRST, "special tokens", "shared opening", "newline or whitespace", "punctuation", "digits", *WORDS)
PARTS = ("attention", "MLP", "keys and values", "gates", "surrogates", "output head")
RARE = 2
MOST_STRINGS, FEWEST_USES = 12, 5
"""Length of each table of tokens, and how often a token must occur to be in it."""


def insight(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    passages: Sequence[Passage],
    number: int = 1,
    track: Any = untracked,
) -> dict[str, Any]:
    """Run passages through a gated model as its dial stands, and say where it skips, in JSON types.

    Args:
        model: A gated model at a budget below 1.
        tokenizer: Its own.
        passages: Each runs by itself.
        number: The passage that is shown token by token, from 1.
        track: As in `Context`.

    Raises:
        UnsupportedModel: the model has no gates.
        ValueError: no such passage, or a budget of 1, at which gates decide nothing.
    """
    dial = dial_of(model)
    if dial.thresholds is None:
        raise ValueError("budget 1 runs every branch, there is nothing to look into; choose a budget below 1")
    if not 1 <= number <= len(passages):
        raise ValueError(f"passage {number} must be from 1 to {len(passages)}: the text has so many")
    windows = (passage.ids[None].to(model.device) for passage in track(passages, "look at passages"))
    seen = [observe(model, window, None) for window in windows]
    keep = [torch.cat([d.keep for d in decided]).cpu() for decided in seen]
    ids = [passage.ids.tolist() for passage in passages]
    texts = {i: str(tokenizer.decode([i])) for i in set().union(*ids)}
    names = classes(ids, texts, _special(tokenizer))
    branches = [(d.layer, d.kind) for d in seen[0]]
    thresholds = [_finite(_threshold(model, dial.thresholds, *branch)) for branch in branches]
    shown = number - 1
    return {
        "budget": dial.budget,
        "tokens": sum(map(len, ids)),
        "passages": len(ids),
        **_spending(model, seen, [len(one) for one in ids]),
        **by_branch(keep, branches, thresholds),
        "classes": by_class(keep, branches, names),
        "strings": by_string(keep, ids, texts, names),
        "positions": by_position(keep, names),
        "passage": {
            "number": number,
            "tokens": [
                {"text": texts[i], "class": name, "kept_share": kept}
                for i, name, kept in zip(ids[shown], names[shown], _share_of_tokens(keep[shown]).tolist(), strict=True)
            ],
            "margins": margins(seen[shown], thresholds),
            "kept": keep[shown].tolist(),
        },
    }


def classes(ids: Sequence[Sequence[int]], texts: dict[int, str], special: set[int]) -> list[list[str]]:
    """The class of every token, passage by passage; see the module's table."""
    opening = 0
    if len(ids) > 1:
        opening = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*ids, strict=False)))

    def name(at: int, token: int) -> str:
        if at == 0:
            return FIRST
        if token in special:
            return "special tokens"
        return "shared opening" if at < opening else _look(texts[token])

    named = [[name(at, token) for at, token in enumerate(one)] for one in ids]
    words = Counter(
        t for one, names in zip(ids, named, strict=True) for t, n in zip(one, names, strict=True) if n == "word"
    )
    half, passed, frequent = sum(words.values()) / 2, 0, set[int]()
    for token, uses in words.most_common():
        if passed >= half or uses <= RARE:
            break
        frequent.add(token)
        passed += uses

    def word(token: int) -> str:
        return "rare words" if words[token] <= RARE else "frequent words" if token in frequent else "other words"

    return [
        [word(t) if n == "word" else n for t, n in zip(one, names, strict=True)]
        for one, names in zip(ids, named, strict=True)
    ]


def _look(text: str) -> str:
    """What a token's own text makes it; bytes that are no whole character count as part of a word."""
    bare = text.strip()
    if not bare:
        return "newline or whitespace"
    if bare.isnumeric():
        return "digits"
    return "word" if any(c.isalnum() or c == "\N{REPLACEMENT CHARACTER}" for c in bare) else "punctuation"


def _special(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def by_branch(
    keep: Sequence[Bool[Tensor, "g _"]], branches: Sequence[tuple[int, str]], thresholds: Sequence[float | None]
) -> dict[str, Any]:
    """Kept shares of branches, of layers (None where a branch has no gate) and of all attention and all MLPs."""
    shares = torch.cat(list(keep), 1).double().mean(1).tolist()
    by_layer: dict[int, dict[str, float]] = {}
    for (layer, kind), share in zip(branches, shares, strict=True):
        by_layer.setdefault(layer, {})[kind] = share
    rows = zip(branches, thresholds, shares, strict=True)
    return {
        "branches": [
            {"layer": layer, "kind": kind, "threshold": threshold, "kept_share": share}
            for (layer, kind), threshold, share in rows
        ],
        "layers": [
            {
                "layer": layer,
                **{kind: own.get(kind) for kind in BRANCH_KINDS},
                "kept_share": sum(own.values()) / len(own),
            }
            for layer, own in by_layer.items()
        ],
        "kinds": {kind: _mean([own[kind] for own in by_layer.values() if kind in own]) for kind in BRANCH_KINDS},
    }


def by_class(
    keep: Sequence[Bool[Tensor, "g _"]], branches: Sequence[tuple[int, str]], names: Sequence[Sequence[str]]
) -> list[dict[str, Any]]:
    """Kept share of each class of tokens, over all gated branches and over those of each kind."""
    rows = []
    for name in CLASSES:
        chosen = [torch.tensor([n == name for n in one]) for one in names]
        row = {"class": name, **_kept(keep, chosen)}
        for kind in BRANCH_KINDS:
            of_kind = torch.tensor([k == kind for _, k in branches])
            row[kind] = _kept([part[of_kind] for part in keep], chosen)["kept_share"] if of_kind.any() else None
        rows.append(row)
    return rows


def by_string(
    keep: Sequence[Bool[Tensor, "g _"]],
    ids: Sequence[Sequence[int]],
    texts: dict[int, str],
    names: Sequence[Sequence[str]],
) -> dict[str, Any]:
    """Tokens kept most and least, of those that occur often enough; first tokens and the shared opening left out."""
    shares: dict[tuple[int, str], list[float]] = {}
    for part, one, named in zip(keep, ids, names, strict=True):
        for token, name, share in zip(one, named, _share_of_tokens(part).tolist(), strict=True):
            if name not in (FIRST, "shared opening"):
                shares.setdefault((token, name), []).append(share)
    rows = [
        {"text": texts[token], "class": name, "uses": len(found), "kept_share": _mean(found)}
        for (token, name), found in shares.items()
        if len(found) >= FEWEST_USES
    ]
    rows.sort(key=lambda row: (-row["kept_share"], row["text"]))
    half = min(MOST_STRINGS, (len(rows) + 1) // 2)
    return {"fewest_uses": FEWEST_USES, "most": rows[:half], "least": rows[half:][::-1][:MOST_STRINGS]}


def by_position(keep: Sequence[Bool[Tensor, "g _"]], names: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Kept share by place in the passage, in bins that grow fourfold; of all tokens, and of words alone.

    Words alone, because templates put other kinds of tokens at the start of a passage than further on.
    """
    longest = max(map(len, names))
    edges = [0, *takewhile(lambda edge: edge < longest, (4**i for i in count())), longest]
    rows = []
    for start, end in pairwise(edges):
        inside = [torch.tensor([start <= at < end for at in range(len(one))]) for one in names]
        words = [torch.tensor([name in WORDS for name in one]) for one in names]
        alone = _kept(keep, [a & b for a, b in zip(inside, words, strict=True)])
        rows.append({"first": start, "last": end - 1, **_kept(keep, inside), "words": alone})
    return rows


def margins(seen: Sequence[Decision], thresholds: Sequence[float | None]) -> list[list[float | None]]:
    """Score minus threshold, branch by branch; None where a branch never skips."""
    rows = zip(seen, thresholds, strict=True)
    return [
        [None if threshold is None else round(score - threshold, 4) for score in decision.score[0].tolist()]
        for decision, threshold in rows
    ]


def parts(costs: dict[tuple[int, str], BranchCost], head: int, seen: Sequence[Decision], tokens: int) -> dict[str, int]:
    """Multiply-adds of one pass over `tokens`, by part; with nothing seen, of the model without gates.

    Their sum is what `calibrate.spent` spends.
    """
    skipped = {(d.layer, d.kind): d.tokens - int(d.keep.sum()) for d in seen}
    ran = [
        sum((tokens - skipped.get(at, 0)) * cost.kept for at, cost in costs.items() if at[1] == kind)
        for kind in BRANCH_KINDS
    ]
    always = tokens * sum(cost.always for cost in costs.values())
    gates = sum(d.tokens * costs[d.layer, d.kind].gate for d in seen)
    surrogates = sum(count * costs[at].skipped for at, count in skipped.items())
    return dict(zip(PARTS, (*ran, always, gates, surrogates, tokens * head), strict=True))


def _spending(model: PreTrainedModel, seen: Sequence[Sequence[Decision]], lengths: Sequence[int]) -> dict[str, Any]:
    """Shares of the ungated model's multiply-adds, by part; every passage over its own length of context."""
    spent, ungated = Counter[str](), Counter[str]()
    for decided, tokens in zip(seen, lengths, strict=True):
        model_costs = branch_costs(model, tokens), head_macs(model)
        spent.update(parts(*model_costs, decided, tokens))
        ungated.update(parts(*model_costs, [], tokens))
    whole = sum(ungated.values())
    executions = sum(d.keep.numel() for decided in seen for d in decided)
    return {
        "macs_share": sum(spent.values()) / whole,
        "executed_share": sum(int(d.keep.sum()) for decided in seen for d in decided) / executions,
        "parts": [
            {"part": part, "macs_share": spent[part] / whole, "ungated_macs_share": ungated[part] / whole}
            for part in PARTS
        ],
    }


def _kept(keep: Sequence[Bool[Tensor, "g _"]], chosen: Sequence[Bool[Tensor, " _"]]) -> dict[str, Any]:
    """Kept share of the chosen tokens and its interval; None where there are none, or too few passages."""
    found = [(_share_of_tokens(part)[mine], int(mine.sum())) for part, mine in zip(keep, chosen, strict=True)]
    held = [(float(shares.sum()), tokens) for shares, tokens in found if tokens]
    tokens = sum(n for _, n in held)
    low = high = None
    if len(held) > 1:
        sums, counts = zip(*held, strict=True)
        low, high = bootstrap_interval(torch.tensor(sums, dtype=torch.float64), torch.tensor(counts))
    mean = sum(total for total, _ in held) / tokens if tokens else None
    return {"tokens": tokens, "passages": len(held), "kept_share": mean, "low": low, "high": high}


def _share_of_tokens(keep: Bool[Tensor, "g t"]) -> Float[Tensor, " t"]:
    """Share of the gated branches that keep each token."""
    return keep.double().mean(0)


def _threshold(model: PreTrainedModel, thresholds: Sequence[float], layer: int, kind: str) -> float:
    """What a branch's score was compared with; a gate without a kind follows its block's attention."""
    decides = kind if blocks(model)[layer].gates[kind].kind is not None else BRANCH_KINDS[0]
    return thresholds[branch_index(layer, decides)]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
