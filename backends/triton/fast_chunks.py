"""S_fast, three ways through a chunk (SPEC.md 2), and W behind the last one. Programs are independent; no way writes anything but its results.

    whole    a chunk is one tile: scores Q K^T once, for one v head or for all that share q and k
    blocks   a block of rows walks the column blocks before it, backwards, so that the decay in between is one running scalar
    walk     a program walks a chunk forwards with W on chip: linear in the chunk, serial; it knows the final W without another launch

A row of a chunk moves q, k, v, o and two numbers once, (2 K + 2 V) elements, and takes C (K + V) FLOP (whole computes the upper half too; blocks
C (K + V) and rereads k and v from L2; walk 4 K V + 2 BLOCK (K + V)). At C = 128 device memory limits it, with walk the latency of its chain.
Off a block's diagonal the decay is a factor of the row times one of the column, both at most 1; on it, one exponential of their difference.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decay import running_log
from .grid import locate
from .launch import Kernel

__all__ = ["BLOCKS", "FINAL", "WALK", "WHOLE"]


@triton.jit
def _rows(x, row, column, here, row_t, COLUMNS: tl.constexpr, EVEN: tl.constexpr):
    """A tile `[rows, columns]`; EVEN: its columns all exist."""
    inside = here[:, None] if EVEN else here[:, None] & (column[None, :] < COLUMNS)
    return tl.load(x + row[:, None] * row_t + column[None, :], mask=inside, other=0.0)


@triton.jit
def _log(g, row, here, row_t, SPLIT: tl.constexpr):
    """The running log decay of a block, as `running_log` has it."""
    return running_log(tl.load(g + row * row_t, mask=here, other=0.0).to(tl.float32), SPLIT)


@triton.jit
def _apart(coarse, fine, row, SPLIT: tl.constexpr):
    """Gamma_ij = exp(G_i - G_j) on and below the diagonal, else 0."""
    log = coarse[:, None] - coarse[None, :]
    if SPLIT:
        log += fine[:, None] - fine[None, :]
    return tl.exp(tl.where(row[:, None] >= row[None, :], log, float("-inf")))


@triton.jit
def _memory(w, sequence, head, column, value, w_b, w_h, w_t, K: tl.constexpr, V: tl.constexpr):
    """A tile of a W `[N, H, K, V]`: where it lies, and which of it exists."""
    at = w + sequence.to(tl.int64) * w_b + head.to(tl.int64) * w_h + column[:, None] * w_t + value[None, :]
    return at, (column[:, None] < K) & (value[None, :] < V)


@triton.jit
def _held(
    q, w, row, value, here, sequence, head, q_t, w_b, w_h, w_t,
    K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """q W of a block, a slab of keys at a time: W is float32, and a whole tile of it would take more of the card than anything else."""
    SLAB: tl.constexpr = 32 if K > 16 else 16
    DTYPE: tl.constexpr = q.dtype.element_ty
    y = tl.zeros([BLOCK, BLOCK_V], tl.float32)
    for low in range(0, K, SLAB):
        column = low + tl.arange(0, SLAB)
        place, exists = _memory(w, sequence, head, column, value, w_b, w_h, w_t, K, V)
        q_tile = _rows(q, row, column, here, q_t, K, K % SLAB == 0)
        y = tl.dot(q_tile, tl.load(place, mask=exists, other=0.0).to(DTYPE), y, input_precision=DOT)
    return y


@triton.jit
def _write(o, y, gate, row, value, here, scale, gate_t, o_t, V: tl.constexpr, EVEN: tl.constexpr):
    """o = gate * scale * y."""
    factor = scale
    if gate is not None:
        factor = (tl.load(gate + row * gate_t, mask=here, other=0.0).to(tl.float32) * scale)[:, None]
    inside = here[:, None] if EVEN else here[:, None] & (value[None, :] < V)
    tl.store(o + row[:, None] * o_t + value[None, :], (y * factor).to(o.dtype.element_ty), mask=inside)


@triton.jit
def _whole(
    q, k, v, gate, g, initial, cu_seqlens, o,
    scale, tokens, sequences, offset, heads, group,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, gate_b, gate_t, gate_h, g_b, g_t, g_h, initial_b, initial_h, initial_t, o_b, o_t,
    K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    SHARE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A chunk of SHARE v heads with one q/k head, and a value tile."""
    TILES: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    DTYPE: tl.constexpr = k.dtype.element_ty
    SPLIT: tl.constexpr = k.dtype.element_ty == tl.float32
    EVEN_V: tl.constexpr = V % BLOCK_V == 0
    program = tl.program_id(0)
    parts = heads // SHARE
    first_head = program % parts * SHARE
    rest = program // parts
    batch, sequence, index, start, begin, end = locate(cu_seqlens, rest // TILES, tokens, sequences, offset, CHUNK)
    if (start >= end) | (begin >= end):
        return
    row = tl.arange(0, BLOCK)
    column = tl.arange(0, BLOCK_K)
    value = rest % TILES * BLOCK_V + tl.arange(0, BLOCK_V)
    here = (row >= begin - start) & (row < end - start)
    if CHUNK != BLOCK:
        here = here & (row < CHUNK)
    at = batch.to(tl.int64)
    first = start.to(tl.int64)
    shared = (first_head // group).to(tl.int64)
    q += at * q_b + first * q_t + shared * q_h
    q_tile = _rows(q, row, column, here, q_t, K, K == BLOCK_K)
    k_tile = _rows(k + at * k_b + first * k_t + shared * k_h, row, column, here, k_t, K, K == BLOCK_K)
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=DOT)
    if g is None:
        masked = tl.where(row[:, None] >= row[None, :], scores, 0.0).to(DTYPE)
    for step in range(SHARE):
        head = first_head.to(tl.int64) + step
        v_tile = _rows(v + at * v_b + first * v_t + head * v_h, row, value, here, v_t, V, EVEN_V)
        if g is None:
            y = tl.dot(masked, v_tile, input_precision=DOT)
        else:
            coarse, fine, _last, _last_fine = _log(g + at * g_b + first * g_t + head * g_h, row, here, g_t, SPLIT)
            y = tl.dot((scores * _apart(coarse, fine, row, SPLIT)).to(DTYPE), v_tile, input_precision=DOT)
        if initial is not None:
            if index == 0:
                held = _held(q, initial, row, value, here, sequence, head, q_t, initial_b, initial_h, initial_t, K, V, BLOCK, BLOCK_V, DOT)
                if g is not None:
                    held *= tl.exp(coarse + fine)[:, None]
                y += held
        gates = gate
        if gate is not None:
            gates = gate + at * gate_b + first * gate_t + head * gate_h
        _write(o + at * o_b + first * o_t + head * V, y, gates, row, value, here, scale, gate_t, o_t, V, EVEN_V)


@triton.jit
def _blocks(
    q, k, v, gate, g, initial, cu_seqlens, o,
    scale, tokens, sequences, offset, heads, group,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, gate_b, gate_t, gate_h, g_b, g_t, g_h, initial_b, initial_h, initial_t, o_b, o_t,
    K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A block of a chunk's rows, one v head, a value tile; the last block of a chunk, which has most to do, runs first."""
    TILES: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    COUNT: tl.constexpr = (CHUNK + BLOCK - 1) // BLOCK
    DTYPE: tl.constexpr = k.dtype.element_ty
    SPLIT: tl.constexpr = k.dtype.element_ty == tl.float32
    EVEN_V: tl.constexpr = V % BLOCK_V == 0
    program = tl.program_id(0)
    head = program % heads
    rest = program // heads
    value = rest % TILES * BLOCK_V + tl.arange(0, BLOCK_V)
    rest = rest // TILES
    block = COUNT - 1 - rest % COUNT
    batch, sequence, index, start, begin, end = locate(cu_seqlens, rest // COUNT, tokens, sequences, offset, CHUNK)
    stop = tl.minimum(end, start + CHUNK)
    own = start + block * BLOCK
    if (own >= stop) | (own + BLOCK <= begin) | (begin >= end):
        return
    row = tl.arange(0, BLOCK)
    column = tl.arange(0, BLOCK_K)
    here = (own + row >= begin) & (own + row < stop)
    at = batch.to(tl.int64)
    first = own.to(tl.int64)
    wide_head = head.to(tl.int64)
    shared = (head // group).to(tl.int64)
    k += at * k_b + first * k_t + shared * k_h
    v += at * v_b + first * v_t + wide_head * v_h
    q += at * q_b + first * q_t + shared * q_h
    q_tile = _rows(q, row, column, here, q_t, K, K == BLOCK_K)
    y = tl.zeros([BLOCK, BLOCK_V], tl.float32)
    if g is not None:
        g += at * g_b + first * g_t + wide_head * g_h
        own_coarse, own_fine, _last, _last_fine = _log(g, row, here, g_t, SPLIT)
        ahead = tl.exp(own_coarse + own_fine)
        passed = own * 0.0
    lowest = tl.maximum(begin - start, 0) // BLOCK
    for back in range(block - lowest + 1):
        low = row - back * BLOCK
        known = (own + low >= begin) & (own + low < stop)
        k_tile = _rows(k, low, column, known, k_t, K, K == BLOCK_K)
        v_tile = _rows(v, low, value, known, v_t, V, EVEN_V)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=DOT)
        if g is not None:
            coarse, fine, last, last_fine = _log(g, low, known, g_t, SPLIT)
            if back == 0:
                scores *= _apart(coarse, fine, row, SPLIT)
            else:
                scores *= ahead[:, None] * tl.exp((last - coarse) + (last_fine - fine) + passed)[None, :]
                passed += last + last_fine
        else:
            scores = tl.where((row[:, None] >= row[None, :]) | (back > 0), scores, 0.0)
        y = tl.dot(scores.to(DTYPE), v_tile, y, input_precision=DOT)
    if initial is not None:
        if index == 0:
            held = _held(q, initial, row, value, here, sequence, head, q_t, initial_b, initial_h, initial_t, K, V, BLOCK, BLOCK_V, DOT)
            if g is not None:
                held *= (ahead * tl.exp(passed))[:, None]
            y += held
    if gate is not None:
        gate += at * gate_b + first * gate_t + wide_head * gate_h
    _write(o + at * o_b + first * o_t + wide_head * V, y, gate, row, value, here, scale, gate_t, o_t, V, EVEN_V)


@triton.jit
def _advance(w, k_turned, v_tile, coarse, fine, last, last_fine, DECAYED: tl.constexpr, DOT: tl.constexpr):
    """W behind a block: e^last W + sum over its tokens of e^(last - G_j) k_j v_j^T."""
    if DECAYED:
        w *= tl.exp(last + last_fine)
        v_tile = (v_tile.to(tl.float32) * tl.exp((last - coarse) + (last_fine - fine))[:, None]).to(v_tile.dtype)
    return tl.dot(k_turned, v_tile, w, input_precision=DOT)


@triton.jit
def _walk(
    q, k, v, gate, g, initial, cu_seqlens, o, final,
    scale, tokens, sequences, offset, heads, group,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, gate_b, gate_t, gate_h, g_b, g_t, g_h, initial_b, initial_h, initial_t, o_b, o_t,
    K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A chunk of one v head and a value tile, block after block. A sequence's last chunk writes the final W, an empty sequence's first slot too."""
    TILES: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    DTYPE: tl.constexpr = k.dtype.element_ty
    SPLIT: tl.constexpr = k.dtype.element_ty == tl.float32
    EVEN_V: tl.constexpr = V % BLOCK_V == 0
    program = tl.program_id(0)
    head = program % heads
    rest = program // heads
    batch, sequence, index, start, begin, end = locate(cu_seqlens, rest // TILES, tokens, sequences, offset, CHUNK)
    empty = begin >= end
    if ((start >= end) | empty) & ((index > 0) | (end > begin)):
        return
    stop = tl.minimum(end, start + CHUNK)
    row = tl.arange(0, BLOCK)
    column = tl.arange(0, BLOCK_K)
    value = rest % TILES * BLOCK_V + tl.arange(0, BLOCK_V)
    at = batch.to(tl.int64)
    first = start.to(tl.int64)
    wide_head = head.to(tl.int64)
    shared = (head // group).to(tl.int64)
    q += at * q_b + first * q_t + shared * q_h
    k += at * k_b + first * k_t + shared * k_h
    v += at * v_b + first * v_t + wide_head * v_h
    o += at * o_b + first * o_t + wide_head * V
    if g is not None:
        g += at * g_b + first * g_t + wide_head * g_h
    if gate is not None:
        gate += at * gate_b + first * gate_t + wide_head * gate_h
    w = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if initial is not None:
        carried = (index == 0) & ((offset > 0) | empty)
        place, exists = _memory(initial, sequence, head, column, value, initial_b, initial_h, initial_t, K, V)
        w = tl.load(place, mask=exists & carried, other=0.0)
    low = tl.maximum(begin - start, 0) // BLOCK * BLOCK
    for block in range(low, tl.where(empty, low, stop - start), BLOCK):
        line = (block + row).to(tl.int64)
        here = (start + block + row >= begin) & (start + block + row < stop)
        q_tile = _rows(q, line, column, here, q_t, K, K == BLOCK_K)
        k_tile = _rows(k, line, column, here, k_t, K, K == BLOCK_K)
        v_tile = _rows(v, line, value, here, v_t, V, EVEN_V)
        k_turned = tl.trans(k_tile)
        scores = tl.dot(q_tile, k_turned, input_precision=DOT)
        y = tl.dot(q_tile, w.to(DTYPE), input_precision=DOT)
        if g is not None:
            coarse, fine, last, last_fine = _log(g, line, here, g_t, SPLIT)
            y *= tl.exp(coarse + fine)[:, None]
            scores *= _apart(coarse, fine, row, SPLIT)
            w = _advance(w, k_turned, v_tile, coarse, fine, last, last_fine, True, DOT)
        else:
            scores = tl.where(row[:, None] >= row[None, :], scores, 0.0)
            w = _advance(w, k_turned, v_tile, 0.0, 0.0, 0.0, 0.0, False, DOT)
        y = tl.dot(scores.to(DTYPE), v_tile, y, input_precision=DOT)
        _write(o, y, gate, line, value, here, scale, gate_t, o_t, V, EVEN_V)
    if final is not None:
        if stop >= end:
            place, exists = _memory(final, sequence, head, column, value, heads * K * V, K * V, V, K, V)
            tl.store(place, w, mask=exists)


@triton.jit
def _final(
    k, v, g, initial, cu_seqlens, final,
    tokens, offset, heads, group,
    k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, initial_b, initial_h, initial_t,
    K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """W behind a sequence's last chunk, for one head and a value tile: 2 K BLOCK_V FLOP a token on K + BLOCK_V elements."""
    TILES: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    SPLIT: tl.constexpr = k.dtype.element_ty == tl.float32
    program = tl.program_id(0)
    value = program % TILES * BLOCK_V + tl.arange(0, BLOCK_V)
    head = program // TILES % heads
    sequence = program // TILES // heads
    if cu_seqlens is None:
        at = sequence.to(tl.int64)
        begin = sequence * 0
        end = begin + tokens
    else:
        at = sequence.to(tl.int64) * 0
        begin = tl.load(cu_seqlens + sequence).to(tl.int32)
        end = tl.load(cu_seqlens + sequence + 1).to(tl.int32)
    chunk = tl.maximum(end - begin + offset - 1, 0) // CHUNK
    start = begin - offset + chunk * CHUNK
    row = tl.arange(0, BLOCK)
    column = tl.arange(0, BLOCK_K)
    wide_head = head.to(tl.int64)
    first = start.to(tl.int64)
    k += at * k_b + first * k_t + (head // group).to(tl.int64) * k_h
    v += at * v_b + first * v_t + wide_head * v_h
    if g is not None:
        g += at * g_b + first * g_t + wide_head * g_h
    w = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if initial is not None:
        carried = (begin >= end) | ((chunk == 0) & (offset > 0))
        place, exists = _memory(initial, sequence, head, column, value, initial_b, initial_h, initial_t, K, V)
        w = tl.load(place, mask=exists & carried, other=0.0)
    for block in range(0, tl.where(begin >= end, 0, end - start), BLOCK):
        line = (block + row).to(tl.int64)
        here = (start + block + row >= begin) & (start + block + row < end)
        k_turned = tl.trans(_rows(k, line, column, here, k_t, K, K == BLOCK_K))
        v_tile = _rows(v, line, value, here, v_t, V, V % BLOCK_V == 0)
        if g is not None:
            coarse, fine, last, last_fine = _log(g, line, here, g_t, SPLIT)
            w = _advance(w, k_turned, v_tile, coarse, fine, last, last_fine, True, DOT)
        else:
            w = _advance(w, k_turned, v_tile, 0.0, 0.0, 0.0, 0.0, False, DOT)
    place, exists = _memory(final, sequence, head, column, value, heads * K * V, K * V, V, K, V)
    tl.store(place, w, mask=exists)


WHOLE, BLOCKS, WALK, FINAL = Kernel(_whole), Kernel(_blocks), Kernel(_walk), Kernel(_final)
