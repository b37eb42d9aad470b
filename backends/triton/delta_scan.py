"""The serial part of the exact gated delta rule: the state in registers from the first block to the last, outputs on the way.

A program owns a sequence (or a segment of it), a v head and a tile of value columns. A block of tokens costs five products and no mask:

    W = V - erase (K S)      U = A' W      O = read (Q S) + P U      S <- total S + K^T (write U)

2 BLOCK (2 BLOCK + 3 K) BLOCK_V FLOP on 2 BLOCK (K + K + BLOCK_V + 2 BLOCK) bytes at 16 bits, but what binds is the chain K S -> A' W -> K^T U, each
product waiting for the last.

With `weight` A' comes without beta: U = A' (weight W). `updates` is where U goes, for a backward.
With `w` the values are u, from which S is corrected by U = u - w S: slow_core, one product less on the chain.

With `fast_scores` the same pass carries the fast core's state W, cleared where a chunk begins (SPEC.md 2, 5), and merges both:
o += fast_read (Q W) + P_fast V,  W <- W + K^T (fast_write V).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .grid import first_slot, locate
from .launch import Kernel

__all__ = ["CHAIN", "SCAN", "TRANSITIONS"]


@triton.jit
def advance(state, k_tile, w_tile, v_tile, a_tile, weight, erase, write, total, DTYPE: tl.constexpr, DOT: tl.constexpr):
    """The state after a block, and the state before it and U as operands; with `w_tile` the values are u, and U = u - erase w S (erase: 1 where it is absent)."""
    old = state.to(DTYPE)
    if w_tile is not None:
        seen = tl.dot(w_tile, old, input_precision=DOT)
        if erase is not None:
            seen *= erase[:, None]
        update = v_tile.to(tl.float32) - seen
    else:
        seen = tl.dot(k_tile, old, input_precision=DOT)
        error = v_tile.to(tl.float32) - seen * erase[:, None]
        if weight is not None:
            error *= weight[:, None]
        update = tl.dot(a_tile, error.to(DTYPE), input_precision=DOT)
    state = tl.dot(tl.trans(k_tile), (update * write[:, None]).to(DTYPE), acc=state * total, input_precision=DOT)
    return state, old, update.to(DTYPE)


@triton.jit
def _scan_block(
    state, fast, q, k, w, v, o, states, updates, inverses, weight, scores, read, erase, write, total, fast_scores, fast_read, fast_write,
    first, place, column, begin, end, heads, keep, q_t, k_t, w_t, v_t,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr, MASKED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One block from token `first` on, its factors at `place`: pointers stand at the program's batch row, head and value column."""
    DTYPE: tl.constexpr = k.dtype.element_ty
    row = tl.arange(0, BLOCK)
    key = tl.arange(0, BLOCK_K)
    value = column + tl.arange(0, BLOCK_V)
    wide = first.to(tl.int64)
    here = (first + row >= begin) & (first + row < end)
    keys = key[None, :] < K
    at_v = wide * v_t + row[:, None] * v_t + value[None, :]
    at_o = (wide + row[:, None]) * (heads * V) + value[None, :]
    in_v = here[:, None] & (value[None, :] < V)
    at_k = wide * k_t + row[:, None] * k_t + key[None, :]
    at_q = wide * q_t + row[:, None] * q_t + key[None, :]
    if MASKED:
        k_tile = tl.load(k + at_k, mask=here[:, None] & keys, other=0.0)
        v_tile = tl.load(v + at_v, mask=in_v, other=0.0)
        if o is not None:
            q_tile = tl.load(q + at_q, mask=here[:, None] & keys, other=0.0)
    else:
        k_tile = tl.load(k + at_k)
        v_tile = tl.load(v + at_v)
        if o is not None:
            q_tile = tl.load(q + at_q)
    square = place * (BLOCK * BLOCK) + row[:, None] * BLOCK + row[None, :]
    line = place * BLOCK + row
    w_tile = None
    a_tile = None
    erased = None
    weighed = None
    if w is not None:
        at_w = w + wide * w_t + row[:, None] * w_t + key[None, :]
        w_tile = tl.load(at_w, mask=here[:, None] & keys, other=0.0) if MASKED else tl.load(at_w)
    else:
        a_tile = tl.load(inverses + square)
        if weight is not None:
            weighed = tl.load(weight + line)
    if erase is not None:
        erased = tl.load(erase + line)
    written = tl.load(write + line)
    kept = tl.load(total + place)
    if states is not None:
        spot = place * (K * V)
        tl.store(states + spot + key[:, None] * V + value[None, :], state.to(DTYPE), mask=(key[:, None] < K) & (value[None, :] < V))
    state, old, update = advance(state, k_tile, w_tile, v_tile, a_tile, weighed, erased, written, kept, DTYPE, DOT)
    if updates is not None:
        if MASKED:
            tl.store(updates + at_o, update, mask=in_v)
        else:
            tl.store(updates + at_o, update)
    if o is not None:
        p_tile = tl.load(scores + square)
        ahead = tl.load(read + line)
        out = tl.dot(q_tile, old, input_precision=DOT) * ahead[:, None]
        out = tl.dot(p_tile, update, acc=out, input_precision=DOT)
        if fast_scores is not None:
            fast *= keep
            m_tile = tl.load(fast_scores + square)
            quick = tl.load(fast_read + line)
            into = tl.load(fast_write + line)
            out += tl.dot(q_tile, fast.to(DTYPE), input_precision=DOT) * quick[:, None]
            out = tl.dot(m_tile, v_tile, acc=out, input_precision=DOT)
            fast = tl.dot(tl.trans(k_tile), (v_tile.to(tl.float32) * into[:, None]).to(DTYPE), acc=fast, input_precision=DOT)
        if MASKED:
            tl.store(o + at_o, out.to(o.dtype.element_ty), mask=in_v)
        else:
            tl.store(o + at_o, out.to(o.dtype.element_ty))
    return state, fast


@triton.jit
def _scan(
    q, k, w, v, o, states, updates, inverses, weight, scores, read, erase, write, total, fast_scores, fast_read, fast_write,
    initial, final, initial_fast, final_fast, cu_seqlens,
    tokens, sequences, offset, heads, group, tiles, chunk,
    q_b, q_t, q_h, k_b, k_t, k_h, w_b, w_t, w_h, v_b, v_t, v_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr, SEGMENT: tl.constexpr,
    OFFSET: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tile = program % tiles
    head = (program // tiles) % heads
    unit = program // tiles // heads
    if SEGMENT > 0:
        batch, sequence, segment, start, begin, end = locate(cu_seqlens, unit, tokens, sequences, offset, SEGMENT * BLOCK)
        stop = tl.minimum(end, start + SEGMENT * BLOCK)
        block = segment * SEGMENT
        if (start >= end) | (begin >= end):
            return
    else:
        sequence = unit
        block = unit * 0
        if cu_seqlens is None:
            batch, begin, stop = unit, unit * 0, tokens + unit * 0
        else:
            batch, begin, stop = unit * 0, tl.load(cu_seqlens + unit).to(tl.int32), tl.load(cu_seqlens + unit + 1).to(tl.int32)
        start = begin - offset
    if cu_seqlens is None:
        slot = sequence * tl.cdiv(tokens + offset, BLOCK) + block
    else:
        slot = first_slot(begin, sequence, offset, BLOCK) + block
    at = batch.to(tl.int64)
    shared = head // group
    column = tile * BLOCK_V
    q_row = q + at * q_b + shared * q_h if q is not None else None
    k_row = k + at * k_b + shared * k_h
    w_row = w + at * w_b + head * w_h if w is not None else None
    v_row = v + at * v_b + head * v_h
    o_row = o + (at * tokens * heads + head) * V if o is not None else None
    u_row = updates + (at * tokens * heads + head) * V if updates is not None else None
    key = tl.arange(0, BLOCK_K)
    value = column + tl.arange(0, BLOCK_V)
    at_state = key[:, None] * V + value[None, :]
    in_state = (key[:, None] < K) & (value[None, :] < V)
    of_unit = (unit.to(tl.int64) * heads + head) * (K * V)
    of_sequence = (sequence.to(tl.int64) * heads + head) * (K * V)
    state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    fast = state
    if initial is not None:
        state = tl.load(initial + of_unit + at_state, mask=in_state, other=0.0)
    if initial_fast is not None:
        fast = tl.load(initial_fast + of_sequence + at_state, mask=in_state & (block == 0), other=0.0)
    EXACT: tl.constexpr = (K == BLOCK_K) & (V % BLOCK_V == 0) & (not OFFSET)
    length = tl.where(begin < stop, stop - start, 0)
    full = length // BLOCK
    for i in tl.range(0, full, num_stages=STAGES):
        place = (slot + i).to(tl.int64) * heads + head
        keep = 1.0
        if fast_scores is not None:
            keep = tl.where((((block + i) * BLOCK) % chunk == 0) & ((block + i > 0) | (offset == 0)), 0.0, 1.0)
        state, fast = _scan_block(
            state, fast, q_row, k_row, w_row, v_row, o_row, states, u_row, inverses, weight, scores, read, erase, write, total, fast_scores, fast_read, fast_write,
            start + i * BLOCK, place, column, begin, stop, heads, keep, q_t, k_t, w_t, v_t,
            K, V, BLOCK_K, BLOCK, BLOCK_V, not EXACT, DOT,
        )  # fmt: skip
    for i in tl.range(full, tl.cdiv(length, BLOCK), num_stages=STAGES):  # at most once; outside a loop it was miscompiled
        place = (slot + i).to(tl.int64) * heads + head
        keep = 1.0
        if fast_scores is not None:
            keep = tl.where((((block + i) * BLOCK) % chunk == 0) & ((block + i > 0) | (offset == 0)), 0.0, 1.0)
        state, fast = _scan_block(
            state, fast, q_row, k_row, w_row, v_row, o_row, states, u_row, inverses, weight, scores, read, erase, write, total, fast_scores, fast_read, fast_write,
            start + i * BLOCK, place, column, begin, stop, heads, keep, q_t, k_t, w_t, v_t,
            K, V, BLOCK_K, BLOCK, BLOCK_V, True, DOT,
        )  # fmt: skip
    if SEGMENT > 0:
        in_state = in_state & (stop >= end)
    if final is not None:
        tl.store(final + of_sequence + at_state, state, mask=in_state)
    if final_fast is not None:
        tl.store(final_fast + of_sequence + at_state, fast, mask=in_state)


SCAN = Kernel(_scan)


@triton.jit
def _transitions(
    k, w, v, offsets, maps, inverses, weight, erase, write, total, initial, cu_seqlens,
    tokens, sequences, offset, heads, group, tiles,
    k_b, k_t, k_h, w_b, w_t, w_h, v_b, v_t, v_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, SEGMENT: tl.constexpr, DOT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """What a segment does to the state, exactly: S_out = M S_in + N, as the columns of one recurrence from [S_0 | I]: V of N, then K of M.

    A first segment starts from the initial state and needs no M; a last one is left out.
    """
    program = tl.program_id(0)
    tile = program % tiles
    head = (program // tiles) % heads
    unit = program // tiles // heads
    batch, sequence, segment, start, begin, end = locate(cu_seqlens, unit, tokens, sequences, offset, SEGMENT * BLOCK)
    if (start >= end) | (begin >= end) | (start + SEGMENT * BLOCK >= end) | ((tile * COLUMNS >= V) & (segment == 0)):
        return
    if cu_seqlens is None:
        slot = sequence * tl.cdiv(tokens + offset, BLOCK) + segment * SEGMENT
    else:
        slot = first_slot(begin, sequence, offset, BLOCK) + segment * SEGMENT
    DTYPE: tl.constexpr = k.dtype.element_ty
    at = batch.to(tl.int64)
    k_row = k + at * k_b + (head // group) * k_h
    v_row = v + at * v_b + head * v_h
    row = tl.arange(0, BLOCK)
    key = tl.arange(0, BLOCK_K)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    in_n = (key[:, None] < K) & (column[None, :] < V)
    in_m = (key[:, None] < K) & (column[None, :] >= V) & (column[None, :] < V + K)
    at_n = key[:, None] * V + column[None, :]
    state = tl.where(key[:, None] + V == column[None, :], 1.0, 0.0)
    if initial is not None:
        known = initial + (sequence.to(tl.int64) * heads + head) * (K * V)
        state += tl.load(known + at_n, mask=in_n & (segment == 0), other=0.0)
    for i in tl.range(0, SEGMENT, num_stages=STAGES):
        first = start + i * BLOCK
        place = (slot + i).to(tl.int64) * heads + head
        here = first + row >= begin
        wide = first.to(tl.int64)
        k_tile = tl.load(k_row + wide * k_t + row[:, None] * k_t + key[None, :], mask=here[:, None] & (key[None, :] < K), other=0.0)
        v_tile = tl.load(v_row + wide * v_t + row[:, None] * v_t + column[None, :], mask=here[:, None] & (column[None, :] < V), other=0.0)
        w_tile = None
        a_tile = None
        erased = None
        weighed = None
        if w is not None:
            w_row = w + at * w_b + head * w_h + wide * w_t
            w_tile = tl.load(w_row + row[:, None] * w_t + key[None, :], mask=here[:, None] & (key[None, :] < K), other=0.0)
        else:
            a_tile = tl.load(inverses + place * (BLOCK * BLOCK) + row[:, None] * BLOCK + row[None, :])
            erased = tl.load(erase + place * BLOCK + row)
            if weight is not None:
                weighed = tl.load(weight + place * BLOCK + row)
        written = tl.load(write + place * BLOCK + row)
        state, _, _ = advance(state, k_tile, w_tile, v_tile, a_tile, weighed, erased, written, tl.load(total + place), DTYPE, DOT)
    out = (unit.to(tl.int64) * heads + head) * K
    tl.store(offsets + out * V + at_n, state, mask=in_n)
    tl.store(maps + out * K + key[:, None] * K + (column - V)[None, :], state, mask=in_m & (segment > 0))


TRANSITIONS = Kernel(_transitions)


@triton.jit
def _chain(
    offsets, maps, initial, starts, final, cu_seqlens, tokens, sequences, offset, heads, tiles,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, UNIT: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The state at every segment's start, one segment after the other: S <- M S + N. Of the final states only those of empty sequences."""
    program = tl.program_id(0)
    tile = program % tiles
    head = (program // tiles) % heads
    sequence = program // tiles // heads
    if cu_seqlens is None:
        length = tl.where(tokens > 0, tokens + offset, 0)
        unit = sequence * tl.cdiv(length, UNIT)
    else:
        begin = tl.load(cu_seqlens + sequence).to(tl.int32)
        length = tl.load(cu_seqlens + sequence + 1).to(tl.int32) - begin + offset
        unit = first_slot(begin, sequence, offset, UNIT)
        length = tl.where(length == offset, 0, length)
    row = tl.arange(0, BLOCK_K)
    value = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    at = row[:, None] * V + value[None, :]
    inside = (row[:, None] < K) & (value[None, :] < V)
    at_map = row[:, None] * K + row[None, :]
    in_map = (row[:, None] < K) & (row[None, :] < K)
    state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if initial is not None:
        state = tl.load(initial + (sequence.to(tl.int64) * heads + head) * (K * V) + at, mask=inside, other=0.0)
    count = tl.cdiv(length, UNIT)
    if count == 0:
        if final is not None:
            tl.store(final + (sequence.to(tl.int64) * heads + head) * (K * V) + at, state, mask=inside)
    else:
        place = (unit.to(tl.int64) * heads + head) * K
        tl.store(starts + place * V + at, state, mask=inside)
        if count > 1:
            state = tl.load(offsets + place * V + at, mask=inside, other=0.0)
        for i in tl.range(1, count - 1, num_stages=STAGES):
            place = ((unit + i).to(tl.int64) * heads + head) * K
            tl.store(starts + place * V + at, state, mask=inside)
            carry = tl.load(maps + place * K + at_map, mask=in_map, other=0.0)
            added = tl.load(offsets + place * V + at, mask=inside, other=0.0)
            state = tl.dot(carry, state, acc=added, input_precision=DOT)
        if count > 1:
            place = ((unit + count - 1).to(tl.int64) * heads + head) * K
            tl.store(starts + place * V + at, state, mask=inside)


CHAIN = Kernel(_chain)
