"""The serial part of the delta rule's backward: the gradient of the state in registers, from the last block to the first (SPEC.md 10).

A program owns a sequence, a v head and a tile of value columns. With the forward's factors (`delta_prepare`; A' without beta) a block costs
five products, of which three wait for each other, as in the forward's scan:

    dU = P^T dO + write (K dS)      dX = A'^T dU      dS <- total dS + Q^T (read dO) - K^T (erase weight dX)

`leaving` keeps dS before each block, rounded, and `errors` dX, for the gradients of the inputs (`delta_gradients`). With `w`, for slow_core,
U was u - w S: `errors` keeps dU, which is the gradient of u, and dS <- total dS + Q^T (read dO) - w^T dU.
It moves 2 BLOCK (2 K + 2 BLOCK_V + 2 BLOCK) + 2 K BLOCK_V bytes a block at 16 bits; the chain binds.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .grid import first_slot
from .launch import Kernel

__all__ = ["REVERSE"]


@triton.jit
def _reverse_block(
    state, q, k, w, do, leaving, errors, inverses, weight, scores, read, erase, write, total, first, place, column, begin, end, heads, q_t, k_t, w_t, do_t,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr, MASKED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """dS before the block, from dS behind it: pointers stand at the program's batch row and head."""
    DTYPE: tl.constexpr = k.dtype.element_ty
    row = tl.arange(0, BLOCK)
    key = tl.arange(0, BLOCK_K)
    value = column + tl.arange(0, BLOCK_V)
    wide = first.to(tl.int64)
    here = (first + row >= begin) & (first + row < end)
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
    tl.store(leaving + spot, old, mask=(key[:, None] < K) & (value[None, :] < V))
    change = tl.dot(k_tile, old, input_precision=DOT) * written[:, None]
    change = tl.dot(tl.trans(p_tile), do_tile, acc=change, input_precision=DOT)
    if w is None:
        a_tile = tl.load(inverses + square)
        lost = tl.load(erase + line) * tl.load(weight + line)
        error = tl.dot(tl.trans(a_tile), change.to(DTYPE), input_precision=DOT)
        back = (error * -lost[:, None]).to(DTYPE)
        away = k_tile
    else:
        at_w = w + wide * w_t + row[:, None] * w_t + key[None, :]
        error = change
        back = (-change).to(DTYPE)
        away = tl.load(at_w, mask=keys, other=0.0) if MASKED else tl.load(at_w)
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
    q, k, w, do, leaving, errors, inverses, weight, scores, read, erase, write, total, d_final, d_initial, cu_seqlens,
    tokens, heads, group, tiles,
    q_b, q_t, q_h, k_b, k_t, k_h, w_b, w_t, w_h, do_b, do_t, do_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tile = program % tiles
    head = (program // tiles) % heads
    sequence = program // tiles // heads
    if cu_seqlens is None:
        batch, begin, end = sequence, sequence * 0, tokens + sequence * 0
        slot = sequence * tl.cdiv(tokens, BLOCK)
    else:
        batch, begin, end = sequence * 0, tl.load(cu_seqlens + sequence).to(tl.int32), tl.load(cu_seqlens + sequence + 1).to(tl.int32)
        slot = first_slot(begin, sequence, 0, BLOCK)
    at = batch.to(tl.int64)
    shared = head // group
    column = tile * BLOCK_V
    q_row = q + at * q_b + shared * q_h
    k_row = k + at * k_b + shared * k_h
    w_row = w + at * w_b + head * w_h if w is not None else None
    do_row = do + at * do_b + head * do_h
    e_row = errors + (at * tokens * heads + head) * V
    key = tl.arange(0, BLOCK_K)
    value = column + tl.arange(0, BLOCK_V)
    of_state = (sequence.to(tl.int64) * heads + head) * (K * V) + key[:, None] * V + value[None, :]
    in_state = (key[:, None] < K) & (value[None, :] < V)
    state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if d_final is not None:
        state = tl.load(d_final + of_state, mask=in_state, other=0.0)
    EXACT: tl.constexpr = (K == BLOCK_K) & (V % BLOCK_V == 0)
    length = end - begin
    full = length // BLOCK
    count = tl.cdiv(length, BLOCK)
    for i in tl.range(full, count, num_stages=STAGES):  # the ragged block comes first, and at most once
        place = (slot + i).to(tl.int64) * heads + head
        state = _reverse_block(
            state, q_row, k_row, w_row, do_row, leaving, e_row, inverses, weight, scores, read, erase, write, total,
            begin + i * BLOCK, place, column, begin, end, heads, q_t, k_t, w_t, do_t, K, V, BLOCK_K, BLOCK, BLOCK_V, True, DOT,
        )  # fmt: skip
    for step in tl.range(0, full, num_stages=STAGES):
        i = full - 1 - step
        place = (slot + i).to(tl.int64) * heads + head
        state = _reverse_block(
            state, q_row, k_row, w_row, do_row, leaving, e_row, inverses, weight, scores, read, erase, write, total,
            begin + i * BLOCK, place, column, begin, end, heads, q_t, k_t, w_t, do_t, K, V, BLOCK_K, BLOCK, BLOCK_V, not EXACT, DOT,
        )  # fmt: skip
    if d_initial is not None:
        tl.store(d_initial + of_state, state, mask=in_state)


REVERSE = Kernel(_reverse)
