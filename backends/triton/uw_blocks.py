"""The kernels of uw_transform: u and w of a chunk, the triangle and its inverse on chip (SPEC.md 3).

`uw_block`: a chunk of at most 64 tokens is one block of BLOCK rows. Per program and v head it moves BLOCK (2 K + 2 V) elements (the q/k heads'
rows come from L2 for all but one v head of a group) and computes BLOCK^2 (2 K + V) + 2/3 BLOCK^3 multiply-adds: bytes limit it. Small heads may be
joined: values and keys side by side as one operand of 64 columns, wide enough for four warps (`serving.narrow_warps`).
`uw_walk`: a longer chunk is walked in blocks, with running matrices in registers in place of a large triangle: exact, R [K, columns]; lam, R and
the Gram matrix P [K, K] of the chunk's earlier keys, or without P the earlier blocks once more. `uw_scaled`: no transform, only the scaling.
The grid of chunks begins `offset` absent tokens before each sequence.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decay import between, running_log
from .grid import locate
from .inverse import unit_lower_inverse
from .launch import Kernel

__all__ = ["JOINED_WIDTH", "UW_BLOCK", "UW_SCALED", "UW_WALK", "block_triangle", "chunk_of", "load_tile", "load_vector", "store_tile"]

JOINED_WIDTH = 32
"""The widest head that `uw_block` joins."""


@triton.jit
def chunk_of(cu_seqlens, slot, tokens, sequences, offset, CHUNK: tl.constexpr):
    """(batch row, first token of the chunk, which an offset may put before the sequence, first and end of those that exist) of a slot."""
    row, _, _, first, begin, end = locate(cu_seqlens, slot, tokens, sequences, offset, CHUNK)
    return row, first, begin, first + tl.minimum(end - first, CHUNK)


@triton.jit
def load_tile(base, rows, ok, stride, start, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """Columns start to start + TILE of some rows; zero where a row or a column does not exist."""
    columns = start + tl.arange(0, TILE)
    keep = ok[:, None]
    if WIDTH % TILE != 0:
        keep = keep & (columns[None, :] < WIDTH)
    return tl.load(base + rows[:, None] * stride + columns[None, :], mask=keep, other=0.0)


@triton.jit
def store_tile(base, rows, ok, stride, start, value, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """Writes what `load_tile` would read."""
    columns = start + tl.arange(0, TILE)
    keep = ok[:, None]
    if WIDTH % TILE != 0:
        keep = keep & (columns[None, :] < WIDTH)
    tl.store(base + rows[:, None] * stride + columns[None, :], value.to(base.dtype.element_ty), mask=keep)


@triton.jit
def load_vector(base, rows, ok, stride):
    """One number a row, in float32; zero where the row does not exist."""
    return tl.load(base + rows * stride, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _lower(gram, beta, coarse, fine, DECAYED: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr):
    """L = stril(diag(beta) K K^T * Gamma)."""
    row = tl.arange(0, BLOCK)
    below = row[:, None] > row[None, :]
    lower = gram * beta[:, None]
    if DECAYED:
        lower *= between(coarse, fine, below, SPLIT)
    return tl.where(below, lower, 0.0)


@triton.jit
def _upper(gram, beta, coarse, fine, DECAYED: tl.constexpr, TWICE: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr):
    """L^T, from the symmetric K K^T and not by a transposition; TWICE: with Gamma squared."""
    row = tl.arange(0, BLOCK)
    above = row[:, None] < row[None, :]
    upper = gram * beta[None, :]
    if DECAYED:
        fading = between(-coarse, -fine, above, SPLIT)
        upper *= fading
        if TWICE:
            upper *= fading
    return tl.where(above, upper, 0.0)


@triton.jit
def block_triangle(
    gram, beta, coarse, fine,
    DECAYED: tl.constexpr, OPERAND: tl.constexpr, BLOCK: tl.constexpr, LAM: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """T `[BLOCK, BLOCK]` in float32 from K K^T, beta and G as `running_log` keeps it."""
    SPLIT: tl.constexpr = OPERAND.primitive_bitwidth == 32
    lower = _lower(gram, beta, coarse, fine, DECAYED, BLOCK, SPLIT)
    if LAM:
        row = tl.arange(0, BLOCK)
        transposed = _upper(gram, beta, coarse, fine, DECAYED, False, BLOCK, SPLIT)
        square = tl.dot(lower.to(OPERAND), transposed.to(OPERAND), input_precision=DOT)
        triangle = tl.where(row[:, None] == row[None, :], 1.0, 0.0) - lower + tl.where(row[:, None] > row[None, :], square, 0.0)
    else:
        triangle = unit_lower_inverse(lower, BLOCK, OPERAND, DOT)
    return triangle


@triton.jit
def _uw_block(
    k, v, beta, g, u, w, cu_seqlens, tokens, sequences, offset,
    k_b, k_t, k_h, v_b, v_t, v_h, beta_b, beta_t, beta_h, g_b, g_t, g_h,
    HEADS: tl.constexpr, GROUP: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PER: tl.constexpr,
    LAM: tl.constexpr, DOT: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    """u and w of one chunk and PER v heads of one q/k head. Blocks: slots * HEADS // PER. JOINED: half the columns of a joined operand, or 0."""
    OPERAND: tl.constexpr = k.dtype.element_ty
    DECAYED: tl.constexpr = g is not None
    SPLIT: tl.constexpr = k.dtype.element_ty == tl.float32
    slot = tl.program_id(0) // (HEADS // PER)
    head = tl.program_id(0) % (HEADS // PER) * PER
    row, first, low, stop = chunk_of(cu_seqlens, slot, tokens, sequences, offset, CHUNK)
    if first >= stop:
        return
    row = tl.cast(row, tl.int64)
    first = tl.cast(first, tl.int64)
    line = tl.arange(0, BLOCK)
    ok = (line < stop - first) & (line >= low - first)
    k += row * k_b + first * k_t + (head // GROUP) * k_h
    gram = tl.zeros([BLOCK, BLOCK], tl.float32)
    for part in tl.static_range(0, KEYS, BLOCK_K):
        keys = load_tile(k, line, ok, k_t, part, KEYS, BLOCK_K)
        gram = tl.dot(keys, tl.trans(keys), gram, input_precision=DOT)
    token = row * tokens + first
    v += row * v_b + first * v_t
    beta += row * beta_b + first * beta_t
    if DECAYED:
        g += row * g_b + first * g_t
    for h in tl.range(head, head + PER, disable_licm=True):
        b = load_vector(beta + h * beta_h, line, ok, beta_t)
        coarse = b
        fine = b
        if DECAYED:
            coarse, fine, _, _ = running_log(load_vector(g + h * g_h, line, ok, g_t), SPLIT)
        triangle = block_triangle(gram, b, coarse, fine, DECAYED, OPERAND, BLOCK, LAM, DOT) * b[None, :]
        right = triangle.to(OPERAND)
        out = u + (token * HEADS + h) * VALUES
        if JOINED > 0:
            column = tl.arange(0, 2 * JOINED)[None, :]
            in_v, in_k = ok[:, None] & (column < VALUES), ok[:, None] & (column >= JOINED) & (column < JOINED + KEYS)
            both = tl.load(k + line[:, None] * k_t + (column - JOINED), mask=in_k, other=0.0)
            if DECAYED:
                both = (both.to(tl.float32) * tl.exp(coarse + fine)[:, None]).to(OPERAND)
            both += tl.load(v + h * v_h + line[:, None] * v_t + column, mask=in_v, other=0.0)
            both = tl.dot(right, both, input_precision=DOT).to(u.dtype.element_ty)
            tl.store(out + line[:, None] * (HEADS * VALUES) + column, both, mask=in_v)
            tl.store(w + (token * HEADS + h) * KEYS + line[:, None] * (HEADS * KEYS) + (column - JOINED), both, mask=in_k)
        else:
            for part in tl.static_range(0, VALUES, BLOCK_V):
                values = load_tile(v + h * v_h, line, ok, v_t, part, VALUES, BLOCK_V)
                store_tile(out, line, ok, HEADS * VALUES, part, tl.dot(right, values, input_precision=DOT), VALUES, BLOCK_V)
            if DECAYED:
                right = (triangle * tl.exp(coarse + fine)[None, :]).to(OPERAND)
            out = w + (token * HEADS + h) * KEYS
            for part in tl.static_range(0, KEYS, BLOCK_K):
                if KEYS > BLOCK_K:
                    keys = load_tile(k, line, ok, k_t, part, KEYS, BLOCK_K)
                store_tile(out, line, ok, HEADS * KEYS, part, tl.dot(right, keys, input_precision=DOT), KEYS, BLOCK_K)


@triton.jit
def _walk_columns(
    k, x, beta, g, out, first, low, stop, token, start, k_t, x_t, beta_t, g_t,
    IS_KEY: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr, LAM: tl.constexpr, PAIRS: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """COLUMNS columns of u (x is v) or of w (x is k) of one chunk, block after block. Pointers stand at the chunk's first token."""
    OPERAND: tl.constexpr = k.dtype.element_ty
    DECAYED: tl.constexpr = g is not None
    SPLIT: tl.constexpr = k.dtype.element_ty == tl.float32
    line = tl.arange(0, BLOCK)
    written = tl.zeros([BLOCK_K, COLUMNS], tl.float32)
    if LAM and not PAIRS:
        known = tl.zeros([BLOCK_K, BLOCK_K], tl.float32)
    passed = 0.0
    for begin in tl.range(0, tl.cast(stop - first, tl.int32), BLOCK, disable_licm=True):
        at = tl.cast(begin, tl.int64)
        ok = (line < stop - first - at) & (line >= low - first - at)
        keys = load_tile(k + at * k_t, line, ok, k_t, 0, KEYS, BLOCK_K)
        gram = tl.dot(keys, tl.trans(keys), input_precision=DOT)
        b = load_vector(beta + at * beta_t, line, ok, beta_t)
        coarse = b
        fine = b
        if DECAYED:
            coarse, fine, all_coarse, all_fine = running_log(load_vector(g + at * g_t, line, ok, g_t), SPLIT)
            log = coarse + fine
            left = (all_coarse - coarse) + (all_fine - fine)
            total = all_coarse + all_fine
        right = load_tile(x + at * x_t, line, ok, x_t, start, WIDTH, COLUMNS)
        if IS_KEY and DECAYED:
            right = (right * tl.exp(log + passed)[:, None]).to(OPERAND)
        read = tl.dot(keys, written.to(OPERAND), input_precision=DOT)
        if DECAYED:
            read *= tl.exp(log)[:, None]
        triangle = block_triangle(gram, b, coarse, fine, DECAYED, OPERAND, BLOCK, LAM, DOT)
        if LAM:
            before = b
            after = b
            if DECAYED:
                before = b * tl.exp(log)
                after = b * tl.exp(left)
            weighted = right * after[:, None]
            again = before
            if DECAYED:
                again = before * tl.exp(log)
            # P^T is P, and Z^T = K^T (I + A')^T - P K^T diag(again): no product's result is transposed
            seen = tl.dot(tl.trans(keys), (weighted * again[:, None]).to(OPERAND), input_precision=DOT).to(OPERAND)
            if PAIRS:
                common = tl.zeros([BLOCK, BLOCK_K], tl.float32)
                undone = tl.zeros([BLOCK_K, COLUMNS], tl.float32)
                since = 0.0
                for back in range(BLOCK, begin + BLOCK, BLOCK):
                    there = at - back
                    earlier = load_tile(k + there * k_t, line, line >= low - first - there, k_t, 0, KEYS, BLOCK_K)
                    fade = tl.zeros([BLOCK], tl.float32) + 1.0
                    if DECAYED:
                        rough, small, all_rough, all_small = running_log(load_vector(g + there * g_t, line, line >= low - first - there, g_t), SPLIT)
                        fade = tl.exp(2.0 * ((all_rough - rough) + (all_small - small) + since))
                        since += all_rough + all_small
                    across = tl.dot(keys, tl.trans(earlier), input_precision=DOT) * fade[None, :]
                    common = tl.dot(across.to(OPERAND), earlier, common, input_precision=DOT)
                    met = tl.dot(earlier, seen, input_precision=DOT) * fade[:, None]
                    undone = tl.dot(tl.trans(earlier), met.to(OPERAND), undone, input_precision=DOT)
            else:
                kept = known.to(OPERAND)
                common = tl.dot(keys, kept, input_precision=DOT)
                undone = tl.dot(kept, seen, input_precision=DOT)
            shared = tl.dot(common.to(OPERAND), tl.trans(keys), input_precision=DOT) * before[:, None] * before[None, :]
            triangle += tl.where(line[:, None] > line[None, :], shared, 0.0)
            solved = tl.dot((triangle * b[None, :]).to(OPERAND), right, input_precision=DOT) - read * b[:, None]
            pulled = tl.dot(_upper(gram, b, coarse, fine, DECAYED, True, BLOCK, SPLIT).to(OPERAND), weighted.to(OPERAND), input_precision=DOT)
            new = weighted - pulled
            if DECAYED:
                written *= tl.exp(total)
            written = tl.dot(tl.trans(keys), new.to(OPERAND), written, input_precision=DOT) - undone
            if not PAIRS:
                again_keys = keys
                if DECAYED:
                    known *= tl.exp(2.0 * total)
                    again_keys = (keys * tl.exp(2.0 * left)[:, None]).to(OPERAND)
                known = tl.dot(tl.trans(keys), again_keys, known, input_precision=DOT)
        else:
            solved = tl.dot((triangle * b[None, :]).to(OPERAND), (right - read).to(OPERAND), input_precision=DOT)
            new = solved
            if DECAYED:
                new = solved * tl.exp(left)[:, None]
                written *= tl.exp(total)
            written = tl.dot(tl.trans(keys), new.to(OPERAND), written, input_precision=DOT)
        if DECAYED:
            passed += total
        store_tile(out + (token + at) * HEADS * WIDTH, line, ok, HEADS * WIDTH, start, solved, WIDTH, COLUMNS)


@triton.jit
def _uw_walk(
    k, v, beta, g, u, w, cu_seqlens, tokens, sequences, offset,
    k_b, k_t, k_h, v_b, v_t, v_h, beta_b, beta_t, beta_h, g_b, g_t, g_h,
    HEADS: tl.constexpr, GROUP: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr, PAIRS: tl.constexpr,
    LAM: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """COLUMNS columns of u or of w of one chunk and v head. Blocks: slots * HEADS * (ceil(V / COLUMNS) + ceil(K / COLUMNS))."""
    OF_U: tl.constexpr = (VALUES + COLUMNS - 1) // COLUMNS
    OF_W: tl.constexpr = (KEYS + COLUMNS - 1) // COLUMNS
    tile = tl.program_id(0) % (OF_U + OF_W)
    head = tl.program_id(0) // (OF_U + OF_W) % HEADS
    slot = tl.program_id(0) // (OF_U + OF_W) // HEADS
    row, first, low, stop = chunk_of(cu_seqlens, slot, tokens, sequences, offset, CHUNK)
    if first >= stop:
        return
    row = tl.cast(row, tl.int64)
    first = tl.cast(first, tl.int64)
    token = row * tokens + first
    k += row * k_b + first * k_t + (head // GROUP) * k_h
    v += row * v_b + first * v_t + head * v_h
    beta += row * beta_b + first * beta_t + head * beta_h
    if g is not None:
        g += row * g_b + first * g_t + head * g_h
    if tile < OF_U:
        _walk_columns(
            k, v, beta, g, u + head * VALUES, first, low, stop, token, tile * COLUMNS, k_t, v_t, beta_t, g_t,
            False, VALUES, HEADS, KEYS, CHUNK, BLOCK, BLOCK_K, COLUMNS, LAM, PAIRS, DOT,
        )  # fmt: skip
    else:
        _walk_columns(
            k, k, beta, g, w + head * KEYS, first, low, stop, token, (tile - OF_U) * COLUMNS, k_t, k_t, beta_t, g_t,
            True, KEYS, HEADS, KEYS, CHUNK, BLOCK, BLOCK_K, COLUMNS, LAM, PAIRS, DOT,
        )  # fmt: skip


@triton.jit
def _uw_scaled(
    k, v, beta, g, u, w, cu_seqlens, tokens, sequences, offset,
    k_b, k_t, k_h, v_b, v_t, v_h, beta_b, beta_t, beta_h, g_b, g_t, g_h,
    HEADS: tl.constexpr, GROUP: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """beta * V and beta * exp(G) * K of one chunk and v head. Blocks: slots * HEADS."""
    slot = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    row, first, low, stop = chunk_of(cu_seqlens, slot, tokens, sequences, offset, CHUNK)
    if first >= stop:
        return
    row = tl.cast(row, tl.int64)
    first = tl.cast(first, tl.int64)
    line = tl.arange(0, BLOCK)
    k += row * k_b + first * k_t + (head // GROUP) * k_h
    v += row * v_b + first * v_t + head * v_h
    beta += row * beta_b + first * beta_t + head * beta_h
    u += ((row * tokens + first) * HEADS + head) * VALUES
    w += ((row * tokens + first) * HEADS + head) * KEYS
    if g is not None:
        g += row * g_b + first * g_t + head * g_h
    passed = 0.0
    for begin in tl.range(0, tl.cast(stop - first, tl.int32), BLOCK, disable_licm=True):
        at = tl.cast(begin, tl.int64)
        ok = (line < stop - first - at) & (line >= low - first - at)
        b = load_vector(beta + at * beta_t, line, ok, beta_t)
        for part in tl.static_range(0, VALUES, BLOCK_V):
            values = load_tile(v + at * v_t, line, ok, v_t, part, VALUES, BLOCK_V)
            store_tile(u + at * HEADS * VALUES, line, ok, HEADS * VALUES, part, values * b[:, None], VALUES, BLOCK_V)
        if g is not None:
            coarse, fine, all_coarse, all_fine = running_log(load_vector(g + at * g_t, line, ok, g_t), k.dtype.element_ty == tl.float32)
            b *= tl.exp(coarse + fine + passed)
            passed += all_coarse + all_fine
        for part in tl.static_range(0, KEYS, BLOCK_K):
            keys = load_tile(k + at * k_t, line, ok, k_t, part, KEYS, BLOCK_K)
            store_tile(w + at * HEADS * KEYS, line, ok, HEADS * KEYS, part, keys * b[:, None], KEYS, BLOCK_K)


UW_BLOCK = Kernel(_uw_block)
UW_WALK = Kernel(_uw_walk)
UW_SCALED = Kernel(_uw_scaled)
