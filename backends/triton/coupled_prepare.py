"""coupled_core before and behind the walk for chunks of one block of at most 64 tokens: all that does not hang on the states in one launch, the output in another.

    prepare    T of uw_transform, u = T beta V, w = T beta K, the walk's factors A = K^T w and B = K^T u, and what the output wants of them:
               the reader P = scale Q - M w and the inside M u, so that y_x = M u + P N(S~_x); 2 C^2 (4 K + 2 V) + 2/3 C^3 + 2 C K (K + V) FLOP
    read       o = alpha f y_f + (1 - alpha) s y_s: 4 C K V FLOP, moves C (K + V) numbers, 2 K V numbers and C V elements

u and w are float32 and never rounded to the call's 16 bits, which identical keys would add up over a chunk; products take float32 operands (tf32 holds 16-bit ones
but for float16's subnormals). At 1x8192, 12 heads of 32, chunks of 64, bfloat16: prepare moves 56 MB, read 44 MB: 17 and 13 us of memory.
Compiled for sm_90 by Triton 3.6.0, heads of 32: prepare 226 registers and 32 KB, read 92 and 8 KB; in tf32x3 prepare spills 272 bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .coupled_chunks import blended, wide_tile
from .coupled_walks import numbers_of, reading_of
from .grid import locate
from .launch import Kernel
from .rounding import operand as as_operand
from .uw_blocks import block_triangle, load_vector, store_tile

__all__ = ["PREPARE", "READ"]


@triton.jit
def _store_turned(base, x, start, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """x `[BLOCK, TILE]`, columns start and on of a matrix, into its transpose, whose rows have ROWS numbers."""
    row = tl.arange(0, BLOCK)[:, None]
    column = start + tl.arange(0, TILE)[None, :]
    tl.store(base + column * ROWS + row, x, mask=(row < ROWS) & (column < COLUMNS))


@triton.jit
def _prepare(
    q, k, v, beta, u, w, reader, inside, factor_a, turned_b, wide_k, wide_v, cu_seqlens, tokens, sequences, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, beta_b, beta_t, beta_h,
    HEADS: tl.constexpr, GROUP: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, LAM: tl.constexpr, PLAIN: tl.constexpr, DELTA: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """What of its outputs is not None, all float32: u, inside `[B, T, H, V]`, w, reader `[B, T, H, K]`, A `[slots, H, K, K]`, B^T `[slots, H, V, K]`,
    wide_k, wide_v: copies of k and v.

    PLAIN: transform none. Blocks: slots * HEADS.
    """
    head = tl.program_id(0) % HEADS
    slot = tl.program_id(0) // HEADS
    row, _, _, first, _, end = locate(cu_seqlens, slot, tokens, sequences, 0, CHUNK)
    if first >= end:
        return
    row = tl.cast(row, tl.int64)
    line = tl.arange(0, BLOCK)
    ok = line < tl.minimum(end - first, CHUNK)
    first = tl.cast(first, tl.int64)
    token = (row * tokens + first) * HEADS + head
    at = slot.to(tl.int64) * HEADS + head
    k += row * k_b + first * k_t + (head // GROUP) * k_h
    v += row * v_b + first * v_t + head * v_h
    b = load_vector(beta + row * beta_b + first * beta_t + head * beta_h, line, ok, beta_t)
    keys = wide_tile(k, line, ok, k_t, 0, KEYS, BLOCK_K, DOT)
    if wide_k is not None:
        if head % GROUP == 0:
            store_tile(wide_k + token // GROUP * KEYS, line, ok, HEADS // GROUP * KEYS, 0, keys, KEYS, BLOCK_K)
    if not PLAIN:
        gram = tl.dot(keys, tl.trans(keys), input_precision=DOT)
        triangle = as_operand(block_triangle(gram, b, b, b, False, tl.float32, BLOCK, LAM, DOT) * b[None, :], tl.float32, DOT)
    if reader is not None or inside is not None:
        queries = wide_tile(q + row * q_b + first * q_t + (head // GROUP) * q_h, line, ok, q_t, 0, KEYS, BLOCK_K, DOT) * scale
        scores = tl.dot(as_operand(queries, tl.float32, DOT), tl.trans(keys), input_precision=DOT)
        scores = as_operand(tl.where(line[:, None] >= line[None, :], scores, 0.0), tl.float32, DOT)
    if DELTA:
        if PLAIN:
            pull = keys * b[:, None]
        else:
            pull = tl.dot(triangle, keys, input_precision=DOT)
        if w is not None:
            store_tile(w + token * KEYS, line, ok, HEADS * KEYS, 0, pull, KEYS, BLOCK_K)
        pull = as_operand(pull, tl.float32, DOT)
        factor = tl.dot(tl.trans(keys), pull, input_precision=DOT)
        key = tl.arange(0, BLOCK_K)
        store_tile(factor_a + at * (KEYS * KEYS), key, key < KEYS, KEYS, 0, as_operand(factor, tl.float32, DOT), KEYS, BLOCK_K)
        if reader is not None:
            queries -= tl.dot(scores, pull, input_precision=DOT)
    if reader is not None:
        store_tile(reader + token * KEYS, line, ok, HEADS * KEYS, 0, queries, KEYS, BLOCK_K)
    for start in tl.static_range(0, VALUES, BLOCK_V):
        values = wide_tile(v, line, ok, v_t, start, VALUES, BLOCK_V, DOT)
        if wide_v is not None:
            store_tile(wide_v + token * VALUES, line, ok, HEADS * VALUES, start, values, VALUES, BLOCK_V)
        if PLAIN:
            new = values * b[:, None]
        else:
            new = tl.dot(triangle, values, input_precision=DOT)
        if u is not None:
            store_tile(u + token * VALUES, line, ok, HEADS * VALUES, start, new, VALUES, BLOCK_V)
        new = as_operand(new, tl.float32, DOT)
        if inside is not None:
            store_tile(inside + token * VALUES, line, ok, HEADS * VALUES, start, tl.dot(scores, new, input_precision=DOT), VALUES, BLOCK_V)
        written = tl.dot(tl.trans(keys), new, input_precision=DOT)
        _store_turned(turned_b + at * (KEYS * VALUES), written, start, KEYS, VALUES, BLOCK_K, BLOCK_V)


@triton.jit
def _read(
    reader, inside, alpha, fast_gate, slow_gate, starts, numbers, o, cu_seqlens, tokens, sequences, number,
    alpha_b, alpha_t, alpha_h, fast_b, fast_t, fast_h, slow_b, slow_t, slow_h,
    HEADS: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """o `[B, T, H, V]` of one chunk, BLOCK_V columns. Blocks: slots * HEADS * ceil(V / BLOCK_V)."""
    TILES: tl.constexpr = (VALUES + BLOCK_V - 1) // BLOCK_V
    column = tl.program_id(0) % TILES * BLOCK_V
    head = tl.program_id(0) // TILES % HEADS
    slot = tl.program_id(0) // TILES // HEADS
    row, sequence, _, first, _, end = locate(cu_seqlens, slot, tokens, sequences, 0, CHUNK)
    if first >= end:
        return
    row = tl.cast(row, tl.int64)
    line = tl.arange(0, BLOCK)
    ok = line < tl.minimum(end - first, CHUNK)
    first = tl.cast(first, tl.int64)
    token = (row * tokens + first) * HEADS + head
    place = (slot + sequence).to(tl.int64) * HEADS + head
    fast_was, slow_was, fast_size, slow_size, by_fast, by_slow, _to_fast, _to_slow = numbers_of(numbers, place)
    rows = wide_tile(reader + token * KEYS, line, ok, HEADS * KEYS, 0, KEYS, BLOCK_K, DOT)
    value = column + tl.arange(0, BLOCK_V)
    starts += place * (2 * KEYS * VALUES)
    fast = wide_tile(starts, value, value < VALUES, KEYS, 0, KEYS, BLOCK_K, DOT)
    slow = wide_tile(starts + KEYS * VALUES, value, value < VALUES, KEYS, 0, KEYS, BLOCK_K, DOT)
    quick = reading_of(by_fast, fast_was, fast_size) * tl.dot(rows, tl.trans(fast), input_precision=DOT)
    steady = reading_of(by_slow, slow_was, slow_size) * tl.dot(rows, tl.trans(slow), input_precision=DOT)
    if alpha is not None:
        alpha += row * alpha_b + first * alpha_t + head * alpha_h
    if fast_gate is not None:
        fast_gate += row * fast_b + first * fast_t + head * fast_h
    if slow_gate is not None:
        slow_gate += row * slow_b + first * slow_t + head * slow_h
    share, rest = blended(alpha, fast_gate, slow_gate, number, line, ok, alpha_t, fast_t, slow_t)
    own = wide_tile(inside + token * VALUES, line, ok, HEADS * VALUES, column, VALUES, BLOCK_V, "ieee")
    total = share[:, None] * (own + quick) + rest[:, None] * (own + steady)
    store_tile(o + token * VALUES, line, ok, HEADS * VALUES, column, total, VALUES, BLOCK_V)


PREPARE = Kernel(_prepare)
READ = Kernel(_read)
