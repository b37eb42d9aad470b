"""The delta rule's gradients of every input but the initial state, in parallel over blocks, from what the scans left (SPEC.md 10).

With S the state at a block's start, E the gradient of the state that leaves it, U the updates, X the gradient of beta W,
P = tril(dO U^T) * Gamma * scale and L = -stril(X U^T) * Gamma, three kernels in this order, each with one such product and one [BLOCK, BLOCK_K] sum on chip:

    queries   dQ = gate (scale e^G dO S^T + P K)                                       on S, dO, U; writes P and its diagonal
    erased    left = L K - e^G X S^T                                                   on S, X, U; writes L
    written   right = e^(G_C - G) U E^T + P^T (gate Q) + L^T (beta K)      dK = beta left + right         on E, U, P, L

Wherever a vector scales a row, its gradient is a sum over that row, written by tiles of columns and put together by `vectors`: of the gate `told` =
rowsum(Q * dQ / gate), of beta `direct` + `seen` = rowsum(V * X) + rowsum(K * left). With `gone` = rowsum(K * e^(G_C - G) U E^T) and `taken` = rowsum(K * right)
- gone, the gradient of g is the sum from its token to the block's end of gate `past` + beta seen - taken, that of gone before its token, and e^(G_C) <S, E>.
`past` and `taken` are without P's diagonal: it would cancel in that sum, but not its rounding, which is larger than all the rest where the gates forget within a
few tokens. So products take P without it, and it is added in float32. The rest of P, and L, are rounded once for both sums: gate and beta scale rows of Q and K.
`delta_reverse` wrote dV = beta X, `direct` and <S, E>.

A program owns a block, a q/k head and a tile of key columns, and goes through its v heads one after the other; what they share is summed in float32 through
scratch, in order. Each computes 2 BLOCK (BLOCK_K V + BLOCK V + BLOCK BLOCK_K) FLOP a v head on 2 (BLOCK_K V + 2 BLOCK V + BLOCK^2) bytes at 16 bits: bytes limit
them. With `dw`, for slow_core, v is u and X its gradient: dw = -X S^T, and there is no L; its chunk_decay d scales S wherever it is read, and gets
<S, E> + `asked` - `shed` = <S, E> + sum(gate scale Q * dO S^T) - sum(w * X S^T).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decay import between, running_log
from .delta_prepare import row_norm
from .grid import chunks_before, locate
from .launch import Kernel

__all__ = ["ERASED", "QUERIES", "VECTORS", "WRITTEN"]


@triton.jit
def load_state(at, key, value, K: tl.constexpr, V: tl.constexpr, WHOLE: tl.constexpr, DTYPE: tl.constexpr):
    """Columns of a state `[K, V]`."""
    place = at + key[:, None] * V + value[None, :]
    tile = tl.load(place) if WHOLE else tl.load(place, mask=(key[:, None] < K) & (value[None, :] < V), other=0.0)
    return tile.to(DTYPE)


@triton.jit
def load_rows(at, row_t, row, column, here, COLUMNS: tl.constexpr, WHOLE: tl.constexpr):
    """Rows of a block; zero where a token or a column is not there."""
    place = at + row[:, None] * row_t + column[None, :]
    return tl.load(place, mask=here[:, None] if WHOLE else here[:, None] & (column[None, :] < COLUMNS), other=0.0)


@triton.jit
def load_line(at, row_t, row, here):
    """A number for each token, in float32."""
    return tl.load(at + row * row_t, mask=here, other=0.0).to(tl.float32)


@triton.jit
def unnormed(found, wide, norm):
    """The gradient of rows through their normalisation."""
    return norm[:, None] * (found - wide * (norm * norm * tl.sum(wide * found, 1))[:, None])


@triton.jit
def normed(tile, norm, L2NORM: tl.constexpr):
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
    q, k, g, gate, do, states, updates, erase, pairs, diagonal, told, past, asked, sums, dq, cu_seqlens, tokens, sequences, heads, group, places, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, g_b, g_t, g_h, gate_b, gate_t, gate_h, do_b, do_t, do_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr, L2NORM: tl.constexpr, DOT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dq; `pairs` and `diagonal [places, BLOCK]` are for `written`, `told` and `past [TILES, places, BLOCK]` and `asked [TILES, places]` for `vectors`.

    `erase`: with a chunk_decay, that.
    """
    WHOLE: tl.constexpr = dq is not None or told is not None
    READ: tl.constexpr = WHOLE or past is not None or asked is not None
    WHOLE_K: tl.constexpr = K % BLOCK_K == 0
    WHOLE_V: tl.constexpr = V % BLOCK_V == 0
    DTYPE: tl.constexpr = k.dtype.element_ty
    SPLIT: tl.constexpr = DTYPE == tl.float32
    TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    groups = heads // group
    tile = tl.program_id(0) % TILES
    shared = tl.program_id(0) // TILES % groups
    slot = tl.program_id(0) // TILES // groups
    batch, _, _, start, _, end = locate(cu_seqlens, slot, tokens, sequences, 0, BLOCK)
    if start >= end:
        return
    row = tl.arange(0, BLOCK)
    key = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    here = start + row < end
    at = batch.to(tl.int64)
    first = start.to(tl.int64)
    rows = at * tokens + first
    at_q = q + at * q_b + first * q_t + shared * q_h
    at_k = k + at * k_b + first * k_t + shared * k_h
    at_sums = (slot.to(tl.int64) * groups + shared) * (BLOCK * BLOCK_K * TILES) + row[:, None] * (BLOCK_K * TILES) + key[None, :]
    causal = row[:, None] >= row[None, :]
    stop = V + tl.program_id(1)  # V, but the compiler does not know, and leaves the loop a loop
    for member in tl.range(0, group, num_stages=1):
        head = shared * group + member
        place = slot.to(tl.int64) * heads + head
        at_do = do + at * do_b + first * do_t + head * do_h
        at_u = updates + (rows * heads + head) * V
        if g is not None:
            step = load_line(g + at * g_b + first * g_t + head * g_h, g_t, row, here)
        if READ:
            k_tile = load_rows(at_k, k_t, row, key, here, K, WHOLE_K)
            q_tile = load_rows(at_q, q_t, row, key, here, K, WHOLE_K)
        scored = tl.zeros([BLOCK, BLOCK], tl.float32)
        read = tl.zeros([BLOCK, BLOCK_K], tl.float32)
        for column in tl.range(0, stop, BLOCK_V, num_stages=STAGES):
            value = column + tl.arange(0, BLOCK_V)
            do_tile = load_rows(at_do, do_t, row, value, here, V, WHOLE_V)
            u_tile = load_rows(at_u, heads * V, row, value, here, V, WHOLE_V)
            scored = tl.dot(do_tile, tl.trans(u_tile), acc=scored, input_precision=DOT)
            if READ:
                s_tile = load_state(states + place * (K * V), key, value, K, V, WHOLE_K & WHOLE_V, DTYPE)
                read = tl.dot(do_tile, tl.trans(s_tile), acc=read, input_precision=DOT)
        scored = tl.where(causal, scored, 0.0) * scale
        if g is not None:
            coarse, fine, _last, _rest = running_log(step, SPLIT)
            scored *= between(coarse, fine, causal, SPLIT)
            read *= tl.exp(coarse + fine)[:, None]
        own = tl.sum(tl.where(row[:, None] == row[None, :], scored, 0.0), 1)
        p_tile = tl.where(row[:, None] > row[None, :], scored, 0.0).to(DTYPE)
        if tile == 0:
            if pairs is not None:
                tl.store(pairs + place * (BLOCK * BLOCK) + row[:, None] * BLOCK + row[None, :], p_tile)
            if diagonal is not None:
                tl.store(diagonal + place * BLOCK + row, own)
        if READ:
            if asked is not None:
                line = tl.sum(q_tile.to(tl.float32) * read, 1) * scale
                if gate is not None:
                    line *= load_line(gate + at * gate_b + first * gate_t + head * gate_h, gate_t, row, here)
                tl.store(asked + tile * places + place, tl.sum(line, 0))
            if erase is not None:
                read *= tl.load(erase + place * BLOCK + row)[:, None]
            norm = tl.full([BLOCK], 1.0, tl.float32)
            if L2NORM:
                norm = row_norm(k_tile)
            read = tl.dot(p_tile, normed(k_tile, norm, L2NORM), acc=read * scale, input_precision=DOT)
            wide = q_tile.to(tl.float32)
            if past is not None:
                line = tl.sum(wide * read, 1)
                if L2NORM:
                    line *= row_norm(wide)
                tl.store(past + (tile * places + place) * BLOCK + row, line)
            if WHOLE:
                k_tile = load_rows(at_k, k_t, row, key, here, K, WHOLE_K)  # again: registers are scarce
                read += k_tile.to(tl.float32) * (own * norm)[:, None]
            if told is not None:
                line = tl.sum(wide * read, 1)
                if L2NORM:
                    line *= row_norm(wide)
                tl.store(told + (tile * places + place) * BLOCK + row, line)
            if gate is not None:
                read *= load_line(gate + at * gate_b + first * gate_t + head * gate_h, gate_t, row, here)[:, None]
            if dq is not None:
                if sums is not None:
                    read = _add(read, sums, at_sums, member)
                if member == group - 1:
                    if L2NORM:
                        read = unnormed(read, wide, row_norm(wide))
                    at_dq = dq + (rows * groups + shared) * K + row[:, None] * (groups * K) + key[None, :]
                    tl.store(at_dq, read.to(dq.dtype.element_ty), mask=here[:, None] & (key[None, :] < K))


QUERIES = Kernel(_queries)


@triton.jit
def _erased(
    k, w, beta, g, states, updates, errors, erase, links, seen, shed, sums, dw, cu_seqlens, tokens, sequences, heads, group, places,
    k_b, k_t, k_h, w_b, w_t, w_h, beta_b, beta_t, beta_h, g_b, g_t, g_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr, L2NORM: tl.constexpr, DOT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dw; `links` and `sums`, which gets beta left, are for `written`, `seen [TILES, places, BLOCK]` and `shed [TILES, places]` for `vectors`.

    `erase`: with a chunk_decay, that.
    """
    LEFT: tl.constexpr = sums is not None or seen is not None
    BOUND: tl.constexpr = LEFT or links is not None
    WHOLE_K: tl.constexpr = K % BLOCK_K == 0
    WHOLE_V: tl.constexpr = V % BLOCK_V == 0
    DTYPE: tl.constexpr = k.dtype.element_ty
    SPLIT: tl.constexpr = DTYPE == tl.float32
    TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    groups = heads // group
    tile = tl.program_id(0) % TILES
    shared = tl.program_id(0) // TILES % groups
    slot = tl.program_id(0) // TILES // groups
    batch, _, _, start, _, end = locate(cu_seqlens, slot, tokens, sequences, 0, BLOCK)
    if start >= end:
        return
    row = tl.arange(0, BLOCK)
    key = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    here = start + row < end
    at = batch.to(tl.int64)
    first = start.to(tl.int64)
    rows = at * tokens + first
    at_sums = (slot.to(tl.int64) * groups + shared) * (BLOCK * BLOCK_K * TILES) + row[:, None] * (BLOCK_K * TILES) + key[None, :]
    stop = V + tl.program_id(1)  # V, but the compiler does not know, and leaves the loop a loop
    for member in tl.range(0, group, num_stages=1):
        head = shared * group + member
        place = slot.to(tl.int64) * heads + head
        at_x = errors + (rows * heads + head) * V
        b = tl.full([BLOCK], 1.0, tl.float32)
        if beta is not None:
            b = load_line(beta + at * beta_b + first * beta_t + head * beta_h, beta_t, row, here)
        if g is not None:
            step = load_line(g + at * g_b + first * g_t + head * g_h, g_t, row, here)
        if LEFT:
            k_tile = load_rows(k + at * k_b + first * k_t + shared * k_h, k_t, row, key, here, K, WHOLE_K)
        bound = tl.zeros([BLOCK, BLOCK], tl.float32)
        lost = tl.zeros([BLOCK, BLOCK_K], tl.float32)
        for column in tl.range(0, stop, BLOCK_V, num_stages=STAGES):
            value = column + tl.arange(0, BLOCK_V)
            x_tile = load_rows(at_x, heads * V, row, value, here, V, WHOLE_V)
            if BOUND:
                u_tile = load_rows(updates + (rows * heads + head) * V, heads * V, row, value, here, V, WHOLE_V)
                bound = tl.dot(x_tile, tl.trans(u_tile), acc=bound, input_precision=DOT)
            if LEFT or dw is not None or shed is not None:
                s_tile = load_state(states + place * (K * V), key, value, K, V, WHOLE_K & WHOLE_V, DTYPE)
                lost = tl.dot(x_tile, tl.trans(s_tile), acc=lost, input_precision=DOT)
        if shed is not None:
            w_tile = load_rows(w + at * w_b + first * w_t + head * w_h, w_t, row, key, here, K, WHOLE_K)
            tl.store(shed + tile * places + place, tl.sum(tl.sum(w_tile.to(tl.float32) * lost, 1), 0))
        if erase is not None:
            lost *= tl.load(erase + place * BLOCK + row)[:, None]
        if dw is not None:
            at_dw = dw + (rows * heads + head) * K + row[:, None] * (heads * K) + key[None, :]
            tl.store(at_dw, (-lost).to(dw.dtype.element_ty), mask=here[:, None] & (key[None, :] < K))
        if BOUND:
            bound = tl.where(row[:, None] > row[None, :], -bound, 0.0)
            back = tl.full([BLOCK], 1.0, tl.float32)
            if g is not None:
                coarse, fine, _last, _rest = running_log(step, SPLIT)
                bound *= between(coarse, fine, row[:, None] >= row[None, :], SPLIT)
                back = tl.exp(coarse + fine)
            if links is not None and tile == 0:
                tl.store(links + place * (BLOCK * BLOCK) + row[:, None] * BLOCK + row[None, :], bound.to(DTYPE))
        if LEFT:
            norm = tl.full([BLOCK], 1.0, tl.float32)
            if L2NORM:
                norm = row_norm(k_tile)
            left = tl.dot(bound.to(DTYPE), normed(k_tile, norm, L2NORM), acc=lost * -back[:, None], input_precision=DOT)
            if seen is not None:
                tl.store(seen + (tile * places + place) * BLOCK + row, norm * tl.sum(k_tile.to(tl.float32) * left, 1))
            if sums is not None:
                _add(left * b[:, None], sums, at_sums, member)


ERASED = Kernel(_erased)


@triton.jit
def _written(
    q, k, beta, g, gate, leaving, updates, pairs, diagonal, links, taken, gone, sums, dk, cu_seqlens, tokens, sequences, heads, group, places,
    q_b, q_t, q_h, k_b, k_t, k_h, beta_b, beta_t, beta_h, g_b, g_t, g_h, gate_b, gate_t, gate_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr, L2NORM: tl.constexpr, DOT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dk; `taken` and `gone [TILES, places, BLOCK]` are for `vectors`. `sums`: what `erased` left, if there are `links`, and what earlier v heads add."""
    WHOLE_K: tl.constexpr = K % BLOCK_K == 0
    WHOLE_V: tl.constexpr = V % BLOCK_V == 0
    DTYPE: tl.constexpr = k.dtype.element_ty
    SPLIT: tl.constexpr = DTYPE == tl.float32
    TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    groups = heads // group
    tile = tl.program_id(0) % TILES
    shared = tl.program_id(0) // TILES % groups
    slot = tl.program_id(0) // TILES // groups
    batch, _, _, start, _, end = locate(cu_seqlens, slot, tokens, sequences, 0, BLOCK)
    if start >= end:
        return
    row = tl.arange(0, BLOCK)
    key = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    here = start + row < end
    at = batch.to(tl.int64)
    first = start.to(tl.int64)
    rows = at * tokens + first
    at_q = q + at * q_b + first * q_t + shared * q_h
    at_k = k + at * k_b + first * k_t + shared * k_h
    at_sums = (slot.to(tl.int64) * groups + shared) * (BLOCK * BLOCK_K * TILES) + row[:, None] * (BLOCK_K * TILES) + key[None, :]
    stop = V + tl.program_id(1)  # V, but the compiler does not know, and leaves the loop a loop
    for member in tl.range(0, group, num_stages=1):
        head = shared * group + member
        place = slot.to(tl.int64) * heads + head
        at_u = updates + (rows * heads + head) * V
        square = place * (BLOCK * BLOCK) + row[:, None] * BLOCK + row[None, :]
        if g is not None:
            step = load_line(g + at * g_b + first * g_t + head * g_h, g_t, row, here)
        k_tile = load_rows(at_k, k_t, row, key, here, K, WHOLE_K)
        q_tile = load_rows(at_q, q_t, row, key, here, K, WHOLE_K)
        p_tile = tl.load(pairs + square)
        if links is not None:
            l_tile = tl.load(links + square)
        right = tl.zeros([BLOCK, BLOCK_K], tl.float32)
        for column in tl.range(0, stop, BLOCK_V, num_stages=STAGES):
            value = column + tl.arange(0, BLOCK_V)
            u_tile = load_rows(at_u, heads * V, row, value, here, V, WHOLE_V)
            e_tile = load_state(leaving + place * (K * V), key, value, K, V, WHOLE_K & WHOLE_V, DTYPE)
            right = tl.dot(u_tile, tl.trans(e_tile), acc=right, input_precision=DOT)
        norm = tl.full([BLOCK], 1.0, tl.float32)
        through = norm
        if L2NORM:
            norm = row_norm(k_tile)
            through = row_norm(q_tile)
        if g is not None:
            coarse, fine, coarse_last, fine_last = running_log(step, SPLIT)
            right *= tl.exp((coarse_last - coarse) + (fine_last - fine))[:, None]
        line = (tile * places + place) * BLOCK + row
        if gone is not None:
            left = norm * tl.sum(k_tile.to(tl.float32) * right, 1)
            tl.store(gone + line, left)
        inner = right
        if SPLIT:
            inner = tl.zeros([BLOCK, BLOCK_K], tl.float32)
        if gate is not None:
            through *= load_line(gate + at * gate_b + first * gate_t + head * gate_h, gate_t, row, here)
        inner = tl.dot(tl.trans(p_tile), normed(q_tile, through, L2NORM or gate is not None), acc=inner, input_precision=DOT)
        if links is not None:
            bent = norm * load_line(beta + at * beta_b + first * beta_t + head * beta_h, beta_t, row, here)
            inner = tl.dot(tl.trans(l_tile), normed(k_tile, bent, True), acc=inner, input_precision=DOT)
        if taken is not None:
            found = norm * tl.sum(k_tile.to(tl.float32) * inner, 1)
            tl.store(taken + line, found if SPLIT else found - left)
        right = right + inner if SPLIT else inner
        if dk is not None:
            q_tile = load_rows(at_q, q_t, row, key, here, K, WHOLE_K)  # again: registers are scarce
            right += q_tile.to(tl.float32) * (through * tl.load(diagonal + place * BLOCK + row))[:, None]
            if sums is not None:
                if links is not None:  # noqa: SIM114  (decided when it compiles)
                    right += tl.load(sums + at_sums)
                elif member > 0:
                    right += tl.load(sums + at_sums)
                if member < group - 1:
                    tl.debug_barrier()
                    tl.store(sums + at_sums, right)
                    tl.debug_barrier()
            if member == group - 1:
                if L2NORM:
                    right = unnormed(right, k_tile.to(tl.float32), norm)
                at_dk = dk + (rows * groups + shared) * K + row[:, None] * (groups * K) + key[None, :]
                tl.store(at_dk, right.to(dk.dtype.element_ty), mask=here[:, None] & (key[None, :] < K))


WRITTEN = Kernel(_written)


@triton.jit
def _vectors(
    beta, g, gate, told, past, direct, seen, taken, gone, asked_of, shed, carried, dbeta, dg, dgate, d_decay, cu_seqlens,
    tokens, sequences, heads, places, parts, tiles, chunks,
    beta_b, beta_t, beta_h, g_b, g_t, g_h, gate_b, gate_t, gate_h, BLOCK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The gradients of beta, g, the output gate and chunk_decay, from the row sums of tiles and the `parts` of <S, E>. Programs: blocks x v heads."""
    head = tl.program_id(0) % heads
    slot = tl.program_id(0) // heads
    batch, sequence, index, start, _, end = locate(cu_seqlens, slot, tokens, sequences, 0, BLOCK)
    if start >= end:
        return
    row = tl.arange(0, BLOCK)
    here = start + row < end
    at = batch.to(tl.int64)
    first = start.to(tl.int64)
    place = slot.to(tl.int64) * heads + head
    out = (at * tokens + first + row) * heads + head
    steep = tl.zeros([BLOCK], tl.float32)
    answered = steep
    asked = steep
    erased = steep
    held = steep
    for tile in range(tiles):
        line = (tile * places + place) * BLOCK + row
        if told is not None:
            answered += tl.load(told + line)
        if past is not None:
            asked += tl.load(past + line)
        if seen is not None:
            erased += tl.load(seen + line)
        if taken is not None:
            steep -= tl.load(taken + line)
            held += tl.load(gone + line - 1, mask=row > 0, other=0.0)
    total = 0.0
    if carried is not None:
        for part in range(parts):
            total += tl.load(carried + place * parts + part)
    if d_decay is not None:
        for tile in range(tiles):
            total += tl.load(asked_of + tile * places + place)
            if shed is not None:
                total -= tl.load(shed + tile * places + place)
        if cu_seqlens is not None:
            index += chunks_before(cu_seqlens, sequence, BLOCK)
        tl.store(d_decay + (at * chunks + index) * heads + head, total.to(d_decay.dtype.element_ty))
    if dgate is not None:
        tl.store(dgate + out, answered.to(dgate.dtype.element_ty), mask=here)
    if dbeta is not None:
        wanted = erased
        for part in range(parts):
            wanted += tl.load(direct + (place * parts + part) * BLOCK + row)
        tl.store(dbeta + out, wanted.to(dbeta.dtype.element_ty), mask=here)
    if dg is not None:
        if gate is not None:
            asked *= load_line(gate + at * gate_b + first * gate_t + head * gate_h, gate_t, row, here)
        if seen is not None:
            erased *= load_line(beta + at * beta_b + first * beta_t + head * beta_h, beta_t, row, here)
        _coarse, _fine, coarse_last, fine_last = running_log(load_line(g + at * g_b + first * g_t + head * g_h, g_t, row, here), SPLIT)
        total *= tl.exp(coarse_last + fine_last)
        steep = tl.where(here, steep + asked + erased, 0.0)
        found = tl.sum(steep, 0) - tl.cumsum(steep, 0) + steep + tl.cumsum(held, 0) + total
        tl.store(dg + out, found.to(dg.dtype.element_ty), mask=here)


VECTORS = Kernel(_vectors)
