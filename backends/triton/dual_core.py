"""dual_core in Triton: "flat" is one kernel (dual_flat.py), "recurrent" the scan of S_slow with S_fast in the same pass (dual_recurrent.py)."""

from __future__ import annotations

from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.dual_core import DualCore
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict, refused

from . import slow_core
from .ahead import ahead_of
from .dual_backward import backward_candidates, run_backward
from .dual_flat import flat, flat_candidates
from .dual_recurrent import recurrent, recurrent_candidates
from .program import remembering, remembering_backward
from .serving import serves

__all__ = ["backward_candidates", "candidates", "compile_ahead", "remember", "remember_backward", "run", "run_backward", "supports"]


def supports(signature: Signature, machine: Machine) -> Verdict:
    """Every option, wherever the backend can work and its tiles fit the card; normalize_read as slow_core has it."""
    if signature.option("memory") == "flat":
        return serves(signature, machine)
    verdict = slow_core.supports(signature, machine)
    if verdict and not recurrent_candidates(signature, machine):
        sizes = f"K={signature.dim('K')}, V={signature.dim('V')} in {str(signature.dtype).removeprefix('torch.')}"
        return refused(
            f"no tiles of {sizes} with transform={signature.option('transform')!r} fit the shared memory of {machine.name}; use backend='eager'"
        )
    return verdict


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """The ways of the mode that was asked for."""
    return flat_candidates(signature, machine) if signature.option("memory") == "flat" else recurrent_candidates(signature, machine)


def run(call: DualCore, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """o and both final states, float32."""
    if candidate.variant == "flat":
        return flat(call, candidate), None, None
    return recurrent(call, candidate)


compile_ahead = ahead_of(run, "dual_core", run_backward)
remember, remember_backward = remembering(run), remembering_backward(run_backward)
