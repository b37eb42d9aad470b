"""u and w of a chunk (SPEC.md 3): A = -stril(diag(b) K K^T * Gamma), then u = T (b * V) and w = T (b * exp(G) * K).

exact: T = (I - A)^-1 by forward substitution, never inverted: row i of u is b_i v_i + sum over j < i of A_ij u_j. Every column of [u | w] is solved by
one thread, which waits for no other. lam: T = I + A + stril(A A^T), so the same sum over the right-hand side's rows. none: T = I. `transposed`: T^T in place of T,
from the last row to the first, for the gradients.

FLOP a token and head: C K for A (half of K K^T), C (K + V) for the substitution. Bytes: 4 (K + V) read, 4 (K + V) written. Floor for 2048 tokens of
12 heads of 32 on an H100: 4 us by the bytes. Shared memory: A's lower triangle, packed row after row, and a slice of the keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from .grid import Grid, locate
from .launch import Kernel
from .settings import LANES, SIMULATED_TILE, THREADS, power_of_two
from .target import ZERO, cuda, float32

__all__ = ["EXACT", "LAM", "LARGEST_CHUNK", "NONE", "TRANSFORMS", "transform_back", "transform_chunks"]

EXACT, LAM, NONE = 0, 1, 2
TRANSFORMS = {"exact": EXACT, "lam": LAM, "none": NONE}
LARGEST_CHUNK = 128
"""Tokens of the largest chunk: its packed triangle takes 32 of the 48 KiB."""


def uw_chunks(capacity: int, keys: int, values: int, slice_keys: int, threads: int, lanes: int) -> Callable[..., None]:
    """The kernel: a block per chunk and head. `capacity` tokens at most; the keys are multiplied `slice_keys` columns at a time."""
    triangle_size = capacity * (capacity - 1) // 2
    warps = threads // lanes
    pitch = slice_keys + 1

    def kernel(bounds, packed, tokens, chunk, offset, transform, transposed, columns, k, beta, log, x, z, u, w):
        a = cuda.shared.array(triangle_size, float32)
        part = cuda.shared.array((capacity, pitch), float32)
        solved = cuda.local.array(capacity, float32)
        thread = cuda.threadIdx.x
        warp = thread // lanes
        lane = thread % lanes
        head = cuda.blockIdx.y
        group = head // (u.shape[2] // k.shape[2])
        z_head = head // (u.shape[2] // z.shape[2])
        row, _, _, first, stop, _ = locate(bounds, packed, tokens, chunk, offset, cuda.blockIdx.x)
        count = stop - first

        # K K^T below the diagonal, a slice of the keys at a time: a warp takes rows, its lanes the columns
        for i in range(warp, count, warps):
            for j in range(lane, i, lanes):
                a[i * (i - 1) // 2 + j] = ZERO
        for start in range(0, keys, slice_keys):
            cuda.syncthreads()
            for place in range(thread, count * slice_keys, threads):
                i = place // slice_keys
                d = place % slice_keys
                part[i, d] = k[row, first + i, group, start + d] if start + d < keys else ZERO
            cuda.syncthreads()
            for i in range(warp, count, warps):
                for j in range(lane, i, lanes):
                    dot = ZERO
                    for d in range(slice_keys):
                        dot += part[i, d] * part[j, d]
                    a[i * (i - 1) // 2 + j] += dot
        # A = -b_i Gamma_ij (k_i . k_j)
        for i in range(warp, count, warps):
            for j in range(lane, i, lanes):
                gamma = math.exp(float32(log[row, first + i, head] - log[row, first + j, head]))
                a[i * (i - 1) // 2 + j] *= -beta[row, first + i, head] * gamma
        cuda.syncthreads()

        # lam: A + stril(A A^T) in A's own place, the last row first, since row i needs the rows before it
        if transform == LAM:
            for above in range(1, count):
                i = count - above
                both = ZERO
                if thread < i:
                    for m in range(thread):
                        both += a[i * (i - 1) // 2 + m] * a[thread * (thread - 1) // 2 + m]
                cuda.syncthreads()
                if thread < i:
                    a[i * (i - 1) // 2 + thread] += both
                cuda.syncthreads()

        # [u | w], a column a thread, from the first row on; transposed, from the last
        for column in range(thread, columns, threads):
            for step in range(count):
                i = count - 1 - step if transposed else step
                token = first + i
                right = x[row, token, head, column] if column < values else z[row, token, z_head, column - values]
                if not transposed:
                    right *= beta[row, token, head]
                    if column >= values:
                        right *= math.exp(float32(log[row, token, head]))
                total = right
                if transform != NONE and transposed:
                    for j in range(i + 1, count):
                        total += a[j * (j - 1) // 2 + i] * solved[j]
                elif transform != NONE:
                    for j in range(i):
                        total += a[i * (i - 1) // 2 + j] * solved[j]
                solved[i] = right if transform == LAM else total
                if column < values:
                    u[row, token, head, column] = total
                else:
                    w[row, token, head, column - values] = total

    return kernel


_UW = Kernel(uw_chunks)


def transform_chunks(k: Tensor, v: Tensor, beta: Tensor, log: Tensor, grid: Grid, transform: str, u: Tensor, w: Tensor | None) -> None:
    """Writes `u [B, T, H, V]` and `w [B, T, H, K]`; without w, which a memory that reads no state does not need, u alone."""
    keys, values = k.shape[3], v.shape[3]
    capacity = power_of_two(grid.chunk, 8)
    slice_keys = min(power_of_two(keys, 4), SIMULATED_TILE or 16)
    columns = values if w is None else values + keys
    _UW(
        (grid.slots, v.shape[2]), THREADS, (capacity, keys, values, slice_keys, THREADS, LANES),
        *grid.args, TRANSFORMS[transform], 0, columns, k, beta, log, v, k, u, u if w is None else w,
    )  # fmt: skip


def transform_back(k: Tensor, beta: Tensor, log: Tensor, grid: Grid, transform: str, du: Tensor, dw: Tensor, dx: Tensor, dz: Tensor) -> None:
    """Writes dx = T^T du `[B, T, H, V]` and dz = T^T dw `[B, T, H, K]` (SPEC.md 10)."""
    keys, values = dw.shape[3], du.shape[3]
    slice_keys = min(power_of_two(keys, 4), SIMULATED_TILE or 16)
    _UW(
        (grid.slots, du.shape[2]), THREADS, (power_of_two(grid.chunk, 8), keys, values, slice_keys, THREADS, LANES),
        *grid.args, TRANSFORMS[transform], 1, values + keys, k, beta, log, du, dw, dx, dz,
    )  # fmt: skip
