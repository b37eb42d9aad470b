"""Compiling without a GPU what a call would launch: each form's cubin goes to disk, where `engine` looks for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from titans_backends.backend import Candidate
from titans_backends.launching import ahead
from titans_backends.launching.ahead import CompileAhead, Residual, arriving
from titans_backends.launching.remember import Run, RunBackward

from .compile import architecture, cubin
from .launch import TAPING, Form

__all__ = ["ahead_of", "arriving", "collected"]


def collected(run: Callable[[Any, Candidate], object], call: Any, candidate: Candidate) -> list[Form]:
    """What a call on the CPU or on sizes alone (device "meta") would launch, each form once, in the order of the launches."""
    return ahead.collected(TAPING, run, call, candidate)


def ahead_of(run: Run, op: str = "", run_backward: RunBackward | None = None, residual: Residual | None = None) -> CompileAhead:
    """An op module's `compile_ahead`, from its `run` and, for an op that trains, its name, its `run_backward` and what makes residuals; CompileError holds
    NVRTC's log."""
    return ahead.ahead_of(TAPING, lambda form, sm: cubin(form, architecture(sm)), run, op, run_backward, residual)
