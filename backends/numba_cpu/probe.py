"""The probe: compiles the decode kernel, runs it once and compares it with the contract's float64 reference. A call of an op never comes here."""

from __future__ import annotations

import torch

from titans_backends.backend import Candidate
from titans_backends.contracts.gated_delta_step import CONTRACT, GatedDeltaStep, reference
from titans_backends.contracts.tolerance import compare, tolerance
from titans_backends.machine import Machine
from titans_backends.verdict import ACCEPTED, Verdict, refused

from .gated_delta_step import run

__all__ = ["probe"]


def probe(machine: Machine) -> Verdict:
    """Whether one token of gated_delta_step compiles here and is right."""
    call = _smallest()
    try:
        outputs = run(call, Candidate("numba_cpu", "tokens"))
    except Exception as error:  # whatever Numba or LLVM raises is the reason
        said = (str(error).strip() or "no message").splitlines()[0]
        return refused(f"the smallest case failed: {type(error).__name__}: {said}")
    limit = tolerance(torch.float32).outputs
    for spec, got, want in zip(CONTRACT.outputs, outputs, reference(CONTRACT.to(call, torch.float64)), strict=True):  # type: ignore[arg-type]
        assert got is not None
        assert want is not None
        difference = compare(spec.name, got, want)
        if not difference.within(limit):
            return refused(f"the smallest case is wrong: {difference}, where {limit:.0e} is allowed")
    return ACCEPTED


def _smallest() -> GatedDeltaStep:
    """One token, one head; the same numbers everywhere."""
    source = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 1, 16, generator=source, dtype=torch.float32, device="cpu") for _ in range(3))
    state = torch.randn(1, 1, 16, 16, generator=source, dtype=torch.float32, device="cpu")
    beta = torch.rand(1, 1, 1, generator=source, dtype=torch.float32, device="cpu")
    return GatedDeltaStep(q, k, v, beta, -0.1 * beta, state=state, qk_l2norm=True)
