"""G, the running log decay inside a chunk (SPEC.md 1): G_i = sum over j <= i of g_j, begun anew in every chunk.

Kept in float64: a few tokens of g = -20 push |G| to where float32 cannot hold the differences that exp(G_i - G_j) needs. A token's g counts as at
least -128, since exp(-128) is 0 in float32; so -inf is a clean reset. FLOP: C / 2 a token and head. Bytes: 4 read and 8 written a token and head.
Floor: the bytes, 0.1 us for 2048 tokens of 12 heads on an H100. Each token sums for itself: no thread waits for another.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .absent import nothing
from .grid import Grid, locate
from .launch import Kernel
from .settings import THREADS
from .target import cuda, float64

__all__ = ["running_log"]


def log_decay() -> Callable[..., None]:
    """The kernel: a block per chunk and head, a thread per token."""

    def kernel(bounds, packed, tokens, chunk, offset, g, log):
        head = cuda.blockIdx.y
        row, _, _, first, stop, _ = locate(bounds, packed, tokens, chunk, offset, cuda.blockIdx.x)
        for token in range(first + cuda.threadIdx.x, stop, cuda.blockDim.x):
            total = 0.0
            for earlier in range(first, token + 1):
                total += max(float64(g[row, earlier, head]), -128.0)
            log[row, token, head] = total

    return kernel


_LOG_DECAY = Kernel(log_decay)


def running_log(g: Tensor | None, grid: Grid, like: Tensor) -> Tensor:
    """G `[B, T, H]` in float64; without g a zero that is read everywhere."""
    if g is None:
        return nothing(like, *like.shape[:3], dtype=torch.float64)
    log = torch.empty(g.shape, dtype=torch.float64, device=g.device)
    _LOG_DECAY((grid.slots, g.shape[2]), THREADS, (), *grid.args, g.float(), log)
    return log
