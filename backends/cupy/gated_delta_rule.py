"""gated_delta_rule in CUDA C++: heads of up to 64 in segments side by side in one launch (delta_segments.py), all in a walk over prepared blocks (delta_walk.py),
heads of 128 on Hopper by its own products (delta_hopper.py)."""

from __future__ import annotations

from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.gated_delta_rule import GatedDeltaRule
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict

from . import delta_hopper
from .ahead import ahead_of
from .delta_backward import backward_candidates, run_backward
from .delta_kept import keeping, residual
from .delta_segments import segments, segments_candidates
from .delta_walk import run_walk, walk_candidates
from .program import remembering, remembering_backward
from .serving import WIDEST, serves

__all__ = ["backward_candidates", "candidates", "compile_ahead", "remember", "remember_backward", "run", "run_backward", "supports"]

_KEEPING = 2
"""Walks that are offered with what they made handed on."""


def supports(signature: Signature, machine: Machine) -> Verdict:
    """What `serving.serves` says; every option, at any chunk size: the rule is the same on every grid."""
    return serves(signature, machine, WIDEST)


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """The shapes that fit the card: where heads are narrow segments, and one walk; in training also walks that hand on what they made."""
    segmented, walks = segments_candidates(signature, machine), walk_candidates(signature, machine)
    wide = delta_hopper.forward_candidates(signature, machine)
    return (segmented + walks[:1] if segmented else walks) + wide + keeping(wide or walks, signature, _KEEPING)


def run(call: GatedDeltaRule, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """o and the final state."""
    if candidate.variant == "segments":
        return segments(call, candidate)
    return delta_hopper.run(call, candidate) if "carriers" in dict(candidate.params) else run_walk(call, candidate)


compile_ahead = ahead_of(run, "gated_delta_rule", run_backward, residual)
remember, remember_backward = remembering(run), remembering_backward(run_backward)
