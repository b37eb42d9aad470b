"""C = A B, batched, and C = A B + D E: the last line of SPEC.md 3 with T given, and its gradients. No triangle is assumed.

A block makes a square tile of C; it walks along the inner dimension with one tile of each operand in shared memory. FLOP: 2 m n p a matrix. Bytes: each
operand read n / tile times. Floor for fused_uw on 2048 tokens of 12 heads of 32 in chunks of 64, on an H100: 6 us by the bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .launch import Kernel
from .settings import SIMULATED_TILE
from .target import ZERO, cuda, float32

__all__ = ["product"]

_TILE = 16


def tiled_product(tile: int) -> Callable[..., None]:
    """The kernel: block x is the matrix of the batch and the tile's row, y the tile's column; a thread per element."""
    pitch = tile + 1

    def kernel(tiles, pairs, a, b, d, e, c):
        left = cuda.shared.array((tile, pitch), float32)
        right = cuda.shared.array((tile, pitch), float32)
        i = cuda.threadIdx.x // tile
        j = cuda.threadIdx.x % tile
        batch = cuda.blockIdx.x // tiles
        row = cuda.blockIdx.x % tiles * tile + i
        column = cuda.blockIdx.y * tile + j
        total = ZERO
        for pair in range(pairs):
            inner = d.shape[2] if pair else a.shape[2]
            for start in range(0, inner, tile):
                cuda.syncthreads()
                left[i, j] = ZERO
                right[i, j] = ZERO
                if row < c.shape[1] and start + j < inner:
                    left[i, j] = d[batch, row, start + j] if pair else a[batch, row, start + j]
                if start + i < inner and column < c.shape[2]:
                    right[i, j] = e[batch, start + i, column] if pair else b[batch, start + i, column]
                cuda.syncthreads()
                for m in range(tile):
                    total += left[i, m] * right[m, j]
        if row < c.shape[1] and column < c.shape[2]:
            c[batch, row, column] = total

    return kernel


_PRODUCT = Kernel(tiled_product)


def product(a: Tensor, b: Tensor, d: Tensor | None = None, e: Tensor | None = None) -> Tensor:
    """A B, or A B + D E, of `[n, *, *]` in float32."""
    c = torch.empty(a.shape[0], a.shape[1], b.shape[2], dtype=a.dtype, device=a.device)
    tile = SIMULATED_TILE or _TILE
    tiles = -(-a.shape[1] // tile)
    both = d is not None and e is not None
    _PRODUCT((a.shape[0] * tiles, -(-b.shape[2] // tile)), tile * tile, (tile,), tiles, 1 + both, a, b, d if both else a, e if both else b, c)
    return c
