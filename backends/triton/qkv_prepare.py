"""qkv_prepare in one launch, and its backward in two: `conv_rows.py` and `conv_gradients.py`.

Rows of q, k and v may lie anywhere: parts of one joint projection are read where they are.
"""

from __future__ import annotations

from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.qkv_prepare import QKVPrepare, parts
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict

from .ahead import ahead_of
from .conv_parts import backward_ways, convolved, convolved_backward, ways
from .program import remembering, remembering_backward
from .serving import serves

__all__ = ["backward_candidates", "candidates", "compile_ahead", "remember", "remember_backward", "run", "run_backward", "supports"]

_INPUTS = {"x": "", "weight": "_weight", "bias": "_bias", "initial_state": "_state"}
"""What `short_conv` calls an input, and what follows the tensor's letter here."""


def supports(signature: Signature, machine: Machine) -> Verdict:
    """What `serving.serves` says; every option."""
    return serves(signature, machine)


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """Tiles of tokens."""
    return ways(signature)


def backward_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """Walks over tokens."""
    return backward_ways(signature)


def run(call: QKVPrepare, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """q, k and v, contiguous, then the last four inputs of each."""
    return convolved(parts(call), call.qk_norm, candidate)


def run_backward(
    call: QKVPrepare, grads: tuple[Tensor | None, ...], states: Tensor | None, needs: frozenset[str], candidate: Candidate
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, the three weights, the three biases and the three states, in that order."""
    wanted = tuple(frozenset(name for name, tail in _INPUTS.items() if letter + tail in needs) for letter in "qkv")
    found = convolved_backward(parts(call), call.qk_norm, grads, wanted, candidate)
    return tuple(found[part][name] for name in range(4) for part in range(3))


compile_ahead = ahead_of(run, "qkv_prepare", run_backward)
remember, remember_backward = remembering(run), remembering_backward(run_backward)
