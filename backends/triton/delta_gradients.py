"""The delta rule's gradients of every input but the initial state, in parallel over blocks, from what the scans left (SPEC.md 10).

With S the state at a block's start, E the gradient of the state that leaves it, U the updates, X the gradient of beta W,
P = tril(dO U^T) * Gamma * scale and L = -stril(X U^T) * Gamma, three kernels in this order, each with one such product and one [BLOCK, K] sum on chip:

    queries   dQ = gate (scale e^G dO S^T + P K)                                       on S, dO, U; writes P
    erased    left = L K - e^G X S^T      dV = beta X      d_beta = rowsum(V * X) + rowsum(K * left)      on S, X, U, V; writes L
    written   right = e^(G_C - G) U E^T + (gate P)^T Q + (beta L)^T K      dK = beta left + right         on E, U, P, L

Wherever a vector scales a row, its gradient is a sum over that row: of the gate rowsum(Q * dQ / gate), of G rowsum(Q * dQ) + beta rowsum(K * left) -
rowsum(K * right), summed from the block's end, with e^(G_C) <S, E> (`delta_reverse` wrote the product) and <K, e^(G_C - G) U E^T>.

A program owns a block and a q/k head, and goes through its v heads one after the other; what they share is summed in float32 through scratch, in order.
Each computes 2 BLOCK (K V + BLOCK V + BLOCK K) FLOP a v head on 2 (K V + 2 BLOCK V + BLOCK^2) bytes at 16 bits, `erased` 2 BLOCK V more: bytes limit them.
One kernel for all three keeps too many addresses, and is half as fast. With `dw`, for slow_core, v is u and X its gradient: dw = -X S^T, and there is no L.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decay import between, running_log
from .delta_prepare import row_norm
from .grid import locate
from .launch import Kernel

__all__ = ["ERASED", "QUERIES", "WRITTEN"]


@triton.jit
def _load_state(at, key, value, K: tl.constexpr, V: tl.constexpr, WHOLE: tl.constexpr, DTYPE: tl.constexpr):
    """Columns of a state `[K, V]`."""
    place = at + key[:, None] * V + value[None, :]
    tile = tl.load(place) if WHOLE else tl.load(place, mask=(key[:, None] < K) & (value[None, :] < V), other=0.0)
    return tile.to(DTYPE)


@triton.jit
def _load_rows(at, row_t, row, column, here, COLUMNS: tl.constexpr, WHOLE: tl.constexpr):
    """Rows of a block; zero where a token or a column is not there."""
    place = at + row[:, None] * row_t + column[None, :]
    return tl.load(place, mask=here[:, None] if WHOLE else here[:, None] & (column[None, :] < COLUMNS), other=0.0)


@triton.jit
def _load_line(at, row_t, row, here):
    """A number for each token, in float32."""
    return tl.load(at + row * row_t, mask=here, other=0.0).to(tl.float32)


@triton.jit
def _unnormed(found, wide, norm):
    """The gradient of rows through their normalisation."""
    return norm[:, None] * (found - wide * (norm * norm * tl.sum(wide * found, 1))[:, None])


@triton.jit
def _normed(tile, norm, L2NORM: tl.constexpr):
    """Rows as the rule sees them."""
    return (tile.to(tl.float32) * norm[:, None]).to(tile.dtype) if L2NORM else tile


@triton.jit
def _add(found, sums, at_sums, member):
    """With what the v heads before this one left in scratch, where it goes back."""
    if member > 0:
        found += tl.load(sums + at_sums)
    tl.debug_barrier()
    tl.store(sums + at_sums, found)
    tl.debug_barrier()
    return found


@triton.jit
def _queries(
    q, k, g, gate, do, states, updates, pairs, slope, sums, dq, dgate, cu_seqlens, tokens, sequences, heads, group, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, g_b, g_t, g_h, gate_b, gate_t, gate_h, do_b, do_t, do_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr, L2NORM: tl.constexpr, DOT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dq and the output gate's gradient; `pairs` and `slope` are for `written`, which is asked for where `pairs` is given."""
    READ: tl.constexpr = dq is not None or dgate is not None or slope is not None
    WHOLE_K: tl.constexpr = K == BLOCK_K
    WHOLE_V: tl.constexpr = V % BLOCK_V == 0
    DTYPE: tl.constexpr = k.dtype.element_ty
    SPLIT: tl.constexpr = DTYPE == tl.float32
    groups = heads // group
    shared = tl.program_id(0) % groups
    slot = tl.program_id(0) // groups
    batch, _, _, start, _, end = locate(cu_seqlens, slot, tokens, sequences, 0, BLOCK)
    if start >= end:
        return
    row = tl.arange(0, BLOCK)
    key = tl.arange(0, BLOCK_K)
    here = start + row < end
    at = batch.to(tl.int64)
    first = start.to(tl.int64)
    rows = at * tokens + first
    at_q = q + at * q_b + first * q_t + shared * q_h
    at_k = k + at * k_b + first * k_t + shared * k_h
    at_sums = (slot.to(tl.int64) * groups + shared) * (BLOCK * BLOCK_K) + row[:, None] * BLOCK_K + key[None, :]
    causal = row[:, None] >= row[None, :]
    stop = V + tl.program_id(1)  # V, but the compiler does not know, and leaves the loop a loop
    for member in tl.range(0, group, num_stages=1):
        head = shared * group + member
        place = slot.to(tl.int64) * heads + head
        at_do = do + at * do_b + first * do_t + head * do_h
        at_u = updates + (rows * heads + head) * V
        scored = tl.zeros([BLOCK, BLOCK], tl.float32)
        read = tl.zeros([BLOCK, BLOCK_K], tl.float32)
        for column in tl.range(0, stop, BLOCK_V, num_stages=STAGES):
            value = column + tl.arange(0, BLOCK_V)
            do_tile = _load_rows(at_do, do_t, row, value, here, V, WHOLE_V)
            u_tile = _load_rows(at_u, heads * V, row, value, here, V, WHOLE_V)
            scored = tl.dot(do_tile, tl.trans(u_tile), acc=scored, input_precision=DOT)
            if READ:
                s_tile = _load_state(states + place * (K * V), key, value, K, V, WHOLE_K & WHOLE_V, DTYPE)
                read = tl.dot(do_tile, tl.trans(s_tile), acc=read, input_precision=DOT)
        scored = tl.where(causal, scored, 0.0) * scale
        if g is not None:
            coarse, fine, _last, _rest = running_log(_load_line(g + at * g_b + first * g_t + head * g_h, g_t, row, here), SPLIT)
            scored *= between(coarse, fine, causal, SPLIT)
            read *= tl.exp(coarse + fine)[:, None]
        p_tile = scored.to(DTYPE)
        if pairs is not None:
            tl.store(pairs + place * (BLOCK * BLOCK) + row[:, None] * BLOCK + row[None, :], p_tile)
        if READ:
            k_tile = _load_rows(at_k, k_t, row, key, here, K, WHOLE_K)
            if L2NORM:
                k_tile = _normed(k_tile, row_norm(k_tile), True)
            read = tl.dot(p_tile, k_tile, acc=read * scale, input_precision=DOT)
            wide = _load_rows(at_q, q_t, row, key, here, K, WHOLE_K).to(tl.float32)
            told = tl.sum(wide * read, 1)
            if L2NORM:
                told *= row_norm(wide)
            if dgate is not None:
                tl.store(dgate + (rows + row) * heads + head, told.to(dgate.dtype.element_ty), mask=here)
            if gate is not None:
                through = _load_line(gate + at * gate_b + first * gate_t + head * gate_h, gate_t, row, here)
                told *= through
                read *= through[:, None]
            if slope is not None:
                tl.store(slope + place * BLOCK + row, told)
            if dq is not None:
                if sums is not None:
                    read = _add(read, sums, at_sums, member)
                if member == group - 1:
                    if L2NORM:
                        wide = _load_rows(at_q, q_t, row, key, here, K, WHOLE_K).to(tl.float32)
                        read = _unnormed(read, wide, row_norm(wide))
                    at_dq = dq + (rows * groups + shared) * K + row[:, None] * (groups * K) + key[None, :]
                    tl.store(at_dq, read.to(dq.dtype.element_ty), mask=here[:, None] & (key[None, :] < K))


QUERIES = Kernel(_queries)


@triton.jit
def _erased(
    k, v, beta, g, states, updates, errors, links, slope, sums, dv, dw, dbeta, cu_seqlens, tokens, sequences, heads, group,
    k_b, k_t, k_h, v_b, v_t, v_h, beta_b, beta_t, beta_h, g_b, g_t, g_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr, L2NORM: tl.constexpr, DOT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dv and d_beta, or dw; `links`, `slope` and `sums`, which gets beta left, are for `written`."""
    LEFT: tl.constexpr = sums is not None or slope is not None or dbeta is not None
    BOUND: tl.constexpr = LEFT or links is not None
    WHOLE_K: tl.constexpr = K == BLOCK_K
    WHOLE_V: tl.constexpr = V % BLOCK_V == 0
    DTYPE: tl.constexpr = k.dtype.element_ty
    SPLIT: tl.constexpr = DTYPE == tl.float32
    groups = heads // group
    shared = tl.program_id(0) % groups
    slot = tl.program_id(0) // groups
    batch, _, _, start, _, end = locate(cu_seqlens, slot, tokens, sequences, 0, BLOCK)
    if start >= end:
        return
    row = tl.arange(0, BLOCK)
    key = tl.arange(0, BLOCK_K)
    here = start + row < end
    at = batch.to(tl.int64)
    first = start.to(tl.int64)
    rows = at * tokens + first
    at_sums = (slot.to(tl.int64) * groups + shared) * (BLOCK * BLOCK_K) + row[:, None] * BLOCK_K + key[None, :]
    stop = V + tl.program_id(1)  # V, but the compiler does not know, and leaves the loop a loop
    for member in tl.range(0, group, num_stages=1):
        head = shared * group + member
        place = slot.to(tl.int64) * heads + head
        at_u = updates + (rows * heads + head) * V
        at_x = errors + (rows * heads + head) * V
        at_v = v + at * v_b + first * v_t + head * v_h
        b = tl.full([BLOCK], 1.0, tl.float32)
        if beta is not None:
            b = _load_line(beta + at * beta_b + first * beta_t + head * beta_h, beta_t, row, here)
        bound = tl.zeros([BLOCK, BLOCK], tl.float32)
        lost = tl.zeros([BLOCK, BLOCK_K], tl.float32)
        direct = tl.zeros([BLOCK], tl.float32)
        for column in tl.range(0, stop, BLOCK_V, num_stages=STAGES):
            value = column + tl.arange(0, BLOCK_V)
            x_tile = _load_rows(at_x, heads * V, row, value, here, V, WHOLE_V)
            if BOUND:
                u_tile = _load_rows(at_u, heads * V, row, value, here, V, WHOLE_V)
                bound = tl.dot(x_tile, tl.trans(u_tile), acc=bound, input_precision=DOT)
            if LEFT or dw is not None:
                s_tile = _load_state(states + place * (K * V), key, value, K, V, WHOLE_K & WHOLE_V, DTYPE)
                lost = tl.dot(x_tile, tl.trans(s_tile), acc=lost, input_precision=DOT)
            if dbeta is not None:
                direct += tl.sum(x_tile.to(tl.float32) * _load_rows(at_v, v_t, row, value, here, V, WHOLE_V).to(tl.float32), 1)
            if dv is not None:
                at_dv = dv + (rows * heads + head) * V + row[:, None] * (heads * V) + value[None, :]
                tl.store(at_dv, (x_tile.to(tl.float32) * b[:, None]).to(dv.dtype.element_ty), mask=here[:, None] & (value[None, :] < V))
        if dw is not None:
            at_dw = dw + (rows * heads + head) * K + row[:, None] * (heads * K) + key[None, :]
            tl.store(at_dw, (-lost).to(dw.dtype.element_ty), mask=here[:, None] & (key[None, :] < K))
        if BOUND:
            bound = tl.where(row[:, None] > row[None, :], -bound, 0.0)
            back = tl.full([BLOCK], 1.0, tl.float32)
            if g is not None:
                coarse, fine, _last, _rest = running_log(_load_line(g + at * g_b + first * g_t + head * g_h, g_t, row, here), SPLIT)
                bound *= between(coarse, fine, row[:, None] >= row[None, :], SPLIT)
                back = tl.exp(coarse + fine)
            if links is not None:
                tl.store(links + place * (BLOCK * BLOCK) + row[:, None] * BLOCK + row[None, :], (bound * b[:, None]).to(DTYPE))
        if LEFT:
            k_tile = _load_rows(k + at * k_b + first * k_t + shared * k_h, k_t, row, key, here, K, WHOLE_K)
            norm = tl.full([BLOCK], 1.0, tl.float32)
            if L2NORM:
                norm = row_norm(k_tile)
            left = tl.dot(bound.to(DTYPE), _normed(k_tile, norm, L2NORM), acc=lost * -back[:, None], input_precision=DOT)
            seen = norm * tl.sum(k_tile.to(tl.float32) * left, 1)
            if dbeta is not None:
                tl.store(dbeta + (rows + row) * heads + head, (direct + seen).to(dbeta.dtype.element_ty), mask=here)
            if slope is not None:
                line = slope + place * BLOCK + row
                tl.store(line, tl.load(line) + b * seen)
            if sums is not None:
                _add(left * b[:, None], sums, at_sums, member)


ERASED = Kernel(_erased)


@triton.jit
def _written(
    q, k, g, gate, leaving, updates, pairs, links, slope, carried, sums, dk, dg, cu_seqlens, tokens, sequences, heads, group, parts,
    q_b, q_t, q_h, k_b, k_t, k_h, g_b, g_t, g_h, gate_b, gate_t, gate_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr, L2NORM: tl.constexpr, DOT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dg. `carried [places, parts]`: the parts of <S, E>; `sums` holds what `erased` left, where it ran, and what earlier v heads add."""
    WHOLE_K: tl.constexpr = K == BLOCK_K
    WHOLE_V: tl.constexpr = V % BLOCK_V == 0
    DTYPE: tl.constexpr = k.dtype.element_ty
    SPLIT: tl.constexpr = DTYPE == tl.float32
    groups = heads // group
    shared = tl.program_id(0) % groups
    slot = tl.program_id(0) // groups
    batch, _, _, start, _, end = locate(cu_seqlens, slot, tokens, sequences, 0, BLOCK)
    if start >= end:
        return
    row = tl.arange(0, BLOCK)
    key = tl.arange(0, BLOCK_K)
    here = start + row < end
    at = batch.to(tl.int64)
    first = start.to(tl.int64)
    rows = at * tokens + first
    at_q = q + at * q_b + first * q_t + shared * q_h
    at_k = k + at * k_b + first * k_t + shared * k_h
    at_sums = (slot.to(tl.int64) * groups + shared) * (BLOCK * BLOCK_K) + row[:, None] * BLOCK_K + key[None, :]
    stop = V + tl.program_id(1)  # V, but the compiler does not know, and leaves the loop a loop
    for member in tl.range(0, group, num_stages=1):
        head = shared * group + member
        place = slot.to(tl.int64) * heads + head
        at_u = updates + (rows * heads + head) * V
        square = place * (BLOCK * BLOCK) + row[:, None] * BLOCK + row[None, :]
        right = tl.zeros([BLOCK, BLOCK_K], tl.float32)
        for column in tl.range(0, stop, BLOCK_V, num_stages=STAGES):
            value = column + tl.arange(0, BLOCK_V)
            u_tile = _load_rows(at_u, heads * V, row, value, here, V, WHOLE_V)
            e_tile = _load_state(leaving + place * (K * V), key, value, K, V, WHOLE_K & WHOLE_V, DTYPE)
            right = tl.dot(u_tile, tl.trans(e_tile), acc=right, input_precision=DOT)
        k_tile = _load_rows(at_k, k_t, row, key, here, K, WHOLE_K)
        norm = tl.full([BLOCK], 1.0, tl.float32)
        if L2NORM:
            norm = row_norm(k_tile)
        if g is not None:
            coarse, fine, coarse_last, fine_last = running_log(_load_line(g + at * g_b + first * g_t + head * g_h, g_t, row, here), SPLIT)
            right *= tl.exp((coarse_last - coarse) + (fine_last - fine))[:, None]
        if dg is not None:
            gone = tl.sum(norm * tl.sum(k_tile.to(tl.float32) * right, 1), 0)
        q_tile = _load_rows(at_q, q_t, row, key, here, K, WHOLE_K)
        if L2NORM:
            q_tile = _normed(q_tile, row_norm(q_tile), True)
        p_tile = tl.load(pairs + square)
        if gate is not None:
            through = _load_line(gate + at * gate_b + first * gate_t + head * gate_h, gate_t, row, here)
            p_tile = (p_tile.to(tl.float32) * through[:, None]).to(DTYPE)
        right = tl.dot(tl.trans(p_tile), q_tile, acc=right, input_precision=DOT)
        if links is not None:
            right = tl.dot(tl.trans(tl.load(links + square)), _normed(k_tile, norm, L2NORM), acc=right, input_precision=DOT)
        if dg is not None:
            steep = tl.load(slope + place * BLOCK + row) - norm * tl.sum(k_tile.to(tl.float32) * right, 1)
            steep = tl.where(here, steep, 0.0)
            held = 0.0
            for part in range(parts):
                held += tl.load(carried + place * parts + part)
            whole = gone + tl.exp(coarse_last + fine_last) * held
            found = tl.sum(steep, 0) - tl.cumsum(steep, 0) + steep + whole
            tl.store(dg + (rows + row) * heads + head, found.to(dg.dtype.element_ty), mask=here)
        if dk is not None:
            if sums is not None:
                right += tl.load(sums + at_sums)
                if member < group - 1:
                    tl.debug_barrier()
                    tl.store(sums + at_sums, right)
                    tl.debug_barrier()
            if member == group - 1:
                if L2NORM:
                    right = _unnormed(right, k_tile.to(tl.float32), norm)
                at_dk = dk + (rows * groups + shared) * K + row[:, None] * (groups * K) + key[None, :]
                tl.store(at_dk, right.to(dk.dtype.element_ty), mask=here[:, None] & (key[None, :] < K))


WRITTEN = Kernel(_written)
