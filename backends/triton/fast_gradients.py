"""The gradients of S_fast (SPEC.md 10), two ways through a chunk. What the forward computed inside a chunk is computed again; nothing of it is saved.

    whole    a chunk is one or two blocks, whose pairs are written out: programs for dv, for the sums of dgate and dg, and, for each block and all v heads
             that share q and k, for dq and dk. One launch; the last step of dg is taken on chip
    blocks   a program walks the blocks that its own meets: dq, dk, dv in pieces of columns, and the sums over rows and over keys, side by side in one
             launch; `RUNNING` then sums for dg. Quadratic in the chunk: beyond 512 tokens walking it would be faster, which is not written yet

With P = Q K^T, D = dO V^T and F_tj = scale gate_t Gamma_tj on and below the diagonal, A = F P, B = F D:

    dv = A^T dO    dk = B^T Q    dq = B K    dgate = scale rowsum(P D Gamma)    dg_i = sum over t < i of colsum(P B)_t - rowsum(P B)_t

dO enters the products as it came: gate, scale and decay are applied to float32 scores. The diagonal of P B, which would cancel in dg, is left out. B is
summed over the v heads before the products with K and Q. No result of a product is turned for the next: A^T comes from K Q^T, and dk^T = Q^T B.

A row moves 2 K / group + 2 V elements in and 2 K / group + V out a v head. For a chunk of two blocks whole takes 16 products of a pair of blocks a v head
and 6 more a q/k head (2 BLOCK^2 K FLOP each; 10 and 6 without gate and g), for one block 5 and 2; blocks takes 10 a pair. Its programs read a tile about
three times, from L2, since those of a chunk run together. By estimate device memory, L2 and tensor cores are about even at C = 128, K = 128; narrow heads
are bound by exponentials and sums. What a carried and a final W add is prepared by `fast_edges`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .fast_chunks import _log, _rows
from .fast_edges import edge_row
from .grid import locate
from .launch import Kernel

__all__ = ["BLOCKS", "RUNNING", "WHOLE"]


@triton.jit
def _rate(gate, row, here, scale, gate_t, ROWS: tl.constexpr):
    """scale * gate `[rows]`."""
    if gate is None:
        return tl.zeros([ROWS], tl.float32) + scale
    else:
        return tl.load(gate + row * gate_t, mask=here, other=0.0).to(tl.float32) * scale


@triton.jit
def _put(x, tile, more, row, column, here, edge, row_t, COLUMNS: tl.constexpr, EVEN: tl.constexpr):
    """Writes a tile `[rows, columns]`, with what lies in `more` where the chunk is at that edge."""
    inside = here[:, None] if EVEN else here[:, None] & (column[None, :] < COLUMNS)
    at = row[:, None] * row_t + column[None, :]
    if more is not None:
        tile += tl.load(more + at, mask=inside & edge, other=0.0)
    tl.store(x + at, tile.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _put_turned(x, tile, more, row, column, here, edge, row_t, COLUMNS: tl.constexpr, EVEN: tl.constexpr):
    """The same of a tile `[columns, rows]`."""
    inside = here[None, :] if EVEN else here[None, :] & (column[:, None] < COLUMNS)
    at = row[None, :] * row_t + column[:, None]
    if more is not None:
        tile += tl.load(more + at, mask=inside & edge, other=0.0)
    tl.store(x + at, tile.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _gamma(x, log, fine, key_log, key_fine, row, key, SPLIT: tl.constexpr):
    """x Gamma `[rows, keys]`: 0 above the diagonal."""
    if log is None:
        return tl.where(row[:, None] >= key[None, :], x, 0.0)
    else:
        apart = log[:, None] - key_log[None, :]
        if SPLIT:
            apart += fine[:, None] - key_fine[None, :]
        return x * tl.exp(tl.where(row[:, None] >= key[None, :], apart, float("-inf")))


@triton.jit
def _gamma_turned(x, log, fine, key_log, key_fine, row, key, SPLIT: tl.constexpr):
    """The same `[keys, rows]`."""
    if log is None:
        return tl.where(key[:, None] <= row[None, :], x, 0.0)
    else:
        apart = log[None, :] - key_log[:, None]
        if SPLIT:
            apart += fine[None, :] - key_fine[:, None]
        return x * tl.exp(tl.where(key[:, None] <= row[None, :], apart, float("-inf")))


@triton.jit
def _values(
    q, k, gate, g, d_o, left_v, dv, scale, heads, at, first, head, shared, token, edge, low, high, closes,
    q_b, q_t, q_h, k_b, k_t, k_h, gate_b, gate_t, gate_h, g_b, g_t, g_h, do_b, do_t, do_h,
    K: tl.constexpr, V: tl.constexpr, TWO: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """dv of a chunk and one v head, from A^T `[keys, rows]`."""
    DTYPE: tl.constexpr = k.dtype.element_ty
    SPLIT: tl.constexpr = k.dtype.element_ty == tl.float32
    EVEN_K: tl.constexpr = K == BLOCK_K
    EVEN_V: tl.constexpr = V == BLOCK_V
    row = tl.arange(0, BLOCK)
    column = tl.arange(0, BLOCK_K)
    value = tl.arange(0, BLOCK_V)
    here0 = (row >= low) & (row < high)
    here1 = (row >= low - BLOCK) & (row < high - BLOCK)
    q += at * q_b + first * q_t + shared * q_h
    k += at * k_b + first * k_t + shared * k_h
    d_o += at * do_b + first * do_t + head * do_h
    dv += (token * heads + head) * V
    if left_v is not None:
        left_v += (edge * heads + head) * V
    log0 = None
    fine0 = None
    log1 = None
    fine1 = None
    if gate is not None:
        gate += at * gate_b + first * gate_t + head * gate_h
    if g is not None:
        g += at * g_b + first * g_t + head * g_h
        log0, fine0, last, last_fine = _log(g, row, here0, g_t, SPLIT)
    if TWO:
        q1 = _rows(q, BLOCK + row, column, here1, q_t, K, EVEN_K)
        k1 = _rows(k, BLOCK + row, column, here1, k_t, K, EVEN_K)
        p = tl.dot(k1, tl.trans(q1), input_precision=DOT)
        do1 = _rows(d_o, BLOCK + row, value, here1, do_t, V, EVEN_V)
        rate1 = _rate(gate, BLOCK + row, here1, scale, gate_t, BLOCK)
        if g is not None:
            log1, fine1, _last, _last_fine = _log(g, BLOCK + row, here1, g_t, SPLIT)
        a = (_gamma_turned(p, log1, fine1, log1, fine1, row, row, SPLIT) * rate1[None, :]).to(DTYPE)
        dv_tile = tl.dot(a, do1, input_precision=DOT)
        _put(dv, dv_tile, left_v, BLOCK + row, value, here1, closes, heads * V, V, EVEN_V)
    k0 = _rows(k, row, column, here0, k_t, K, EVEN_K)
    if TWO:
        p = tl.dot(k0, tl.trans(q1), input_precision=DOT)
        if g is not None:
            p *= tl.exp((last - log0) + (last_fine - fine0))[:, None]
            p *= tl.exp(log1 + fine1)[None, :]
        a_far = (p * rate1[None, :]).to(DTYPE)
    q0 = _rows(q, row, column, here0, q_t, K, EVEN_K)
    do0 = _rows(d_o, row, value, here0, do_t, V, EVEN_V)
    p = tl.dot(k0, tl.trans(q0), input_precision=DOT)
    a = (_gamma_turned(p, log0, fine0, log0, fine0, row, row, SPLIT) * _rate(gate, row, here0, scale, gate_t, BLOCK)[None, :]).to(DTYPE)
    dv_tile = tl.dot(a, do0, input_precision=DOT)
    if TWO:
        dv_tile = tl.dot(a_far, do1, dv_tile, input_precision=DOT)
    _put(dv, dv_tile, left_v, row, value, here0, closes, heads * V, V, EVEN_V)


@triton.jit
def _sums(
    q, k, v, gate, g, d_o, held_log, left_log, total, dgate, dg, scale, heads, at, first, head, shared, token, edge, sequence, low, high, opens, closes,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, gate_b, gate_t, gate_h, g_b, g_t, g_h, do_b, do_t, do_h,
    K: tl.constexpr, V: tl.constexpr, TWO: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    TILES: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """dgate and dg of a chunk and one v head, from P D Gamma `[rows, keys]`."""
    SPLIT: tl.constexpr = k.dtype.element_ty == tl.float32
    EVEN_K: tl.constexpr = K == BLOCK_K
    EVEN_V: tl.constexpr = V == BLOCK_V
    row = tl.arange(0, BLOCK)
    column = tl.arange(0, BLOCK_K)
    value = tl.arange(0, BLOCK_V)
    here0 = (row >= low) & (row < high)
    here1 = (row >= low - BLOCK) & (row < high - BLOCK)
    q += at * q_b + first * q_t + shared * q_h
    k += at * k_b + first * k_t + shared * k_h
    v += at * v_b + first * v_t + head * v_h
    d_o += at * do_b + first * do_t + head * do_h
    place = token * heads + head
    mine = edge * heads + head
    log0 = None
    fine0 = None
    log1 = None
    fine1 = None
    if gate is not None:
        gate += at * gate_b + first * gate_t + head * gate_h
    if g is not None:
        g += at * g_b + first * g_t + head * g_h
        log0, fine0, last, last_fine = _log(g, row, here0, g_t, SPLIT)
    if TWO:
        rate1 = _rate(gate, BLOCK + row, here1, scale, gate_t, BLOCK)
        if g is not None:
            log1, fine1, _last, _last_fine = _log(g, BLOCK + row, here1, g_t, SPLIT)
        q1 = _rows(q, BLOCK + row, column, here1, q_t, K, EVEN_K)
        do1 = _rows(d_o, BLOCK + row, value, here1, do_t, V, EVEN_V)
        p = tl.dot(q1, tl.trans(_rows(k, BLOCK + row, column, here1, k_t, K, EVEN_K)), input_precision=DOT)
        p *= tl.dot(do1, tl.trans(_rows(v, BLOCK + row, value, here1, v_t, V, EVEN_V)), input_precision=DOT)
        p = _gamma(p, log1, fine1, log1, fine1, row, row, SPLIT)
        diagonal = tl.sum(tl.where(row[:, None] == row[None, :], p, 0.0), 1)
        p = tl.where(row[:, None] > row[None, :], p, 0.0)
        read = tl.sum(p, 1)
        flow1 = tl.sum(p * rate1[:, None], 0)
    k0 = _rows(k, row, column, here0, k_t, K, EVEN_K)
    v0 = _rows(v, row, value, here0, v_t, V, EVEN_V)
    if TWO:
        p = tl.dot(q1, tl.trans(k0), input_precision=DOT)
        p *= tl.dot(do1, tl.trans(v0), input_precision=DOT)
        if g is not None:
            p *= tl.exp(log1 + fine1)[:, None]
            p *= tl.exp((last - log0) + (last_fine - fine0))[None, :]
        read += tl.sum(p, 1)
        flow0 = tl.sum(p * rate1[:, None], 0)
        if held_log is not None:
            read += tl.load(held_log + mine + (BLOCK + row) * heads, mask=here1 & opens, other=0.0)
        if dgate is not None:
            tl.store(dgate + place + (BLOCK + row) * heads, ((read + diagonal) * scale).to(dgate.dtype.element_ty), mask=here1)
        if left_log is not None:
            flow1 += tl.load(left_log + mine + (BLOCK + row) * heads, mask=here1 & closes, other=0.0)
        flow1 -= read * rate1
    rate0 = _rate(gate, row, here0, scale, gate_t, BLOCK)
    p = tl.dot(_rows(q, row, column, here0, q_t, K, EVEN_K), tl.trans(k0), input_precision=DOT)
    p *= tl.dot(_rows(d_o, row, value, here0, do_t, V, EVEN_V), tl.trans(v0), input_precision=DOT)
    p = _gamma(p, log0, fine0, log0, fine0, row, row, SPLIT)
    diagonal = tl.sum(tl.where(row[:, None] == row[None, :], p, 0.0), 1)
    p = tl.where(row[:, None] > row[None, :], p, 0.0)
    read = tl.sum(p, 1)
    flow = tl.sum(p * rate0[:, None], 0)
    if held_log is not None:
        read += tl.load(held_log + mine + row * heads, mask=here0 & opens, other=0.0)
    if dgate is not None:
        tl.store(dgate + place + row * heads, ((read + diagonal) * scale).to(dgate.dtype.element_ty), mask=here0)
    if dg is not None:
        # dg_i = total + sum over t < i of what flows in less what flows out
        if TWO:
            flow += flow0
        if left_log is not None:
            flow += tl.load(left_log + mine + row * heads, mask=here0 & closes, other=0.0)
        flow -= read * rate0
        base = 0.0
        if total is not None:
            base = _total(total, sequence, head, heads, opens, TILES)
        tl.store(dg + place + row * heads, (base + tl.cumsum(flow, 0) - flow).to(dg.dtype.element_ty), mask=here0)
        if TWO:
            base += tl.sum(flow, 0)
            tl.store(dg + place + (BLOCK + row) * heads, (base + tl.cumsum(flow1, 0) - flow1).to(dg.dtype.element_ty), mask=here1)


@triton.jit
def _shared(
    q, k, v, gate, g, d_o, held_q, left_k, dq, dk, scale, groups, at, first, shared, token, edge, low, high, opens, closes, nothing,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, gate_b, gate_t, gate_h, g_b, g_t, g_h, do_b, do_t, do_h,
    K: tl.constexpr, V: tl.constexpr, TWO: tl.constexpr, LATE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    GROUP: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """dq and dk of one block of a chunk (LATE: the second) and one q/k head, from B `[rows, keys]` summed over the GROUP v heads.

    The first block's keys meet both blocks' rows, the second block's rows both blocks' keys.
    """
    DTYPE: tl.constexpr = k.dtype.element_ty
    SUM: tl.constexpr = DTYPE if GROUP == 1 else tl.float32
    SPLIT: tl.constexpr = k.dtype.element_ty == tl.float32
    EVEN_K: tl.constexpr = K == BLOCK_K
    EVEN_V: tl.constexpr = V == BLOCK_V
    column = tl.arange(0, BLOCK_K)
    value = tl.arange(0, BLOCK_V)
    near = tl.zeros([BLOCK, BLOCK], SUM)
    if TWO:
        far = tl.zeros([BLOCK, BLOCK], SUM)
    for step in range(GROUP):
        row = tl.arange(0, BLOCK) + step * nothing  # so that no mask waits in registers for the next head
        here0 = (row >= low) & (row < high)
        here1 = (row >= low - BLOCK) & (row < high - BLOCK)
        head = shared * GROUP + step
        v_head = v + at * v_b + first * v_t + head * v_h
        do_head = d_o + at * do_b + first * do_t + head * do_h
        gates = gate
        if gate is not None:
            gates = gate + at * gate_b + first * gate_t + head * gate_h
        log0 = None
        fine0 = None
        log1 = None
        fine1 = None
        if g is not None:
            logs = g + at * g_b + first * g_t + head * g_h
            log0, fine0, last, last_fine = _log(logs, row, here0, g_t, SPLIT)
            if TWO:
                log1, fine1, _last, _last_fine = _log(logs, BLOCK + row, here1, g_t, SPLIT)
        v0 = _rows(v_head, row, value, here0, v_t, V, EVEN_V)
        if TWO:
            rate1 = _rate(gates, BLOCK + row, here1, scale, gate_t, BLOCK)
            do1 = _rows(do_head, BLOCK + row, value, here1, do_t, V, EVEN_V)
            d = tl.dot(do1, tl.trans(v0), input_precision=DOT)
            ahead = rate1
            if g is not None:
                ahead *= tl.exp(log1 + fine1)
                d *= tl.exp((last - log0) + (last_fine - fine0))[None, :]
            far += (d * ahead[:, None]).to(SUM)
        if LATE:
            v1 = _rows(v_head, BLOCK + row, value, here1, v_t, V, EVEN_V)
            d = tl.dot(do1, tl.trans(v1), input_precision=DOT)
            near += (_gamma(d, log1, fine1, log1, fine1, row, row, SPLIT) * rate1[:, None]).to(SUM)
        else:
            rate0 = _rate(gates, row, here0, scale, gate_t, BLOCK)
            do0 = _rows(do_head, row, value, here0, do_t, V, EVEN_V)
            d = tl.dot(do0, tl.trans(v0), input_precision=DOT)
            near += (_gamma(d, log0, fine0, log0, fine0, row, row, SPLIT) * rate0[:, None]).to(SUM)
    row = tl.arange(0, BLOCK)
    here0 = (row >= low) & (row < high)
    here1 = (row >= low - BLOCK) & (row < high - BLOCK)
    line = row + (BLOCK if LATE else 0)
    here = here1 if LATE else here0
    q += at * q_b + first * q_t + shared * q_h
    k += at * k_b + first * k_t + shared * k_h
    place = (token * groups + shared) * K
    mine = (edge * groups + shared) * K
    near_dot = near.to(DTYPE)
    if TWO:
        far_dot = far.to(DTYPE)
    if dq is not None:
        held = held_q
        if held_q is not None:
            held = held_q + mine
        dq_tile = tl.dot(near_dot, _rows(k, line, column, here, k_t, K, EVEN_K), input_precision=DOT)
        if LATE:
            dq_tile = tl.dot(far_dot, _rows(k, row, column, here0, k_t, K, EVEN_K), dq_tile, input_precision=DOT)
        _put(dq + place, dq_tile, held, line, column, here, opens, groups * K, K, EVEN_K)
    if dk is not None:
        left = left_k
        if left_k is not None:
            left = left_k + mine
        dk_tile = tl.dot(tl.trans(_rows(q, line, column, here, q_t, K, EVEN_K)), near_dot, input_precision=DOT)
        if TWO and not LATE:
            dk_tile = tl.dot(tl.trans(_rows(q, BLOCK + row, column, here1, q_t, K, EVEN_K)), far_dot, dk_tile, input_precision=DOT)
        _put_turned(dk + place, dk_tile, left, line, column, here, closes, groups * K, K, EVEN_K)


@triton.jit
def _whole(
    q, k, v, gate, g, d_o, cu_seqlens, held_q, held_log, left_k, left_v, left_log, total, dq, dk, dv, dgate, dg,
    scale, tokens, sequences, offset, heads, nothing,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, gate_b, gate_t, gate_h, g_b, g_t, g_h, do_b, do_t, do_h,
    K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    GROUP: tl.constexpr, TILES: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A chunk of one or two blocks and a q/k head: dq and dk of a block, or what one of the GROUP v heads has of its own."""
    TWO: tl.constexpr = CHUNK > BLOCK
    SHARED: tl.constexpr = (2 if TWO else 1) if (dq is not None) or (dk is not None) else 0
    VALUES: tl.constexpr = GROUP if dv is not None else 0
    SUMS: tl.constexpr = GROUP if (dgate is not None) or (dg is not None) else 0
    program = tl.program_id(0)
    part = program % (SHARED + VALUES + SUMS)
    groups = heads // GROUP
    rest = program // (SHARED + VALUES + SUMS)
    shared = (rest % groups).to(tl.int64)
    batch, sequence, index, start, begin, end = locate(cu_seqlens, rest // groups, tokens, sequences, offset, CHUNK)
    if (start >= end) | (begin >= end):
        return
    stop = tl.minimum(end, start + CHUNK)
    low = begin - start
    high = stop - start
    at = batch.to(tl.int64)
    first = start.to(tl.int64)
    token = at * tokens + first
    opens = index == 0
    closes = stop >= end
    edge = edge_row(cu_seqlens, sequence, begin, tokens, CHUNK) + first - tl.maximum(start, begin)
    if SHARED > 0:
        if part == 0:
            _shared(
                q, k, v, gate, g, d_o, held_q, left_k, dq, dk, scale, groups, at, first, shared, token, edge, low, high, opens, closes, nothing,
                q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, gate_b, gate_t, gate_h, g_b, g_t, g_h, do_b, do_t, do_h,
                K, V, TWO, False, BLOCK, BLOCK_K, BLOCK_V, GROUP, DOT,
            )  # fmt: skip
            return
    if SHARED > 1:
        if part == 1:
            _shared(
                q, k, v, gate, g, d_o, held_q, left_k, dq, dk, scale, groups, at, first, shared, token, edge, low, high, opens, closes, nothing,
                q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, gate_b, gate_t, gate_h, g_b, g_t, g_h, do_b, do_t, do_h,
                K, V, TWO, True, BLOCK, BLOCK_K, BLOCK_V, GROUP, DOT,
            )  # fmt: skip
            return
    if VALUES > 0:
        if part - SHARED < VALUES:
            head = shared * GROUP + part - SHARED
            _values(
                q, k, gate, g, d_o, left_v, dv, scale, heads, at, first, head, shared, token, edge, low, high, closes,
                q_b, q_t, q_h, k_b, k_t, k_h, gate_b, gate_t, gate_h, g_b, g_t, g_h, do_b, do_t, do_h,
                K, V, TWO, BLOCK, BLOCK_K, BLOCK_V, DOT,
            )  # fmt: skip
            return
    if SUMS > 0:
        head = shared * GROUP + part - SHARED - VALUES
        _sums(
            q, k, v, gate, g, d_o, held_log, left_log, total, dgate, dg, scale, heads, at, first, head, shared, token, edge, sequence, low, high, opens, closes,
            q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, gate_b, gate_t, gate_h, g_b, g_t, g_h, do_b, do_t, do_h,
            K, V, TWO, BLOCK, BLOCK_K, BLOCK_V, TILES, DOT,
        )  # fmt: skip


@triton.jit
def _total(total, sequence, head, heads, opens, TILES: tl.constexpr):
    """<W, dW> of a chunk that a carried W opens, which is dg before its first token; else 0."""
    place = total + (sequence.to(tl.int64) * heads + head) * TILES
    found = tl.load(place, mask=opens, other=0.0)
    for tile in range(1, TILES):
        found += tl.load(place + tile, mask=opens, other=0.0)
    return found


@triton.jit
def _down(
    own, left, right, other, gate, g, column, block, low, high, scale, acc, zero, left_t, right_t, gate_t, g_t,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_L: tl.constexpr, EVEN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A block of keys against the rows from its own on, X = own left^T: acc + (F X)^T right; or with `other` acc + the column sums of F X (other right^T)."""
    DTYPE: tl.constexpr = left.dtype.element_ty
    SPLIT: tl.constexpr = left.dtype.element_ty == tl.float32
    line = tl.arange(0, BLOCK)
    wide = tl.arange(0, BLOCK_L)
    key = block * BLOCK + line
    first = (block * BLOCK).to(tl.int64)
    key_log = None
    key_fine = None
    if g is not None:
        key_log, key_fine, _last, _last_fine = _log(g + first * g_t, line, (key >= low) & (key < high), g_t, SPLIT)
    passed = zero
    passed_fine = zero
    for above in range(block, tl.cdiv(high, BLOCK)):
        log = None
        fine = None
        gates = gate
        ahead = first + (above - block) * BLOCK
        row = above * BLOCK + line
        here = (row >= low) & (row < high)
        left_tile = _rows(left + ahead * left_t, line, wide, here, left_t, LEFT, LEFT == BLOCK_L)
        right_tile = _rows(right + ahead * right_t, line, column, here, right_t, RIGHT, EVEN)
        if g is not None:
            log, fine, last, last_fine = _log(g + ahead * g_t, line, here, g_t, SPLIT)
            log += passed
            fine += passed_fine
            passed += last
            passed_fine += last_fine
        if gate is not None:
            gates = gate + ahead * gate_t
        rate = _rate(gates, line, here, scale, gate_t, BLOCK)
        x = tl.dot(own, tl.trans(left_tile), input_precision=DOT)
        x = _gamma_turned(x, log, fine, key_log, key_fine, row, key, SPLIT) * rate[None, :]
        if other is None:
            acc = tl.dot(x.to(DTYPE), right_tile, acc, input_precision=DOT)
        else:
            x *= tl.dot(other, tl.trans(right_tile), input_precision=DOT)
            acc += tl.sum(tl.where(key[:, None] < row[None, :], x, 0.0), 1)
    return acc


@triton.jit
def _back(
    do_tile, q_tile, v, k, gate, g, column, block, low, high, scale, acc, diagonal, zero, v_t, k_t, gate_t, g_t,
    K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr, EVEN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A block of rows against the keys from its own back: acc + B K; or with `q_tile` acc + the row sums of P D Gamma, and its diagonal."""
    DTYPE: tl.constexpr = k.dtype.element_ty
    SPLIT: tl.constexpr = k.dtype.element_ty == tl.float32
    line = tl.arange(0, BLOCK)
    value = tl.arange(0, BLOCK_V)
    row = block * BLOCK + line
    here = (row >= low) & (row < high)
    first = (block * BLOCK).to(tl.int64)
    log = None
    fine = None
    gates = gate
    if gate is not None:
        gates = gate + first * gate_t
    rate = _rate(gates, line, here, scale, gate_t, BLOCK)
    if g is not None:
        log, fine, _last, _last_fine = _log(g + first * g_t, line, here, g_t, SPLIT)
    between = zero
    between_fine = zero
    for back in range(block - tl.maximum(low, 0) // BLOCK + 1):
        key_log = None
        key_fine = None
        behind = first - back * BLOCK
        key = (block - back) * BLOCK + line
        near = (key >= low) & (key < high)
        v_tile = _rows(v + behind * v_t, line, value, near, v_t, V, V == BLOCK_V)
        k_tile = _rows(k + behind * k_t, line, column, near, k_t, K, EVEN)
        if g is not None:
            key_log, key_fine, last, last_fine = _log(g + behind * g_t, line, near, g_t, SPLIT)
            between += tl.where(back > 0, last, 0.0)
            between_fine += tl.where(back > 0, last_fine, 0.0)
            key_log -= between
            key_fine -= between_fine
        d = _gamma(tl.dot(do_tile, tl.trans(v_tile), input_precision=DOT), log, fine, key_log, key_fine, row, key, SPLIT)
        if q_tile is None:
            acc = tl.dot((d * rate[:, None]).to(DTYPE), k_tile, acc, input_precision=DOT)
        else:
            d *= tl.dot(q_tile, tl.trans(k_tile), input_precision=DOT)
            acc += tl.sum(tl.where(row[:, None] > key[None, :], d, 0.0), 1)
            diagonal += tl.sum(tl.where(row[:, None] == key[None, :], d, 0.0), 1)
    return acc, diagonal, rate


@triton.jit
def _blocks(
    q, k, v, gate, g, d_o, cu_seqlens, held_q, held_log, left_k, left_v, left_log, dq, dk, dv, dgate, inflow, outflow,
    scale, tokens, sequences, offset, heads, group,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, gate_b, gate_t, gate_h, g_b, g_t, g_h, do_b, do_t, do_h,
    K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A block of a chunk and a q/k head: BLOCK_C columns of dq, of dk, of one v head's dv, or one v head's sums over its rows or over its keys."""
    COUNT: tl.constexpr = (CHUNK + BLOCK - 1) // BLOCK
    TILES_K: tl.constexpr = (K + BLOCK_C - 1) // BLOCK_C
    TILES_V: tl.constexpr = (V + BLOCK_C - 1) // BLOCK_C
    READS: tl.constexpr = TILES_K if dq is not None else 0
    KEYS: tl.constexpr = TILES_K if dk is not None else 0
    VALUES: tl.constexpr = TILES_V if dv is not None else 0
    ROWS: tl.constexpr = 1 if (dgate is not None) or (outflow is not None) else 0
    SUMS: tl.constexpr = ROWS + (1 if inflow is not None else 0)
    EVEN_K: tl.constexpr = K == BLOCK_K
    EVEN_V: tl.constexpr = V == BLOCK_V
    groups = heads // group
    parts = READS + KEYS + (VALUES + SUMS) * group
    program = tl.program_id(0)
    part = program % parts
    rest = program // parts
    block = rest % COUNT
    rest = rest // COUNT
    shared = (rest % groups).to(tl.int64)
    batch, sequence, index, start, begin, end = locate(cu_seqlens, rest // groups, tokens, sequences, offset, CHUNK)
    low = begin - start
    high = tl.minimum(end - start, CHUNK)
    if (block * BLOCK >= high) | (block * BLOCK + BLOCK <= low) | (begin >= end):
        return
    at = batch.to(tl.int64)
    first = start.to(tl.int64)
    token = at * tokens + first
    opens = index == 0
    closes = start + high >= end
    edge = edge_row(cu_seqlens, sequence, begin, tokens, CHUNK) + first - tl.maximum(start, begin)
    column = tl.arange(0, BLOCK_K)
    value = tl.arange(0, BLOCK_V)
    piece = tl.arange(0, BLOCK_C)
    own = block * BLOCK + tl.arange(0, BLOCK)
    row = own.to(tl.int64)
    here = (own >= low) & (own < high)
    zero = start * 0.0
    q += at * q_b + first * q_t + shared * q_h
    k += at * k_b + first * k_t + shared * k_h
    v += at * v_b + first * v_t + shared * group * v_h
    d_o += at * do_b + first * do_t + shared * group * do_h
    if gate is not None:
        gate += at * gate_b + first * gate_t + shared * group * gate_h
    if g is not None:
        g += at * g_b + first * g_t + shared * group * g_h
    if READS > 0:
        if part < READS:
            acc = tl.zeros([BLOCK, BLOCK_C], tl.float32)
            for _step in range(group):
                do_tile = _rows(d_o, row, value, here, do_t, V, EVEN_V)
                acc, _zero, _rates = _back(
                    do_tile, None, v, k, gate, g, part * BLOCK_C + piece, block, low, high, scale, acc, zero, zero, v_t, k_t, gate_t, g_t,
                    K, V, BLOCK, BLOCK_V, K % BLOCK_C == 0, DOT,
                )  # fmt: skip
                v += v_h
                d_o += do_h
                if gate is not None:
                    gate += gate_h
                if g is not None:
                    g += g_h
            if held_q is not None:
                held_q += (edge * groups + shared) * K
            _put(dq + (token * groups + shared) * K, acc, held_q, row, part * BLOCK_C + piece, here, opens, groups * K, K, K % BLOCK_C == 0)
            return
    part -= READS
    if KEYS > 0:
        if part < KEYS:
            acc = tl.zeros([BLOCK, BLOCK_C], tl.float32)
            for _step in range(group):
                v_tile = _rows(v, row, value, here, v_t, V, EVEN_V)
                acc = _down(
                    v_tile, d_o, q, None, gate, g, part * BLOCK_C + piece, block, low, high, scale, acc, zero, do_t, q_t, gate_t, g_t,
                    V, K, BLOCK, BLOCK_V, K % BLOCK_C == 0, DOT,
                )  # fmt: skip
                v += v_h
                d_o += do_h
                if gate is not None:
                    gate += gate_h
                if g is not None:
                    g += g_h
            if left_k is not None:
                left_k += (edge * groups + shared) * K
            _put(dk + (token * groups + shared) * K, acc, left_k, row, part * BLOCK_C + piece, here, closes, groups * K, K, K % BLOCK_C == 0)
            return
    part -= KEYS
    step = (part % group).to(tl.int64)
    part = part // group
    head = shared * group + step
    place = row * heads + head
    v += step * v_h
    d_o += step * do_h
    if gate is not None:
        gate += step * gate_h
    if g is not None:
        g += step * g_h
    if VALUES > 0:
        if part < VALUES:
            k_tile = _rows(k, row, column, here, k_t, K, EVEN_K)
            acc = _down(
                k_tile, q, d_o, None, gate, g, part * BLOCK_C + piece, block, low, high, scale, tl.zeros([BLOCK, BLOCK_C], tl.float32), zero,
                q_t, do_t, gate_t, g_t, K, V, BLOCK, BLOCK_K, V % BLOCK_C == 0, DOT,
            )  # fmt: skip
            if left_v is not None:
                left_v += (edge * heads + head) * V
            _put(dv + (token * heads + head) * V, acc, left_v, row, part * BLOCK_C + piece, here, closes, heads * V, V, V % BLOCK_C == 0)
            return
    if ROWS > 0:
        if part < VALUES + ROWS:
            q_tile = _rows(q, row, column, here, q_t, K, EVEN_K)
            do_tile = _rows(d_o, row, value, here, do_t, V, EVEN_V)
            none = tl.zeros([BLOCK], tl.float32)
            read, diagonal, rate = _back(
                do_tile, q_tile, v, k, gate, g, column, block, low, high, scale, none, none, zero, v_t, k_t, gate_t, g_t,
                K, V, BLOCK, BLOCK_V, EVEN_K, DOT,
            )  # fmt: skip
            if held_log is not None:
                read += tl.load(held_log + edge * heads + place, mask=here & opens, other=0.0)
            if dgate is not None:
                tl.store(dgate + token * heads + place, ((read + diagonal) * scale).to(dgate.dtype.element_ty), mask=here)
            if outflow is not None:
                tl.store(outflow + token * heads + place, read * rate, mask=here)
            return
    if inflow is not None:
        k_tile = _rows(k, row, column, here, k_t, K, EVEN_K)
        v_tile = _rows(v, row, value, here, v_t, V, EVEN_V)
        flow = _down(
            k_tile, q, d_o, v_tile, gate, g, value, block, low, high, scale, tl.zeros([BLOCK], tl.float32), zero, q_t, do_t, gate_t, g_t,
            K, V, BLOCK, BLOCK_K, EVEN_V, DOT,
        )  # fmt: skip
        if left_log is not None:
            flow += tl.load(left_log + edge * heads + place, mask=here & closes, other=0.0)
        tl.store(inflow + token * heads + place, flow, mask=here)


@triton.jit
def _running(
    inflow, outflow, total, cu_seqlens, dg, tokens, sequences, offset, heads,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """dg of a chunk and HEADS v heads: what flowed in before a token less what flowed out."""
    program = tl.program_id(0)
    parts = tl.cdiv(heads, HEADS)
    batch, sequence, index, start, begin, end = locate(cu_seqlens, program // parts, tokens, sequences, offset, CHUNK)
    if (start >= end) | (begin >= end):
        return
    head = program % parts * HEADS + tl.arange(0, HEADS)
    line = tl.arange(0, BLOCK)
    token = batch.to(tl.int64) * tokens + start
    known = head < heads
    behind = tl.zeros([HEADS], tl.float32)
    if total is not None:
        behind += _total(total, sequence, head, heads, known & (index == 0), TILES)
    low = tl.maximum(begin - start, 0) // BLOCK * BLOCK
    for block in range(low, tl.minimum(end - start, CHUNK), BLOCK):
        row = block + line
        here = (start + row >= begin) & (start + row < end) & (row < CHUNK)
        inside = here[:, None] & known[None, :]
        at = (token + row)[:, None] * heads + head[None, :]
        flow = tl.load(inflow + at, mask=inside, other=0.0) - tl.load(outflow + at, mask=inside, other=0.0)
        tl.store(dg + at, (behind[None, :] + tl.cumsum(flow, 0) - flow).to(dg.dtype.element_ty), mask=inside)
        behind += tl.sum(flow, 0)


WHOLE, BLOCKS, RUNNING = Kernel(_whole), Kernel(_blocks), Kernel(_running)
