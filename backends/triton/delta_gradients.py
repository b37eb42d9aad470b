"""The delta rule's gradients of q, k and of what weighs a token, in parallel over blocks, from what the scans and `delta_pairs` left (SPEC.md 10).

A program owns a block and a q/k head, and goes through its v heads one after the other; what they share is summed in float32 through `sums`, in order.
With S the state at the block's start, E the gradient of the state that leaves it, U the updates, X the gradient of beta W, a v head costs

    queries   dQ = read dO S^T + pairs K
    keys      dK = write U E^T - beta erase X S^T + pairs^T Q + (links + links^T) K

2 BLOCK (3 K V + 4 BLOCK K) FLOP on 2 (3 K V + 3 BLOCK V + 5 BLOCK K + 3 BLOCK^2) bytes at 16 bits. What a vector's gradient wants summed over V is a sum over K of
these: rowsum(dO * (Q S)) = rowsum(Q * (dO S^T)), and so on. Two kernels, because one's accumulators would spill.

With `dw`, for slow_core, X is the gradient of u: dw = -X S^T, and there are no links.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decay import running_log
from .delta_prepare import row_norm
from .grid import locate
from .launch import Kernel

__all__ = ["KEYS", "QUERIES"]


@triton.jit
def _through_state(
    x, state, x_t, place, here, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr,
    DTYPE: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """X S^T `[BLOCK, BLOCK_K]` for rows of x `[BLOCK, V]` and the state at `place`."""
    row = tl.arange(0, BLOCK)
    key = tl.arange(0, BLOCK_K)
    found = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    for column in tl.range(0, V, BLOCK_V, num_stages=STAGES):
        value = column + tl.arange(0, BLOCK_V)
        x_tile = tl.load(x + row[:, None] * x_t + value[None, :], mask=here[:, None] & (value[None, :] < V), other=0.0)
        at_state = place * (K * V) + key[:, None] * V + value[None, :]
        s_tile = tl.load(state + at_state, mask=(key[:, None] < K) & (value[None, :] < V), other=0.0).to(DTYPE)
        found = tl.dot(x_tile, tl.trans(s_tile), acc=found, input_precision=DOT)
    return found


@triton.jit
def _queries(
    q, k, g, gate, do, states, pairs, slope, erase, sums, dq, dgate, cu_seqlens,
    tokens, sequences, heads, group, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, g_b, g_t, g_h, gate_b, gate_t, gate_h, do_b, do_t, do_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr, L2NORM: tl.constexpr, DOT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dq, the output gate's gradient, and in `slope` what G gets through read."""
    program = tl.program_id(0)
    groups = heads // group
    shared = program % groups
    slot = program // groups
    batch, _, _, start, _, end = locate(cu_seqlens, slot, tokens, sequences, 0, BLOCK)
    if start >= end:
        return
    DTYPE: tl.constexpr = k.dtype.element_ty
    SPLIT: tl.constexpr = DTYPE == tl.float32
    row = tl.arange(0, BLOCK)
    key = tl.arange(0, BLOCK_K)
    here = start + row < end
    inside = here[:, None] & (key[None, :] < K)
    at = batch.to(tl.int64)
    first = start.to(tl.int64)
    token = at * tokens + first + row
    at_sums = (slot.to(tl.int64) * groups + shared) * (BLOCK * BLOCK_K) + row[:, None] * BLOCK_K + key[None, :]
    for member in tl.range(0, group, num_stages=1):
        head = shared * group + member
        place = slot.to(tl.int64) * heads + head
        line = place * BLOCK + row
        through = tl.full([BLOCK], 1.0, tl.float32)
        if gate is not None:
            through = tl.load(gate + at * gate_b + first * gate_t + head * gate_h + row * gate_t, mask=here, other=0.0).to(tl.float32)
        back = tl.full([BLOCK], 1.0, tl.float32)
        if g is not None:
            step = tl.load(g + at * g_b + first * g_t + head * g_h + row * g_t, mask=here, other=0.0).to(tl.float32)
            coarse, fine, _last, _rest = running_log(step, SPLIT)
            back = tl.exp(coarse + fine)
        read = _through_state(
            do + at * do_b + first * do_t + head * do_h, states, do_t, place, here, K, V, BLOCK_K, BLOCK, BLOCK_V, DTYPE, DOT, STAGES
        )
        wide = tl.load(q + at * q_b + first * q_t + shared * q_h + row[:, None] * q_t + key[None, :], mask=inside, other=0.0).to(tl.float32)
        norm = tl.full([BLOCK], 1.0, tl.float32)
        if L2NORM:
            norm = row_norm(wide)
        told = back * (scale * norm) * tl.sum(wide * read, 1)
        if dgate is not None:
            tl.store(dgate + token * heads + head, (told + tl.load(erase + line)).to(dgate.dtype.element_ty), mask=here)
        if g is not None:
            tl.store(slope + line, tl.load(slope + line) + through * told)
        if dq is not None:
            k_tile = tl.load(k + at * k_b + first * k_t + shared * k_h + row[:, None] * k_t + key[None, :], mask=inside, other=0.0)
            if L2NORM:
                k_tile = (k_tile.to(tl.float32) * row_norm(k_tile)[:, None]).to(DTYPE)
            p_tile = tl.load(pairs + place * (BLOCK * BLOCK) + row[:, None] * BLOCK + row[None, :])
            found = tl.dot(p_tile, k_tile, acc=read * (through * back * scale)[:, None], input_precision=DOT)
            if sums is not None:
                if member > 0:
                    found += tl.load(sums + at_sums)
                tl.debug_barrier()
                tl.store(sums + at_sums, found)
                tl.debug_barrier()
            if member == group - 1:
                if L2NORM:
                    found = norm[:, None] * (found - wide * (norm * norm * tl.sum(wide * found, 1))[:, None])
                tl.store(dq + token[:, None] * (groups * K) + shared * K + key[None, :], found.to(dq.dtype.element_ty), mask=inside)


QUERIES = Kernel(_queries)


@triton.jit
def _keys(
    q, k, beta, g, states, leaving, updates, errors, pairs, links, slope, weight, total, sums, dk, dw, dbeta, dg, cu_seqlens,
    tokens, sequences, heads, group,
    q_b, q_t, q_h, k_b, k_t, k_h, beta_b, beta_t, beta_h, g_b, g_t, g_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr, L2NORM: tl.constexpr, DOT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dk and the gradients of beta and g, or of w."""
    program = tl.program_id(0)
    groups = heads // group
    shared = program % groups
    slot = program // groups
    batch, _, _, start, _, end = locate(cu_seqlens, slot, tokens, sequences, 0, BLOCK)
    if start >= end:
        return
    DTYPE: tl.constexpr = k.dtype.element_ty
    SPLIT: tl.constexpr = DTYPE == tl.float32
    row = tl.arange(0, BLOCK)
    key = tl.arange(0, BLOCK_K)
    here = start + row < end
    inside = here[:, None] & (key[None, :] < K)
    at = batch.to(tl.int64)
    first = start.to(tl.int64)
    token = at * tokens + first + row
    rows_v = (at * tokens + first) * heads
    at_k = k + at * k_b + first * k_t + shared * k_h + row[:, None] * k_t + key[None, :]
    at_sums = (slot.to(tl.int64) * groups + shared) * (BLOCK * BLOCK_K) + row[:, None] * BLOCK_K + key[None, :]
    for member in tl.range(0, group, num_stages=1):
        head = shared * group + member
        place = slot.to(tl.int64) * heads + head
        line = place * BLOCK + row
        square = place * (BLOCK * BLOCK) + row[:, None] * BLOCK + row[None, :]
        back = tl.full([BLOCK], 1.0, tl.float32)
        on = back
        if g is not None:
            step = tl.load(g + at * g_b + first * g_t + head * g_h + row * g_t, mask=here, other=0.0).to(tl.float32)
            coarse, fine, coarse_last, fine_last = running_log(step, SPLIT)
            back = tl.exp(coarse + fine)
            on = tl.exp((coarse_last - coarse) + (fine_last - fine))
        kept = _through_state(updates + (rows_v + head) * V, leaving, heads * V, place, here, K, V, BLOCK_K, BLOCK, BLOCK_V, DTYPE, DOT, STAGES)
        wide = tl.load(at_k, mask=inside, other=0.0).to(tl.float32)
        norm = tl.full([BLOCK], 1.0, tl.float32)
        if L2NORM:
            norm = row_norm(wide)
        gone = on * norm * tl.sum(wide * kept, 1)
        steep = -gone
        d_k = kept * on[:, None]
        lost = _through_state(errors + (rows_v + head) * V, states, heads * V, place, here, K, V, BLOCK_K, BLOCK, BLOCK_V, DTYPE, DOT, STAGES)
        if dw is not None:
            tl.store(dw + (token[:, None] * heads + head) * K + key[None, :], (-lost).to(dw.dtype.element_ty), mask=inside)
        else:
            b = tl.load(beta + at * beta_b + first * beta_t + head * beta_h + row * beta_t, mask=here, other=0.0).to(tl.float32)
            seen = back * norm * tl.sum(tl.load(at_k, mask=inside, other=0.0).to(tl.float32) * lost, 1)
            steep -= b * seen
            if dbeta is not None:
                tl.store(dbeta + token * heads + head, (tl.load(weight + line) - seen).to(dbeta.dtype.element_ty), mask=here)
            d_k -= lost * (b * back)[:, None]
        if dg is not None:
            steep = tl.where(here, steep + tl.load(slope + line), 0.0)
            whole = tl.sum(gone, 0) + tl.load(total + place)
            tl.store(dg + token * heads + head, (tl.sum(steep, 0) - tl.cumsum(steep, 0) + steep + whole).to(dg.dtype.element_ty), mask=here)
        if dk is not None:
            q_tile = tl.load(q + at * q_b + first * q_t + shared * q_h + row[:, None] * q_t + key[None, :], mask=inside, other=0.0)
            if L2NORM:
                q_tile = (q_tile.to(tl.float32) * row_norm(q_tile)[:, None]).to(DTYPE)
            p_tile = tl.load(pairs + square)
            d_k = tl.dot(tl.trans(p_tile), q_tile, acc=d_k, input_precision=DOT)
            if dw is None:
                k_tile = tl.load(at_k, mask=inside, other=0.0)
                if L2NORM:
                    k_tile = (k_tile.to(tl.float32) * norm[:, None]).to(DTYPE)
                l_tile = tl.load(links + square)
                d_k = tl.dot(l_tile, k_tile, acc=d_k, input_precision=DOT)
                d_k = tl.dot(tl.trans(l_tile), k_tile, acc=d_k, input_precision=DOT)
            if sums is not None:
                if member > 0:
                    d_k += tl.load(sums + at_sums)
                tl.debug_barrier()
                tl.store(sums + at_sums, d_k)
                tl.debug_barrier()
            if member == group - 1:
                if L2NORM:
                    again = tl.load(at_k, mask=inside, other=0.0).to(tl.float32)
                    d_k = norm[:, None] * (d_k - again * (norm * norm * tl.sum(again * d_k, 1))[:, None])
                tl.store(dk + token[:, None] * (groups * K) + shared * K + key[None, :], d_k.to(dk.dtype.element_ty), mask=inside)


KEYS = Kernel(_keys)
