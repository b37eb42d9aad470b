"""The updates U of every block from the states at the blocks' starts, in parallel: what the scan computes on its way, for a backward that was handed the states.

    U = A' (weight (V - erase (K S)))     or, with `w`, u - w S

A program owns a block, a v head and a tile of value columns: 2 BLOCK (K + BLOCK) BLOCK_V FLOP on 2 (BLOCK K + K BLOCK_V + 2 BLOCK BLOCK_V + BLOCK^2)
bytes at 16 bits: bytes limit it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .grid import locate
from .launch import Kernel

__all__ = ["UPDATES"]


@triton.jit
def _updates(
    k, w, v, states, updates, inverses, weight, erase, cu_seqlens, tokens, sequences, heads, group, tiles,
    k_b, k_t, k_h, w_b, w_t, w_h, v_b, v_t, v_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tile = program % tiles
    head = (program // tiles) % heads
    slot = program // tiles // heads
    batch, _, _, start, _, end = locate(cu_seqlens, slot, tokens, sequences, 0, BLOCK)
    if start >= end:
        return
    DTYPE: tl.constexpr = k.dtype.element_ty
    row = tl.arange(0, BLOCK)
    key = tl.arange(0, BLOCK_K)
    value = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    here = start + row < end
    keys = here[:, None] & (key[None, :] < K)
    in_v = here[:, None] & (value[None, :] < V)
    at = batch.to(tl.int64)
    first = start.to(tl.int64)
    place = slot.to(tl.int64) * heads + head
    spot = place * (K * V) + key[:, None] * V + value[None, :]
    state = tl.load(states + spot, mask=(key[:, None] < K) & (value[None, :] < V), other=0.0).to(DTYPE)
    v_tile = tl.load(v + at * v_b + first * v_t + head * v_h + row[:, None] * v_t + value[None, :], mask=in_v, other=0.0).to(tl.float32)
    if w is not None:
        w_tile = tl.load(w + at * w_b + first * w_t + head * w_h + row[:, None] * w_t + key[None, :], mask=keys, other=0.0)
        update = v_tile - tl.dot(w_tile, state, input_precision=DOT)
    else:
        k_tile = tl.load(k + at * k_b + first * k_t + (head // group) * k_h + row[:, None] * k_t + key[None, :], mask=keys, other=0.0)
        line = place * BLOCK + row
        error = (v_tile - tl.dot(k_tile, state, input_precision=DOT) * tl.load(erase + line)[:, None]) * tl.load(weight + line)[:, None]
        a_tile = tl.load(inverses + place * (BLOCK * BLOCK) + row[:, None] * BLOCK + row[None, :])
        update = tl.dot(a_tile, error.to(DTYPE), input_precision=DOT)
    at_u = ((at * tokens + first + row[:, None]) * heads + head) * V + value[None, :]
    tl.store(updates + at_u, update.to(updates.dtype.element_ty), mask=in_v)


UPDATES = Kernel(_updates)
