"""The delta rule's gradients of a block's pairs of tokens, in parallel over blocks and v heads, from what the two scans kept (SPEC.md 10).

With U the updates and X the gradient of beta W, all [BLOCK, V]:

    pairs = tril(dO U^T) * Gamma * scale * gate     the gradient of Q K^T        links = -stril(X U^T) * Gamma * beta     that of K K^T

both written over what the reverse scan no longer needs (`scores`, `inverses`), as are the parts of the vectors' gradients that a row or a column of
these gives: of G in `slope`, of beta in `weight`, of the output gate in `erase`, and e^(G_C) <S, E> in `total`. The gradient of v is written here too.
With `inverses` None, for slow_core, there are no links. A program computes 4 BLOCK^2 (K + V) FLOP on 2 (3 BLOCK V + 2 BLOCK K + 2 K V + 2 BLOCK^2) bytes at
16 bits: bytes limit it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decay import between, running_log
from .delta_prepare import row_norm
from .grid import locate
from .launch import Kernel

__all__ = ["PAIRS"]


@triton.jit
def _pairs(
    q, k, v, beta, g, gate, do, states, leaving, updates, errors, scores, inverses, slope, weight, erase, total, dv, cu_seqlens,
    tokens, sequences, heads, group, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, beta_b, beta_t, beta_h, g_b, g_t, g_h, gate_b, gate_t, gate_h, do_b, do_t, do_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr, SLICE: tl.constexpr, L2NORM: tl.constexpr,
    DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head = program % heads
    slot = program // heads
    shared = head // group
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
    causal = row[:, None] >= row[None, :]
    place = slot.to(tl.int64) * heads + head
    square = place * (BLOCK * BLOCK) + row[:, None] * BLOCK + row[None, :]
    line = place * BLOCK + row
    b = tl.full([BLOCK], 1.0, tl.float32)
    if inverses is not None:
        b = tl.load(beta + at * beta_b + first * beta_t + head * beta_h + row * beta_t, mask=here, other=0.0).to(tl.float32)
    scored = tl.zeros([BLOCK, BLOCK], tl.float32)
    bound = tl.zeros([BLOCK, BLOCK], tl.float32)
    direct = tl.zeros([BLOCK], tl.float32)
    for column in tl.range(0, V, BLOCK_V, num_stages=STAGES):
        value = column + tl.arange(0, BLOCK_V)
        in_v = here[:, None] & (value[None, :] < V)
        at_v = (token[:, None] * heads + head) * V + value[None, :]
        u_tile = tl.load(updates + at_v, mask=in_v, other=0.0)
        do_tile = tl.load(do + at * do_b + first * do_t + head * do_h + row[:, None] * do_t + value[None, :], mask=in_v, other=0.0)
        scored = tl.dot(do_tile, tl.trans(u_tile), acc=scored, input_precision=DOT)
        if inverses is not None:
            x_tile = tl.load(errors + at_v, mask=in_v, other=0.0)
            bound = tl.dot(x_tile, tl.trans(u_tile), acc=bound, input_precision=DOT)
            wide_x = x_tile.to(tl.float32)
            if dv is not None:
                tl.store(dv + at_v, (wide_x * b[:, None]).to(dv.dtype.element_ty), mask=in_v)
            v_tile = tl.load(v + at * v_b + first * v_t + head * v_h + row[:, None] * v_t + value[None, :], mask=in_v, other=0.0)
            direct += tl.sum(wide_x * v_tile.to(tl.float32), 1)
    k_tile = tl.load(k + at * k_b + first * k_t + shared * k_h + row[:, None] * k_t + key[None, :], mask=inside, other=0.0)
    q_tile = tl.load(q + at * q_b + first * q_t + shared * q_h + row[:, None] * q_t + key[None, :], mask=inside, other=0.0)
    met = tl.dot(q_tile, tl.trans(k_tile), input_precision=DOT)
    if L2NORM:
        k_norm = row_norm(k_tile)
        met *= row_norm(q_tile)[:, None] * k_norm[None, :]
    gamma = 1.0
    fade = 1.0
    if g is not None:
        step = tl.load(g + at * g_b + first * g_t + head * g_h + row * g_t, mask=here, other=0.0).to(tl.float32)
        coarse, fine, coarse_last, fine_last = running_log(step, SPLIT)
        fade = tl.exp(coarse_last + fine_last)
        gamma = between(coarse, fine, causal, SPLIT)
    pairs = tl.where(causal, scored * gamma * scale, 0.0)
    if gate is not None:
        tl.store(erase + line, tl.sum(pairs * met, 1))
        pairs *= tl.load(gate + at * gate_b + first * gate_t + head * gate_h + row * gate_t, mask=here, other=0.0).to(tl.float32)[:, None]
    tl.store(scores + square, pairs.to(DTYPE))
    pairs *= met
    steep = tl.sum(pairs, 1) - tl.sum(pairs, 0)
    if inverses is not None:
        near = tl.dot(k_tile, tl.trans(k_tile), input_precision=DOT)
        if L2NORM:
            near *= k_norm[:, None] * k_norm[None, :]
        links = tl.where(row[:, None] > row[None, :], -bound * gamma, 0.0)
        touched = links * near
        tl.store(weight + line, direct + tl.sum(touched, 1))
        tl.store(inverses + square, (links * b[:, None]).to(DTYPE))
        touched *= b[:, None]
        steep += tl.sum(touched, 1) - tl.sum(touched, 0)
    if g is not None:
        tl.store(slope + line, steep)
        carried = tl.zeros([BLOCK_K], tl.float32)
        spot = place * (K * V)
        for column in tl.range(0, V, SLICE):
            value = column + tl.arange(0, SLICE)
            at_state = spot + key[:, None] * V + value[None, :]
            in_state = (key[:, None] < K) & (value[None, :] < V)
            s_tile = tl.load(states + at_state, mask=in_state, other=0.0).to(tl.float32)
            carried += tl.sum(s_tile * tl.load(leaving + at_state, mask=in_state, other=0.0).to(tl.float32), 1)
        tl.store(total + place, fade * tl.sum(carried, 0))


PAIRS = Kernel(_pairs)
