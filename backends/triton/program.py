"""What a call launches through `launch`, remembered: an op module's `remember` and `remember_backward`."""

from __future__ import annotations

from titans_backends.launching import remember
from titans_backends.launching.remember import Remember, RememberBackward, Run, RunBackward

from .launch import TAPING

__all__ = ["remembering", "remembering_backward"]


def remembering(run: Run) -> Remember:
    """An op module's `remember`, from its `run`."""
    return remember.remembering(TAPING, run)


def remembering_backward(run_backward: RunBackward) -> RememberBackward:
    """An op module's `remember_backward`, from its `run_backward`."""
    return remember.remembering_backward(TAPING, run_backward)
