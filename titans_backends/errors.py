"""The errors that a caller may want to catch by type; everything else is a plain ValueError or TypeError.

Messages are complete sentences: what was asked, what was found, what would be accepted, what to type next.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "AccelerateError",
    "BackendError",
    "BackendRefusedError",
    "BoundCallMismatchError",
    "RanksError",
    "SwitchError",
    "UnknownNameError",
    "unknown",
]


class AccelerateError(ValueError):
    """`accelerate` found nothing that it knows in a model, or something that it knows and cannot swap; the message holds every reason."""


class UnknownNameError(ValueError):
    """An op, backend, variant or option of that name does not exist; the message lists the known ones."""


class BackendRefusedError(RuntimeError):
    """A forced backend, or every backend, refuses a call; the message holds every reason."""


class BackendError(RuntimeError):
    """A backend is broken: its module raised on import, declares what it does not have, or returns what it did not declare."""


class BoundCallMismatchError(ValueError):
    """A bound op was called with tensors that differ from the ones it was bound to."""


class RanksError(RuntimeError):
    """Ranks of one job cannot choose alike: one died, did not come, failed or differs; the message names it."""


class SwitchError(ValueError):
    """An environment switch has a value, or a name, that is not understood."""


def unknown(kind: str, name: object, known: Iterable[str]) -> UnknownNameError:
    """The error for an unknown name: says what it is called and what there is."""
    return UnknownNameError(f"unknown {kind} {name!r}; known: {', '.join(sorted(known)) or 'none'}")
