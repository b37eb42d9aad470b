"""Gradients of the short convolutions in one walk over the tokens: x and dy are read once, dx is written once, z is computed again on the way.

With z_s = bias + sum_j w_j x_(s-3+ahead+j) and dz the gradient that passes norm and SiLU,

    dx_t = sum_j w_j dz_(t+3-ahead-j)        dw_j = sum_s dz_s x_(s-3+ahead+j)        dbias = sum_s dz_s

A program owns SPAN tokens of HEADS heads and walks them one by one: the last three rows of x and of dz stay in registers, and so do the sums for weight
and bias, which `partial_sums` adds up over the programs in order. Three rows before and after its own are walked too. What would be the gradient of the
three tokens before a sequence is its initial state's. Floor: 3 x 2 bytes a channel and token: 120 us at 1x8192 with 16/32 heads of 128 in bfloat16,
17 us at 12 heads of 32; about 45 FLOP and two exponentials each, a quarter of that; the sums are 40 / SPAN bytes more.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .conv_rows import span
from .launch import Kernel

__all__ = ["WALK"]


@triton.jit
def _passed(z, dy, SILU: tl.constexpr, NORM: tl.constexpr):
    """dz of one token, `[HEADS, BLOCK]`."""
    y = z
    slope = z * 0.0 + 1.0
    if SILU:
        gate = tl.sigmoid(z)
        y = z * gate
        slope = gate * (1.0 + z * (1.0 - gate))
    if NORM == 1:
        size = tl.sqrt(tl.sum(y * y, 1))
        rate = 1.0 / tl.maximum(size, 1e-12)
        along = tl.where(size < 1e-12, 0.0, tl.sum(y * dy, 1) * rate * rate)
        dy = (dy - y * along[:, None]) * rate[:, None]
    if NORM == 2:
        rate = tl.rsqrt(tl.sum(y * y, 1) + 1e-6)
        dy = (dy - y * (tl.sum(y * dy, 1) * rate * rate)[:, None]) * rate[:, None]
    return dy * slope


@triton.jit
def _row(x, at, place, begin, end, live, x_t):
    """One token's row in float32, zeros outside of its sequence or where the tensor is absent."""
    if x is None:
        return at * 0.0
    else:
        return tl.load(x + place.to(tl.int64) * x_t + at, mask=live & (place >= begin) & (place < end), other=0.0).to(tl.float32)


@triton.jit
def _advance(
    a, b, c, d, dy, e, f, g, w0, w1, w2, w3, shift, d0, d1, d2, d3, db, place, start, stop,
    SILU: tl.constexpr, NORM: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Token `place`, whose taps read a, b, c, d, and the dz before it e, f, g: (dz, dx of the token that it completes, the sums)."""
    dz = _passed(shift + w0 * a + w1 * b + w2 * c + w3 * d, dy, SILU, NORM)
    dx = w0 * dz + w1 * g + w2 * f + w3 * e
    if SUMS:
        own = tl.where((place >= start) & (place < stop), dz, 0.0)
        d0 += own * a
        d1 += own * b
        d2 += own * c
        d3 += own * d
        db += own
    return dz, dx, d0, d1, d2, d3, db


@triton.jit
def _write(dx, out, d_final, state_at, at, place, end, tokens_at, live, row_stride):
    """dx of one token, with what its place among the last four adds; nothing from the end on."""
    if place < end:
        if d_final is not None:
            if place >= end - 4:
                dx += tl.load(d_final + state_at + (place - end + 4), mask=live, other=0.0)
        tl.store(out + (tokens_at + place) * row_stride + at, dx.to(out.dtype.element_ty), mask=live)


@triton.jit
def _before(dx, d_state, d_final, state_at, live, length, older: tl.constexpr):
    """The gradient of entry `older` of a sequence's initial state."""
    if d_final is not None:
        if (length <= older) & (length + 4 > older):
            dx += tl.load(d_final + state_at + (older - length), mask=live, other=0.0)
    tl.store(d_state + state_at + older, dx, mask=live)


@triton.jit
def _walked(
    x, weight, bias, state, d_y, d_final, dx, d_state, partial, row, sequence, opens, start, begin, end, tokens, slot, tile, heads, total, first,
    x_b, x_t, x_h, y_b, y_t, y_h,
    D: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, SPAN: tl.constexpr, AHEAD: tl.constexpr, SILU: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """SPAN tokens of HEADS heads of one tensor. `first`: where its sums begin in a row of `partial`, weight before bias."""
    SUMS: tl.constexpr = partial is not None
    head = tile * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, BLOCK)
    live = (head < heads)[:, None] & (column < D)[None, :]
    channel = head[:, None] * D + column[None, :]
    wide = head.to(tl.int64)[:, None]
    x += row * x_b
    x_at = wide * x_h + column[None, :]
    if d_y is not None:
        d_y += row * y_b
    y_at = wide * y_h + column[None, :]
    state_at = (sequence * heads * D + channel) * 4
    w0 = tl.load(weight + channel * 4, mask=live, other=0.0).to(tl.float32)
    w1 = tl.load(weight + channel * 4 + 1, mask=live, other=0.0).to(tl.float32)
    w2 = tl.load(weight + channel * 4 + 2, mask=live, other=0.0).to(tl.float32)
    w3 = tl.load(weight + channel * 4 + 3, mask=live, other=0.0).to(tl.float32)
    none = tl.zeros([HEADS, BLOCK], tl.float32)
    shift = none
    if bias is not None:
        shift += tl.load(bias + channel, mask=live, other=0.0).to(tl.float32)
    stop = tl.minimum(start + SPAN, end)
    length = end - begin
    a = _row(x, x_at, start - 3, begin, end, live, x_t)
    b = _row(x, x_at, start - 2, begin, end, live, x_t)
    c = _row(x, x_at, start - 1, begin, end, live, x_t)
    if state is not None:
        if opens:
            a += tl.load(state + state_at + 1, mask=live, other=0.0)
            b += tl.load(state + state_at + 2, mask=live, other=0.0)
            c += tl.load(state + state_at + 3, mask=live, other=0.0)
    d0, d1, d2, d3, db = none, none, none, none, none
    place = start - AHEAD
    d = _row(x, x_at, start, begin, end, live, x_t)
    y = _row(d_y, y_at, place, begin, end, live, y_t)
    e, old1, d0, d1, d2, d3, db = _advance(
        a, b, c, d, y, none, none, none, w0, w1, w2, w3, shift, d0, d1, d2, d3, db, place, start, stop, SILU, NORM, SUMS
    )  # fmt: skip
    a = _row(x, x_at, start + 1, begin, end, live, x_t)
    y = _row(d_y, y_at, place + 1, begin, end, live, y_t)
    f, old2, d0, d1, d2, d3, db = _advance(
        b, c, d, a, y, none, none, e, w0, w1, w2, w3, shift, d0, d1, d2, d3, db, place + 1, start, stop, SILU, NORM, SUMS
    )  # fmt: skip
    b = _row(x, x_at, start + 2, begin, end, live, x_t)
    y = _row(d_y, y_at, place + 2, begin, end, live, y_t)
    g, old3, d0, d1, d2, d3, db = _advance(
        c, d, a, b, y, none, e, f, w0, w1, w2, w3, shift, d0, d1, d2, d3, db, place + 2, start, stop, SILU, NORM, SUMS
    )  # fmt: skip
    if d_state is not None:
        if opens:
            _before(none, d_state, d_final, state_at, live, length, 0)
            _before(old1, d_state, d_final, state_at, live, length, 1)
            _before(old2, d_state, d_final, state_at, live, length, 2)
            _before(old3, d_state, d_final, state_at, live, length, 3)
    out_at = row * tokens
    stride = (heads * D).to(tl.int64)
    a, b, c = d, a, b
    for low in range(0, stop - start, 4):
        token = start + low
        place = token + 3 - AHEAD
        x0 = _row(x, x_at, token + 3, begin, end, live, x_t)
        x1 = _row(x, x_at, token + 4, begin, end, live, x_t)
        x2 = _row(x, x_at, token + 5, begin, end, live, x_t)
        x3 = _row(x, x_at, token + 6, begin, end, live, x_t)
        y0 = _row(d_y, y_at, place, begin, end, live, y_t)
        y1 = _row(d_y, y_at, place + 1, begin, end, live, y_t)
        y2 = _row(d_y, y_at, place + 2, begin, end, live, y_t)
        y3 = _row(d_y, y_at, place + 3, begin, end, live, y_t)
        h, out, d0, d1, d2, d3, db = _advance(
            a, b, c, x0, y0, e, f, g, w0, w1, w2, w3, shift, d0, d1, d2, d3, db, place, start, stop, SILU, NORM, SUMS
        )  # fmt: skip
        if dx is not None:
            _write(out, dx, d_final, state_at, channel, token, end, out_at, live, stride)
        e, out, d0, d1, d2, d3, db = _advance(
            b, c, x0, x1, y1, f, g, h, w0, w1, w2, w3, shift, d0, d1, d2, d3, db, place + 1, start, stop, SILU, NORM, SUMS
        )  # fmt: skip
        if dx is not None:
            _write(out, dx, d_final, state_at, channel, token + 1, end, out_at, live, stride)
        f, out, d0, d1, d2, d3, db = _advance(
            c, x0, x1, x2, y2, g, h, e, w0, w1, w2, w3, shift, d0, d1, d2, d3, db, place + 2, start, stop, SILU, NORM, SUMS
        )  # fmt: skip
        if dx is not None:
            _write(out, dx, d_final, state_at, channel, token + 2, end, out_at, live, stride)
        g, out, d0, d1, d2, d3, db = _advance(
            x0, x1, x2, x3, y3, h, e, f, w0, w1, w2, w3, shift, d0, d1, d2, d3, db, place + 3, start, stop, SILU, NORM, SUMS
        )  # fmt: skip
        if dx is not None:
            _write(out, dx, d_final, state_at, channel, token + 3, end, out_at, live, stride)
        a, b, c = x1, x2, x3
    if SUMS:
        partial += slot.to(tl.int64) * total + first
        tl.store(partial + channel * 4, d0, mask=live)
        tl.store(partial + channel * 4 + 1, d1, mask=live)
        tl.store(partial + channel * 4 + 2, d2, mask=live)
        tl.store(partial + channel * 4 + 3, d3, mask=live)
        tl.store(partial + heads * D * 4 + channel, db, mask=live)


@triton.jit
def _walk(
    q, k, v, q_weight, k_weight, v_weight, q_bias, k_bias, v_bias, q_state, k_state, v_state, cu_seqlens,
    q_dy, k_dy, v_dy, q_dfinal, k_dfinal, v_dfinal, q_dx, k_dx, v_dx, q_dstate, k_dstate, v_dstate, partial,
    slots, tokens, sequences, groups, heads, total, with_q, with_k, with_v,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, q_dy_b, q_dy_t, q_dy_h, k_dy_b, k_dy_t, k_dy_h, v_dy_b, v_dy_t, v_dy_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, HEADS_K: tl.constexpr, HEADS_V: tl.constexpr, SPAN: tl.constexpr,
    AHEAD: tl.constexpr, SILU: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """First q's programs, then k's, then v's; `with_*` are 1, or 0 for a tensor that wants nothing; q and k may be absent."""
    program = tl.program_id(0)
    if q is not None:
        tiles = tl.cdiv(groups, HEADS_K)
        if (program >= 0) & (program < with_q * slots * tiles):
            slot = program // tiles
            row, sequence, opens, start, begin, end = span(cu_seqlens, slot, tokens, sequences, SPAN)
            _walked(
                q, q_weight, q_bias, q_state, q_dy, q_dfinal, q_dx, q_dstate, partial, row, sequence, opens, start, begin, end, tokens, slot,
                program % tiles, groups, total, 0, q_b, q_t, q_h, q_dy_b, q_dy_t, q_dy_h, K, BLOCK_K, HEADS_K, SPAN, AHEAD, SILU, NORM,
            )  # fmt: skip
        program -= with_q * slots * tiles
        if (program >= 0) & (program < with_k * slots * tiles):
            slot = program // tiles
            row, sequence, opens, start, begin, end = span(cu_seqlens, slot, tokens, sequences, SPAN)
            _walked(
                k, k_weight, k_bias, k_state, k_dy, k_dfinal, k_dx, k_dstate, partial, row, sequence, opens, start, begin, end, tokens, slot,
                program % tiles, groups, total, groups * K * 5, k_b, k_t, k_h, k_dy_b, k_dy_t, k_dy_h,
                K, BLOCK_K, HEADS_K, SPAN, AHEAD, SILU, NORM,
            )  # fmt: skip
        program -= with_k * slots * tiles
    tiles = tl.cdiv(heads, HEADS_V)
    if (program >= 0) & (program < with_v * slots * tiles):
        slot = program // tiles
        row, sequence, opens, start, begin, end = span(cu_seqlens, slot, tokens, sequences, SPAN)
        before = 0
        if q is not None:
            before = groups * K * 10
        _walked(
            v, v_weight, v_bias, v_state, v_dy, v_dfinal, v_dx, v_dstate, partial, row, sequence, opens, start, begin, end, tokens, slot,
            program % tiles, heads, total, before, v_b, v_t, v_h, v_dy_b, v_dy_t, v_dy_h, V, BLOCK_V, HEADS_V, SPAN, AHEAD, SILU, 0,
        )  # fmt: skip


WALK = Kernel(_walk)
