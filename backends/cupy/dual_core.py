"""dual_core in CUDA C++: "flat" in one launch (dual_flat.py)."""

from __future__ import annotations

from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.dual_core import DualCore
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict, refused

from .ahead import ahead_of
from .dual_flat import flat, flat_candidates, serves_flat
from .program import remembering
from .serving import serves

__all__ = ["candidates", "compile_ahead", "remember", "run", "supports"]


def supports(signature: Signature, machine: Machine) -> Verdict:
    """The flat mode on chunks of up to 128 tokens."""
    verdict = serves(signature, machine)
    if signature.option("memory") == "flat":
        return verdict & serves_flat(signature, machine)
    return verdict & refused("memory='recurrent' is not written yet; use backend='triton'")


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """The ways of the mode that was asked for."""
    return flat_candidates(signature, machine)


def run(call: DualCore, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """o, and both final states where the mode has them."""
    return flat(call, candidate), None, None


compile_ahead = ahead_of(run)
remember = remembering(run)
