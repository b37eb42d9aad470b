"""The option `normalize_final`: S / (||S||_F + 1e-8) once at the end (SPEC.md 4), in place; 0 stays 0.

FLOP: 3 K V a head. Bytes: 12 K V a head. Floor: far below a launch. A block takes one head's state.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from .launch import Kernel
from .settings import WIDE
from .target import ONE, ZERO, cuda, float32

__all__ = ["normalize"]

_EPS = float32(1e-8)


def frobenius(threads: int) -> Callable[..., None]:
    """The kernel: block x is the sequence, y the head."""

    def kernel(state):
        squares = cuda.shared.array(threads, float32)
        thread = cuda.threadIdx.x
        sequence = cuda.blockIdx.x
        head = cuda.blockIdx.y
        entries = state.shape[2] * state.shape[3]
        square = ZERO
        for place in range(thread, entries, threads):
            held = state[sequence, head, place // state.shape[3], place % state.shape[3]]
            square += held * held
        squares[thread] = square
        cuda.syncthreads()
        total = ZERO
        for other in range(threads):
            total += squares[other]
        if total > ZERO:
            rate = ONE / (float32(math.sqrt(total)) + _EPS)
            for place in range(thread, entries, threads):
                state[sequence, head, place // state.shape[3], place % state.shape[3]] *= rate

    return kernel


_NORMALIZE = Kernel(frobenius)


def normalize(state: Tensor) -> Tensor:
    """The state `[N, H, K, V]`, normalised where it lies."""
    _NORMALIZE(state.shape[:2], WIDE, (WIDE,), state)
    return state
