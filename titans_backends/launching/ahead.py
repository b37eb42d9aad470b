"""Compiling without a GPU what a call would launch: its launches are collected, nothing is launched, and each form goes to the backend's compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.validate import validate
from titans_backends.launching.remember import Run, RunBackward
from titans_backends.launching.tape import Outputs, Taping
from titans_backends.machine import Machine

__all__ = ["CompileAhead", "ahead_of", "arriving", "collected"]

Residual = Callable[[Any, Candidate], tuple[Tensor, ...]]
CompileAhead = Callable[[Any, Candidate, Machine], None]
F = TypeVar("F")


def collected(taping: Taping[F], run: Callable[[Any, Candidate], object], call: Any, candidate: Candidate) -> list[F]:
    """What a call on the CPU or on sizes alone (device "meta") would launch, each form once, in the order of the launches."""
    with taping.collecting() as forms:
        run(call, candidate)
    return list(forms)


def ahead_of(
    taping: Taping[F],
    compiled: Callable[[F, int], object],
    run: Run,
    op: str = "",
    run_backward: RunBackward | None = None,
    residual: Residual | None = None,
) -> CompileAhead:
    """An op module's `compile_ahead`, from its `run` and, for an op that trains, its name and `run_backward`.

    `compiled(form, sm)` compiles a form for a compute capability (90 for 9.0), and raises where the compiler does. `residual` makes tensors of the sizes that
    a backward with a residual is handed.
    """

    def either(call: Any, candidate: Candidate) -> object:
        if candidate.direction == "forward" or run_backward is None:
            return run(call, candidate)
        grads, states, needs = arriving(op, call, candidate)
        handed = residual(call, candidate) if candidate.residual and residual is not None else states
        return run_backward(call, grads, handed, needs, candidate)

    def compile_ahead(call: Any, candidate: Candidate, machine: Machine) -> None:
        """Compiles what running the candidate would launch. ValueError for a machine that is no CUDA card; what the compiler raises."""
        if machine.kind != "cuda" or machine.sm is None or torch.version.hip is not None:
            raise ValueError(f"it compiles ahead for CUDA cards whose capability is known, not for {machine.name}")
        for form in collected(taping, either, call, candidate):
            compiled(form, machine.sm)

    return compile_ahead


def arriving(op: str, call: Any, candidate: Candidate) -> tuple[Outputs, Tensor | None, frozenset[str]]:
    """What a backward is handed, of the right sizes: gradients of every output, saved states, and every input's need."""
    made = CONTRACTS[op]
    dims, given = validate(made, call), made.tensors(call)
    first = given[made.operands[0]]
    grads = []
    for output in made.outputs:
        asked = output.when is None or getattr(call, output.when)
        like = given[output.like] if output.like else None
        shape = tuple(like.shape) if like is not None and output.dims.startswith("*") else tuple(dims[letter] for letter in output.dims.split())
        grads.append(torch.empty(shape, dtype=torch.float32 if like is None else like.dtype, device=first.device) if asked else None)
    states = None
    if candidate.saves_states and made.grid is not None:
        chunks = -(-dims["T"] // made.grid(call))
        states = torch.empty(dims["B"], chunks, dims["H"], dims["K"], dims["V"], dtype=first.dtype, device=first.device)
    return tuple(grads), states, frozenset(name for name in made.differentiable if name in given)
