"""The blocks of deep_core one after another, forward and in reverse: what a sequence carries stays in registers from its first token to its last.

A program owns BLOCK_V value columns of one head of one sequence; columns never meet.
ROWS tokens of a block cost the forward three products and no mask but that of the ragged end, 6 ROWS K BLOCK_V FLOP, on 2 ROWS (2 K + 2 BLOCK_V) bytes in 16 bits:

    o = gate scale Q D      w = eta (V - K D)      E += K^T w        and at a block's end, where D is made anew:  D <- exp(G) D + E / Z

The mass and the summed g of every block come from a launch of their own, BLOCKS, or are summed on the way, which costs registers.
The reverse, which carries the gradient of D, has three too: dE of a block is (gradient of D after it) / Z, and within the block

    gradient of D before it = exp(G) (gradient after it) + sum over its tokens of  q (gate scale do)^T - k (eta dE^T k)^T

Both are short chains, so that what binds is the latency of a step, about a microsecond each ROWS tokens. At 1x8192, 16/32 heads of 128, bfloat16: 52 GFLOP
(52 us at 989 TFLOP/s) on 201 MB of tokens (60 us at 3.35 TB/s) either way, and 128 steps; q, k are read once more for each value tile, from L2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .deep_step import divisor
from .grid import first_slot, locate
from .launch import Kernel
from .rounding import operand

__all__ = ["BLOCKS", "REVERSE", "SWEEP", "block_slot", "block_sums", "line_of", "rows_of", "sequence_of", "sums_of", "tile_of"]


@triton.jit
def steps_of(length, offset, SPAN: tl.constexpr, ROWS: tl.constexpr):
    """(first step, end of the steps) of a sequence: a step is ROWS tokens of a block, the last of a block or of the sequence fewer. Without tokens none."""
    PER: tl.constexpr = (SPAN + ROWS - 1) // ROWS
    reach = length + offset
    first = offset // ROWS + length * 0
    return first, tl.where(length > 0, reach // SPAN * PER + (reach % SPAN + ROWS - 1) // ROWS, first)


@triton.jit
def block_slot(cu_seqlens, sequence, begin, tokens, offset, SPAN: tl.constexpr):
    """Where the first block of a sequence has its place among all blocks."""
    if cu_seqlens is None:
        return sequence * tl.cdiv(tokens + offset, SPAN)
    else:
        return first_slot(begin, sequence, offset, SPAN)


@triton.jit
def sequence_of(cu_seqlens, sequence, tokens):
    """(batch row, first token, length)."""
    if cu_seqlens is None:
        return sequence, sequence * 0, tokens + sequence * 0
    else:
        begin = tl.load(cu_seqlens + sequence).to(tl.int32)
        return sequence * 0, begin, tl.load(cu_seqlens + sequence + 1).to(tl.int32) - begin


@triton.jit
def rows_of(step, length, offset, SPAN: tl.constexpr, ROWS: tl.constexpr):
    """(block, whether the step is its last, the block's end, the step's first token, which of its rows are tokens); tokens count inside the sequence."""
    PER: tl.constexpr = (SPAN + ROWS - 1) // ROWS
    block = step // PER
    sub = step % PER
    edge = (block + 1) * SPAN - offset
    first = block * SPAN - offset + sub * ROWS
    row = first + tl.arange(0, ROWS)
    return block, sub == PER - 1, edge, first, (row >= 0) & (row < tl.minimum(edge, length))


@triton.jit
def tile_of(x, first, stride, here, column, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A step's rows of a tile of columns; `x` stands at the sequence's first token."""
    row = tl.arange(0, ROWS)
    at = x + first.to(tl.int64) * stride + row[:, None] * stride + column[None, :]
    if COLUMNS % BLOCK:
        return tl.load(at, mask=here[:, None] & (column[None, :] < COLUMNS), other=0.0)
    else:
        return tl.load(at, mask=here[:, None], other=0.0)


@triton.jit
def line_of(x, first, stride, here, ROWS: tl.constexpr):
    """A step's eta, g or gate in float32."""
    return tl.load(x + first.to(tl.int64) * stride + tl.arange(0, ROWS) * stride, mask=here, other=0.0).to(tl.float32)


@triton.jit
def block_sums(
    k, eta, g, mass, log_decay, masses, logs, place, block, length, k_t, eta_t, g_t, offset,
    K: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Writes mass and G of one block of one head, before it closes, to `place`; what the sequence brought in counts to its first block."""
    PER: tl.constexpr = (SPAN + ROWS - 1) // ROWS
    key = tl.arange(0, BLOCK_K)
    weighed = tl.zeros([ROWS], tl.float32)
    logged = tl.zeros([ROWS], tl.float32)
    for sub in range(PER):
        _, _, _, first, here = rows_of(block * PER + sub, length, offset, SPAN, ROWS)
        wide_k = tile_of(k, first, k_t, here, key, K, ROWS, BLOCK_K).to(tl.float32)
        weighed += line_of(eta, first, eta_t, here, ROWS) * tl.sum(wide_k * wide_k, 1)
        if g is not None:
            logged += line_of(g, first, g_t, here, ROWS)
    total = tl.sum(weighed, 0)
    decay = tl.sum(logged, 0)
    if mass is not None:
        if (block == 0) & (length > 0):
            total += tl.load(mass)
            decay += tl.load(log_decay)
    tl.store(masses + place, total)
    tl.store(logs + place, decay)


@triton.jit
def _blocks(
    k, eta, g, mass, log_decay, cu_seqlens, masses, logs, tokens, sequences, heads, group, offset,
    k_b, k_t, k_h, eta_b, eta_t, eta_h, g_b, g_t, g_h, mass_b, mass_h, log_b, log_h,
    K: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Mass and G of one block of one head."""
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    slot = program // heads
    batch, sequence, block, _, begin, end = locate(cu_seqlens, slot, tokens, sequences, offset, SPAN)
    wide = begin.to(tl.int64)
    batch = batch.to(tl.int64)
    k += batch * k_b + head // group * k_h + wide * k_t
    eta += batch * eta_b + head * eta_h + wide * eta_t
    if g is not None:
        g += batch * g_b + head * g_h + wide * g_t
    if mass is not None:
        mass += sequence.to(tl.int64) * mass_b + head * mass_h
        log_decay += sequence.to(tl.int64) * log_b + head * log_h
    place = slot.to(tl.int64) * heads + head
    block_sums(k, eta, g, mass, log_decay, masses, logs, place, block, end - begin, k_t, eta_t, g_t, offset, K, BLOCK_K, ROWS, SPAN)


@triton.jit
def sums_of(masses, logs, place, there, total, decay):
    """A block's mass and G where it is there, else what is given."""
    return tl.load(masses + place, mask=there, other=total), tl.load(logs + place, mask=there, other=decay)


@triton.jit
def _sweep(
    q, k, v, eta, g, gate, state, error, mass, log_decay, masses, logs, cu_seqlens, o, starts, ends, to_state, to_error, to_mass, to_log,
    scale, tokens, sequences, heads, group, offset,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, eta_b, eta_t, eta_h, g_b, g_t, g_h, gate_b, gate_t, gate_h,
    state_b, state_h, state_t, error_b, error_h, error_t, mass_b, mass_h, log_b, log_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr,
    NORMALIZE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Forward. `masses`, `logs`: mass and G of every block, of BLOCKS, or summed here where absent. `starts`, `ends`: D before every block, and E before it closes."""
    TILES: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    DTYPE: tl.constexpr = k.dtype.element_ty
    program = tl.program_id(0)
    tile = program % TILES
    head = (program // TILES % heads).to(tl.int64)
    sequence = program // TILES // heads
    batch, begin, length = sequence_of(cu_seqlens, sequence, tokens)
    slot = block_slot(cu_seqlens, sequence, begin, tokens, offset, SPAN).to(tl.int64)
    start, stop = steps_of(length, offset, SPAN, ROWS)
    key = tl.arange(0, BLOCK_K)
    value = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    batch = batch.to(tl.int64)
    place = sequence.to(tl.int64)
    wide = begin.to(tl.int64)
    if o is not None:
        q += batch * q_b + head // group * q_h + wide * q_t
        o += ((batch * tokens + wide) * heads + head) * V
        if gate is not None:
            gate += batch * gate_b + head * gate_h + wide * gate_t
    k += batch * k_b + head // group * k_h + wide * k_t
    v += batch * v_b + head * v_h + wide * v_t
    eta += batch * eta_b + head * eta_h + wide * eta_t
    if g is not None:
        g += batch * g_b + head * g_h + wide * g_t
    whole = (key[:, None] < K) & (value[None, :] < V)
    memory = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    missed = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    total = scale * 0.0
    decay = scale * 0.0
    if state is not None:
        memory = tl.load(state + place * state_b + head * state_h + key[:, None].to(tl.int64) * state_t + value[None, :], mask=whole, other=0.0)
    if error is not None:
        missed = tl.load(error + place * error_b + head * error_h + key[:, None].to(tl.int64) * error_t + value[None, :], mask=whole, other=0.0)
        total = tl.load(mass + place * mass_b + head * mass_h)
        decay = tl.load(log_decay + place * log_b + head * log_h)
    square = key[:, None] * V + value[None, :]
    # what no product reads is not copied ahead by the compiler: the gate's next rows, the next block's sums
    if o is not None and gate is not None:
        _, _, _, first, here = rows_of(start, length, offset, SPAN, ROWS)
        opened = line_of(gate, first, gate_t, here, ROWS)
    if masses is not None:
        total, decay = sums_of(masses, logs, slot * heads + head, stop > start, total, decay)
    for step in tl.range(start, stop):
        block, last, edge, first, here = rows_of(step, length, offset, SPAN, ROWS)
        k_tile = tile_of(k, first, k_t, here, key, K, ROWS, BLOCK_K)
        v_tile = tile_of(v, first, v_t, here, value, V, ROWS, BLOCK_V)
        weight = line_of(eta, first, eta_t, here, ROWS)
        known = operand(memory, DTYPE, DOT)
        if starts is not None:
            if (step == start) | (step % ((SPAN + ROWS - 1) // ROWS) == 0):
                tl.store(starts + ((slot + block) * heads + head) * (K * V) + square, memory.to(DTYPE), mask=whole)
        if o is not None:
            q_tile = tile_of(q, first, q_t, here, key, K, ROWS, BLOCK_K)
            y = tl.dot(q_tile, known, input_precision=DOT) * scale
            if gate is not None:
                y *= opened[:, None]
                _, _, _, next_first, next_here = rows_of(step + 1, length, offset, SPAN, ROWS)
                opened = line_of(gate, next_first, gate_t, next_here, ROWS)
            row = tl.arange(0, ROWS)
            at = o + first.to(tl.int64) * (heads * V) + row[:, None] * (heads * V) + value[None, :]
            tl.store(at, y.to(o.dtype.element_ty), mask=here[:, None] & (value[None, :] < V))
        off = (v_tile.to(tl.float32) - tl.dot(k_tile, known, input_precision=DOT)) * weight[:, None]
        missed = tl.dot(tl.trans(k_tile), operand(off, DTYPE, DOT), acc=missed, input_precision=DOT)
        if masses is None:
            wide_k = k_tile.to(tl.float32)
            total += tl.sum(weight * tl.sum(wide_k * wide_k, 1), 0)
            if g is not None:
                decay += tl.sum(line_of(g, first, g_t, here, ROWS), 0)
        if ends is not None:
            if last | (step == stop - 1):
                tl.store(ends + ((slot + block) * heads + head) * (K * V) + square, missed.to(ends.dtype.element_ty), mask=whole)
        if last & (edge <= length):
            share = 1.0 / divisor(total, SPAN, NORMALIZE)
            memory = tl.exp(decay) * memory + missed * share
            missed = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
            total = tl.zeros([], tl.float32)
            decay = tl.zeros([], tl.float32)
            if masses is not None:
                total, decay = sums_of(masses, logs, (slot + block + 1) * heads + head, step + 1 < stop, total, decay)
    if to_state is not None:
        at = (place * heads + head) * (K * V) + square
        tl.store(to_state + at, memory, mask=whole)
        tl.store(to_error + at, missed, mask=whole)
        if tile == 0:
            tl.store(to_mass + place * heads + head, total)
            tl.store(to_log + place * heads + head, decay)


@triton.jit
def _reverse(
    q, k, eta, gate, d_o, masses, logs, cu_seqlens, d_state, d_error, d_mass, d_log, sums, to_state, to_error, to_mass, to_log,
    scale, tokens, sequences, heads, group, offset,
    q_b, q_t, q_h, k_b, k_t, k_h, eta_b, eta_t, eta_h, gate_b, gate_t, gate_h, do_b, do_t, do_h,
    state_b, state_h, state_t, error_b, error_h, error_t, mass_b, mass_h, log_b, log_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr,
    NORMALIZE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """In reverse: `sums` takes every block's dE; `to_state`, `to_error` the gradients of what came in, `to_mass`, `to_log` those of a sequence without blocks."""
    TILES: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    DTYPE: tl.constexpr = k.dtype.element_ty
    program = tl.program_id(0)
    tile = program % TILES
    head = (program // TILES % heads).to(tl.int64)
    sequence = program // TILES // heads
    batch, begin, length = sequence_of(cu_seqlens, sequence, tokens)
    slot = block_slot(cu_seqlens, sequence, begin, tokens, offset, SPAN).to(tl.int64)
    start, stop = steps_of(length, offset, SPAN, ROWS)
    key = tl.arange(0, BLOCK_K)
    value = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    batch = batch.to(tl.int64)
    place = sequence.to(tl.int64)
    wide = begin.to(tl.int64)
    k += batch * k_b + head // group * k_h + wide * k_t
    eta += batch * eta_b + head * eta_h + wide * eta_t
    if d_o is not None:
        q += batch * q_b + head // group * q_h + wide * q_t
        d_o += batch * do_b + head * do_h + wide * do_t
        if gate is not None:
            gate += batch * gate_b + head * gate_h + wide * gate_t
    whole = (key[:, None] < K) & (value[None, :] < V)
    memory = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    missed = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if d_state is not None:
        memory = tl.load(d_state + place * state_b + head * state_h + key[:, None].to(tl.int64) * state_t + value[None, :], mask=whole, other=0.0)
    if d_error is not None:
        missed = tl.load(d_error + place * error_b + head * error_h + key[:, None].to(tl.int64) * error_t + value[None, :], mask=whole, other=0.0)
    square = key[:, None] * V + value[None, :]
    final = slot + (stop - 1) // ((SPAN + ROWS - 1) // ROWS)
    total, decay = sums_of(masses, logs, final * heads + head, stop > start, scale * 0.0, scale * 0.0)
    for back in tl.range(0, stop - start):
        step = stop - 1 - back
        block, last, edge, first, here = rows_of(step, length, offset, SPAN, ROWS)
        k_tile = tile_of(k, first, k_t, here, key, K, ROWS, BLOCK_K)
        weight = line_of(eta, first, eta_t, here, ROWS)
        if last & (edge <= length):
            missed = memory * (1.0 / divisor(total, SPAN, NORMALIZE))
            memory *= tl.exp(decay)
        if last | (back == 0):
            total, decay = sums_of(masses, logs, (slot + block - 1) * heads + head, block > 0, total, decay)
        share = operand(missed, DTYPE, DOT)
        if last | (back == 0):
            tl.store(sums + ((slot + block) * heads + head) * (K * V) + square, share, mask=whole)
        p = tl.dot(k_tile, share, input_precision=DOT) * -weight[:, None]
        memory = tl.dot(tl.trans(k_tile), operand(p, DTYPE, DOT), acc=memory, input_precision=DOT)
        if d_o is not None:
            q_tile = tile_of(q, first, q_t, here, key, K, ROWS, BLOCK_K)
            y = tile_of(d_o, first, do_t, here, value, V, ROWS, BLOCK_V).to(tl.float32) * scale
            if gate is not None:
                y *= line_of(gate, first, gate_t, here, ROWS)[:, None]
            memory = tl.dot(tl.trans(q_tile), operand(y, DTYPE, DOT), acc=memory, input_precision=DOT)
    at = (place * heads + head) * (K * V) + square
    if to_state is not None:
        tl.store(to_state + at, memory, mask=whole)
    if to_error is not None:
        tl.store(to_error + at, missed, mask=whole)
    if (stop == start) & (tile == 0):
        at_line = place * heads + head
        if to_mass is not None:
            tl.store(to_mass + at_line, tl.load(d_mass + place * mass_b + head * mass_h) if d_mass is not None else 0.0)
        if to_log is not None:
            tl.store(to_log + at_line, tl.load(d_log + place * log_b + head * log_h) if d_log is not None else 0.0)


BLOCKS = Kernel(_blocks)
SWEEP = Kernel(_sweep)
REVERSE = Kernel(_reverse)
