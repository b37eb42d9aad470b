"""What a block's tokens get in the backward of deep_core: all tokens at once, from D at their block's start and the gradient dE of its sum.

Of a step's ROWS tokens, with M = V - K D, P = K dE, and what SCALARS finds for the block, dz = -<E, dE> / Z (0 where "safe" is at its floor) and dG = exp(G) Z <D, dE>:

    dV = eta P    dK = (eta M) dE^T - dV D^T + 2 dz eta K    deta = rows of M . P + dz |k|^2    dg = dG
    dQ = gate scale dO D^T    dgate = scale rows of dO . (Q D)

12 K V FLOP a token beside the scans' 6 each: at 1x8192, 16/32 heads of 128, bfloat16, 103 GFLOP (104 us) on 470 MB of tokens and 200 MB of D, E and dE
(200 us at 3.35 TB/s). A program owns the tokens of one step and one head of q and k, of which it sums the v heads; queries and keys are programs of their own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .deep_scan import line_of, rows_of, tile_of
from .deep_step import divisor
from .grid import locate
from .launch import Kernel
from .rounding import operand

__all__ = ["SCALARS", "TOKENS"]


@triton.jit
def _matrix(x, slot, head, heads, value, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr):
    """A tile of columns of a block's D, E or dE."""
    key = tl.arange(0, BLOCK_K)
    at = x + (slot * heads + head) * (K * V) + key[:, None] * V + value[None, :]
    if K % BLOCK_K or V % BLOCK_V:
        return tl.load(at, mask=(key[:, None] < K) & (value[None, :] < V), other=0.0)
    else:
        return tl.load(at)


@triton.jit
def _scalars(
    starts, ends, sums, masses, logs, d_mass, d_log, cu_seqlens, drawn, grown, to_mass, to_log, tokens, sequences, heads, offset,
    mass_b, mass_h, log_b, log_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, SPAN: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """dz (`drawn`) and dG (`grown`) of one block of one head, either absent; `to_mass`, `to_log`: of what a sequence with tokens brought in."""
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    slot = (program // heads).to(tl.int64)
    _, sequence, block, _, begin, end = locate(cu_seqlens, program // heads, tokens, sequences, offset, SPAN)
    length = end - begin
    place = slot * heads + head
    sequence = sequence.to(tl.int64)
    if block * SPAN - offset >= length:
        return
    d_total = tl.zeros([], tl.float32)
    d_decay = tl.zeros([], tl.float32)
    if (block + 1) * SPAN - offset <= length:
        kept = tl.zeros([BLOCK_K], tl.float32)
        pulled = tl.zeros([BLOCK_K], tl.float32)
        for column in range(0, V, BLOCK_V):
            value = column + tl.arange(0, BLOCK_V)
            share = _matrix(sums, slot, head, heads, value, K, V, BLOCK_K, BLOCK_V).to(tl.float32)
            if ends is not None:
                pulled += tl.sum(_matrix(ends, slot, head, heads, value, K, V, BLOCK_K, BLOCK_V).to(tl.float32) * share, 1)
            if grown is not None or to_log is not None:
                kept += tl.sum(_matrix(starts, slot, head, heads, value, K, V, BLOCK_K, BLOCK_V).to(tl.float32) * share, 1)
        mass = tl.load(masses + place)
        z = divisor(mass, SPAN, NORMALIZE)
        if ends is not None:
            d_total = tl.where(mass >= 1.0, -tl.sum(pulled, 0) / z, 0.0)
        if grown is not None or to_log is not None:
            d_decay = tl.exp(tl.load(logs + place)) * z * tl.sum(kept, 0)
    else:
        if d_mass is not None:
            d_total = tl.load(d_mass + sequence * mass_b + head * mass_h)
        if d_log is not None:
            d_decay = tl.load(d_log + sequence * log_b + head * log_h)
    if drawn is not None:
        tl.store(drawn + place, d_total)
    if grown is not None:
        tl.store(grown + place, d_decay)
    if block == 0:
        if to_mass is not None:
            tl.store(to_mass + sequence * heads + head, d_total)
        if to_log is not None:
            tl.store(to_log + sequence * heads + head, d_decay)


@triton.jit
def _tokens(
    q, k, v, eta, gate, d_o, starts, sums, drawn, grown, cu_seqlens, dq, dk, dv, d_eta, dg, d_gate,
    scale, tokens, sequences, heads, groups, group, offset,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, eta_b, eta_t, eta_h, gate_b, gate_t, gate_h, do_b, do_t, do_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr,
    READS: tl.constexpr, WRITES: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """READS: programs for dq and dgate; WRITES: programs for the rest."""
    PARTS: tl.constexpr = READS + WRITES
    PER: tl.constexpr = (SPAN + ROWS - 1) // ROWS
    DTYPE: tl.constexpr = k.dtype.element_ty
    program = tl.program_id(0)
    part = program % PARTS
    shared = program // PARTS % groups
    sub = program // PARTS // groups % PER
    slot = program // PARTS // groups // PER
    batch, _, block, _, begin, end = locate(cu_seqlens, slot, tokens, sequences, offset, SPAN)
    length = end - begin
    _, _, edge, first, here = rows_of(block * PER + sub, length, offset, SPAN, ROWS)
    if (first >= tl.minimum(length, edge)) | (first + ROWS <= 0):
        return
    key = tl.arange(0, BLOCK_K)
    row = tl.arange(0, ROWS)
    slot = slot.to(tl.int64)
    batch = batch.to(tl.int64)
    shared = shared.to(tl.int64)
    wide = begin.to(tl.int64)
    token = batch * tokens + wide + first
    into = (token * groups + shared) * K
    grouped = row[:, None] * (groups * K) + key[None, :]
    stored = here[:, None] & (key[None, :] < K)
    if READS:
        if part == 0:
            q_tile = tile_of(q + batch * q_b + shared * q_h + wide * q_t, first, q_t, here, key, K, ROWS, BLOCK_K)
            sum_q = tl.zeros([ROWS, BLOCK_K], tl.float32)
            for within in range(group):
                head = shared * group + within
                d_o_head = d_o + batch * do_b + head * do_h + wide * do_t
                through = tl.zeros([ROWS], tl.float32) + scale
                if gate is not None:
                    through *= line_of(gate + batch * gate_b + head * gate_h + wide * gate_t, first, gate_t, here, ROWS)
                felt = tl.zeros([ROWS], tl.float32)
                for column in range(0, V, BLOCK_V):
                    value = column + tl.arange(0, BLOCK_V)
                    known = _matrix(starts, slot, head, heads, value, K, V, BLOCK_K, BLOCK_V)
                    y = tile_of(d_o_head, first, do_t, here, value, V, ROWS, BLOCK_V).to(tl.float32)
                    if d_gate is not None:
                        felt += tl.sum(y * tl.dot(q_tile, known, input_precision=DOT), 1)
                    if dq is not None:
                        sum_q = tl.dot(operand(y * through[:, None], DTYPE, DOT), tl.trans(known), acc=sum_q, input_precision=DOT)
                if d_gate is not None:
                    tl.store(d_gate + token * heads + head + row * heads, (felt * scale).to(d_gate.dtype.element_ty), mask=here)
            if dq is not None:
                tl.store(dq + into + grouped, sum_q.to(dq.dtype.element_ty), mask=stored)
    if WRITES:
        if part == PARTS - 1:
            k_tile = tile_of(k + batch * k_b + shared * k_h + wide * k_t, first, k_t, here, key, K, ROWS, BLOCK_K)
            sum_k = tl.zeros([ROWS, BLOCK_K], tl.float32)
            pulled = tl.zeros([ROWS], tl.float32)
            for within in range(group):
                head = shared * group + within
                v_head = v + batch * v_b + head * v_h + wide * v_t
                weight = line_of(eta + batch * eta_b + head * eta_h + wide * eta_t, first, eta_t, here, ROWS)
                felt = tl.zeros([ROWS], tl.float32)
                if dk is not None or dv is not None or d_eta is not None:
                    for column in range(0, V, BLOCK_V):
                        value = column + tl.arange(0, BLOCK_V)
                        share = _matrix(sums, slot, head, heads, value, K, V, BLOCK_K, BLOCK_V)
                        p = tl.dot(k_tile, share, input_precision=DOT)
                        d_value = p * weight[:, None]
                        if dv is not None:
                            at = dv + (token * heads + head) * V + row[:, None] * (heads * V) + value[None, :]
                            tl.store(at, d_value.to(dv.dtype.element_ty), mask=here[:, None] & (value[None, :] < V))
                        if dk is not None or d_eta is not None:
                            known = _matrix(starts, slot, head, heads, value, K, V, BLOCK_K, BLOCK_V)
                            off = tile_of(v_head, first, v_t, here, value, V, ROWS, BLOCK_V).to(tl.float32)
                            off -= tl.dot(k_tile, known, input_precision=DOT)
                            felt += tl.sum(off * p, 1)
                            if dk is not None:
                                sum_k = tl.dot(operand(-d_value, DTYPE, DOT), tl.trans(known), acc=sum_k, input_precision=DOT)
                                sum_k = tl.dot(operand(off * weight[:, None], DTYPE, DOT), tl.trans(share), acc=sum_k, input_precision=DOT)
                if drawn is not None:
                    d_total = tl.load(drawn + slot * heads + head)
                    pulled += 2.0 * d_total * weight
                    if d_eta is not None:
                        wide_k = k_tile.to(tl.float32)
                        felt += d_total * tl.sum(wide_k * wide_k, 1)
                if d_eta is not None:
                    tl.store(d_eta + token * heads + head + row * heads, felt.to(d_eta.dtype.element_ty), mask=here)
                if dg is not None:
                    d_decay = tl.zeros([ROWS], tl.float32) + tl.load(grown + slot * heads + head)
                    tl.store(dg + token * heads + head + row * heads, d_decay.to(dg.dtype.element_ty), mask=here)
            if dk is not None:
                if drawn is not None:
                    sum_k += pulled[:, None] * k_tile.to(tl.float32)
                tl.store(dk + into + grouped, sum_k.to(dk.dtype.element_ty), mask=stored)


SCALARS = Kernel(_scalars)
TOKENS = Kernel(_tokens)
