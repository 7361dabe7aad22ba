"""How drafts fared, to be reported."""

from dataclasses import dataclass, fields


@dataclass
class Acceptance:
    """Counts and seconds of generations; a decoder adds to them in place. Tokens and passes are counted by row.

    Args:
        drafted: Tokens.
        accepted: Of these.
        verifies: Passes over drafted tokens.
        plain_steps: Passes over one token.
        repeated: Tokens read once more, where two were nearly tied.
        draft_s: Seconds of drafting.
        verify_s: Seconds of verify passes, accepting included.
        plain_s: Seconds of plain steps.
    """

    drafted: int = 0
    accepted: int = 0
    verifies: int = 0
    plain_steps: int = 0
    repeated: int = 0
    draft_s: float = 0.0
    verify_s: float = 0.0
    plain_s: float = 0.0

    @property
    def accepted_share(self) -> float | None:
        """Share of drafted tokens that stood; None where none was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_verify(self) -> float | None:
        """Mean tokens that a verify pass yields, its own included; None where there was none."""
        return (self.accepted + self.verifies) / self.verifies if self.verifies else None

    @property
    def time_shares(self) -> dict[str, float | None]:
        """Shares of the decoding time, prompts left out: drafting, verifying, plain steps."""
        whole = self.draft_s + self.verify_s + self.plain_s
        parts = {"draft": self.draft_s, "verify": self.verify_s, "plain": self.plain_s}
        return {f"{name}_time_share": part / whole if whole else None for name, part in parts.items()}

    def facts(self) -> dict[str, float | None]:
        """Counts and shares by name, as the command line gives them."""
        return {
            "accepted_share": self.accepted_share,
            "tokens_per_verify": self.tokens_per_verify,
            "drafted_tokens": self.drafted,
            "accepted_tokens": self.accepted,
            "verifies": self.verifies,
            "plain_steps": self.plain_steps,
            "reread_tokens": self.repeated,
            **self.time_shares,
        }

    def clear(self) -> None:
        """Back to nothing, in place."""
        for field in fields(self):
            setattr(self, field.name, field.default)
