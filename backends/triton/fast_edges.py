"""What a carried W and the gradient of a final W add to the gradients of S_fast (SPEC.md 10), in the first and last chunk of each sequence.

    held    from W into dq and into the row sums of dG: (scale gate e^G) dO W^T, and q . W dO
    left    from dW into dk, dv and the column sums: e^(G_C - G) V dW^T, e^(G_C - G) K dW, and v . (K dW)
    start   dW at the start: (scale gate e^G Q)^T dO + e^(G_C) dW, and <W, dW at the start>, which is dg before the first token

They run before the gradients proper, which add float32 tiles of at most one chunk a sequence, as `edge_row` places them; a call without states launches
none. A row costs 2 K V FLOP a head each (left twice that), against C (K + V) for its chunk; device memory is read once but for W, K V a block of rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .fast_chunks import _log, _memory, _rows
from .launch import Kernel

__all__ = ["HELD", "LEFT", "START", "edge_row"]


@triton.jit
def edge_row(cu_seqlens, sequence, begin, tokens, CHUNK: tl.constexpr):
    """Where a sequence's rows begin in a tensor with room for one chunk of every sequence: they never overlap, and there are no more than tokens."""
    wide = sequence.to(tl.int64)
    if cu_seqlens is None:
        return wide * tl.minimum(tokens, CHUNK)
    else:
        return tl.minimum(begin.to(tl.int64), wide * CHUNK)


@triton.jit
def _span(cu_seqlens, sequence, tokens):
    """(batch row, first token, end) of a sequence; tokens count inside the row."""
    if cu_seqlens is None:
        return sequence.to(tl.int64), sequence * 0, sequence * 0 + tokens
    else:
        begin = tl.load(cu_seqlens + sequence).to(tl.int32)
        return sequence.to(tl.int64) * 0, begin, tl.load(cu_seqlens + sequence + 1).to(tl.int32)


@triton.jit
def _turned(w, sequence, head, value, column, w_b, w_h, w_t, K: tl.constexpr, V: tl.constexpr):
    """A tile `[value columns, keys]` of W^T."""
    at = w + sequence.to(tl.int64) * w_b + head * w_h + column[None, :] * w_t + value[:, None]
    return tl.load(at, mask=(column[None, :] < K) & (value[:, None] < V), other=0.0)


@triton.jit
def _gate(gate, row, here, gate_t, BLOCK: tl.constexpr):
    """The gate of a block's rows."""
    if gate is None:
        return tl.zeros([BLOCK], tl.float32) + 1.0
    else:
        return tl.load(gate + row * gate_t, mask=here, other=0.0).to(tl.float32)


@triton.jit
def _held(
    q, gate, g, d_o, initial, cu_seqlens, held_q, held_log,
    scale, tokens, offset, heads, group,
    q_b, q_t, q_h, gate_b, gate_t, gate_h, g_b, g_t, g_h, do_b, do_t, do_h, initial_b, initial_h, initial_t,
    K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, SLAB: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A block of a sequence's first rows and one q/k head."""
    COUNT: tl.constexpr = (CHUNK + BLOCK - 1) // BLOCK
    DTYPE: tl.constexpr = q.dtype.element_ty
    SPLIT: tl.constexpr = q.dtype.element_ty == tl.float32
    groups = heads // group
    program = tl.program_id(0)
    block = program % COUNT
    shared = (program // COUNT % groups).to(tl.int64)
    sequence = program // COUNT // groups
    at, begin, end = _span(cu_seqlens, sequence, tokens)
    count = tl.minimum(end - begin, CHUNK - offset)
    if block * BLOCK >= count:
        return
    line = tl.arange(0, BLOCK)
    row = block * BLOCK + line
    here = row < count
    column = tl.arange(0, BLOCK_K)
    first = begin.to(tl.int64)
    place = edge_row(cu_seqlens, sequence, begin, tokens, CHUNK) + row
    q_tile = _rows(q + at * q_b + first * q_t + shared * q_h, row.to(tl.int64), column, here, q_t, K, K == BLOCK_K).to(tl.float32)
    dq = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    for step in range(group):
        head = shared * group + step
        from_w = tl.zeros([BLOCK, BLOCK_K], tl.float32)
        for low in range(0, V, SLAB):
            value = low + tl.arange(0, SLAB)
            do_tile = _rows(d_o + at * do_b + first * do_t + head * do_h, row.to(tl.int64), value, here, do_t, V, V % SLAB == 0)
            w_tile = _turned(initial, sequence, head, value, column, initial_b, initial_h, initial_t, K, V)
            from_w = tl.dot(do_tile, w_tile.to(DTYPE), from_w, input_precision=DOT)
        if g is not None:
            logs = g + at * g_b + first * g_t + head * g_h
            passed = begin * 0.0
            for low in range(0, block * BLOCK, BLOCK):
                _coarse, _fine, last, last_fine = _log(logs, (low + line).to(tl.int64), low + line < count, g_t, SPLIT)
                passed += last + last_fine
            coarse, fine, _last, _last_fine = _log(logs, row.to(tl.int64), here, g_t, SPLIT)
            from_w *= tl.exp(coarse + fine + passed)[:, None]
        if held_log is not None:
            tl.store(held_log + place * heads + head, tl.sum(from_w * q_tile, 1), mask=here)
        gates = gate
        if gate is not None:
            gates = gate + at * gate_b + first * gate_t + head * gate_h
        dq += from_w * (_gate(gates, row.to(tl.int64), here, gate_t, BLOCK) * scale)[:, None]
    if held_q is not None:
        inside = here[:, None] & (column[None, :] < K)
        tl.store(held_q + (place * groups + shared)[:, None] * K + column[None, :], dq, mask=inside)


@triton.jit
def _left(
    k, v, g, d_final, cu_seqlens, left_k, left_v, left_log,
    tokens, offset, heads, group,
    k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, final_b, final_h, final_t,
    K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, SLAB: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A block of a sequence's last rows and one q/k head."""
    COUNT: tl.constexpr = (CHUNK + BLOCK - 1) // BLOCK
    DTYPE: tl.constexpr = k.dtype.element_ty
    SPLIT: tl.constexpr = k.dtype.element_ty == tl.float32
    groups = heads // group
    program = tl.program_id(0)
    block = program % COUNT
    shared = (program // COUNT % groups).to(tl.int64)
    sequence = program // COUNT // groups
    at, begin, end = _span(cu_seqlens, sequence, tokens)
    start = tl.maximum(begin, begin - offset + tl.maximum(end - begin + offset - 1, 0) // CHUNK * CHUNK)
    count = end - start
    if block * BLOCK >= count:
        return
    line = tl.arange(0, BLOCK)
    row = block * BLOCK + line
    here = row < count
    column = tl.arange(0, BLOCK_K)
    first = start.to(tl.int64)
    place = edge_row(cu_seqlens, sequence, begin, tokens, CHUNK) + row
    k_tile = _rows(k + at * k_b + first * k_t + shared * k_h, row.to(tl.int64), column, here, k_t, K, K == BLOCK_K)
    dk = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    for step in range(group):
        head = shared * group + step
        tail = tl.zeros([BLOCK], tl.float32) + 1.0
        if g is not None:
            logs = g + at * g_b + first * g_t + head * g_h
            coarse, fine, last, last_fine = _log(logs, row.to(tl.int64), here, g_t, SPLIT)
            after = (last - coarse) + (last_fine - fine)
            for low in range(block * BLOCK + BLOCK, count, BLOCK):
                _coarse, _fine, last, last_fine = _log(logs, (low + line).to(tl.int64), low + line < count, g_t, SPLIT)
                after += last + last_fine
            tail = tl.exp(after)
        from_w = tl.zeros([BLOCK, BLOCK_K], tl.float32)
        flow = tl.zeros([BLOCK], tl.float32)
        for low in range(0, V, SLAB):
            value = low + tl.arange(0, SLAB)
            v_tile = _rows(v + at * v_b + first * v_t + head * v_h, row.to(tl.int64), value, here, v_t, V, V % SLAB == 0)
            if (left_v is not None) or (left_log is not None):
                w, exists = _memory(d_final, sequence, head, column, value, final_b, final_h, final_t, K, V)
                dv = tl.dot(k_tile, tl.load(w, mask=exists, other=0.0).to(DTYPE), input_precision=DOT) * tail[:, None]
                flow += tl.sum(dv * v_tile.to(tl.float32), 1)
                if left_v is not None:
                    inside = here[:, None] & (value[None, :] < V)
                    tl.store(left_v + (place * heads + head)[:, None] * V + value[None, :], dv, mask=inside)
            if left_k is not None:
                w_tile = _turned(d_final, sequence, head, value, column, final_b, final_h, final_t, K, V)
                from_w = tl.dot(v_tile, w_tile.to(DTYPE), from_w, input_precision=DOT)
        if left_log is not None:
            # nothing behind a sequence's last token reads its part, which may be far larger than the others
            tl.store(left_log + place * heads + head, tl.where(row < count - 1, flow, 0.0), mask=here)
        dk += from_w * tail[:, None]
    if left_k is not None:
        inside = here[:, None] & (column[None, :] < K)
        tl.store(left_k + (place * groups + shared)[:, None] * K + column[None, :], dk, mask=inside)


@triton.jit
def _start(
    q, gate, g, d_o, initial, d_final, cu_seqlens, d_initial, total,
    scale, tokens, offset, heads, group,
    q_b, q_t, q_h, gate_b, gate_t, gate_h, g_b, g_t, g_h, do_b, do_t, do_h, initial_b, initial_h, initial_t, final_b, final_h, final_t,
    K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The gradient of one sequence's initial W for one v head and a value tile; a sequence without tokens hands dW on, one that opens a chunk nothing."""
    TILES: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    DTYPE: tl.constexpr = q.dtype.element_ty
    SPLIT: tl.constexpr = q.dtype.element_ty == tl.float32
    program = tl.program_id(0)
    tile = program % TILES
    head = (program // TILES % heads).to(tl.int64)
    sequence = program // TILES // heads
    at, begin, end = _span(cu_seqlens, sequence, tokens)
    length = end - begin
    count = tl.where(offset > 0, tl.minimum(length, CHUNK - offset), 0)
    line = tl.arange(0, BLOCK)
    column = tl.arange(0, BLOCK_K)
    value = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    first = begin.to(tl.int64)
    q += at * q_b + first * q_t + head // group * q_h
    d_o += at * do_b + first * do_t + head * do_h
    if gate is not None:
        gate += at * gate_b + first * gate_t + head * gate_h
    if g is not None:
        g += at * g_b + first * g_t + head * g_h
    dw = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    passed = begin * 0.0
    for low in range(0, count, BLOCK):
        row = (low + line).to(tl.int64)
        here = row < count
        factor = _gate(gate, row, here, gate_t, BLOCK) * scale
        if g is not None:
            coarse, fine, last, last_fine = _log(g, row, here, g_t, SPLIT)
            factor *= tl.exp(coarse + fine + passed)
            passed += last + last_fine
        q_tile = _rows(q, row, column, here, q_t, K, K == BLOCK_K)
        do_tile = _rows(d_o, row, value, here, do_t, V, V % BLOCK_V == 0)
        dw = tl.dot(tl.trans(q_tile), (do_tile.to(tl.float32) * factor[:, None]).to(DTYPE), dw, input_precision=DOT)
    if d_final is not None:
        share = tl.where(length > 0, tl.where((count > 0) & (length <= CHUNK - offset), tl.exp(passed), 0.0), 1.0)
        w, exists = _memory(d_final, sequence, head, column, value, final_b, final_h, final_t, K, V)
        dw += tl.load(w, mask=exists, other=0.0) * share
    if d_initial is not None:
        w, exists = _memory(d_initial, sequence, head, column, value, heads * K * V, K * V, V, K, V)
        tl.store(w, dw, mask=exists)
    if total is not None:
        w, exists = _memory(initial, sequence, head, column, value, initial_b, initial_h, initial_t, K, V)
        product = tl.sum(tl.sum(tl.load(w, mask=exists, other=0.0) * dw, 1), 0)
        tl.store(total + (sequence * heads + head) * TILES + tile, product)


HELD, LEFT, START = Kernel(_held), Kernel(_left), Kernel(_start)
