"""The gradients of `delta_gradients` by one kernel: a block's S, E, dO, U and X are read once, and nothing but the gradients and their row sums goes back.

A program owns a block and a q/k head with all its key columns, and goes through its v heads one after the other; what they share is summed in registers.
Of each v head one loop over tiles of value columns makes five sums, and four more products follow behind it:

    P = tril(dO U^T) ..   L = -stril(X U^T) ..   read = dO S^T   lost = X S^T   right^T = E U^T
    dQ += gate (scale e^G read + P K)            left = L K - e^G lost
    dK^T += (beta left)^T + e^(G_C - G) right^T + (gate Q)^T P + (beta K)^T L

What belongs to dK is held transposed, so that P and L are right operands as they are: a product's result, transposed, is no good as an operand (docs/triton.md).
`left` alone is turned, in float32. P and L are rounded once for the products from both sides. P's diagonal is kept out of them and added in float32, as there.

It computes 2 BLOCK (3 K V + 2 BLOCK V + 4 BLOCK K) FLOP a v head on 2 (2 K V + 3 BLOCK V) bytes at 16 bits, and reads q and k, 4 BLOCK K bytes, again from the
cache; dq and dk once a q/k head. With `dw`, for slow_core, v is u and X its gradient: dw = -X S^T, and there is no L.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decay import between, running_log
from .delta_gradients import load_line, load_rows, load_state, normed, unnormed
from .delta_prepare import row_norm
from .grid import locate
from .launch import Kernel

__all__ = ["TOGETHER"]


@triton.jit
def _together(
    q, k, w, beta, g, gate, do, states, leaving, updates, errors, erase, told, past, asked, seen, shed, taken, gone, dq, dk, dw, cu_seqlens,
    tokens, sequences, heads, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, w_b, w_t, w_h, beta_b, beta_t, beta_h, g_b, g_t, g_h, gate_b, gate_t, gate_h, do_b, do_t, do_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr, GROUP: tl.constexpr, L2NORM: tl.constexpr,
    DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq and dk, and dw where there is `w`; for `vectors` the row sums of one tile, `[1, places, BLOCK]`, and `asked` and `shed [1, places]`, where they are given.

    `erase`: with a chunk_decay, that. GROUP: v heads a q/k head.
    """
    RULE: tl.constexpr = w is None
    WHOLE_K: tl.constexpr = K == BLOCK_K
    WHOLE_V: tl.constexpr = V % BLOCK_V == 0
    DTYPE: tl.constexpr = k.dtype.element_ty
    SPLIT: tl.constexpr = DTYPE == tl.float32
    groups = heads // GROUP
    shared = tl.program_id(0) % groups
    slot = tl.program_id(0) // groups
    batch, _, _, start, _, end = locate(cu_seqlens, slot, tokens, sequences, 0, BLOCK)
    if start >= end:
        return
    key = tl.arange(0, BLOCK_K)
    at = batch.to(tl.int64)
    first = start.to(tl.int64)
    rows = at * tokens + first
    at_q = q + at * q_b + first * q_t + shared * q_h
    at_k = k + at * k_b + first * k_t + shared * k_h
    nothing = tl.program_id(1)  # 0, but the compiler does not know: it leaves the loop a loop, and keeps no addresses in registers for the next head
    stop = V + nothing
    all_q = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    all_k = tl.zeros([BLOCK_K, BLOCK], tl.float32)
    for member in tl.range(0, GROUP, num_stages=1):
        head = shared * GROUP + member
        place = slot.to(tl.int64) * heads + head
        at_do = do + at * do_b + first * do_t + head * do_h
        at_u = updates + (rows * heads + head) * V
        at_x = errors + (rows * heads + head) * V
        row = tl.arange(0, BLOCK) + (member + 1) * nothing
        here = start + row < end
        if g is not None:
            step = load_line(g + at * g_b + first * g_t + head * g_h, g_t, row, here)
        if beta is not None:
            bent = load_line(beta + at * beta_b + first * beta_t + head * beta_h, beta_t, row, here)
        output = tl.full([BLOCK], 1.0, tl.float32)
        if gate is not None:
            output = load_line(gate + at * gate_b + first * gate_t + head * gate_h, gate_t, row, here)
        k_tile = load_rows(at_k, k_t, row, key, here, K, WHOLE_K)
        q_tile = load_rows(at_q, q_t, row, key, here, K, WHOLE_K)
        scored = tl.zeros([BLOCK, BLOCK], tl.float32)
        bound = scored
        read = tl.zeros([BLOCK, BLOCK_K], tl.float32)
        lost = read
        right = tl.zeros([BLOCK_K, BLOCK], tl.float32)
        for column in tl.range(0, stop, BLOCK_V, num_stages=STAGES):
            value = column + tl.arange(0, BLOCK_V)
            u_tile = load_rows(at_u, heads * V, row, value, here, V, WHOLE_V)
            s_tile = load_state(states + place * (K * V), key, value, K, V, WHOLE_K & WHOLE_V, DTYPE)
            do_tile = load_rows(at_do, do_t, row, value, here, V, WHOLE_V)
            x_tile = load_rows(at_x, heads * V, row, value, here, V, WHOLE_V)
            e_tile = load_state(leaving + place * (K * V), key, value, K, V, WHOLE_K & WHOLE_V, DTYPE)
            scored = tl.dot(do_tile, tl.trans(u_tile), acc=scored, input_precision=DOT)
            read = tl.dot(do_tile, tl.trans(s_tile), acc=read, input_precision=DOT)
            if RULE:
                bound = tl.dot(x_tile, tl.trans(u_tile), acc=bound, input_precision=DOT)
            lost = tl.dot(x_tile, tl.trans(s_tile), acc=lost, input_precision=DOT)
            right = tl.dot(e_tile, tl.trans(u_tile), acc=right, input_precision=DOT)
        row = tl.arange(0, BLOCK) + (member + 2) * nothing
        here = start + row < end
        line = place * BLOCK + row
        scored *= scale
        back = tl.full([BLOCK], 1.0, tl.float32)
        if g is not None:
            coarse, fine, coarse_last, fine_last = running_log(step, SPLIT)
            back = tl.exp(coarse + fine)
            decay = between(coarse, fine, row[:, None] >= row[None, :], SPLIT)
            scored *= decay
            if RULE:
                bound *= decay
            right *= tl.exp((coarse_last - coarse) + (fine_last - fine))[None, :]
        own = tl.sum(tl.where(row[:, None] == row[None, :], scored, 0.0), 1)
        p_tile = tl.where(row[:, None] > row[None, :], scored, 0.0).to(DTYPE)
        norm = tl.full([BLOCK], 1.0, tl.float32)
        through = norm
        if L2NORM:
            norm = row_norm(k_tile)
            through = row_norm(q_tile)
        if shed is not None:
            w_tile = load_rows(w + at * w_b + first * w_t + head * w_h, w_t, row, key, here, K, WHOLE_K)
            tl.store(shed + place, tl.sum(tl.sum(w_tile.to(tl.float32) * lost, 1), 0))
        if erase is not None:
            lost *= tl.load(erase + line)[:, None]
        if dw is not None:
            at_dw = dw + (rows * heads + head) * K + row[:, None] * (heads * K) + key[None, :]
            tl.store(at_dw, (-lost).to(dw.dtype.element_ty), mask=here[:, None] & (key[None, :] < K))
        weight = norm
        if RULE:
            l_tile = tl.where(row[:, None] > row[None, :], -bound, 0.0).to(DTYPE)
            lost = tl.dot(l_tile, normed(k_tile, norm, L2NORM), acc=lost * -back[:, None], input_precision=DOT)
            if seen is not None:
                tl.store(seen + line, norm * tl.sum(k_tile.to(tl.float32) * lost, 1))
            if beta is not None:
                lost *= bent[:, None]
                weight = norm * bent
        if g is not None:
            read *= back[:, None]
        if asked is not None:
            tl.store(asked + place, tl.sum(tl.sum(q_tile.to(tl.float32) * read, 1) * scale * output, 0))
        if erase is not None:
            read *= tl.load(erase + line)[:, None]
        read = tl.dot(p_tile, normed(k_tile, norm, L2NORM), acc=read * scale, input_precision=DOT)
        if past is not None:
            tl.store(past + line, through * tl.sum(q_tile.to(tl.float32) * read, 1))
        read += k_tile.to(tl.float32) * (own * norm)[:, None]
        if told is not None:
            tl.store(told + line, through * tl.sum(q_tile.to(tl.float32) * read, 1))
        if gate is not None:
            read *= output[:, None]
        if GROUP > 1:
            if member > 0:
                read += all_q
            all_q = read
        if member == GROUP - 1:
            if L2NORM:
                read = unnormed(read, q_tile.to(tl.float32), through)
            at_dq = dq + (rows * groups + shared) * K + row[:, None] * (groups * K) + key[None, :]
            tl.store(at_dq, read.to(dq.dtype.element_ty), mask=here[:, None] & (key[None, :] < K))
        k_wide = tl.trans(k_tile).to(tl.float32)
        if gone is not None:
            left = norm * tl.sum(k_wide * right, 0)
            tl.store(gone + line, left)
        inner = right
        if SPLIT:
            inner = tl.zeros([BLOCK_K, BLOCK], tl.float32)
        through *= output
        inner = tl.dot(tl.trans(normed(q_tile, through, L2NORM or gate is not None)), p_tile, acc=inner, input_precision=DOT)
        if RULE:
            inner = tl.dot(tl.trans(normed(k_tile, weight, L2NORM or beta is not None)), l_tile, acc=inner, input_precision=DOT)
        if taken is not None:
            found = norm * tl.sum(k_wide * inner, 0)
            tl.store(taken + line, found if SPLIT else found - left)
        right = right + inner if SPLIT else inner
        right += tl.trans(q_tile).to(tl.float32) * (own * through)[None, :]
        if RULE:
            right += tl.trans(lost)
        if GROUP > 1:
            if member > 0:
                right += all_k
            all_k = right
        if member == GROUP - 1:
            if L2NORM:
                right = norm[None, :] * (right - k_wide * (norm * norm * tl.sum(k_wide * right, 0))[None, :])  # as `unnormed`, transposed
            at_dk = dk + (rows * groups + shared) * K + row[None, :] * (groups * K) + key[:, None]
            tl.store(at_dk, right.to(dk.dtype.element_ty), mask=here[None, :] & (key[:, None] < K))


TOGETHER = Kernel(_together)
