"""The probe: compiles the decode kernel, runs it once and compares it with the contract's float64 reference. A call of an op never comes here."""

from __future__ import annotations

import torch

from titans_backends.contracts.gated_delta_step import CONTRACT, GatedDeltaStep, reference
from titans_backends.contracts.tolerance import compare, tolerance
from titans_backends.contracts.validate import validate
from titans_backends.facts import signature_of
from titans_backends.machine import Machine
from titans_backends.verdict import ACCEPTED, Verdict, refused

from .gated_delta_step import candidates, run, supports

__all__ = ["probe"]


def probe(machine: Machine) -> Verdict:
    """Whether two tokens of gated_delta_step compile here and are right: Numba wants NVVM, NVRTC and nvJitLink beside the driver."""
    call = _smallest(torch.device(machine.kind))
    signature = signature_of(CONTRACT, call, validate(CONTRACT, call))
    verdict = supports(signature, machine)
    if not verdict:
        return verdict
    try:
        outputs = run(call, candidates(signature, machine)[0])
        found = [None if got is None else got.cpu() for got in outputs]  # a kernel that faults says so here
    except Exception as error:  # whatever Numba, NVVM or the driver raises is the reason
        said = (str(error).strip() or "no message").splitlines()[0]
        return refused(f"the smallest case failed: {type(error).__name__}: {said}")
    limit = tolerance(torch.float32).outputs
    for spec, got, want in zip(CONTRACT.outputs, found, reference(CONTRACT.to(call, torch.float64)), strict=True):  # type: ignore[arg-type]
        assert got is not None
        assert want is not None
        difference = compare(spec.name, got, want)
        if not difference.within(limit):
            return refused(f"the smallest case is wrong: {difference}, where {limit:.0e} is allowed")
    return ACCEPTED


def _smallest(device: torch.device) -> GatedDeltaStep:
    """Two tokens, one head; the same numbers everywhere."""
    source = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 1, 16, generator=source).to(device) for _ in range(3))
    state = torch.randn(1, 1, 16, 16, generator=source).to(device)
    beta = torch.rand(1, 2, 1, generator=source).to(device)
    return GatedDeltaStep(q, k, v, beta, -0.1 * beta, state=state, qk_l2norm=True)
