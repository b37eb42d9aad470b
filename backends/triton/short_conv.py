"""short_conv in one launch, and its backward in two: `conv_rows.py` and `conv_gradients.py`, with one tensor in place of three."""

from __future__ import annotations

from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.short_conv import ShortConv
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict

from .ahead import ahead_of
from .conv_parts import backward_ways, convolved, convolved_backward, ways
from .program import remembering, remembering_backward
from .serving import serves

__all__ = ["backward_candidates", "candidates", "compile_ahead", "remember", "remember_backward", "run", "run_backward", "supports"]


def supports(signature: Signature, machine: Machine) -> Verdict:
    """What `serving.serves` says; every option."""
    return serves(signature, machine)


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """Tiles of tokens."""
    return ways(signature)


def backward_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """Walks over tokens."""
    return backward_ways(signature)


def run(call: ShortConv, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """y, contiguous, and the last four inputs."""
    _, _, y, _, _, final = convolved((None, None, call), "none", candidate)
    return y, final


def run_backward(
    call: ShortConv, grads: tuple[Tensor | None, ...], states: Tensor | None, needs: frozenset[str], candidate: Candidate
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias and initial_state, in that order."""
    empty: frozenset[str] = frozenset()
    return convolved_backward((None, None, call), "none", (None, None, grads[0], None, None, grads[1]), (empty, empty, needs), candidate)[2]


compile_ahead = ahead_of(run, "short_conv", run_backward)
remember, remember_backward = remembering(run), remembering_backward(run_backward)
