"""Short convolutions of q, k and v with SiLU and the norm of q and k in one launch, each row of each head once through the chip (SPEC.md 13).

A program owns ROWS tokens of one head: it reads them with the three before (from cache, where another program has them), and writes as many. Floor: (2 D
bytes in and out) B T / 3.35 TB/s over D = 2 G K + H V channels, 80 us at 1x8192 with 16/32 heads of 128 in bfloat16 and 11 us at 12 heads of 32; 13 FLOP a
channel and about two exponentials are a tenth of that. A sequence's first program takes what lies before it from the state, and writes the final state.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .grid import locate
from .launch import Kernel

__all__ = ["NORMS", "PREPARE", "span"]

NORMS = {"none": 0, "l2": 1, "l2_eps": 2}
"""How q and k are normalised, as the kernels know it."""


@triton.jit
def span(cu_seqlens, slot, tokens, sequences, UNIT: tl.constexpr):
    """(batch row, sequence, whether the slot is its first, first token of the slot, first token, end of the sequence)."""
    row, sequence, index, start, begin, end = locate(cu_seqlens, slot, tokens, sequences, 0, UNIT)
    return row.to(tl.int64), sequence.to(tl.int64), index == 0, start, begin, end


@triton.jit
def _convolved(
    x, weight, bias, state, y, final, row, sequence, opens, start, begin, end, tokens, head, heads, x_b, x_t, x_h,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, LOOKAHEAD: tl.constexpr, SILU: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of one head of one tensor; all its channels."""
    wide = head.to(tl.int64)
    x += row * x_b + wide * x_h
    weight += wide * D * 4
    column = tl.arange(0, BLOCK)
    live = column < D
    token = start + tl.arange(0, ROWS)
    z = tl.zeros([ROWS, BLOCK], tl.float32)
    if bias is not None:
        z += tl.load(bias + wide * D + column, mask=live, other=0.0).to(tl.float32)[None, :]
    for j in tl.static_range(4):
        place = token + (j - 3 + LOOKAHEAD)
        inside = (place >= begin) & (place < end)
        tile = tl.load(x + place.to(tl.int64)[:, None] * x_t + column[None, :], mask=inside[:, None] & live[None, :], other=0.0).to(tl.float32)
        z += tile * tl.load(weight + column * 4 + j, mask=live, other=0.0).to(tl.float32)[None, :]
    if (state is not None) or (final is not None):
        at = (sequence * heads + wide) * D * 4
        if opens:
            if state is not None:
                for j in tl.static_range(3):
                    older = token - begin + (j + 1)
                    old = tl.load(state + at + column[None, :] * 4 + older[:, None], mask=(older < 4)[:, None] & live[None, :], other=0.0)
                    z += old * tl.load(weight + column * 4 + j, mask=live, other=0.0).to(tl.float32)[None, :]
            if final is not None:
                step = tl.arange(0, 4)
                late = end - 4 + step
                shown = live[:, None] & (late >= begin)[None, :]
                last = tl.load(x + late.to(tl.int64)[None, :] * x_t + column[:, None], mask=shown, other=0.0).to(tl.float32)
                if state is not None:
                    kept = late - begin + 4
                    last += tl.load(state + at + column[:, None] * 4 + kept[None, :], mask=live[:, None] & (kept < 4)[None, :], other=0.0)
                tl.store(final + at + column[:, None] * 4 + step[None, :], last, mask=live[:, None])
    if SILU:
        z *= tl.sigmoid(z)
    if NORM == 1:
        z /= tl.maximum(tl.sqrt(tl.sum(z * z, 1)), 1e-12)[:, None]
    if NORM == 2:
        z *= tl.rsqrt(tl.sum(z * z, 1) + 1e-6)[:, None]
    place = (row * tokens + token) * heads + wide
    tl.store(y + place[:, None] * D + column[None, :], z.to(y.dtype.element_ty), mask=(token < end)[:, None] & live[None, :])


@triton.jit
def _prepare(
    q, k, v, q_weight, k_weight, v_weight, q_bias, k_bias, v_bias, q_state, k_state, v_state, cu_seqlens, q_y, k_y, v_y, q_final, k_final, v_final,
    slots, tokens, sequences, groups, heads, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr,
    LOOKAHEAD: tl.constexpr, SILU: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """First q's programs, then k's, then v's; q and k may be absent."""
    program = tl.program_id(0)
    keys = slots * groups
    if q is not None:
        if program < keys:
            row, sequence, opens, start, begin, end = span(cu_seqlens, program // groups, tokens, sequences, ROWS)
            _convolved(
                q, q_weight, q_bias, q_state, q_y, q_final, row, sequence, opens, start, begin, end, tokens, program % groups, groups, q_b, q_t, q_h,
                K, BLOCK_K, ROWS, LOOKAHEAD, SILU, NORM,
            )  # fmt: skip
        elif program < 2 * keys:
            row, sequence, opens, start, begin, end = span(cu_seqlens, (program - keys) // groups, tokens, sequences, ROWS)
            _convolved(
                k, k_weight, k_bias, k_state, k_y, k_final, row, sequence, opens, start, begin, end, tokens, program % groups, groups, k_b, k_t, k_h,
                K, BLOCK_K, ROWS, LOOKAHEAD, SILU, NORM,
            )  # fmt: skip
        program -= 2 * keys
    if program >= 0:
        row, sequence, opens, start, begin, end = span(cu_seqlens, program // heads, tokens, sequences, ROWS)
        _convolved(
            v, v_weight, v_bias, v_state, v_y, v_final, row, sequence, opens, start, begin, end, tokens, program % heads, heads, v_b, v_t, v_h,
            V, BLOCK_V, ROWS, LOOKAHEAD, SILU, 0,
        )  # fmt: skip


PREPARE = Kernel(_prepare)
