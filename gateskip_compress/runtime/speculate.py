"""Speculative decoding in the native runtime: guess a few tokens, verify them in one call, keep what stands.

Guesses come from where torch's come from, and what is tried, how far, and when not at all, is decided alike
(`speculation/control.py`): a passage that is found again, or the model's own best tokens under a lower budget of its
gates. A call of k tokens gives the bits of k calls of one, so the text is plain decoding's: greedy, or sampled from the
same seed (in batches, where rows draw in turn, from the same distribution). There a guess stands if it is the token
that plain decoding draws: as likely as by speculative sampling (arXiv 2211.17192), since a guess is certain to be
guessed. What was guessed wrong stays in the cache beyond the text's end, where nobody looks before it is written over.
Passages and plain steps of one text go inside the native model, some rounds to a call, where nothing but limits of
drawing decides on its tokens.
"""

from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Float, Int

from ..speculation.acceptance import Acceptance
from ..speculation.control import Clock, Control, Drafter, looked_up, sure, take_in
from ..speculation.lookup import LONGEST, look_up, worth_taking
from .extension import extension
from .lowered import Step
from .plain import CALL_S, Plain
from .texts import Text, choice, chosen_inside, lasts

Guesses = tuple[Drafter | None, list[list[Hashable]]]
"""Who guessed, and the evidence of each token of each row; nobody is a plain step. Tokens stand behind the texts."""


class Speculator:
    """Decodes texts round by round.

    Args:
        plain: Makes plain steps where nobody guesses, and has the session.
        control: Says what to guess, and learns how it fared.
        counts: Are added to.

    Raises:
        ValueError: drafts may be longer than a call takes.
    """

    def __init__(self, plain: Plain, control: Control, counts: Acceptance) -> None:
        most = extension().WINDOW - 1
        if control.most_tokens > most:
            raise ValueError(f"draft_tokens {control.most_tokens} must be from 1 to {most}")
        self.plain, self.session, self.control, self.counts = plain, plain.session, control, counts

    def round(self, texts: Sequence[Text]) -> list[int]:
        """Guess, verify, and let each text grow by what stands."""
        if chosen_inside(texts) and self.control.adapt:
            if self.control.looks:
                if len(texts) == 1 and (made := self._look_ahead(texts[0])):
                    return [made]
            elif (idle := self.control.idle) > 1:
                return self._plainly(texts, idle)
        clock, room = Clock(), min(text.room for text in texts)
        most = min(self.control.most_tokens, room - 1, extension().WINDOW // len(texts) - 1)
        drafter, evidence = self._guess(texts, most)
        guesses, draft_s = [text.guess(len(e)) for text, e in zip(texts, evidence, strict=True)], clock.lap()
        step, found, at = self._verify(texts, [len(guess) + 1 for guess in guesses]), [], 0
        pass_s = clock.lap()
        for text, guess in zip(texts, guesses, strict=True):
            new: list[int] = []
            while len(new) <= len(guess) and new == guess[: len(new)]:  # as many choices as tokens that stand
                new.append(choice(step, at + len(new), text, len(new)))
            found.append(new)
            at += len(guess) + 1
        stands, rest_s = [len(new) - 1 for new in found], pass_s + clock.lap()
        alone_s = pass_s if step.logits is None else None
        take_in(self.control, self.counts, drafter, evidence, stands, draft_s, rest_s, alone_s)
        for text, new in zip(texts, found, strict=True):
            text.append(new)
        return [len(new) for new in found]

    def _plainly(self, texts: Sequence[Text], idle: int) -> list[int]:
        """Plain steps, some to a call: nobody may draft for so many tokens."""
        made = self.plain.steps(texts, min(idle, self.plain.together))
        self.control.plain(self.plain.step_s, made[0])
        self.counts.plain_steps += sum(made)
        self.counts.plain_s += self.plain.step_s * made[0]
        return made

    def _look_ahead(self, text: Text) -> int:
        """Passages, and plain steps while no gates may draft, some to a call; how many tokens came, none perhaps."""
        guesses = np.array(self.control.look_up_lengths(LONGEST), dtype=np.int32)
        idle = self.control.idle
        plainly, most = idle > 1, min(idle if idle > 1 else self.control.patience, text.room)
        draws = None if text.chooser is None else text.chooser.draws
        passes = self.session.speculate(text.known, text.row, guesses, plainly, most, CALL_S, self.plain.ends, draws)
        looking = next(drafter for drafter in self.control.drafters if drafter.budget is None)
        counts = np.stack((passes.found, passes.guessed, passes.stood), axis=1).tolist()
        for (found, guessed, stood), pass_s in zip(counts, passes.seconds.tolist(), strict=True):
            evidence: list[Hashable] = [looked_up(found + place) for place in range(guessed)]
            drafter = looking if guessed else None
            take_in(self.control, self.counts, drafter, [evidence], [stood], 0.0, pass_s)
        text.append(passes.tokens.tolist())
        return len(passes.tokens)

    def _guess(self, texts: Sequence[Text], most: int) -> Guesses:
        """By whom the control chooses."""
        nothing: list[list[Hashable]] = [[] for _ in texts]
        if most < 1:
            return None, nothing
        searched = texts if self.control.looks else ()
        passages = [look_up(text.known, most) for text in searched]
        drafter = self.control.choose(max((passage.found for passage in passages), default=0))
        if drafter is None:
            return None, nothing
        if drafter.budget is not None:
            return drafter, self._guess_by_gates(texts, drafter, drafter.budget, most)
        evidence = worth_taking(passages, self.control, most)
        for text, passage, own in zip(texts, passages, evidence, strict=True):
            text.ids[text.length : text.length + len(own)] = passage.tokens[: len(own)]
        return (drafter if any(evidence) else None), evidence

    def _guess_by_gates(self, texts: Sequence[Text], drafter: Drafter, share: float, most: int) -> list[list[Hashable]]:
        """The model's likeliest tokens under a lower budget, as long as they pay."""
        evidence: list[list[Hashable]] = [[] for _ in texts]
        chance, processed = 1.0, texts[0].chooser is not None and texts[0].chooser.processes
        for guessed in range(most):
            step = self.session.draft(*lasts(texts, guessed), share, logits=processed)
            best, shares = step.best, step.shares
            if step.logits is not None:
                best, shares = self._processed(texts, guessed, step.logits)
            assert shares is not None  # of every drafting step
            keys = [sure(share, of_best) for of_best in shares.tolist()]
            for text, token, own, key in zip(texts, best, evidence, keys, strict=True):
                text.ids[text.length + guessed] = token
                own.append(key)
            chance *= sum(map(self.control.odds.of, keys)) / len(keys)
            if not self.control.goes_on(drafter, chance):
                break
        return evidence

    def _processed(
        self, texts: Sequence[Text], guessed: int, logits: Float[np.ndarray, "b v"]
    ) -> tuple[Int[np.ndarray, " b"], Float[np.ndarray, " b"]]:
        """Best tokens and their shares by the texts' own choosers."""
        found = [t.chooser.likeliest(t.upto(guessed), row) for t, row in zip(texts, logits, strict=True) if t.chooser]
        best, shares = zip(*found, strict=True)
        return np.array(best), np.array(shares)

    def _verify(self, texts: Sequence[Text], counts: list[int]) -> Step:
        """What each text's last token and the guesses behind it give, text after text."""
        ids = [text.ids[text.length - 1 :][:n] for text, n in zip(texts, counts, strict=True)]
        logits = texts[0].wants_logits
        if len(texts) == 1:  # in few calls: what each of them needs lies in memory, not in the processor's caches
            text, wanted = texts[0], counts[0]
            return self.session.run_row(ids[0], text.row, text.length - 1 - text.padding, wanted=wanted, logits=logits)
        _, rows, firsts = lasts(texts)
        places = [np.arange(first, first + n, dtype=np.int32) for first, n in zip(firsts, counts, strict=True)]
        want = np.arange(sum(counts), dtype=np.int32)
        return self.session.run(
            np.concatenate(ids), np.repeat(rows, counts), np.concatenate(places), want, logits=logits
        )
