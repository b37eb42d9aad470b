"""The blocks of deep_core side by side: what each does to D is a matrix and a sum, so that the walk over blocks is one product each (SPEC.md 7).

    N = K^T (eta K)   R = K^T (eta V)   Y = Q^T (gate scale dO)          GATHER, all blocks at once, 2 K (K + V) FLOP a token
    E = E_open + R - N D,   D <- exp(G) D + E / Z                        CHAIN, 2 K^2 V FLOP a block
    dE = dD / Z,   dD <- exp(G) dD - N dE + Y                            BACK, the same in reverse
    o = gate scale Q D                                                   READ, all tokens at once

For few heads on long sequences: 1x65536 tokens of 12 heads of 32 in blocks of 256 are 256 steps of a chain of 0.7 us and not 1024 of a microsecond. It costs N, R and D
of every block in memory: 24 K^2 bytes in float32, as much as 2 K tokens of q, k, v and o in bfloat16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .deep_scan import block_slot, block_sums, line_of, rows_of, sequence_of, sums_of, tile_of
from .deep_step import divisor
from .grid import locate
from .launch import Kernel
from .rounding import operand

__all__ = ["BACK", "CHAIN", "GATHER", "READ"]


@triton.jit
def _summed(
    left, right, weights, block, length, offset, left_t, right_t, weights_t, key, column,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """left^T (weights right) over a block's tokens, `[BLOCK_K, BLOCK_C]`."""
    PER: tl.constexpr = (SPAN + ROWS - 1) // ROWS
    DTYPE: tl.constexpr = left.dtype.element_ty
    found = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    for sub in tl.range(0, PER):
        _, _, _, first, here = rows_of(block * PER + sub, length, offset, SPAN, ROWS)
        left_tile = tile_of(left, first, left_t, here, key, LEFT, ROWS, BLOCK_K)
        y = tile_of(right, first, right_t, here, column, RIGHT, ROWS, BLOCK_C).to(tl.float32)
        if weights is not None:
            y *= line_of(weights, first, weights_t, here, ROWS)[:, None]
        found = tl.dot(tl.trans(left_tile), operand(y, DTYPE, DOT), acc=found, input_precision=DOT)
    return found


@triton.jit
def _gather(
    q, k, v, eta, g, gate, d_o, mass, log_decay, cu_seqlens, maps, inputs, reads, masses, logs, scale, tokens, sequences, heads, group, offset,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, eta_b, eta_t, eta_h, g_b, g_t, g_h, gate_b, gate_t, gate_h, do_b, do_t, do_h,
    mass_b, mass_h, log_b, log_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A tile of columns of N (`maps`), R (`inputs`) or, where there is one, Y (`reads`) of one block of one head; or its mass and G."""
    WIDE: tl.constexpr = (K + BLOCK_C - 1) // BLOCK_C
    TILES: tl.constexpr = (V + BLOCK_C - 1) // BLOCK_C
    PARTS: tl.constexpr = WIDE + TILES + (TILES if reads is not None else 0) + 1
    program = tl.program_id(0)
    part = program % PARTS
    head = (program // PARTS % heads).to(tl.int64)
    slot = program // PARTS // heads
    batch, sequence, block, _, begin, end = locate(cu_seqlens, slot, tokens, sequences, offset, SPAN)
    length = end - begin
    key = tl.arange(0, BLOCK_K)
    wide = begin.to(tl.int64)
    batch = batch.to(tl.int64)
    place = slot.to(tl.int64) * heads + head
    k += batch * k_b + head // group * k_h + wide * k_t
    eta += batch * eta_b + head * eta_h + wide * eta_t
    if part == PARTS - 1:
        if g is not None:
            g += batch * g_b + head * g_h + wide * g_t
        if mass is not None:
            mass += sequence.to(tl.int64) * mass_b + head * mass_h
            log_decay += sequence.to(tl.int64) * log_b + head * log_h
        block_sums(k, eta, g, mass, log_decay, masses, logs, place, block, length, k_t, eta_t, g_t, offset, K, BLOCK_K, ROWS, SPAN)
    elif part < WIDE:
        column = part * BLOCK_C + tl.arange(0, BLOCK_C)
        found = _summed(k, k, eta, block, length, offset, k_t, k_t, eta_t, key, column, K, K, BLOCK_K, BLOCK_C, ROWS, SPAN, DOT)
        map_at = maps + place * (K * K) + key[:, None] * K + column[None, :]
        tl.store(map_at, found.to(maps.dtype.element_ty), mask=(key[:, None] < K) & (column[None, :] < K))
    else:
        column = (part - WIDE) % TILES * BLOCK_C + tl.arange(0, BLOCK_C)
        at = place * (K * V) + key[:, None] * V + column[None, :]
        stored = (key[:, None] < K) & (column[None, :] < V)
        if part < WIDE + TILES:
            v += batch * v_b + head * v_h + wide * v_t
            found = _summed(k, v, eta, block, length, offset, k_t, v_t, eta_t, key, column, K, V, BLOCK_K, BLOCK_C, ROWS, SPAN, DOT)
            tl.store(inputs + at, found, mask=stored)
        if reads is not None:
            if part >= WIDE + TILES:
                q += batch * q_b + head // group * q_h + wide * q_t
                d_o += batch * do_b + head * do_h + wide * do_t
                if gate is not None:
                    gate += batch * gate_b + head * gate_h + wide * gate_t
                found = _summed(q, d_o, gate, block, length, offset, q_t, do_t, gate_t, key, column, K, V, BLOCK_K, BLOCK_C, ROWS, SPAN, DOT)
                tl.store(reads + at, found * scale, mask=stored)


@triton.jit
def _chain(
    maps, inputs, masses, logs, state, error, mass, log_decay, cu_seqlens, starts, ends, to_state, to_error, to_mass, to_log,
    tokens, sequences, heads, offset, state_b, state_h, state_t, error_b, error_h, error_t, mass_b, mass_h, log_b, log_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, SPAN: tl.constexpr, NORMALIZE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A value tile of one head of one sequence, block after block: `starts`, `ends` as of SWEEP, and the carry after the last block."""
    TILES: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    DTYPE: tl.constexpr = maps.dtype.element_ty
    program = tl.program_id(0)
    tile = program % TILES
    head = (program // TILES % heads).to(tl.int64)
    sequence = program // TILES // heads
    _, begin, length = sequence_of(cu_seqlens, sequence, tokens)
    slot = block_slot(cu_seqlens, sequence, begin, tokens, offset, SPAN).to(tl.int64)
    key = tl.arange(0, BLOCK_K)
    value = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    place = sequence.to(tl.int64)
    whole = (key[:, None] < K) & (value[None, :] < V)
    square = key[:, None] * V + value[None, :]
    memory = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    missed = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    total = tl.zeros([], tl.float32)
    decay = tl.zeros([], tl.float32)
    if state is not None:
        memory = tl.load(state + place * state_b + head * state_h + key[:, None].to(tl.int64) * state_t + value[None, :], mask=whole, other=0.0)
    if error is not None:
        missed = tl.load(error + place * error_b + head * error_h + key[:, None].to(tl.int64) * error_t + value[None, :], mask=whole, other=0.0)
        total = tl.load(mass + place * mass_b + head * mass_h)
        decay = tl.load(log_decay + place * log_b + head * log_h)
    count = tl.where(length > 0, (length + offset + SPAN - 1) // SPAN, 0)
    # what no product reads is not copied ahead by the compiler
    total, decay = sums_of(masses, logs, slot * heads + head, count > 0, total, decay)
    upcoming = tl.load(inputs + (slot * heads + head) * (K * V) + square, mask=whole & (count > 0), other=0.0)
    for block in tl.range(0, count):
        at = (slot + block) * heads + head
        line = tl.arange(0, BLOCK_K)
        map_at = maps + at * (K * K) + key[:, None] * K + line[None, :]
        if K % BLOCK_K:
            turn = tl.load(map_at, mask=(key[:, None] < K) & (line[None, :] < K), other=0.0)
        else:
            turn = tl.load(map_at)
        added = upcoming
        more = block + 1 < count
        upcoming = tl.load(inputs + (at + heads) * (K * V) + square, mask=whole & more, other=0.0)
        known = operand(memory, DTYPE, DOT)
        tl.store(starts + at * (K * V) + square, known, mask=whole)
        missed += added - tl.dot(turn, known, input_precision=DOT)
        if ends is not None:
            tl.store(ends + at * (K * V) + square, missed.to(ends.dtype.element_ty), mask=whole)
        if (block + 1) * SPAN - offset <= length:
            memory = tl.exp(decay) * memory + missed * (1.0 / divisor(total, SPAN, NORMALIZE))
            missed = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
            total = tl.zeros([], tl.float32)
            decay = tl.zeros([], tl.float32)
            total, decay = sums_of(masses, logs, at + heads, more, total, decay)
    if to_state is not None:
        at = (place * heads + head) * (K * V) + square
        tl.store(to_state + at, memory, mask=whole)
        tl.store(to_error + at, missed, mask=whole)
        if tile == 0:
            tl.store(to_mass + place * heads + head, total)
            tl.store(to_log + place * heads + head, decay)


@triton.jit
def _back(
    maps, reads, masses, logs, cu_seqlens, d_state, d_error, d_mass, d_log, sums, to_state, to_error, to_mass, to_log,
    tokens, sequences, heads, offset, state_b, state_h, state_t, error_b, error_h, error_t, mass_b, mass_h, log_b, log_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, SPAN: tl.constexpr, NORMALIZE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The gradient of D, block after block from the last: `sums` and what follows as of REVERSE. `reads` may be absent."""
    TILES: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    DTYPE: tl.constexpr = maps.dtype.element_ty
    program = tl.program_id(0)
    tile = program % TILES
    head = (program // TILES % heads).to(tl.int64)
    sequence = program // TILES // heads
    _, begin, length = sequence_of(cu_seqlens, sequence, tokens)
    slot = block_slot(cu_seqlens, sequence, begin, tokens, offset, SPAN).to(tl.int64)
    key = tl.arange(0, BLOCK_K)
    value = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    place = sequence.to(tl.int64)
    whole = (key[:, None] < K) & (value[None, :] < V)
    square = key[:, None] * V + value[None, :]
    memory = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    missed = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if d_state is not None:
        memory = tl.load(d_state + place * state_b + head * state_h + key[:, None].to(tl.int64) * state_t + value[None, :], mask=whole, other=0.0)
    if d_error is not None:
        missed = tl.load(d_error + place * error_b + head * error_h + key[:, None].to(tl.int64) * error_t + value[None, :], mask=whole, other=0.0)
    count = tl.where(length > 0, (length + offset + SPAN - 1) // SPAN, 0)
    total, decay = sums_of(masses, logs, (slot + count - 1) * heads + head, count > 0, tl.zeros([], tl.float32), tl.zeros([], tl.float32))
    if reads is not None:
        upcoming = tl.load(reads + ((slot + count - 1) * heads + head) * (K * V) + square, mask=whole & (count > 0), other=0.0)
    for back in tl.range(0, count):
        block = count - 1 - back
        at = (slot + block) * heads + head
        line = tl.arange(0, BLOCK_K)
        map_at = maps + at * (K * K) + key[:, None] * K + line[None, :]
        if K % BLOCK_K:
            turn = tl.load(map_at, mask=(key[:, None] < K) & (line[None, :] < K), other=0.0)
        else:
            turn = tl.load(map_at)
        if (block + 1) * SPAN - offset <= length:
            missed = memory * (1.0 / divisor(total, SPAN, NORMALIZE))
            memory *= tl.exp(decay)
        share = operand(missed, DTYPE, DOT)
        tl.store(sums + at * (K * V) + square, share, mask=whole)
        total, decay = sums_of(masses, logs, at - heads, block > 0, total, decay)
        if reads is not None:
            added = upcoming
            upcoming = tl.load(reads + (at - heads) * (K * V) + square, mask=whole & (block > 0), other=0.0)
            memory += added
        memory -= tl.dot(turn, share, input_precision=DOT)
    at = (place * heads + head) * (K * V) + square
    if to_state is not None:
        tl.store(to_state + at, memory, mask=whole)
    if to_error is not None:
        tl.store(to_error + at, missed, mask=whole)
    if (length <= 0) & (tile == 0):
        at_line = place * heads + head
        if to_mass is not None:
            tl.store(to_mass + at_line, tl.load(d_mass + place * mass_b + head * mass_h) if d_mass is not None else 0.0)
        if to_log is not None:
            tl.store(to_log + at_line, tl.load(d_log + place * log_b + head * log_h) if d_log is not None else 0.0)


@triton.jit
def _read(
    q, gate, starts, cu_seqlens, o, scale, tokens, sequences, heads, group, offset, q_b, q_t, q_h, gate_b, gate_t, gate_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A tile of value columns of one step's outputs of one head."""
    TILES: tl.constexpr = (V + BLOCK_C - 1) // BLOCK_C
    PER: tl.constexpr = (SPAN + ROWS - 1) // ROWS
    program = tl.program_id(0)
    tile = program % TILES
    head = (program // TILES % heads).to(tl.int64)
    sub = program // TILES // heads % PER
    slot = program // TILES // heads // PER
    batch, _, block, _, begin, end = locate(cu_seqlens, slot, tokens, sequences, offset, SPAN)
    length = end - begin
    _, _, edge, first, here = rows_of(block * PER + sub, length, offset, SPAN, ROWS)
    if (first >= tl.minimum(length, edge)) | (first + ROWS <= 0):
        return
    key = tl.arange(0, BLOCK_K)
    value = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    wide = begin.to(tl.int64)
    batch = batch.to(tl.int64)
    inside = value[None, :] < V
    at = starts + (slot.to(tl.int64) * heads + head) * (K * V) + key[:, None] * V + value[None, :]
    known = tl.load(at, mask=(key[:, None] < K) & inside, other=0.0) if K % BLOCK_K or V % BLOCK_C else tl.load(at)
    q_tile = tile_of(q + batch * q_b + head // group * q_h + wide * q_t, first, q_t, here, key, K, ROWS, BLOCK_K)
    y = tl.dot(q_tile, known, input_precision=DOT) * scale
    if gate is not None:
        y *= line_of(gate + batch * gate_b + head * gate_h + wide * gate_t, first, gate_t, here, ROWS)[:, None]
    row = tl.arange(0, ROWS)
    token = batch * tokens + wide + first
    tl.store(o + (token * heads + head) * V + row[:, None] * (heads * V) + value[None, :], y.to(o.dtype.element_ty), mask=here[:, None] & inside)


GATHER = Kernel(_gather)
CHAIN = Kernel(_chain)
BACK = Kernel(_back)
READ = Kernel(_read)
