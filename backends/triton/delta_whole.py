"""The exact gated delta rule in one launch: a program walks a sequence and does for every block what `delta_prepare` and `delta_scan` do.

Nothing passes through device memory but inputs and outputs. The inverse stands in the serial loop, some microseconds a block, and is repeated
by every value tile: for short sequences, where a second launch costs more, and where memory is short.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decay import between, running_log
from .delta_prepare import row_norm
from .delta_scan import advance
from .inverse import unit_lower_inverse
from .launch import Kernel

__all__ = ["WHOLE"]


@triton.jit
def _whole(
    q, k, v, beta, g, gate, o, initial, final, cu_seqlens, tokens, heads, group, tiles, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, beta_b, beta_t, beta_h, g_b, g_t, g_h, gate_b, gate_t, gate_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr, L2NORM: tl.constexpr,
    DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tile = program % tiles
    head = (program // tiles) % heads
    sequence = program // tiles // heads
    if cu_seqlens is None:
        batch, begin, end = sequence, sequence * 0, tokens + sequence * 0
    else:
        batch, begin, end = sequence * 0, tl.load(cu_seqlens + sequence).to(tl.int32), tl.load(cu_seqlens + sequence + 1).to(tl.int32)
    DTYPE: tl.constexpr = k.dtype.element_ty
    SPLIT: tl.constexpr = DTYPE == tl.float32
    at = batch.to(tl.int64)
    shared = head // group
    row = tl.arange(0, BLOCK)
    causal = row[:, None] >= row[None, :]
    key = tl.arange(0, BLOCK_K)
    value = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    at_state = (sequence.to(tl.int64) * heads + head) * (K * V) + key[:, None] * V + value[None, :]
    in_state = (key[:, None] < K) & (value[None, :] < V)
    state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if initial is not None:
        state = tl.load(initial + at_state, mask=in_state, other=0.0)
    for i in tl.range(0, tl.cdiv(end - begin, BLOCK), num_stages=STAGES):
        first = (begin + i * BLOCK).to(tl.int64)
        here = first + row < end
        in_k = here[:, None] & (key[None, :] < K)
        in_v = here[:, None] & (value[None, :] < V)
        k_tile = tl.load(k + at * k_b + first * k_t + shared * k_h + row[:, None] * k_t + key[None, :], mask=in_k, other=0.0)
        q_tile = tl.load(q + at * q_b + first * q_t + shared * q_h + row[:, None] * q_t + key[None, :], mask=in_k, other=0.0)
        v_tile = tl.load(v + at * v_b + first * v_t + head * v_h + row[:, None] * v_t + value[None, :], mask=in_v, other=0.0)
        b = tl.load(beta + at * beta_b + first * beta_t + head * beta_h + row * beta_t, mask=here, other=0.0).to(tl.float32)
        mixed = tl.dot(q_tile, tl.trans(k_tile), input_precision=DOT) * scale
        gram = tl.dot(k_tile, tl.trans(k_tile), input_precision=DOT)
        ahead = tl.full([BLOCK], 1.0, tl.float32)
        erase = ahead
        write = ahead
        total = 1.0
        if L2NORM:
            q_norm = row_norm(q_tile)
            k_norm = row_norm(k_tile)
            gram *= k_norm[:, None] * k_norm[None, :]
            mixed *= q_norm[:, None] * k_norm[None, :]
            ahead *= q_norm
            erase *= k_norm
            write *= k_norm
        lower = tl.where(row[:, None] > row[None, :], b[:, None] * gram, 0.0)
        a_tile = unit_lower_inverse(lower, BLOCK, DTYPE, DOT) * b[None, :]
        p_tile = tl.where(causal, mixed, 0.0)
        if g is not None:
            step = tl.load(g + at * g_b + first * g_t + head * g_h + row * g_t, mask=here, other=0.0).to(tl.float32)
            coarse, fine, coarse_last, fine_last = running_log(step, SPLIT)
            total = tl.exp(coarse_last + fine_last)
            back = tl.exp(coarse + fine)
            ahead *= back
            erase *= back
            write *= tl.exp((coarse_last - coarse) + (fine_last - fine))
            decay = between(coarse, fine, causal, SPLIT)
            a_tile *= decay
            p_tile *= decay
        state, old, update = advance(state, k_tile, None, v_tile, a_tile.to(DTYPE), None, erase, write, total, DTYPE, DOT)
        out = tl.dot(q_tile, old, input_precision=DOT) * (scale * ahead)[:, None]
        out = tl.dot(p_tile.to(DTYPE), update, acc=out, input_precision=DOT)
        if gate is not None:
            out *= tl.load(gate + at * gate_b + first * gate_t + head * gate_h + row * gate_t, mask=here, other=0.0).to(tl.float32)[:, None]
        at_o = ((at * tokens + first + row[:, None]) * heads + head) * V + value[None, :]
        tl.store(o + at_o, out.to(o.dtype.element_ty), mask=in_v)
    if final is not None:
        tl.store(final + at_state, state, mask=in_state)


WHOLE = Kernel(_whole)
