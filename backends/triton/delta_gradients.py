"""The delta rule's gradients of q, k and of what weighs a token, in parallel over blocks, from what the scans and `delta_pairs` left (SPEC.md 10).

A program owns a block and a q/k head, and goes through its v heads one after the other; dq and dk, which they share, are summed in float32
through `sums`, in order. With S the state at the block's start, E the gradient of the state that leaves it, U the updates, X the gradient of
beta W, a v head costs three products over V and four over the block:

    dQ = read dO S^T + pairs K      dK = write U E^T - beta erase X S^T + pairs^T Q + (links + links^T) K

2 BLOCK (3 K V + 4 BLOCK K) FLOP on 2 (3 K V + 3 BLOCK V + 4 BLOCK K + 2 BLOCK^2) bytes at 16 bits. What a vector's gradient wants summed over V is a sum over K of
these: rowsum(dO * (Q S)) = rowsum(Q * (dO S^T)), and so on. One accumulator after the other: two at once fit the registers of four warps.

With `dw`, for slow_core, X is the gradient of u: dw = -X S^T, and there are no links.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decay import running_log
from .delta_prepare import row_norm
from .grid import locate
from .launch import Kernel

__all__ = ["GRADIENTS"]


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
def _gradients(
    q, k, beta, g, gate, do, states, leaving, updates, errors, pairs, links, slope, weight, erase, total, sums, dq, dk, dw, dbeta, dg, dgate, cu_seqlens,
    tokens, sequences, heads, group, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, beta_b, beta_t, beta_h, g_b, g_t, g_h, gate_b, gate_t, gate_h, do_b, do_t, do_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr, L2NORM: tl.constexpr, DOT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
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
    at_q = q + at * q_b + first * q_t + shared * q_h + row[:, None] * q_t + key[None, :]
    at_k = k + at * k_b + first * k_t + shared * k_h + row[:, None] * k_t + key[None, :]
    at_keys = token[:, None] * (groups * K) + shared * K + key[None, :]
    at_sums = (slot.to(tl.int64) * groups + shared) * (2 * BLOCK * BLOCK_K) + row[:, None] * BLOCK_K + key[None, :]
    rows_v = (at * tokens + first) * heads
    for member in tl.range(0, group, num_stages=1):
        head = shared * group + member
        place = slot.to(tl.int64) * heads + head
        line = place * BLOCK + row
        square = place * (BLOCK * BLOCK) + row[:, None] * BLOCK + row[None, :]
        through = tl.full([BLOCK], 1.0, tl.float32)
        if gate is not None:
            through = tl.load(gate + at * gate_b + first * gate_t + head * gate_h + row * gate_t, mask=here, other=0.0).to(tl.float32)
        back = tl.full([BLOCK], 1.0, tl.float32)
        on = back
        if g is not None:
            step = tl.load(g + at * g_b + first * g_t + head * g_h + row * g_t, mask=here, other=0.0).to(tl.float32)
            coarse, fine, coarse_last, fine_last = running_log(step, SPLIT)
            back = tl.exp(coarse + fine)
            on = tl.exp((coarse_last - coarse) + (fine_last - fine))
        q_tile = tl.load(at_q, mask=inside, other=0.0)
        q_norm = tl.full([BLOCK], 1.0, tl.float32)
        if L2NORM:
            q_norm = row_norm(q_tile)
        x_row = errors + (rows_v + head) * V
        read = _through_state(
            do + at * do_b + first * do_t + head * do_h, states, do_t, place, here, K, V, BLOCK_K, BLOCK, BLOCK_V, DTYPE, DOT, STAGES
        )
        told = back * (scale * q_norm) * tl.sum(q_tile.to(tl.float32) * read, 1)
        if dgate is not None:
            tl.store(dgate + token * heads + head, (told + tl.load(erase + line)).to(dgate.dtype.element_ty), mask=here)
        p_tile = tl.load(pairs + square)
        k_tile = tl.load(at_k, mask=inside, other=0.0)
        k_norm = tl.full([BLOCK], 1.0, tl.float32)
        if L2NORM:
            k_norm = row_norm(k_tile)
            k_unit = (k_tile.to(tl.float32) * k_norm[:, None]).to(DTYPE)
            q_unit = (q_tile.to(tl.float32) * q_norm[:, None]).to(DTYPE)
        else:
            k_unit = k_tile
            q_unit = q_tile
        d_q = tl.dot(p_tile, k_unit, acc=read * (through * back * scale)[:, None], input_precision=DOT)
        if sums is not None:
            if member > 0:
                d_q += tl.load(sums + at_sums)
            tl.debug_barrier()
            tl.store(sums + at_sums, d_q)
        if member == group - 1:
            if L2NORM:
                wide = q_tile.to(tl.float32)
                d_q = q_norm[:, None] * (d_q - wide * (q_norm * q_norm * tl.sum(wide * d_q, 1))[:, None])
            if dq is not None:
                tl.store(dq + at_keys, d_q.to(dq.dtype.element_ty), mask=inside)
        kept = _through_state(updates + (rows_v + head) * V, leaving, heads * V, place, here, K, V, BLOCK_K, BLOCK, BLOCK_V, DTYPE, DOT, STAGES)
        gone = on * k_norm * tl.sum(k_tile.to(tl.float32) * kept, 1)
        d_k = tl.dot(tl.trans(p_tile), q_unit, acc=kept * on[:, None], input_precision=DOT)
        lost = _through_state(x_row, states, heads * V, place, here, K, V, BLOCK_K, BLOCK, BLOCK_V, DTYPE, DOT, STAGES)
        steep = through * told - gone
        if dw is not None:
            tl.store(dw + (token[:, None] * heads + head) * K + key[None, :], (-lost).to(dw.dtype.element_ty), mask=inside)
        else:
            b = tl.load(beta + at * beta_b + first * beta_t + head * beta_h + row * beta_t, mask=here, other=0.0).to(tl.float32)
            seen = back * k_norm * tl.sum(k_tile.to(tl.float32) * lost, 1)
            steep -= b * seen
            if dbeta is not None:
                tl.store(dbeta + token * heads + head, (tl.load(weight + line) - seen).to(dbeta.dtype.element_ty), mask=here)
            d_k -= lost * (b * back)[:, None]
            l_tile = tl.load(links + square)
            d_k = tl.dot(l_tile, k_unit, acc=d_k, input_precision=DOT)
            d_k = tl.dot(tl.trans(l_tile), k_unit, acc=d_k, input_precision=DOT)
        if dg is not None:
            steep = tl.where(here, steep + tl.load(slope + line), 0.0)
            found = tl.sum(steep, 0) - tl.cumsum(steep, 0) + steep + (tl.sum(gone, 0) + tl.load(total + place))
            tl.store(dg + token * heads + head, found.to(dg.dtype.element_ty), mask=here)
        if sums is not None:
            if member > 0:
                d_k += tl.load(sums + at_sums + BLOCK * BLOCK_K)
            tl.debug_barrier()
            tl.store(sums + at_sums + BLOCK * BLOCK_K, d_k)
            tl.debug_barrier()
        if member == group - 1:
            if L2NORM:
                wide = k_tile.to(tl.float32)
                d_k = k_norm[:, None] * (d_k - wide * (k_norm * k_norm * tl.sum(wide * d_k, 1))[:, None])
            if dk is not None:
                tl.store(dk + at_keys, d_k.to(dk.dtype.element_ty), mask=inside)


GRADIENTS = Kernel(_gradients)
