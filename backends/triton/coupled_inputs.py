"""coupled_core's gradients of a chunk, all chunks at once, from what the reverse walk left (coupled_walks; SPEC.md 5, 10).

With R_x = N(S~_x), dy_x = dO times the core's share, dX from dZ as the walk has it, and sums over both cores:

    U'_x = u - w R_x                     dU'_x = M^T dy_x + K dX_x
    du = sum dU'_x                       dw = -sum dU'_x R_x^T             dP = sum dy_x R_x^T
    dM = tril(sum dy_x u^T - dP w^T)     dQ = scale (dP + dM K)            dK = scale dM^T Q + sum U'_x dX_x^T
    <dO, y_x> a row, y_x = M U'_x + scale Q R_x, for the gates and alpha; <dZ_f, X_s>, <dZ_s, X_f> for psi and the coupling, X_x = S~_x + K^T U'_x

A program takes a chunk of one block and one q/k head, the v heads of its group in turn. About 40 C K V + 10 C^2 (K + V) FLOP a chunk and v head; it moves
C (5 K + 4 V) elements and 4 K V numbers in float32: at 1x8192, 12 heads of 32, chunks of 64, bfloat16, 83 MB, 25 us of memory, and 6 GFLOP in tf32.
Compiled for sm_90 by Triton 3.6.0, heads of 32, 8 warps, its four launches: 128 to 210 registers, 24 to 40 KB, no spills (tf32x3: up to 120 bytes).
Operands are turned where they were loaded, products never (Triton miscompiles that): dM^T and dP^T are products of their own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .coupled_chunks import blended, wide_tile
from .coupled_walks import numbers_of, reading_of, sum_of
from .grid import chunks_before, locate
from .launch import Kernel
from .rounding import operand as as_operand
from .uw_blocks import store_tile

__all__ = ["INPUTS"]


@triton.jit
def _inputs(
    q, k, u, w, d_o, alpha, fast_gate, slow_gate, psi, coupling, starts, numbers, d_mixed, dq, dk, du, dw, of_fast, of_slow, d_psi, d_coupling,
    cu_seqlens, tokens, sequences, number, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, u_b, u_t, u_h, w_b, w_t, w_h, o_b, o_t, o_h, alpha_b, alpha_t, alpha_h, fast_b, fast_t, fast_h, slow_b, slow_t, slow_h,
    psi_b, psi_t, psi_h, coupling_b, coupling_t, coupling_h,
    HEADS: tl.constexpr, GROUP: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The gradients that are not None, contiguous; du and dw in their dtype, of_fast and of_slow `[B, T, H]` in float32. Blocks: slots * HEADS // GROUP.

    d_o None: no gradient arrives at o. d_mixed None: none comes from the states, or none that is needed.
    """
    slot = tl.program_id(0) // (HEADS // GROUP)
    group = tl.program_id(0) % (HEADS // GROUP)
    row, sequence, index, first, _, end = locate(cu_seqlens, slot, tokens, sequences, 0, CHUNK)
    if first >= end:
        return
    line = tl.arange(0, BLOCK)
    ok = line < tl.minimum(end - first, CHUNK)
    chunk = row * tl.cdiv(tokens, CHUNK) + index
    chunk_here = index
    if cu_seqlens is not None:
        chunk += chunks_before(cu_seqlens, sequence, CHUNK)
        chunk_here = chunk
    chunk = chunk.to(tl.int64)
    row = tl.cast(row, tl.int64)
    first = tl.cast(first, tl.int64)
    token = row * tokens + first
    q += row * q_b + first * q_t + group * q_h
    k += row * k_b + first * k_t + group * k_h
    queries = as_operand(wide_tile(q, line, ok, q_t, 0, KEYS, BLOCK_K, DOT) * scale, tl.float32, DOT)
    keys = wide_tile(k, line, ok, k_t, 0, KEYS, BLOCK_K, DOT)
    below = line[:, None] >= line[None, :]
    above = line[:, None] <= line[None, :]
    d_query = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    d_key = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    for member in tl.range(0, GROUP, num_stages=1, disable_licm=True):
        head = group * GROUP + member
        place = ((slot + sequence).to(tl.int64) * HEADS + head) * (2 * KEYS * VALUES)
        fast_was, slow_was, fast_size, slow_size, by_fast, by_slow, to_fast, to_slow = numbers_of(
            numbers, (slot + sequence).to(tl.int64) * HEADS + head
        )
        read_fast = reading_of(by_fast, fast_was, fast_size)
        read_slow = reading_of(by_slow, slow_was, slow_size)
        u_here = u + row * u_b + first * u_t + head * u_h
        if w is not None:
            pulls = wide_tile(w + row * w_b + first * w_t + head * w_h, line, ok, w_t, 0, KEYS, BLOCK_K, DOT)
        share = tl.zeros([BLOCK], tl.float32)
        rest = share
        if d_o is not None:
            alpha_here, fast_here, slow_here = alpha, fast_gate, slow_gate
            if alpha is not None:
                alpha_here = alpha + row * alpha_b + first * alpha_t + head * alpha_h
            if fast_gate is not None:
                fast_here = fast_gate + row * fast_b + first * fast_t + head * fast_h
            if slow_gate is not None:
                slow_here = slow_gate + row * slow_b + first * slow_t + head * slow_h
            share, rest = blended(alpha_here, fast_here, slow_here, number, line, ok, alpha_t, fast_t, slow_t)
        d_reader = tl.zeros([BLOCK, BLOCK_K], tl.float32)
        d_reader_turned = tl.zeros([BLOCK_K, BLOCK], tl.float32)
        d_pull = tl.zeros([BLOCK, BLOCK_K], tl.float32)
        d_scores = tl.zeros([BLOCK, BLOCK], tl.float32)
        d_scores_turned = tl.zeros([BLOCK, BLOCK], tl.float32)
        quick = tl.zeros([BLOCK], tl.float32)
        steady = tl.zeros([BLOCK], tl.float32)
        into_fast = 0.0
        into_slow = 0.0
        for start in tl.static_range(0, VALUES, BLOCK_V):
            value = start + tl.arange(0, BLOCK_V)
            there = value < VALUES
            new = wide_tile(u_here, line, ok, u_t, start, VALUES, BLOCK_V, DOT)
            fast = wide_tile(starts + place, value, there, KEYS, 0, KEYS, BLOCK_K, DOT)
            slow = wide_tile(starts + place + KEYS * VALUES, value, there, KEYS, 0, KEYS, BLOCK_K, DOT)
            fast_read = as_operand(fast * read_fast, tl.float32, DOT)
            slow_read = as_operand(slow * read_slow, tl.float32, DOT)
            fast_update = new
            slow_update = new
            if w is not None:
                fast_update = new - tl.dot(pulls, tl.trans(fast_read), input_precision=DOT)
                slow_update = new - tl.dot(pulls, tl.trans(slow_read), input_precision=DOT)
            d_fast_update = tl.zeros([BLOCK, BLOCK_V], tl.float32)
            d_slow_update = d_fast_update
            if d_mixed is not None:
                at = (slot.to(tl.int64) * HEADS + head) * (2 * KEYS * VALUES)
                d_fast = wide_tile(d_mixed + at, value, there, KEYS, 0, KEYS, BLOCK_K, DOT)
                d_slow = wide_tile(d_mixed + at + KEYS * VALUES, value, there, KEYS, 0, KEYS, BLOCK_K, DOT)
                by_keys_fast = tl.dot(keys, tl.trans(d_fast), input_precision=DOT)
                by_keys_slow = tl.dot(keys, tl.trans(d_slow), input_precision=DOT)
                d_fast_update = by_keys_fast + to_slow * by_keys_slow
                d_slow_update = by_keys_slow + to_fast * by_keys_fast
                if d_psi is not None or d_coupling is not None:
                    into_fast += by_slow * slow_was * sum_of(d_fast * slow) + sum_of(by_keys_fast * slow_update)
                    into_slow += by_fast * fast_was * sum_of(d_slow * fast) + sum_of(by_keys_slow * fast_update)
                if dk is not None:
                    wrote_fast = as_operand(d_fast + to_slow * d_slow, tl.float32, DOT)
                    wrote_slow = as_operand(d_slow + to_fast * d_fast, tl.float32, DOT)
                    d_key = tl.dot(as_operand(fast_update, tl.float32, DOT), wrote_fast, d_key, input_precision=DOT)
                    d_key = tl.dot(as_operand(slow_update, tl.float32, DOT), wrote_slow, d_key, input_precision=DOT)
            if d_o is not None:
                arrived = wide_tile(d_o + row * o_b + first * o_t + head * o_h, line, ok, o_t, start, VALUES, BLOCK_V, DOT)
                if du is not None or dw is not None:
                    turned = tl.where(above, tl.dot(keys, tl.trans(queries), input_precision=DOT), 0.0)
                    of_share = as_operand(turned * share[None, :], tl.float32, DOT)
                    d_fast_update = tl.dot(of_share, arrived, d_fast_update, input_precision=DOT)
                    of_rest = as_operand(turned * rest[None, :], tl.float32, DOT)
                    d_slow_update = tl.dot(of_rest, arrived, d_slow_update, input_precision=DOT)
                if dq is not None or dk is not None:
                    both = as_operand(arrived * (share + rest)[:, None], tl.float32, DOT)
                if dq is not None:
                    d_reader += share[:, None] * tl.dot(arrived, fast_read, input_precision=DOT)
                    d_reader += rest[:, None] * tl.dot(arrived, slow_read, input_precision=DOT)
                    d_scores = tl.dot(both, tl.trans(new), d_scores, input_precision=DOT)
                if dk is not None:
                    d_scores_turned = tl.dot(new, tl.trans(both), d_scores_turned, input_precision=DOT)
                    if w is not None:
                        d_reader_turned += share[None, :] * tl.dot(tl.trans(fast_read), tl.trans(arrived), input_precision=DOT)
                        d_reader_turned += rest[None, :] * tl.dot(tl.trans(slow_read), tl.trans(arrived), input_precision=DOT)
                if of_fast is not None or of_slow is not None:
                    scores = tl.where(below, tl.dot(queries, tl.trans(keys), input_precision=DOT), 0.0)
                    scores = as_operand(scores, tl.float32, DOT)
                    y = tl.dot(queries, tl.trans(fast_read), input_precision=DOT)
                    y = tl.dot(scores, as_operand(fast_update, tl.float32, DOT), y, input_precision=DOT)
                    quick += tl.sum(y * arrived, 1)
                    y = tl.dot(queries, tl.trans(slow_read), input_precision=DOT)
                    y = tl.dot(scores, as_operand(slow_update, tl.float32, DOT), y, input_precision=DOT)
                    steady += tl.sum(y * arrived, 1)
            if du is not None:
                out = du + (token * HEADS + head) * VALUES
                store_tile(out, line, ok, HEADS * VALUES, start, d_fast_update + d_slow_update, VALUES, BLOCK_V)
            if dw is not None:
                d_pull -= tl.dot(as_operand(d_fast_update, tl.float32, DOT), fast_read, input_precision=DOT)
                d_pull -= tl.dot(as_operand(d_slow_update, tl.float32, DOT), slow_read, input_precision=DOT)
        if dw is not None:
            store_tile(dw + (token * HEADS + head) * KEYS, line, ok, HEADS * KEYS, 0, d_pull, KEYS, BLOCK_K)
        if d_o is not None:
            if dq is not None:
                if w is not None:
                    d_scores -= tl.dot(as_operand(d_reader, tl.float32, DOT), tl.trans(pulls), input_precision=DOT)
                d_scores = as_operand(tl.where(below, d_scores, 0.0), tl.float32, DOT)
                d_query += scale * (d_reader + tl.dot(d_scores, keys, input_precision=DOT))
            if dk is not None:
                if w is not None:
                    d_scores_turned -= tl.dot(pulls, as_operand(d_reader_turned, tl.float32, DOT), input_precision=DOT)
                d_scores_turned = as_operand(tl.where(above, d_scores_turned, 0.0), tl.float32, DOT)
                d_key = tl.dot(d_scores_turned, queries, d_key, input_precision=DOT)
        if of_fast is not None:
            tl.store(of_fast + (token + line) * HEADS + head, quick, mask=ok)
        if of_slow is not None:
            tl.store(of_slow + (token + line) * HEADS + head, steady, mask=ok)
        if d_psi is not None or d_coupling is not None:
            given = tl.load(psi + row * psi_b + chunk_here.to(tl.int64) * psi_t + head * psi_h).to(tl.float32)
            if coupling is None:
                strength = 0.05 + 0.1 * given
            else:
                strength = tl.load(coupling + row * coupling_b + chunk_here.to(tl.int64) * coupling_t + head * coupling_h).to(tl.float32)
            d_strength = given * into_fast + (1.0 - given) * into_slow
            d_given = strength * (into_fast - into_slow)
            if coupling is None:
                d_given += 0.1 * d_strength
            if d_psi is not None:
                tl.store(d_psi + chunk * HEADS + head, d_given.to(d_psi.dtype.element_ty))
            if d_coupling is not None:
                tl.store(d_coupling + chunk * HEADS + head, d_strength.to(d_coupling.dtype.element_ty))
    if dq is not None:
        store_tile(dq + (token * (HEADS // GROUP) + group) * KEYS, line, ok, HEADS // GROUP * KEYS, 0, d_query, KEYS, BLOCK_K)
    if dk is not None:
        store_tile(dk + (token * (HEADS // GROUP) + group) * KEYS, line, ok, HEADS // GROUP * KEYS, 0, d_key, KEYS, BLOCK_K)


INPUTS = Kernel(_inputs)
