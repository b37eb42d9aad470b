"""The option `qk_l2norm`: x * rsqrt(sum(x^2) + 1e-6) for the rows of q and k (SPEC.md 1, as FLA and transformers have it).

FLOP: 3 K a row. Bytes: 8 K a row. Floor: the bytes, 1 us for q and k of 2048 tokens of 12 heads of 32 on an H100. A warp takes a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .launch import Kernel
from .settings import LANES
from .target import ONE, ZERO, cuda, float32

__all__ = ["unit"]

_EPS = float32(1e-6)


def unit_rows(lanes: int) -> Callable[..., None]:
    """The kernel: a block of `lanes` threads per row; block x is the token of all batch rows, y the head."""

    def kernel(x, out):
        parts = cuda.shared.array(lanes, float32)
        row = cuda.blockIdx.x // x.shape[1]
        token = cuda.blockIdx.x % x.shape[1]
        head = cuda.blockIdx.y
        lane = cuda.threadIdx.x
        square = ZERO
        for d in range(lane, x.shape[3], lanes):
            square += x[row, token, head, d] * x[row, token, head, d]
        parts[lane] = square
        cuda.syncthreads()
        total = ZERO
        for other in range(lanes):
            total += parts[other]
        rate = ONE / float32(math.sqrt(total + _EPS))
        for d in range(lane, x.shape[3], lanes):
            out[row, token, head, d] = x[row, token, head, d] * rate

    return kernel


_UNIT = Kernel(unit_rows)


def unit(x: Tensor) -> Tensor:
    """The rows of `x [B, T, G, K]`, float32, at unit length in new memory."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _UNIT((x.shape[0] * x.shape[1], x.shape[2]), LANES, (LANES,), x, out)
    return out
