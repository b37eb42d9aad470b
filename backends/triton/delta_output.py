"""The outputs of the exact gated delta rule where the state at every block's start is known: blocks in parallel, nothing serial.

    U = A' (V - erase (K S))      o = read (Q S) + P U,   with P = tril(scale Q K^T) * Gamma as `delta_prepare` wrote it

4 BLOCK K BLOCK_V + 4 BLOCK^2 BLOCK_V FLOP on the bytes of q, k, v, o, A', P and S (K BLOCK_V): bound by bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .grid import locate
from .launch import Kernel

__all__ = ["OUTPUT", "block_output"]


@triton.jit
def block_output(
    q, k, v, o, state, inverses, scores, read, erase, batch, start, end, slot, head, tokens, heads, group, value,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Writes a block's outputs for some value columns from the state `[BLOCK_K, columns]` at its start, an operand."""
    DTYPE: tl.constexpr = k.dtype.element_ty
    at = batch.to(tl.int64)
    first = start.to(tl.int64)
    shared = head // group
    row = tl.arange(0, BLOCK)
    key = tl.arange(0, BLOCK_K)
    here = start + row < end
    in_k = here[:, None] & (key[None, :] < K)
    in_v = here[:, None] & (value[None, :] < V)
    place = slot.to(tl.int64) * heads + head
    square = place * (BLOCK * BLOCK) + row[:, None] * BLOCK + row[None, :]
    q_tile = tl.load(q + at * q_b + first * q_t + shared * q_h + row[:, None] * q_t + key[None, :], mask=in_k, other=0.0)
    k_tile = tl.load(k + at * k_b + first * k_t + shared * k_h + row[:, None] * k_t + key[None, :], mask=in_k, other=0.0)
    v_tile = tl.load(v + at * v_b + first * v_t + head * v_h + row[:, None] * v_t + value[None, :], mask=in_v, other=0.0)
    a_tile = tl.load(inverses + square)
    p_tile = tl.load(scores + square)
    erased = tl.load(erase + place * BLOCK + row)
    ahead = tl.load(read + place * BLOCK + row)
    seen = tl.dot(k_tile, state, input_precision=DOT)
    error = (v_tile.to(tl.float32) - seen * erased[:, None]).to(DTYPE)
    update = tl.dot(a_tile, error, input_precision=DOT).to(DTYPE)
    out = tl.dot(q_tile, state, input_precision=DOT) * ahead[:, None]
    out = tl.dot(p_tile, update, acc=out, input_precision=DOT)
    at_o = ((at * tokens + first + row[:, None]) * heads + head) * V + value[None, :]
    tl.store(o + at_o, out.to(o.dtype.element_ty), mask=in_v)


@triton.jit
def _output(
    q, k, v, o, states, inverses, scores, read, erase, cu_seqlens, tokens, sequences, heads, group, tiles,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tile = program % tiles
    head = (program // tiles) % heads
    slot = program // tiles // heads
    batch, _, _, start, _, end = locate(cu_seqlens, slot, tokens, sequences, 0, BLOCK)
    if start >= end:
        return
    key = tl.arange(0, BLOCK_K)
    value = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    place = slot.to(tl.int64) * heads + head
    in_state = (key[:, None] < K) & (value[None, :] < V)
    state = tl.load(states + place * (K * V) + key[:, None] * V + value[None, :], mask=in_state, other=0.0)
    block_output(
        q, k, v, o, state, inverses, scores, read, erase, batch, start, end, slot, head, tokens, heads, group, value,
        q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, K, V, BLOCK_K, BLOCK, DOT,
    )  # fmt: skip


OUTPUT = Kernel(_output)
