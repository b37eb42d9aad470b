"""Compiling without a GPU what a call would launch: its launches are collected, and each form goes into Triton's cache on disk.

The entry is the one that `launch.Kernel` looks for on the card itself: the same source, options and target, `("cuda", machine.sm, 32)`. Nothing is
launched, and nothing is remembered by `program`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from ctypes.util import find_library
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from titans_backends.backend import Candidate
from titans_backends.machine import Machine

from . import launch
from .program import Run

__all__ = ["CompileAhead", "ahead_of", "collected"]

CompileAhead = Callable[[Any, Candidate, Machine], None]


def collected(run: Run, call: Any, candidate: Candidate) -> list[tuple[launch.Kernel, launch.Form]]:
    """What a call on the CPU or on sizes alone (device "meta") would launch, each form once, in the order of the launches."""
    with launch.collecting() as forms:
        run(call, candidate)
    return list(forms)


def ahead_of(run: Run) -> CompileAhead:
    """An op module's `compile_ahead`, from its `run`."""

    def compile_ahead(call: Any, candidate: Candidate, machine: Machine) -> None:
        """Compiles what `run(call, candidate)` would launch. ValueError for a machine that is no CUDA card, RuntimeError with what the compiler raised."""
        if machine.kind != "cuda" or machine.sm is None or torch.version.hip is not None:
            raise ValueError(f"the Triton backend compiles ahead for CUDA cards whose capability is known, not for {machine.name}")
        for kernel, form in collected(run, call, candidate):
            reason = "" if kernel.interpreted else _compiled(kernel, form, machine.sm)
            if reason:
                raise RuntimeError(f"{kernel.name}: {reason}")

    return compile_ahead


@functools.cache
def _compiled(kernel: launch.Kernel, form: launch.Form, sm: int) -> str:
    """Compiles once in this process, unless it lies on disk already; what the compiler raised, or nothing."""
    source = launch.source_of(kernel, form)
    try:
        made = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=launch.options_of(form))
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
