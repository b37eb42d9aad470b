"""The gradients of `delta_gradients` by one kernel: a block's S, E, dO, U and X come from memory once, and nothing but the gradients and their row sums goes back.

A program owns a block and a q/k head with all its key columns, and goes through its v heads one after the other; what they share is summed in registers.
Of each v head two loops over tiles of value columns, each with what follows from it:

    P = tril(dO U^T) ..   L = -stril(X U^T) ..   read = dO S^T   lost = X S^T      dQ += gate (scale e^G read + P K)   dK += beta (L K - e^G lost)
    [P^T L^T] = U [dO; X]^T ..                   right = U E^T                     dK += e^(G_C - G) right + [P^T L^T] [gate Q; beta K]

dO, U and X are read twice, the second time from the cache, because a product's result, transposed, is no good as an operand (docs/triton.md). P^T and L^T are sums of
the same terms in the same order as P and L, with the same factors: rounded twice to the same bits. P's diagonal is kept out of both and added in float32, as there.

It computes 2 BLOCK (3 K V + 4 BLOCK V + 4 BLOCK K) FLOP a v head on 2 (2 K V + 3 BLOCK V) bytes at 16 bits, and q, k, dq and dk once a q/k head. With `dw`, for
slow_core, v is u and X its gradient: dw = -X S^T, and there is no L.
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
def _twice(line, SIZE: tl.constexpr):
    """A number of each row of a block, for two blocks, one below the other."""
    return tl.reshape(tl.trans(tl.join(line, line)), [2 * SIZE])


@triton.jit
def _together(
    q, k, w, beta, g, gate, do, states, leaving, updates, errors, erase, told, past, asked, seen, shed, taken, gone, dq, dk, dw, cu_seqlens,
    tokens, sequences, heads, group, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, w_b, w_t, w_h, beta_b, beta_t, beta_h, g_b, g_t, g_h, gate_b, gate_t, gate_h, do_b, do_t, do_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr, GROUPED: tl.constexpr, L2NORM: tl.constexpr,
    DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq and dk, and dw where there is `w`; for `vectors` the row sums of one tile, `[1, places, BLOCK]`, and `asked` and `shed [1, places]`, where they are given.

    `erase`: with a chunk_decay, that. GROUPED: q/k heads have more than one v head.
    """
    RULE: tl.constexpr = w is None
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
    key = tl.arange(0, BLOCK_K)
    at = batch.to(tl.int64)
    first = start.to(tl.int64)
    rows = at * tokens + first
    at_q = q + at * q_b + first * q_t + shared * q_h
    at_k = k + at * k_b + first * k_t + shared * k_h
    nothing = tl.program_id(
        1
    )  # 0, but the compiler does not know: it leaves the loops loops, and keeps no part's addresses in registers for the next
    stop = V + nothing
    all_q = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    all_k = all_q
    for member in tl.range(0, group, num_stages=1):
        head = shared * group + member
        place = slot.to(tl.int64) * heads + head
        at_do = do + at * do_b + first * do_t + head * do_h
        at_u = updates + (rows * heads + head) * V
        at_x = errors + (rows * heads + head) * V
        row = tl.arange(0, BLOCK) + (member + 1) * nothing
        here = start + row < end
        if g is not None:
            step = load_line(g + at * g_b + first * g_t + head * g_h, g_t, row, here)
        k_tile = load_rows(at_k, k_t, row, key, here, K, WHOLE_K)
        q_tile = load_rows(at_q, q_t, row, key, here, K, WHOLE_K)
        scored = tl.zeros([BLOCK, BLOCK], tl.float32)
        bound = scored
        read = tl.zeros([BLOCK, BLOCK_K], tl.float32)
        lost = read
        for column in tl.range(0, stop, BLOCK_V, num_stages=STAGES):
            value = column + tl.arange(0, BLOCK_V)
            u_tile = load_rows(at_u, heads * V, row, value, here, V, WHOLE_V)
            s_tile = load_state(states + place * (K * V), key, value, K, V, WHOLE_K & WHOLE_V, DTYPE)
            do_tile = load_rows(at_do, do_t, row, value, here, V, WHOLE_V)
            x_tile = load_rows(at_x, heads * V, row, value, here, V, WHOLE_V)
            scored = tl.dot(do_tile, tl.trans(u_tile), acc=scored, input_precision=DOT)
            read = tl.dot(do_tile, tl.trans(s_tile), acc=read, input_precision=DOT)
            if RULE:
                bound = tl.dot(x_tile, tl.trans(u_tile), acc=bound, input_precision=DOT)
            lost = tl.dot(x_tile, tl.trans(s_tile), acc=lost, input_precision=DOT)
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
        own = tl.sum(tl.where(row[:, None] == row[None, :], scored, 0.0), 0)
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
        if RULE:
            l_tile = tl.where(row[:, None] > row[None, :], -bound, 0.0).to(DTYPE)
            lost = tl.dot(l_tile, normed(k_tile, norm, L2NORM), acc=lost * -back[:, None], input_precision=DOT)
            if seen is not None:
                tl.store(seen + line, norm * tl.sum(k_tile.to(tl.float32) * lost, 1))
            if beta is not None:
                lost *= load_line(beta + at * beta_b + first * beta_t + head * beta_h, beta_t, row, here)[:, None]
            all_k = all_k + lost if GROUPED else lost
        if g is not None:
            read *= back[:, None]
        output = norm
        if gate is not None:
            output = load_line(gate + at * gate_b + first * gate_t + head * gate_h, gate_t, row, here)
        if asked is not None:
            sums = tl.sum(q_tile.to(tl.float32) * read, 1) * scale
            tl.store(asked + place, tl.sum(sums * output if gate is not None else sums, 0))
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
        all_q = all_q + read if GROUPED else read
        if member == group - 1:
            if L2NORM:
                all_q = unnormed(all_q, q_tile.to(tl.float32), through)
            at_dq = dq + (rows * groups + shared) * K + row[:, None] * (groups * K) + key[None, :]
            tl.store(at_dq, all_q.to(dq.dtype.element_ty), mask=here[:, None] & (key[None, :] < K))

        row = tl.arange(0, BLOCK) + (member + 3) * nothing
        here = start + row < end
        pair = tl.arange(0, 2 * BLOCK) + (member + 3) * nothing
        half = pair % BLOCK
        in_pair = start + half < end
        at_pair = at_do + half * do_t
        if RULE:
            at_pair = tl.where(pair < BLOCK, at_pair, at_x + half * (heads * V))
        across = tl.zeros([BLOCK, 2 * BLOCK], tl.float32)
        right = tl.zeros([BLOCK, BLOCK_K], tl.float32)
        for column in tl.range(0, stop, BLOCK_V, num_stages=STAGES):
            value = column + tl.arange(0, BLOCK_V)
            u_tile = load_rows(at_u, heads * V, row, value, here, V, WHOLE_V)
            in_tile = in_pair[:, None] if WHOLE_V else in_pair[:, None] & (value[None, :] < V)
            pair_tile = tl.load(at_pair[:, None] + value[None, :], mask=in_tile, other=0.0)
            e_tile = load_state(leaving + place * (K * V), key, value, K, V, WHOLE_K & WHOLE_V, DTYPE)
            across = tl.dot(u_tile, tl.trans(pair_tile), acc=across, input_precision=DOT)
            right = tl.dot(u_tile, tl.trans(e_tile), acc=right, input_precision=DOT)
        row = tl.arange(0, BLOCK) + (member + 4) * nothing
        here = start + row < end
        line = place * BLOCK + row
        pair = tl.arange(0, 2 * BLOCK) + (member + 4) * nothing
        half = pair % BLOCK
        top = pair < BLOCK
        in_pair = start + half < end
        across *= tl.where(top, scale, -1.0)[None, :]
        if g is not None:
            log = _twice(coarse, BLOCK)[None, :] - coarse[:, None]
            if SPLIT:
                log += _twice(fine, BLOCK)[None, :] - fine[:, None]
            across *= tl.exp2(tl.where(half[None, :] >= row[:, None], log * 1.4426950408889634, 0.0))  # as `between`
            right *= tl.exp((coarse_last - coarse) + (fine_last - fine))[:, None]
        own = tl.sum(tl.where(pair[None, :] == row[:, None], across, 0.0), 1)
        across = tl.where(half[None, :] > row[:, None], across, 0.0)
        if not RULE:
            across = tl.where(top[None, :], across, 0.0)
        at_both = tl.where(top, at_q + half * q_t, at_k + half * k_t)
        in_both = in_pair[:, None] if WHOLE_K else in_pair[:, None] & (key[None, :] < K)
        both_tile = tl.load(at_both[:, None] + key[None, :], mask=in_both, other=0.0)
        k_tile = load_rows(at_k, k_t, row, key, here, K, WHOLE_K)
        weight = tl.full([2 * BLOCK], 1.0, tl.float32)
        norm = tl.full([BLOCK], 1.0, tl.float32)
        if L2NORM:
            weight = row_norm(both_tile)
            norm = row_norm(k_tile)
        if beta is not None:
            at_beta = beta + at * beta_b + first * beta_t + head * beta_h + half * beta_t
            weight *= tl.load(at_beta, mask=in_pair & (pair >= BLOCK), other=1.0).to(tl.float32)
        if gate is not None:
            at_gate = gate + at * gate_b + first * gate_t + head * gate_h + half * gate_t
            weight *= tl.load(at_gate, mask=in_pair & top, other=1.0).to(tl.float32)
        if gone is not None:
            left = norm * tl.sum(k_tile.to(tl.float32) * right, 1)
            tl.store(gone + line, left)
        inner = right
        if SPLIT:
            inner = tl.zeros([BLOCK, BLOCK_K], tl.float32)
        inner = tl.dot(across.to(DTYPE), normed(both_tile, weight, True), acc=inner, input_precision=DOT)
        if taken is not None:
            found = norm * tl.sum(k_tile.to(tl.float32) * inner, 1)
            tl.store(taken + line, found if SPLIT else found - left)
        right = right + inner if SPLIT else inner
        q_tile = load_rows(at_q, q_t, row, key, here, K, WHOLE_K)  # again: registers are scarce
        through = own
        if L2NORM:
            through *= row_norm(q_tile)
        if gate is not None:
            through *= load_line(gate + at * gate_b + first * gate_t + head * gate_h, gate_t, row, here)
        right += q_tile.to(tl.float32) * through[:, None]
        all_k = all_k + right if GROUPED or RULE else right
        if member == group - 1:
            if L2NORM:
                all_k = unnormed(all_k, k_tile.to(tl.float32), norm)
            at_dk = dk + (rows * groups + shared) * K + row[:, None] * (groups * K) + key[None, :]
            tl.store(at_dk, all_k.to(dk.dtype.element_ty), mask=here[:, None] & (key[None, :] < K))


TOGETHER = Kernel(_together)
