"""The probe: compiles the smallest case, runs it and compares it with the contract's float64 reference. A call of an op never comes here."""

from __future__ import annotations

import torch

from titans_backends.contracts.case import Case, build
from titans_backends.contracts.gated_delta_step import CONTRACT, reference
from titans_backends.contracts.tolerance import compare, tolerance
from titans_backends.contracts.validate import validate
from titans_backends.facts import signature_of
from titans_backends.machine import Machine
from titans_backends.verdict import ACCEPTED, Verdict, refused

from .gated_delta_step import candidates, run, supports

__all__ = ["probe"]


def probe(machine: Machine) -> Verdict:
    """Whether gated_delta_step's default compiles on this machine and is right: CuPy wants NVRTC, and a driver that takes its cubins."""
    call = build(CONTRACT, Case("smallest", B=1, T=1, G=1, H=1, K=32, V=32, given=("g",)), machine.kind)
    signature = signature_of(CONTRACT, call, validate(CONTRACT, call))
    verdict = supports(signature, machine)
    if not verdict:
        return verdict
    try:
        o, _ = run(call, candidates(signature, machine)[0])  # type: ignore[arg-type]
        assert o is not None
        o = o.cpu()  # a kernel that faults says so here
    except Exception as error:  # whatever CuPy, NVRTC or the driver raises is the reason
        said = (str(error).strip() or "no message").splitlines()[0]
        return refused(f"the smallest case failed: {type(error).__name__}: {said}")
    want, _ = reference(CONTRACT.to(call, torch.float64))  # type: ignore[arg-type]
    assert want is not None
    limit = tolerance(torch.float32).outputs
    difference = compare("o", o, want)
    return ACCEPTED if difference.within(limit) else refused(f"the smallest case is wrong: {difference}, where {limit:.0e} is allowed")
