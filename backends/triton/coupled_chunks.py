"""coupled_core's kernels over all chunks at once: what the walk needs before it, and the output behind it (SPEC.md 5).

    factors    A = K^T w and B^T = u^T K of a chunk, for the walk (coupled_walks): 2 C K (K + V) FLOP; moves C (2 K + V) elements, K (K + V) in float32
    outputs    y_x = M u + (scale Q - M w) N(S~_x), both cores' reads and corrections at once:  o = alpha f y_f + (1 - alpha) s y_s
               4 C^2 K + 2 C^2 V + 4 C K V FLOP a chunk and head; moves C (3 K + 2 V) elements and 2 V K in float32
    arrivals   what o passes to N(S~_x), P^T dy_x with the reader P = scale Q - M w, transposed: the reverse walk's input

Products take float32 operands: 16-bit ones, which tf32 holds exactly but for float16's subnormals, are widened, for narrow products of 16 bits are
miscompiled (`serving.narrow_warps`). At 1x8192, 12 heads of 32, chunks of 64, bfloat16, factors and outputs move 22 and 41 MB: 7 and 12 us of memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .coupled_walks import numbers_of, reading_of
from .grid import locate
from .launch import Kernel
from .rounding import operand as as_operand
from .uw_blocks import load_tile, load_vector, store_tile

__all__ = ["ARRIVALS", "FACTORS", "OUTPUTS", "blended", "wide_tile"]


@triton.jit
def wide_tile(base, rows, ok, stride, start, WIDTH: tl.constexpr, TILE: tl.constexpr, DOT: tl.constexpr):
    """`load_tile`, as float32 operands of a product."""
    return as_operand(load_tile(base, rows, ok, stride, start, WIDTH, TILE).to(tl.float32), tl.float32, DOT)


@triton.jit
def blended(alpha, fast_gate, slow_gate, number, rows, ok, alpha_t, fast_t, slow_t):
    """alpha f and (1 - alpha) s of some rows; zero where a row does not exist."""
    share = tl.where(ok, number, 0.0)
    if alpha is not None:
        share = load_vector(alpha, rows, ok, alpha_t)
    rest = tl.where(ok, 1.0 - share, 0.0)
    if fast_gate is not None:
        share *= load_vector(fast_gate, rows, ok, fast_t)
    if slow_gate is not None:
        rest *= load_vector(slow_gate, rows, ok, slow_t)
    return share, rest


@triton.jit
def _gathered(
    x, k, out, count, x_t, k_t, start,
    WIDTH: tl.constexpr, KEYS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
    ROUNDED: tl.constexpr,
):  # fmt: skip
    """Rows start to start + TILE of x^T K over a chunk of `count` tokens. ROUNDED: as an operand."""
    line = tl.arange(0, BLOCK)
    total = tl.zeros([TILE, BLOCK_K], tl.float32)
    for begin in tl.range(0, count, BLOCK, num_stages=STAGES):
        at = tl.cast(begin, tl.int64)
        ok = line < count - begin
        left = wide_tile(x + at * x_t, line, ok, x_t, start, WIDTH, TILE, DOT)
        keys = wide_tile(k + at * k_t, line, ok, k_t, 0, KEYS, BLOCK_K, DOT)
        total = tl.dot(tl.trans(left), keys, total, input_precision=DOT)
    lines = start + tl.arange(0, TILE)
    store_tile(out, lines, lines < WIDTH, KEYS, 0, as_operand(total, tl.float32, DOT) if ROUNDED else total, KEYS, BLOCK_K)


@triton.jit
def _factors(
    k, u, w, factor_a, turned_b, cu_seqlens, tokens, sequences,
    k_b, k_t, k_h, u_b, u_t, u_h, w_b, w_t, w_h,
    HEADS: tl.constexpr, GROUP: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, TILE: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A `[slots, H, K, K]` (w None: not made) and B^T `[slots, H, V, K]` in float32. Blocks: slots * HEADS."""
    head = tl.program_id(0) % HEADS
    slot = tl.program_id(0) // HEADS
    row, _, _, first, _, end = locate(cu_seqlens, slot, tokens, sequences, 0, CHUNK)
    if first >= end:
        return
    row = tl.cast(row, tl.int64)
    count = tl.minimum(end - first, CHUNK)
    first = tl.cast(first, tl.int64)
    at = slot.to(tl.int64) * HEADS + head
    k += row * k_b + first * k_t + (head // GROUP) * k_h
    u += row * u_b + first * u_t + head * u_h
    for start in tl.static_range(0, VALUES, TILE):
        _gathered(u, k, turned_b + at * (VALUES * KEYS), count, u_t, k_t, start, VALUES, KEYS, TILE, BLOCK, BLOCK_K, DOT, STAGES, False)
    if w is not None:
        w += row * w_b + first * w_t + head * w_h
        for start in tl.static_range(0, KEYS, TILE):
            _gathered(k, w, factor_a + at * (KEYS * KEYS), count, k_t, w_t, start, KEYS, KEYS, TILE, BLOCK, BLOCK_K, DOT, STAGES, True)


@triton.jit
def _outputs(
    q, k, u, w, alpha, fast_gate, slow_gate, starts, numbers, o, cu_seqlens, tokens, sequences, per, number, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, u_b, u_t, u_h, w_b, w_t, w_h, alpha_b, alpha_t, alpha_h, fast_b, fast_t, fast_h, slow_b, slow_t, slow_h,
    HEADS: tl.constexpr, GROUP: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """o `[B, T, H, V]`, a block of rows and BLOCK_V columns. Blocks: slots * per (blocks of a chunk) * HEADS * ceil(V / BLOCK_V)."""
    TILES: tl.constexpr = (VALUES + BLOCK_V - 1) // BLOCK_V
    column = tl.program_id(0) % TILES * BLOCK_V
    head = tl.program_id(0) // TILES % HEADS
    block = tl.program_id(0) // TILES // HEADS % per
    slot = tl.program_id(0) // TILES // HEADS // per
    row, sequence, _, first, _, end = locate(cu_seqlens, slot, tokens, sequences, 0, CHUNK)
    count = tl.minimum(end - first, CHUNK)
    begin = block * BLOCK
    if begin >= count:
        return
    row = tl.cast(row, tl.int64)
    first = tl.cast(first, tl.int64)
    q += row * q_b + first * q_t + (head // GROUP) * q_h
    k += row * k_b + first * k_t + (head // GROUP) * k_h
    u += row * u_b + first * u_t + head * u_h
    if w is not None:
        w += row * w_b + first * w_t + head * w_h
    line = tl.arange(0, BLOCK)
    mine = begin + line
    ok = mine < count
    queries = as_operand(wide_tile(q, mine, ok, q_t, 0, KEYS, BLOCK_K, DOT) * scale, tl.float32, DOT)
    inside = tl.zeros([BLOCK, BLOCK_V], tl.float32)
    reader = queries
    for step in tl.range(0, begin + BLOCK, BLOCK, num_stages=STAGES):
        theirs = step + line
        there = theirs < count
        keys = wide_tile(k, theirs, there, k_t, 0, KEYS, BLOCK_K, DOT)
        scores = tl.dot(queries, tl.trans(keys), input_precision=DOT)
        scores = as_operand(tl.where(mine[:, None] >= theirs[None, :], scores, 0.0), tl.float32, DOT)
        inside = tl.dot(scores, wide_tile(u, theirs, there, u_t, column, VALUES, BLOCK_V, DOT), inside, input_precision=DOT)
        if w is not None:
            reader -= tl.dot(scores, wide_tile(w, theirs, there, w_t, 0, KEYS, BLOCK_K, DOT), input_precision=DOT)
    place = (slot + sequence).to(tl.int64) * HEADS + head
    fast_was, slow_was, fast_size, slow_size, by_fast, by_slow, _to_fast, _to_slow = numbers_of(numbers, place)
    value = column + tl.arange(0, BLOCK_V)
    starts += place * (2 * KEYS * VALUES)
    reader = as_operand(reader, tl.float32, DOT)
    z = wide_tile(starts, value, value < VALUES, KEYS, 0, KEYS, BLOCK_K, DOT)
    fast = inside + reading_of(by_fast, fast_was, fast_size) * tl.dot(reader, tl.trans(z), input_precision=DOT)
    z = wide_tile(starts + KEYS * VALUES, value, value < VALUES, KEYS, 0, KEYS, BLOCK_K, DOT)
    slow = inside + reading_of(by_slow, slow_was, slow_size) * tl.dot(reader, tl.trans(z), input_precision=DOT)
    if alpha is not None:
        alpha += row * alpha_b + first * alpha_t + head * alpha_h
    if fast_gate is not None:
        fast_gate += row * fast_b + first * fast_t + head * fast_h
    if slow_gate is not None:
        slow_gate += row * slow_b + first * slow_t + head * slow_h
    share, rest = blended(alpha, fast_gate, slow_gate, number, mine, ok, alpha_t, fast_t, slow_t)
    token = row * tokens + first
    store_tile(o + (token * HEADS + head) * VALUES, mine, ok, HEADS * VALUES, column, share[:, None] * fast + rest[:, None] * slow, VALUES, BLOCK_V)


@triton.jit
def _arrivals(
    reader, d_o, alpha, fast_gate, slow_gate, d_reads, cu_seqlens, tokens, sequences, number,
    o_b, o_t, o_h, alpha_b, alpha_t, alpha_h, fast_b, fast_t, fast_h, slow_b, slow_t, slow_h,
    HEADS: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """d_reads `[slots, H, 2, V, K]` in float32, of chunks of one block, from the reader `[B, T, H, K]`. Blocks: slots * HEADS."""
    head = tl.program_id(0) % HEADS
    slot = tl.program_id(0) // HEADS
    row, _, _, first, _, end = locate(cu_seqlens, slot, tokens, sequences, 0, CHUNK)
    if first >= end:
        return
    row = tl.cast(row, tl.int64)
    line = tl.arange(0, BLOCK)
    ok = line < tl.minimum(end - first, CHUNK)
    first = tl.cast(first, tl.int64)
    d_o += row * o_b + first * o_t + head * o_h
    if alpha is not None:
        alpha += row * alpha_b + first * alpha_t + head * alpha_h
    if fast_gate is not None:
        fast_gate += row * fast_b + first * fast_t + head * fast_h
    if slow_gate is not None:
        slow_gate += row * slow_b + first * slow_t + head * slow_h
    share, rest = blended(alpha, fast_gate, slow_gate, number, line, ok, alpha_t, fast_t, slow_t)
    rows = load_tile(reader + ((row * tokens + first) * HEADS + head) * KEYS, line, ok, HEADS * KEYS, 0, KEYS, BLOCK_K)
    d_reads += (slot.to(tl.int64) * HEADS + head) * (2 * KEYS * VALUES)
    quick = as_operand(rows * share[:, None], tl.float32, DOT)
    steady = as_operand(rows * rest[:, None], tl.float32, DOT)
    for start in tl.static_range(0, VALUES, BLOCK_V):
        value = start + tl.arange(0, BLOCK_V)
        arrived = tl.trans(wide_tile(d_o, line, ok, o_t, start, VALUES, BLOCK_V, DOT))
        store_tile(d_reads, value, value < VALUES, KEYS, 0, tl.dot(arrived, quick, input_precision=DOT), KEYS, BLOCK_K)
        store_tile(d_reads + KEYS * VALUES, value, value < VALUES, KEYS, 0, tl.dot(arrived, steady, input_precision=DOT), KEYS, BLOCK_K)


FACTORS = Kernel(_factors)
OUTPUTS = Kernel(_outputs)
ARRIVALS = Kernel(_arrivals)
