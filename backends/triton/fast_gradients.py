"""The gradients of S_fast (SPEC.md 10), two ways through a chunk. Everything inside a chunk is computed again; nothing is saved by the forward.

    whole    a program takes a chunk of one or two blocks, a q/k head and all v heads that share it: five products a pair of blocks, those for dq and
             dk once for the whole group, every input read once. The last step of dg is taken on chip
    blocks   programs for key blocks (dk, dv) and for row blocks (dq, dgate), side by side in one launch; `RUNNING` then sums what they found for dg.
             Quadratic in the chunk: chunks beyond 512 tokens are better walked, which is not written yet

With P = Q K^T, D = dO V^T, F_tj = scale gate_t Gamma_tj on and below the diagonal, A = F P and B = F D:

    dv = A^T dO    dk = B^T Q    dq = B K    dgate = rowsum(P D Gamma) scale    dg_i = sum over t < i of colsum(P B)_t - rowsum(P B)_t

dO enters the products as it came: gate, scale and decay are applied to float32 scores. The diagonal of P B would cancel in dg and is left out. `whole`
works on transposed tiles `[keys, rows]`, so that no result of a product need be turned: dq^T = K^T B^T.

A row of a chunk of C tokens moves 2 K / group + 2 V elements in and as many less V out, (4 K / group + 3 V); whole takes C (2 K + 2 V) FLOP a row and
v head and C (2 K) more a row and q/k head (3/4 of the square at two blocks, all of it at one), blocks up to C (7 K + ...) / 2. At C = 128 device memory
limits both. A carried W and a final W add what `fast_edges` prepares for a sequence's first and last chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .fast_chunks import _log, _rows
from .grid import locate
from .launch import Kernel

__all__ = ["BLOCKS", "RUNNING", "WHOLE"]


@triton.jit
def edge_row(cu_seqlens, sequence, begin, tokens, CHUNK: tl.constexpr):
    """Where a sequence's rows begin in a tensor that holds one chunk of every sequence: never overlapping, and never more rows than tokens."""
    wide = sequence.to(tl.int64)
    if cu_seqlens is None:
        return wide * tl.minimum(tokens, CHUNK)
    else:
        return tl.minimum(begin.to(tl.int64), wide * CHUNK)


@triton.jit
def _rate(gate, row, here, scale, gate_t, ROWS: tl.constexpr):
    """scale * gate `[rows]`."""
    if gate is None:
        return tl.zeros([ROWS], tl.float32) + scale
    else:
        return tl.load(gate + row * gate_t, mask=here, other=0.0).to(tl.float32) * scale


@triton.jit
def _put(x, tile, more, row, column, here, closes, row_t, COLUMNS: tl.constexpr, EVEN: tl.constexpr):
    """Writes a tile `[rows, columns]`, with what lies in `more` where that is wanted."""
    inside = here[:, None] if EVEN else here[:, None] & (column[None, :] < COLUMNS)
    at = row[:, None] * row_t + column[None, :]
    if more is not None:
        tile += tl.load(more + at, mask=inside & closes, other=0.0)
    tl.store(x + at, tile.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _put_turned(x, tile, more, row, column, here, opens, row_t, COLUMNS: tl.constexpr, EVEN: tl.constexpr):
    """The same of a tile `[columns, rows]`."""
    inside = here[None, :] if EVEN else here[None, :] & (column[:, None] < COLUMNS)
    at = row[None, :] * row_t + column[:, None]
    if more is not None:
        tile += tl.load(more + at, mask=inside & opens, other=0.0)
    tl.store(x + at, tile.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _pair(
    q_tile, k_tile, v_tile, do_tile, log, fine, key_log, key_fine, rate, row, key, zero,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DTYPE: tl.constexpr, SPLIT: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Keys against rows: A^T, B^T `[keys, rows]`; the row sums of P D Gamma; for dg the same off the diagonal, and the column sums."""
    p = tl.dot(k_tile, tl.trans(q_tile), tl.zeros([KEYS, ROWS], tl.float32) + zero, input_precision=DOT)
    causal = key[:, None] <= row[None, :]
    if log is None:
        p = tl.where(causal, p, 0.0)
        a = (p * rate[None, :]).to(DTYPE)
        d = tl.dot(v_tile, tl.trans(do_tile), input_precision=DOT)
        b = tl.where(causal, d, 0.0) * rate[None, :]
    else:
        apart = log[None, :] - key_log[:, None]
        if SPLIT:
            apart += fine[None, :] - key_fine[:, None]
        spread = tl.exp(tl.where(causal, apart, float("-inf")))
        p *= spread
        a = (p * rate[None, :]).to(DTYPE)
        d = tl.dot(v_tile, tl.trans(do_tile), input_precision=DOT)
        b = d * spread * rate[None, :]
    d *= p
    read = tl.sum(d, 0)
    d = tl.where(key[:, None] < row[None, :], d, 0.0)
    return a, b, read, tl.sum(d, 0) * rate, tl.sum(d * rate[None, :], 1)


@triton.jit
def _whole(
    q, k, v, gate, g, d_o, cu_seqlens, held_q, held_log, left_k, left_v, left_log, total, dq, dk, dv, dgate, dg,
    scale, tokens, sequences, offset, heads,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, gate_b, gate_t, gate_h, g_b, g_t, g_h, do_b, do_t, do_h,
    K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    GROUP: tl.constexpr, TILES: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A chunk of at most BLOCK keys, its rows in one part or two; one q/k head and its GROUP v heads."""
    TWO: tl.constexpr = BLOCK > ROWS
    DTYPE: tl.constexpr = k.dtype.element_ty
    SUM: tl.constexpr = DTYPE if GROUP == 1 else tl.float32
    SPLIT: tl.constexpr = k.dtype.element_ty == tl.float32
    EVEN_K: tl.constexpr = K == BLOCK_K
    EVEN_V: tl.constexpr = V == BLOCK_V
    program = tl.program_id(0)
    groups = heads // GROUP
    shared = program % groups
    batch, sequence, index, start, begin, end = locate(cu_seqlens, program // groups, tokens, sequences, offset, CHUNK)
    if (start >= end) | (begin >= end):
        return
    stop = tl.minimum(end, start + CHUNK)
    key = tl.arange(0, BLOCK)
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_K)
    value = tl.arange(0, BLOCK_V)
    near = (start + key >= begin) & (start + key < stop)
    here = (start + row >= begin) & (start + row < stop)
    at = batch.to(tl.int64)
    first = start.to(tl.int64)
    wide = shared.to(tl.int64)
    token = at * tokens + first
    opens = index == 0
    closes = stop >= end
    edge = edge_row(cu_seqlens, sequence, begin, tokens, CHUNK) + first - tl.maximum(start, begin)
    q += at * q_b + first * q_t + wide * q_h
    k_tile = _rows(k + at * k_b + first * k_t + wide * k_h, key, column, near, k_t, K, EVEN_K)
    q0 = _rows(q, row, column, here, q_t, K, EVEN_K)
    b0 = tl.zeros([BLOCK, ROWS], SUM)
    if TWO:
        late = (start + ROWS + row >= begin) & (start + ROWS + row < stop)
        q1 = _rows(q, ROWS + row, column, late, q_t, K, EVEN_K)
        b1 = tl.zeros([BLOCK, ROWS], SUM)
    for step in range(GROUP):
        zero = step * 0.0  # keeps P inside the loop: it may not wait in registers for the next head
        turn = zero.to(tl.int32)
        key = tl.arange(0, BLOCK) + turn
        row = tl.arange(0, ROWS) + turn
        head = wide * GROUP + step
        do_head = d_o + at * do_b + first * do_t + head * do_h
        v_tile = _rows(v + at * v_b + first * v_t + head * v_h, key, value, near, v_t, V, EVEN_V)
        do0 = _rows(do_head, row, value, here, do_t, V, EVEN_V)
        log = None
        fine = None
        key_log = None
        key_fine = None
        gates = gate
        if gate is not None:
            gates = gate + at * gate_b + first * gate_t + head * gate_h
        rate0 = _rate(gates, row, here, scale, gate_t, ROWS)
        if g is not None:
            logs = g + at * g_b + first * g_t + head * g_h
            key_log, key_fine, _last, _last_fine = _log(logs, key, near, g_t, SPLIT)
            log, fine, last, last_fine = _log(logs, row, here, g_t, SPLIT)
        a, b, read0, out0, flow = _pair(q0, k_tile, v_tile, do0, log, fine, key_log, key_fine, rate0, row, key, zero, ROWS, BLOCK, DTYPE, SPLIT, DOT)
        b0 += b.to(SUM)
        if TWO:
            rate1 = _rate(gates, ROWS + row, late, scale, gate_t, ROWS)
            if g is not None:
                log, fine, _last, _last_fine = _log(logs, ROWS + row, late, g_t, SPLIT)
                log += last
                fine += last_fine
            do1 = _rows(do_head, ROWS + row, value, late, do_t, V, EVEN_V)
            a1, b, read1, out1, more = _pair(q1, k_tile, v_tile, do1, log, fine, key_log, key_fine, rate1, ROWS + row, key, zero, ROWS, BLOCK, DTYPE, SPLIT, DOT)
            b1 += b.to(SUM)
            flow += more
        if dv is not None:
            d_tile = tl.dot(a, do0, input_precision=DOT)
            if TWO:
                d_tile = tl.dot(a1, do1, d_tile, input_precision=DOT)
            left_head = left_v
            if left_v is not None:
                left_head = left_v + (edge * heads + head) * V
            _put(dv + (token * heads + head) * V, d_tile, left_head, key, value, near, closes, heads * V, V, EVEN_V)
        place = token * heads + head
        if held_log is not None:
            held = tl.load(held_log + edge * heads + head + row * heads, mask=here & opens, other=0.0)
            read0 += held
            out0 += held * rate0
            if TWO:
                held = tl.load(held_log + edge * heads + head + (ROWS + row) * heads, mask=late & opens, other=0.0)
                read1 += held
                out1 += held * rate1
        if dgate is not None:
            tl.store(dgate + place + row * heads, (read0 * scale).to(dgate.dtype.element_ty), mask=here)
            if TWO:
                tl.store(dgate + place + (ROWS + row) * heads, (read1 * scale).to(dgate.dtype.element_ty), mask=late)
        if dg is not None:
            # dg_i = total + sum over t < i of what flows in less what flows out
            if left_log is not None:
                flow += tl.load(left_log + edge * heads + head + key * heads, mask=near & closes, other=0.0)
            if TWO:
                flow -= tl.reshape(tl.trans(tl.join(out0, out1)), [BLOCK])
            else:
                flow -= out0
            behind = tl.cumsum(flow, 0) - flow
            if total is not None:
                behind += _total(total, sequence, head, heads, opens, TILES)
            tl.store(dg + place + key * heads, behind.to(dg.dtype.element_ty), mask=near)
    if (dk is not None) or (dq is not None):
        spot = (token * groups + wide) * K
        kept = (edge * groups + wide) * K
        b0_dot = b0.to(DTYPE)
        if TWO:
            b1_dot = b1.to(DTYPE)
        if dk is not None:
            d_tile = tl.dot(b0_dot, q0, input_precision=DOT)
            if TWO:
                d_tile = tl.dot(b1_dot, q1, d_tile, input_precision=DOT)
            left_head = left_k
            if left_k is not None:
                left_head = left_k + kept
            _put(dk + spot, d_tile, left_head, key, column, near, closes, groups * K, K, EVEN_K)
        if dq is not None:
            held_head = held_q
            if held_q is not None:
                held_head = held_q + kept
            d_turned = tl.dot(tl.trans(k_tile), b0_dot, input_precision=DOT)
            _put_turned(dq + spot, d_turned, held_head, row, column, here, opens, groups * K, K, EVEN_K)
            if TWO:
                d_turned = tl.dot(tl.trans(k_tile), b1_dot, input_precision=DOT)
                _put_turned(dq + spot, d_turned, held_head, ROWS + row, column, late, opens, groups * K, K, EVEN_K)


@triton.jit
def _total(total, sequence, head, heads, opens, TILES: tl.constexpr):
    """<W, dW> of a chunk that a carried W opens, which is dg before its first token; else 0."""
    place = total + (sequence.to(tl.int64) * heads + head) * TILES
    found = tl.load(place, mask=opens, other=0.0)
    for tile in range(1, TILES):
        found += tl.load(place + tile, mask=opens, other=0.0)
    return found


WHOLE = Kernel(_whole)
