"""Compiling without a GPU what a call would launch: each form goes into Triton's cache on disk.

The entry is the one that `launch.Kernel` looks for on the card itself: the same source, options and target, `("cuda", sm, 32)`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from ctypes.util import find_library
from typing import Any

from triton.backends.compiler import GPUTarget

from titans_backends.backend import Candidate
from titans_backends.launching import ahead
from titans_backends.launching.ahead import CompileAhead, arriving
from titans_backends.launching.remember import Run, RunBackward

from .lanes import compiled
from .launch import TAPING, Form, Kernel, options_of, source_of

__all__ = ["ahead_of", "arriving", "collected"]


def collected(run: Callable[[Any, Candidate], object], call: Any, candidate: Candidate) -> list[tuple[Kernel, Form]]:
    """What a call on the CPU or on sizes alone (device "meta") would launch, each form once, in the order of the launches."""
    return ahead.collected(TAPING, run, call, candidate)


def ahead_of(run: Run, op: str = "", run_backward: RunBackward | None = None) -> CompileAhead:
    """An op module's `compile_ahead`, from its `run` and, for an op that trains, its name and `run_backward`; RuntimeError says what the compiler raised."""
    return ahead.ahead_of(TAPING, _compile, run, op, run_backward)


def _compile(launched: tuple[Kernel, Form], sm: int) -> None:
    kernel, form = launched
    reason = "" if kernel.interpreted else _compiled(kernel, form, sm)
    if reason:
        raise RuntimeError(f"{kernel.name}: {reason}")


@functools.cache
def _compiled(kernel: Kernel, form: Form, sm: int) -> str:
    """Compiles once in this process, unless it lies on disk already; what the compiler raised, or nothing."""
    source = source_of(kernel, form)
    try:
        made = compiled(source, options_of(form), GPUTarget("cuda", sm, 32))
        if _has_launchers():
            from triton.backends.nvidia.driver import CudaLauncher

            CudaLauncher(source, made.metadata)
    except Exception as error:  # kept, so that a form that fails is not tried for each bucket
        return f"{type(error).__name__}: {error}"
    return ""


@functools.cache
def _has_launchers() -> bool:
    """Whether every signature has a launcher in C that must be compiled too, as up to Triton 3.6, and a driver's library to link it with."""
    from triton.backends.nvidia import driver

    return hasattr(driver, "make_launcher") and find_library("cuda") is not None
