"""The probe: compiles the smallest case, runs it and compares it with the contract's float64 reference. A call of an op never comes here."""

from __future__ import annotations

import torch

from titans_backends.backend import Candidate
from titans_backends.contracts.fast_core import CONTRACT, FastCore, reference
from titans_backends.contracts.tolerance import compare, tolerance
from titans_backends.machine import Machine
from titans_backends.precision import float32_precision
from titans_backends.verdict import ACCEPTED, Verdict, refused

from .fast_core import run
from .toolchain import remember, requirements

__all__ = ["probe"]


def probe(machine: Machine) -> Verdict:
    """Whether fast_core on 32 tokens compiles here and is right; the outcome binds every later call of this process."""
    verdict = requirements(machine)
    if verdict:
        verdict = _tried(machine)
        remember(machine, verdict)
    return verdict


def _tried(machine: Machine) -> Verdict:
    call = _smallest(torch.device(machine.kind))
    try:
        o, _ = run(call, Candidate("inductor", "chunked"))
    except Exception as error:  # whatever the compiler raises is the reason
        said = (str(error).strip() or "no message").splitlines()[0]
        return refused(f"the smallest case failed: {type(error).__name__}: {said}")
    want, _ = reference(CONTRACT.to(call, torch.float64))  # type: ignore[arg-type]
    assert o is not None
    assert want is not None
    limit = tolerance(torch.float32, "highest" if machine.kind == "cpu" else float32_precision(on_cuda=True)).outputs
    difference = compare("o", o, want)
    return ACCEPTED if difference.within(limit) else refused(f"the smallest case is wrong: {difference}, where {limit:.0e} is allowed")


def _smallest(device: torch.device) -> FastCore:
    """Two chunks of 16 tokens, one head, with a decay; the same numbers everywhere."""
    source = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 32, 1, 16, generator=source).to(device) for _ in range(3))
    return FastCore(q, k, v, g=-0.1 * torch.rand(1, 32, 1, generator=source).to(device), chunk_size=16)
