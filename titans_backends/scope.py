"""What the caller asked of the choice, scoped by context managers: a forced backend, batch invariance, tuning on first use.

Held in one context variable, so that threads and async tasks each have their own; dispatch reads it and decides nothing here.
"""

from __future__ import annotations

import contextlib
from contextvars import ContextVar, Token
from dataclasses import dataclass, replace
from typing import get_args

from titans_backends.signature import Launch

__all__ = ["DEFAULT", "Policy", "autotune", "current", "policy", "use_backend"]


@dataclass(frozen=True, slots=True)
class Policy:
    """`forced`: the only backend allowed. `batch_invariant`: one candidate and one chunk grid whatever the batch and length.

    `launch`: "graph", chosen as for a captured graph; None, as the call is launched.
    `tune_budget_s`: a call whose bucket has no row of this machine's own tunes it first, within so many seconds; None: never.
    """

    forced: str | None = None
    batch_invariant: bool = False
    launch: Launch | None = None
    tune_budget_s: float | None = None


DEFAULT = Policy()
_CURRENT: ContextVar[Policy] = ContextVar("titans_backends_policy", default=DEFAULT)
current = _CURRENT.get


_ENTERED: ContextVar[tuple[tuple[_Scope, Token[Policy]], ...]] = ContextVar("titans_backends_entered", default=())
"""What is entered and not yet left, with what each changed back to, outermost first."""


class _Scope(contextlib.ContextDecorator, contextlib.AbstractContextManager[Policy]):
    """Changes what is current where it is entered, not where it was made; may be entered again, one inside the other and in several threads or tasks too."""

    def __init__(self, **changes: object) -> None:
        self._changes = changes

    def __enter__(self) -> Policy:
        changed = replace(current(), **self._changes)  # type: ignore[arg-type]
        _ENTERED.set((*_ENTERED.get(), (self, _CURRENT.set(changed))))
        return changed

    def __exit__(self, *raised: object) -> None:
        entered = _ENTERED.get()
        mine = [place for place, (scope, _) in enumerate(entered) if scope is self]
        if not mine:
            raise RuntimeError(
                "use_backend, policy, autotune: this context was left where it was not entered; leave it in the thread or task that entered it"
            )
        _CURRENT.reset(entered[mine[-1]][1])
        _ENTERED.set((*entered[: mine[-1]], *entered[mine[-1] + 1 :]))


def use_backend(name: str) -> contextlib.AbstractContextManager[Policy]:
    """A context in which every call uses this backend or raises with its reasons; UnknownNameError for an unknown name."""
    from titans_backends import registry

    registry.get(name)
    return _Scope(forced=name)


def policy(*, batch_invariant: bool | None = None, launch: Launch | None = None) -> contextlib.AbstractContextManager[Policy]:
    """A context that changes how calls are chosen; what is None stays as it was.

    `batch_invariant`: a row's bits do not depend on what shares its batch, nor on the length of what follows it.
    `launch="graph"`: the kernel that a captured graph would get. A capture takes only what has run before, so warm up inside of it.
    """
    if batch_invariant is not None and not isinstance(batch_invariant, bool):
        raise TypeError(f"policy: batch_invariant must be True or False, got {batch_invariant!r}")
    if launch is not None and launch not in get_args(Launch):
        raise ValueError(f"policy: launch must be one of {', '.join(get_args(Launch))}, got {launch!r}")
    asked = {"batch_invariant": batch_invariant, "launch": launch}
    return _Scope(**{name: value for name, value in asked.items() if value is not None})


def autotune(*, budget_s: float = 20.0) -> contextlib.AbstractContextManager[Policy]:
    """A context in which a call at an untuned bucket measures it first, in a child process, and writes the user's cache."""
    if isinstance(budget_s, bool) or not isinstance(budget_s, (int, float)) or not budget_s > 0:
        raise ValueError(f"autotune: budget_s must be a positive number of seconds, got {budget_s!r}")
    return _Scope(tune_budget_s=float(budget_s))
