"""u = A V and w = A K for many matrices A of C x C: a tile of A is read once and multiplies a tile of both.

A program of BLOCK rows moves, for each inner tile, BLOCK x INNER of A and INNER x (BLOCK_V + BLOCK_K) of the operands, for 2 BLOCK INNER (BLOCK_V +
BLOCK_K) FLOP: at C = 64 and head_dim 128 72 KB for 2 MFLOP, bound by device memory, so that only enough bytes in flight matter; from C = 512 by products.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import Kernel

__all__ = ["PRODUCT", "SERIES"]


@triton.jit
def _load(x, row, column, rows, row_t, EVEN: tl.constexpr, columns, WHOLE: tl.constexpr):
    """Rows and columns of a matrix; what lies outside is 0 and not read. EVEN: all its rows exist, WHOLE: all its columns."""
    at = x + row[:, None] * row_t + column[None, :]
    if EVEN and WHOLE:
        tile = tl.load(at)
    elif EVEN:
        tile = tl.load(at, mask=column[None, :] < columns, other=0.0)
    elif WHOLE:
        tile = tl.load(at, mask=row[:, None] < rows, other=0.0)
    else:
        tile = tl.load(at, mask=(row[:, None] < rows) & (column[None, :] < columns), other=0.0)
    return tile


@triton.jit
def _store(x, value, row, column, rows, EVEN: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr):
    """The same of a contiguous result."""
    at = x + row[:, None] * COLUMNS + column[None, :]
    value = value.to(x.dtype.element_ty)
    if EVEN and WHOLE:
        tl.store(at, value)
    else:
        tl.store(at, value, mask=(row[:, None] < rows) & (column[None, :] < COLUMNS))


@triton.jit
def _product(
    attn, v, k, u, w, size, matrices, attn_b, attn_t, v_b, v_t, k_b, k_t,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr,
    EVEN: tl.constexpr, ONE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A block of rows and a tile of columns of one matrix; ONE: its inner dimension is one tile."""
    program = tl.program_id(0)
    blocks = 1 if ONE and BLOCK >= INNER else tl.cdiv(size, BLOCK)
    matrix = (program // TILES // blocks).to(tl.int64)
    row = (program // TILES) % blocks * BLOCK + tl.arange(0, BLOCK)
    key = program % TILES * BLOCK_K + tl.arange(0, BLOCK_K)
    value = program % TILES * BLOCK_V + tl.arange(0, BLOCK_V)
    inner = tl.arange(0, INNER)
    attn += matrix * attn_b
    v += matrix * v_b
    k += matrix * k_b
    if ONE:
        a = _load(attn, row, inner, size, attn_t, EVEN, size, EVEN)
        v_tile = _load(v, inner, value, size, v_t, EVEN, V, V == TILES * BLOCK_V)
        k_tile = _load(k, inner, key, size, k_t, EVEN, K, K == TILES * BLOCK_K)
        u_tile = tl.dot(a, v_tile, input_precision=DOT)
        w_tile = tl.dot(a, k_tile, input_precision=DOT)
    else:
        u_tile = tl.zeros([BLOCK, BLOCK_V], tl.float32)
        w_tile = tl.zeros([BLOCK, BLOCK_K], tl.float32)
        for begin in range(0, size, INNER):
            at = begin + inner
            a = _load(attn, row, at, size, attn_t, EVEN, size, EVEN)
            v_tile = _load(v, at, value, size, v_t, EVEN, V, V == TILES * BLOCK_V)
            k_tile = _load(k, at, key, size, k_t, EVEN, K, K == TILES * BLOCK_K)
            u_tile = tl.dot(a, v_tile, u_tile, input_precision=DOT)
            w_tile = tl.dot(a, k_tile, w_tile, input_precision=DOT)
    _store(u + matrix * size * V, u_tile, row, value, size, EVEN, V, V == TILES * BLOCK_V)
    _store(w + matrix * size * K, w_tile, row, key, size, EVEN, K, K == TILES * BLOCK_K)


@triton.jit
def _series(
    attn, v, k, u, w, size, matrices, attn_b, attn_t, v_b, v_t, k_b, k_t,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr,
    EVEN: tl.constexpr, COUNT: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A tile of columns of COUNT matrices that are one tile each: the next one's loads run during this one's products."""
    program = tl.program_id(0)
    first = program // TILES * COUNT
    row = tl.arange(0, BLOCK)
    inner = tl.arange(0, INNER)
    key = program % TILES * BLOCK_K + tl.arange(0, BLOCK_K)
    value = program % TILES * BLOCK_V + tl.arange(0, BLOCK_V)
    for step in range(tl.minimum(COUNT, matrices - first)):
        matrix = first.to(tl.int64) + step
        a = _load(attn + matrix * attn_b, row, inner, size, attn_t, EVEN, size, EVEN)
        v_tile = _load(v + matrix * v_b, inner, value, size, v_t, EVEN, V, V == TILES * BLOCK_V)
        k_tile = _load(k + matrix * k_b, inner, key, size, k_t, EVEN, K, K == TILES * BLOCK_K)
        _store(u + matrix * size * V, tl.dot(a, v_tile, input_precision=DOT), row, value, size, EVEN, V, V == TILES * BLOCK_V)
        _store(w + matrix * size * K, tl.dot(a, k_tile, input_precision=DOT), row, key, size, EVEN, K, K == TILES * BLOCK_K)


PRODUCT, SERIES = Kernel(_product), Kernel(_series)
