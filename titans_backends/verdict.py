"""A decision together with its reasons: may this backend serve this call, and if not, why not.

A verdict never says no without a sentence, and it holds every reason, not the first.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ACCEPTED", "Verdict", "refused"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Accepted when there is no reason against it; truthy exactly then."""

    reasons: tuple[str, ...] = ()

    @property
    def accepted(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.reasons

    def __bool__(self) -> bool:
        return not self.reasons

    def __and__(self, other: Verdict) -> Verdict:
        """Both must accept; the reasons of both are kept."""
        return Verdict(self.reasons + other.reasons)

    def __str__(self) -> str:
        return "accepted" if self.accepted else "; ".join(self.reasons)


ACCEPTED = Verdict()


def refused(*reasons: str) -> Verdict:
    """A refusal with at least one reason."""
    if not reasons:
        raise ValueError("refused() needs at least one reason")
    return Verdict(tuple(reasons))
