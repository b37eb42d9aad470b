"""The probe of an adapter: runs its smallest case and compares it with the contract's float64 reference. A call of an op never comes here."""

from __future__ import annotations

import torch

from titans_backends.backend import OpModule
from titans_backends.contracts.case import Case, build
from titans_backends.contracts.gated_delta_rule import CONTRACT, reference
from titans_backends.contracts.tolerance import compare, tolerance
from titans_backends.contracts.validate import validate
from titans_backends.errors import BackendError
from titans_backends.facts import signature_of
from titans_backends.machine import Machine
from titans_backends.verdict import ACCEPTED, Verdict, refused

__all__ = ["tried"]

_HEAD_DIM = 128


def tried(module: OpModule, machine: Machine) -> Verdict:
    """Whether a peer's gated_delta_rule on 64 tokens of one head can be imported, compiles and is right here."""
    case = Case("smallest", B=1, T=64, G=1, H=1, K=_HEAD_DIM, V=_HEAD_DIM, dtype=torch.bfloat16, given=("g",), options={"output_final_state": True})
    call = build(CONTRACT, case, machine.kind)
    signature = signature_of(CONTRACT, call, validate(CONTRACT, call))
    verdict = module.supports(signature, machine)
    if not verdict:
        return verdict
    try:
        outputs = module.run(call, module.candidates(signature, machine)[-1])  # the simplest comes last
        found = [None if got is None else got.cpu() for got in outputs]  # a kernel that faults says so here
    except BackendError:
        raise  # its import: doctor shows the traceback
    except Exception as error:  # whatever the peer, its compiler or the driver raises is the reason
        said = (str(error).strip() or "no message").splitlines()[0]
        return refused(f"the smallest case failed: {type(error).__name__}: {said}")
    for spec, got, want in zip(CONTRACT.outputs, found, reference(CONTRACT.to(call, torch.float64)), strict=True):  # type: ignore[arg-type]
        assert got is not None
        assert want is not None
        difference, limit = compare(spec.name, got, want), tolerance(torch.bfloat16).outputs
        if not difference.within(limit):
            return refused(f"the smallest case is wrong: {difference}, where {limit:.0e} is allowed")
    return ACCEPTED
