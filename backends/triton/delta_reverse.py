"""The serial part of the delta rule's backward: the gradient of the state in registers, from the last block to the first (SPEC.md 10).

A program owns a sequence, a v head and a tile of value columns. With the forward's factors (`delta_prepare`; A' without beta) a block costs
five products, of which three wait for each other, as in the forward's scan:

    dU = P^T dO + write (K dS)      dX = A'^T dU      dS <- total dS + Q^T (read dO) - K^T (erase weight dX)

`leaving` keeps the dS that leaves each block, rounded, `errors` dX, and `carried` the tile's part of <S, dS>, S the block's first state, from the forward's
`states`; all for the gradients of the inputs (`delta_gradients`). dV = weight dX, and `direct`, the tile's part of rowsum(V * dX), are written here, since
dX is rounded when it is kept. With `w`, for slow_core, U was u - w S: `errors` keeps dU, which is the gradient of u, and
dS <- total dS + Q^T (read dO) - w^T dU.

Few heads are cut into segments: `_reverse` once over all of them from zero, which gives what each adds (`before`); `_ends` goes from one to the next with the
forward's maps transposed, dS_in = M^T dS_out + N; then `_reverse` again over all of them from what is behind each.

It moves 2 BLOCK (2 K + 2 BLOCK_V + 2 BLOCK) + 2 K BLOCK_V bytes a block at 16 bits; the chain binds.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .grid import first_slot, locate
from .launch import Kernel

__all__ = ["ENDS", "REVERSE"]


@triton.jit
def _reverse_block(
    state, q, k, w, v, do, leaving, errors, dv, direct, states, carried, inverses, weight, scores, read, erase, write, total,
    first, place, column, begin, stop, heads, tiles, q_t, k_t, w_t, v_t, do_t,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr, MASKED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """dS before the block, from dS behind it: pointers stand at the program's batch row and head; the segment ends at `stop`."""
    DTYPE: tl.constexpr = k.dtype.element_ty
    row = tl.arange(0, BLOCK)
    key = tl.arange(0, BLOCK_K)
    value = column + tl.arange(0, BLOCK_V)
    wide = first.to(tl.int64)
    here = (first + row >= begin) & (first + row < stop)
    keys = here[:, None] & (key[None, :] < K)
    in_v = here[:, None] & (value[None, :] < V)
    at_q = q + wide * q_t + row[:, None] * q_t + key[None, :]
    at_k = k + wide * k_t + row[:, None] * k_t + key[None, :]
    at_do = do + wide * do_t + row[:, None] * do_t + value[None, :]
    if MASKED:
        k_tile = tl.load(at_k, mask=keys, other=0.0)
        q_tile = tl.load(at_q, mask=keys, other=0.0)
        do_tile = tl.load(at_do, mask=in_v, other=0.0)
    else:
        k_tile = tl.load(at_k)
        q_tile = tl.load(at_q)
        do_tile = tl.load(at_do)
    square = place * (BLOCK * BLOCK) + row[:, None] * BLOCK + row[None, :]
    line = place * BLOCK + row
    p_tile = tl.load(scores + square)
    ahead = tl.load(read + line)
    written = tl.load(write + line)
    kept = tl.load(total + place)
    old = state.to(DTYPE)
    spot = place * (K * V) + key[:, None] * V + value[None, :]
    if leaving is not None:
        tl.store(leaving + spot, old, mask=(key[:, None] < K) & (value[None, :] < V))
    if carried is not None:
        inside = (key[:, None] < K) & (value[None, :] < V)
        held = tl.load(states + spot, mask=inside, other=0.0) if MASKED else tl.load(states + spot)
        tl.store(carried + place * tiles + column // BLOCK_V, tl.sum(tl.sum(held.to(tl.float32) * state, 1), 0))
    change = tl.dot(k_tile, old, input_precision=DOT) * written[:, None]
    change = tl.dot(tl.trans(p_tile), do_tile, acc=change, input_precision=DOT)
    if w is None:
        a_tile = tl.load(inverses + square)
        b = tl.load(weight + line)
        lost = tl.load(erase + line) * b
        error = tl.dot(tl.trans(a_tile), change.to(DTYPE), input_precision=DOT)
        back = (error * -lost[:, None]).to(DTYPE)
        away = k_tile
        if direct is not None:
            at_v = v + wide * v_t + row[:, None] * v_t + value[None, :]
            v_tile = tl.load(at_v, mask=in_v, other=0.0) if MASKED else tl.load(at_v)
            tl.store(direct + (place * tiles + column // BLOCK_V) * BLOCK + row, tl.sum(v_tile.to(tl.float32) * error, 1))
        if dv is not None:
            tl.store(dv + (wide + row[:, None]) * (heads * V) + value[None, :], (error * b[:, None]).to(dv.dtype.element_ty), mask=in_v)
    else:
        at_w = w + wide * w_t + row[:, None] * w_t + key[None, :]
        error = change
        back = (-change).to(DTYPE) if erase is None else (change * -tl.load(erase + line)[:, None]).to(DTYPE)
        away = tl.load(at_w, mask=keys, other=0.0) if MASKED else tl.load(at_w)
    if errors is not None:
        at_e = errors + (wide + row[:, None]) * (heads * V) + value[None, :]
        if MASKED:
            tl.store(at_e, error.to(DTYPE), mask=in_v)
        else:
            tl.store(at_e, error.to(DTYPE))
    seen = (do_tile.to(tl.float32) * ahead[:, None]).to(DTYPE)
    state = tl.dot(tl.trans(q_tile), seen, acc=state * kept, input_precision=DOT)
    return tl.dot(tl.trans(away), back, acc=state, input_precision=DOT)


@triton.jit
def _reverse(
    q, k, w, v, do, leaving, errors, dv, direct, states, carried, inverses, weight, scores, read, erase, write, total, behind, d_final, before, d_initial,
    cu_seqlens, tokens, sequences, heads, group, tiles,
    q_b, q_t, q_h, k_b, k_t, k_h, w_b, w_t, w_h, v_b, v_t, v_h, do_b, do_t, do_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr, SEGMENT: tl.constexpr, DOT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """`behind` and `before` are of a segment, or of a sequence where it is not cut; `d_final` and `d_initial` of a sequence."""
    program = tl.program_id(0)
    tile = program % tiles
    head = (program // tiles) % heads
    unit = program // tiles // heads
    if SEGMENT > 0:
        batch, sequence, segment, start, begin, end = locate(cu_seqlens, unit, tokens, sequences, 0, SEGMENT * BLOCK)
        stop = tl.minimum(end, start + SEGMENT * BLOCK)
        block = segment * SEGMENT
        if (start >= end) | ((before is not None) & (segment == 0)):
            return
    else:
        sequence = unit
        block = unit * 0
        if cu_seqlens is None:
            batch, begin, end = unit, unit * 0, tokens + unit * 0
        else:
            batch, begin, end = unit * 0, tl.load(cu_seqlens + unit).to(tl.int32), tl.load(cu_seqlens + unit + 1).to(tl.int32)
        start = begin
        stop = end
    if cu_seqlens is None:
        slot = sequence * tl.cdiv(tokens, BLOCK) + block
    else:
        slot = first_slot(begin, sequence, 0, BLOCK) + block
    at = batch.to(tl.int64)
    shared = head // group
    column = tile * BLOCK_V
    q_row = q + at * q_b + shared * q_h
    k_row = k + at * k_b + shared * k_h
    w_row = w + at * w_b + head * w_h if w is not None else None
    v_row = v + at * v_b + head * v_h
    do_row = do + at * do_b + head * do_h
    e_row = errors + (at * tokens * heads + head) * V if errors is not None else None
    dv_row = dv + (at * tokens * heads + head) * V if dv is not None else None
    key = tl.arange(0, BLOCK_K)
    value = column + tl.arange(0, BLOCK_V)
    at_state = key[:, None] * V + value[None, :]
    in_state = (key[:, None] < K) & (value[None, :] < V)
    of_unit = (unit.to(tl.int64) * heads + head) * (K * V)
    of_sequence = (sequence.to(tl.int64) * heads + head) * (K * V)
    state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if behind is not None:
        state = tl.load(behind + of_unit + at_state, mask=in_state, other=0.0)
    if d_final is not None:
        state = tl.load(d_final + of_sequence + at_state, mask=in_state & (stop >= end), other=0.0)
    EXACT: tl.constexpr = (K == BLOCK_K) & (V % BLOCK_V == 0)
    length = stop - start
    full = length // BLOCK
    count = tl.cdiv(length, BLOCK)
    for i in tl.range(full, count, num_stages=STAGES):  # the ragged block comes first, and at most once
        place = (slot + i).to(tl.int64) * heads + head
        state = _reverse_block(
            state, q_row, k_row, w_row, v_row, do_row, leaving, e_row, dv_row, direct, states, carried, inverses, weight, scores, read, erase, write, total,
            start + i * BLOCK, place, column, begin, stop, heads, tiles, q_t, k_t, w_t, v_t, do_t, K, V, BLOCK_K, BLOCK, BLOCK_V, True, DOT,
        )  # fmt: skip
    for step in tl.range(0, full, num_stages=STAGES):
        i = full - 1 - step
        place = (slot + i).to(tl.int64) * heads + head
        state = _reverse_block(
            state, q_row, k_row, w_row, v_row, do_row, leaving, e_row, dv_row, direct, states, carried, inverses, weight, scores, read, erase, write, total,
            start + i * BLOCK, place, column, begin, stop, heads, tiles, q_t, k_t, w_t, v_t, do_t, K, V, BLOCK_K, BLOCK, BLOCK_V, not EXACT, DOT,
        )  # fmt: skip
    if before is not None:
        tl.store(before + of_unit + at_state, state, mask=in_state)
    if d_initial is not None:
        tl.store(d_initial + of_sequence + at_state, state, mask=in_state & (start == begin))


REVERSE = Kernel(_reverse)


@triton.jit
def _ends(
    added, maps, d_final, behind, d_initial, cu_seqlens, tokens, heads, tiles,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, UNIT: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradient of the state behind every segment, from the last to the first. Of the initial states only those of empty sequences."""
    program = tl.program_id(0)
    tile = program % tiles
    head = (program // tiles) % heads
    sequence = program // tiles // heads
    if cu_seqlens is None:
        length = tokens + sequence * 0
        unit = sequence * tl.cdiv(tokens, UNIT)
    else:
        begin = tl.load(cu_seqlens + sequence).to(tl.int32)
        length = tl.load(cu_seqlens + sequence + 1).to(tl.int32) - begin
        unit = first_slot(begin, sequence, 0, UNIT)
    row = tl.arange(0, BLOCK_K)
    value = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    at = row[:, None] * V + value[None, :]
    inside = (row[:, None] < K) & (value[None, :] < V)
    at_map = row[None, :] * K + row[:, None]
    in_map = (row[:, None] < K) & (row[None, :] < K)
    state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    of_sequence = (sequence.to(tl.int64) * heads + head) * (K * V) + at
    if d_final is not None:
        state = tl.load(d_final + of_sequence, mask=inside, other=0.0)
    count = tl.cdiv(length, UNIT)
    if count == 0:
        if d_initial is not None:
            tl.store(d_initial + of_sequence, state, mask=inside)
    else:
        place = ((unit + count - 1).to(tl.int64) * heads + head) * K
        tl.store(behind + place * V + at, state, mask=inside)
        if count > 1:
            state = tl.load(added + place * V + at, mask=inside, other=0.0)
        for step in tl.range(1, count - 1, num_stages=STAGES):
            place = ((unit + count - 1 - step).to(tl.int64) * heads + head) * K
            tl.store(behind + place * V + at, state, mask=inside)
            carry = tl.load(maps + place * K + at_map, mask=in_map, other=0.0)
            more = tl.load(added + place * V + at, mask=inside, other=0.0)
            state = tl.dot(carry, state, acc=more, input_precision=DOT)
        if count > 1:
            place = (unit.to(tl.int64) * heads + head) * K
            tl.store(behind + place * V + at, state, mask=inside)


ENDS = Kernel(_ends)
