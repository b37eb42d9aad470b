"""dual_core in CUDA C++: "flat" in one launch (dual_flat.py), "recurrent" the slow core's launches and then the fast core's (dual_recurrent.py)."""

from __future__ import annotations

from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.dual_core import DualCore
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict

from .ahead import ahead_of
from .dual_backward import backward_candidates, run_backward
from .dual_flat import flat, flat_candidates, serves_flat
from .dual_recurrent import recurrent, recurrent_candidates, serves_recurrent
from .program import remembering, remembering_backward
from .serving import serves

__all__ = ["backward_candidates", "candidates", "compile_ahead", "remember", "remember_backward", "run", "run_backward", "supports"]


def supports(signature: Signature, machine: Machine) -> Verdict:
    """Every option; the flat mode and, but for the exact rule, the recurrent one on chunks of up to 128 tokens."""
    if signature.option("memory") == "flat":
        return serves(signature, machine) & serves_flat(signature, machine)
    return serves_recurrent(signature, machine)


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """The ways of the mode that was asked for."""
    return flat_candidates(signature, machine) if signature.option("memory") == "flat" else recurrent_candidates(signature, machine)


def run(call: DualCore, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """o, and both final states where the mode has them."""
    if call.memory == "flat":
        return flat(call, candidate), None, None
    return recurrent(call, candidate)


compile_ahead = ahead_of(run, "dual_core", run_backward)
remember, remember_backward = remembering(run), remembering_backward(run_backward)
