"""The scan of slow_core: S `[K, BLOCK_V]` in registers for a whole sequence, block after block (SPEC.md 4); with S_fast beside it for dual_core.

One program per sequence, v head and value tile. A block of R rows moves R (3 K + 2 V) elements a v head from device memory (q, k and w of
the other value tiles come from L2) and computes 2 R (R (K + BLOCK_V) + 3 K BLOCK_V) FLOP a program, serially: latency limits it.
What does not depend on S stands first in a block; full blocks have no row masks; without g there are no exponentials.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decay import between, running_log
from .grid import chunks_before, locate, on_device, slot_count, unit_stride
from .launch import Kernel
from .serving import tile_width

__all__ = ["Tiling", "denormalized", "normalized", "shared_bytes", "slow_scan"]

_ONE_CHUNK = 2**30


@triton.jit
def _rows(base, line, stride, ok, start, WIDTH: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr):
    """Columns start to start + TILE of a block's rows; only what may not exist is masked."""
    columns = start + tl.arange(0, TILE)
    at = base + line[:, None] * stride + columns[None, :]
    if MASKED:
        keep = ok[:, None]
        if WIDTH % TILE != 0:
            keep = keep & (columns[None, :] < WIDTH)
        rows = tl.load(at, mask=keep, other=0.0)
    elif WIDTH % TILE != 0:
        rows = tl.load(at, mask=columns[None, :] < WIDTH, other=0.0)
    else:
        rows = tl.load(at)
    return rows


@triton.jit
def _numbers(base, line, stride, ok, MASKED: tl.constexpr):
    """One number a row, in float32."""
    numbers = tl.load(base + line * stride, mask=ok, other=0.0) if MASKED else tl.load(base + line * stride)
    return numbers.to(tl.float32)


@triton.jit
def _block(
    state, begun, fast, norm, passed, block, length, offset, scale, column,
    q, k, u, w, g, logs, rests, chunk_decay, gate, v, beta, fast_gate, o,
    q_t, k_t, u_t, w_t, g_t, decay_t, gate_t, v_t, beta_t, fast_t, o_t,
    KEYS: tl.constexpr, VALUES: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    NORMALIZE: tl.constexpr, KEEP_FAST: tl.constexpr, SHIFTED: tl.constexpr, DOT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of rows: writes o and returns what is carried: S, S at the chunk's start, W, ||S|| there, and the log decay since.

    Tokens are counted from `offset` tokens before the sequence, where the pointers stand. `begun` is S_r in the operands' dtype (in
    float32 with NORMALIZE) and unused where a chunk is one block.
    """
    OPERAND: tl.constexpr = k.dtype.element_ty
    PER: tl.constexpr = (CHUNK + BLOCK - 1) // BLOCK
    DECAYED: tl.constexpr = g is not None or logs is not None
    SPLIT: tl.constexpr = k.dtype.element_ty == tl.float32
    line = tl.arange(0, BLOCK)
    if PER * BLOCK == CHUNK:
        first = block * BLOCK
        stop = length
    else:
        first = block // PER * CHUNK + block % PER * BLOCK
        stop = block // PER * CHUNK + tl.minimum(length - block // PER * CHUNK, CHUNK)
    ok = line < stop - first
    if SHIFTED:
        ok = ok & (line >= offset - first)
    at = first.to(tl.int64)
    keys = _rows(k + at * k_t, line, k_t, ok, 0, KEYS, BLOCK_K, MASKED)
    queries = _rows(q + at * q_t, line, q_t, ok, 0, KEYS, BLOCK_K, MASKED)
    update = _rows(u + at * u_t, line, u_t, ok, column, VALUES, BLOCK_V, MASKED)
    if w is not None:
        erase = _rows(w + at * w_t, line, w_t, ok, 0, KEYS, BLOCK_K, MASKED)
    scores = tl.dot(queries, tl.trans(keys), input_precision=DOT)
    causal = line[:, None] >= line[None, :]
    if DECAYED:
        if logs is not None:
            there = line
            last = BLOCK - 1
            if MASKED:
                there = tl.minimum(line, tl.minimum(stop - first, BLOCK) - 1)
                last = tl.minimum(stop - first, BLOCK) - 1
                if SHIFTED:
                    there = tl.maximum(there, tl.maximum(offset - first, 0))
            coarse = tl.load(logs + at + there)
            total = tl.load(logs + at + last)
            log = coarse
            fine = coarse
            left = total - coarse
            if SPLIT:
                fine = tl.load(rests + at + there)
                rest = tl.load(rests + at + last)
                log = coarse + fine
                left += rest - fine
                total += rest
        else:
            coarse, fine, total, rest = running_log(_numbers(g + at * g_t, line, g_t, ok, MASKED), SPLIT)
            log = coarse
            left = total - coarse
            if SPLIT:
                log = coarse + fine
                left += rest - fine
                total += rest
        mixed = tl.where(causal, scores * between(coarse, fine, causal, SPLIT), 0.0).to(OPERAND)
    else:
        mixed = tl.where(causal, scores, 0.0).to(OPERAND)
    weight = scale
    if gate is not None:
        weight = _numbers(gate + at * gate_t, line, gate_t, ok, MASKED) * scale
    starts = block % PER == 0
    opens = starts | (block == offset // BLOCK) if SHIFTED else starts
    if chunk_decay is not None:
        if PER == 1:
            state *= tl.load(chunk_decay + block * decay_t).to(tl.float32)
        else:
            state *= tl.load(chunk_decay + block // PER * decay_t, mask=starts, other=1.0).to(tl.float32)
    if NORMALIZE:
        square = tl.sum(state * state)
        length_now = tl.sqrt(square) + 1e-8
        unit = tl.where(square > 0.0, state / length_now, 0.0)
        if PER == 1:
            read = unit.to(OPERAND)
            known = read
        else:
            begun = tl.where(opens, unit, begun)
            norm = tl.where(opens, length_now, norm)
            passed = tl.where(opens, 0.0, passed)
            read = (state + begun * (tl.exp(passed) * (1.0 - norm))).to(OPERAND)
            known = begun.to(OPERAND)
            if DECAYED:
                passed += total
    else:
        read = state.to(OPERAND)
        known = read
        if PER > 1:
            begun = tl.where(opens, read, begun)
            known = begun
    corrected = update.to(tl.float32)
    if w is not None:
        corrected -= tl.dot(erase, known, input_precision=DOT)
    written = corrected.to(OPERAND)
    out = tl.dot(queries, read, input_precision=DOT)
    if DECAYED:
        out *= tl.exp(log)[:, None]
        written_late = (corrected * tl.exp(left)[:, None]).to(OPERAND)
        state *= tl.exp(total)
    else:
        written_late = written
    out = tl.dot(mixed, written, out, input_precision=DOT)
    state = tl.dot(tl.trans(keys), written_late, state, input_precision=DOT)
    if gate is not None:
        out *= weight[:, None]
    else:
        out *= weight
    if v is not None:
        strength = _numbers(beta + at * beta_t, line, beta_t, ok, MASKED)
        values = (_rows(v + at * v_t, line, v_t, ok, column, VALUES, BLOCK_V, MASKED) * strength[:, None]).to(OPERAND)
        near = mixed
        if DECAYED:
            near = tl.where(causal, scores, 0.0).to(OPERAND)
        quick = tl.dot(near, values, input_precision=DOT)
        if PER > 1 or SHIFTED:
            fast = tl.where(starts & (first >= offset), 0.0, fast)
            quick = tl.dot(queries, fast.to(OPERAND), quick, input_precision=DOT)
            fast = tl.dot(tl.trans(keys), values, fast, input_precision=DOT)
        elif KEEP_FAST:
            fast = tl.dot(tl.trans(keys), values, input_precision=DOT)
        if fast_gate is not None:
            out += quick * (_numbers(fast_gate + at * fast_t, line, fast_t, ok, MASKED) * scale)[:, None]
        else:
            out += quick * scale
    columns = column + tl.arange(0, BLOCK_V)
    target = o + at * o_t + line[:, None] * o_t + columns[None, :]
    shown = out.to(o.dtype.element_ty)
    if MASKED:
        tl.store(target, shown, mask=ok[:, None] & (columns[None, :] < VALUES))
    elif VALUES % BLOCK_V != 0:
        tl.store(target, shown, mask=columns[None, :] < VALUES)
    else:
        tl.store(target, shown)
    return state, begun, fast, norm, passed


@triton.jit
def _slow_scan(
    q, k, u, w, g, logs, rests, chunk_decay, gate, initial, v, beta, fast_gate, initial_fast, o, final, final_fast, cu_seqlens, tokens, offset, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, u_b, u_t, u_h, w_b, w_t, w_h, g_b, g_t, g_h, decay_b, decay_t, decay_h, gate_b, gate_t, gate_h,
    v_b, v_t, v_h, beta_b, beta_t, beta_h, fast_b, fast_t, fast_h,
    HEADS: tl.constexpr, GROUP: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, NORMALIZE: tl.constexpr, SHIFTED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Blocks: sequences * HEADS * ceil(V / BLOCK_V), value tiles of a head side by side."""
    TILES: tl.constexpr = (VALUES + BLOCK_V - 1) // BLOCK_V
    PER: tl.constexpr = (CHUNK + BLOCK - 1) // BLOCK
    KEEP_FAST: tl.constexpr = final_fast is not None
    column = tl.program_id(0) % TILES * BLOCK_V
    head = tl.program_id(0) // TILES % HEADS
    sequence = tl.program_id(0) // TILES // HEADS
    if cu_seqlens is None:
        row = sequence.to(tl.int64)
        begin = sequence * 0
        length = tokens + offset
        chunks = begin
    else:
        row = (sequence * 0).to(tl.int64)
        begin = tl.load(cu_seqlens + sequence).to(tl.int32)
        length = tl.load(cu_seqlens + sequence + 1).to(tl.int32) - begin + offset
        chunks = begin
        if chunk_decay is not None:
            chunks = chunks_before(cu_seqlens, sequence, CHUNK)
    start = (begin - offset).to(tl.int64)
    o_t = HEADS * VALUES
    q += row * q_b + start * q_t + (head // GROUP) * q_h
    k += row * k_b + start * k_t + (head // GROUP) * k_h
    u += row * u_b + start * u_t + head * u_h
    o += (row * tokens + start) * o_t + head * VALUES
    if w is not None:
        w += row * w_b + start * w_t + head * w_h
    if g is not None:
        g += row * g_b + start * g_t + head * g_h
    if logs is not None:
        logs += (row * HEADS + head) * tokens + start
    if rests is not None:
        rests += (row * HEADS + head) * tokens + start
    if chunk_decay is not None:
        chunk_decay += row * decay_b + chunks.to(tl.int64) * decay_t + head * decay_h
    if gate is not None:
        gate += row * gate_b + start * gate_t + head * gate_h
    if v is not None:
        v += row * v_b + start * v_t + head * v_h
        beta += row * beta_b + start * beta_t + head * beta_h
    if fast_gate is not None:
        fast_gate += row * fast_b + start * fast_t + head * fast_h

    key = tl.arange(0, BLOCK_K)[:, None]
    value = column + tl.arange(0, BLOCK_V)[None, :]
    cell = (sequence.to(tl.int64) * HEADS + head) * (KEYS * VALUES) + key * VALUES + value
    exists = (key < KEYS) & (value < VALUES)
    state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if initial is not None:
        state = tl.load(initial + cell, mask=exists, other=0.0).to(tl.float32)
    begun = 0.0
    if PER > 1:
        begun = tl.zeros([BLOCK_K, BLOCK_V], tl.float32 if NORMALIZE else k.dtype.element_ty)
    fast = 0.0
    if v is not None and (PER > 1 or SHIFTED or KEEP_FAST):
        fast = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
        if initial_fast is not None:
            fast = tl.load(initial_fast + cell, mask=exists, other=0.0).to(tl.float32)
    norm = 1.0
    passed = 0.0
    block = offset // BLOCK
    whole = block
    if PER * BLOCK == CHUNK:
        blocks = tl.cdiv(length, BLOCK)
        if SHIFTED:
            blocks = tl.where(length > offset, blocks, 0)
            opening = tl.minimum(tl.where(offset % BLOCK != 0, block + 1, block), blocks)
            for index in tl.range(block, opening, disable_licm=True):
                state, begun, fast, norm, passed = _block(
                    state, begun, fast, norm, passed, index, length, offset, scale, column,
                    q, k, u, w, g, logs, rests, chunk_decay, gate, v, beta, fast_gate, o,
                    q_t, k_t, u_t, w_t, g_t, decay_t, gate_t, v_t, beta_t, fast_t, o_t,
                    KEYS, VALUES, CHUNK, BLOCK, BLOCK_K, BLOCK_V, NORMALIZE, KEEP_FAST, SHIFTED, DOT, True,
                )  # fmt: skip
            block = tl.maximum(opening, block)
        whole = length // BLOCK
        for index in tl.range(block, whole, disable_licm=True):
            state, begun, fast, norm, passed = _block(
                state, begun, fast, norm, passed, index, length, offset, scale, column,
                q, k, u, w, g, logs, rests, chunk_decay, gate, v, beta, fast_gate, o,
                q_t, k_t, u_t, w_t, g_t, decay_t, gate_t, v_t, beta_t, fast_t, o_t,
                KEYS, VALUES, CHUNK, BLOCK, BLOCK_K, BLOCK_V, NORMALIZE, KEEP_FAST, SHIFTED, DOT, False,
            )  # fmt: skip
        whole = tl.maximum(block, whole)
        for index in tl.range(whole, blocks, disable_licm=True):  # at most once; outside a loop Triton 3.6 miscompiles it on Hopper
            state, begun, fast, norm, passed = _block(
                state, begun, fast, norm, passed, index, length, offset, scale, column,
                q, k, u, w, g, logs, rests, chunk_decay, gate, v, beta, fast_gate, o,
                q_t, k_t, u_t, w_t, g_t, decay_t, gate_t, v_t, beta_t, fast_t, o_t,
                KEYS, VALUES, CHUNK, BLOCK, BLOCK_K, BLOCK_V, NORMALIZE, KEEP_FAST, SHIFTED, DOT, True,
            )  # fmt: skip
    else:
        blocks = length // CHUNK * PER + tl.cdiv(length % CHUNK, BLOCK)
        if SHIFTED:
            blocks = tl.where(length > offset, blocks, 0)
        for index in tl.range(block, blocks, disable_licm=True):
            state, begun, fast, norm, passed = _block(
                state, begun, fast, norm, passed, index, length, offset, scale, column,
                q, k, u, w, g, logs, rests, chunk_decay, gate, v, beta, fast_gate, o,
                q_t, k_t, u_t, w_t, g_t, decay_t, gate_t, v_t, beta_t, fast_t, o_t,
                KEYS, VALUES, CHUNK, BLOCK, BLOCK_K, BLOCK_V, NORMALIZE, KEEP_FAST, SHIFTED, DOT, True,
            )  # fmt: skip
    if final is not None:
        tl.store(final + cell, state, mask=exists)
    if KEEP_FAST:
        tl.store(final_fast + cell, fast, mask=exists)


@triton.jit
def _running_logs(
    g, logs, rests, cu_seqlens, tokens, sequences, offset, g_b, g_t, g_h,
    HEADS: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """G from each block's start `[B, H, T]`, as `running_log` keeps it (rests None: not split). Blocks: slots of UNIT tokens * ceil(H / TILE)."""
    PARTS: tl.constexpr = (HEADS + TILE - 1) // TILE
    row, _, _, first, low, end = locate(cu_seqlens, tl.program_id(0) // PARTS, tokens, sequences, offset, UNIT)
    head = tl.program_id(0) % PARTS * TILE + tl.arange(0, TILE)
    line = tl.arange(0, BLOCK)
    g += row.to(tl.int64) * g_b + head[None, :] * g_h
    to = row.to(tl.int64) * HEADS * tokens + head[None, :].to(tl.int64) * tokens
    stop = first + tl.minimum(end - first, UNIT)
    for start in range(first, stop, BLOCK):
        token = start + line
        ok = ((token >= low) & (token < stop))[:, None] & (head < HEADS)[None, :]
        step = tl.load(g + token.to(tl.int64)[:, None] * g_t, mask=ok, other=0.0).to(tl.float32)
        coarse, fine, _last, _rest = running_log(step, rests is not None)
        tl.store(logs + to + token[:, None], coarse, mask=ok)
        if rests is not None:
            tl.store(rests + to + token[:, None], fine, mask=ok)


@triton.jit
def _normalize(state, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Divides one matrix of SIZE numbers by its Frobenius norm + 1e-8, in place; zeros stay zeros."""
    state += tl.program_id(0).to(tl.int64) * SIZE
    cell = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, SIZE, BLOCK):
        x = tl.load(state + start + cell, mask=cell < SIZE - start, other=0.0)
        squares += x * x
    factor = 1.0 / (tl.sqrt(tl.sum(squares, 0)) + 1e-8)
    for start in range(0, SIZE, BLOCK):
        x = tl.load(state + start + cell, mask=cell < SIZE - start, other=0.0)
        tl.store(state + start + cell, x * factor, mask=cell < SIZE - start)


@triton.jit
def _denormalize(state, grad, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Writes over one matrix its gradient, from that of the same matrix divided by its Frobenius norm + 1e-8; 0 where the matrix is 0."""
    state += tl.program_id(0).to(tl.int64) * SIZE
    grad += tl.program_id(0).to(tl.int64) * SIZE
    cell = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float32)
    inner = tl.zeros([BLOCK], tl.float32)
    for start in range(0, SIZE, BLOCK):
        x = tl.load(state + start + cell, mask=cell < SIZE - start, other=0.0)
        squares += x * x
        inner += x * tl.load(grad + start + cell, mask=cell < SIZE - start, other=0.0)
    norm = tl.sqrt(tl.sum(squares, 0))
    factor = tl.where(norm > 0, 1.0 / (norm + 1e-8), 0.0)
    along = tl.where(norm > 0, tl.sum(inner, 0) / tl.where(norm > 0, norm, 1.0) * factor * factor, 0.0)
    for start in range(0, SIZE, BLOCK):
        x = tl.load(state + start + cell, mask=cell < SIZE - start, other=0.0)
        dx = tl.load(grad + start + cell, mask=cell < SIZE - start, other=0.0)
        tl.store(state + start + cell, dx * factor - x * along, mask=cell < SIZE - start)


SLOW_SCAN = Kernel(_slow_scan)
RUNNING_LOGS = Kernel(_running_logs)
NORMALIZE = Kernel(_normalize)
DENORMALIZE = Kernel(_denormalize)


@dataclass(frozen=True, slots=True)
class Tiling:
    """How the scan is cut: rows of a block, columns of a value tile, warps, stages, the rounding of float32 products.

    `prepared`: a small kernel before the scan sums g (T H floats through device memory), which shortens the serial loop.
    """

    block: int
    block_v: int
    warps: int
    stages: int
    dot: str
    prepared: bool = False


def shared_bytes(tiling: Tiling, keys: int, chunk: int, width: int, *, fast: bool = False) -> int:
    """An upper bound of a program's shared memory: the pipeline's tiles, and what a block converts.

    `keys`: K's tile width; `width`: bytes of an operand; `fast`: with v. 16-bit and tf32 products of 64 rows
    read the pipeline's buffers, one for each stage; others read registers, and need one less.
    """
    rows, columns = tiling.block, tiling.block_v
    direct = rows >= 64 and (width == 2 or tiling.dot == "tf32")
    tiles = (tiling.stages if direct else tiling.stages - 1) * (3 * rows * keys + (2 if fast else 1) * rows * columns)
    states = (1 + (chunk > rows) + fast) * keys * columns
    converted = states + (3 if fast else 2) * rows * columns
    if width == 4 and not direct:
        converted = max(converted + rows * rows, 2 * rows * keys)
    return (tiles + converted) * width + 64 * rows // 2


def slow_scan(
    q: Tensor,
    k: Tensor,
    u: Tensor,
    w: Tensor | None,
    tiling: Tiling,
    *,
    g: Tensor | None = None,
    chunk_decay: Tensor | None = None,
    gate: Tensor | None = None,
    chunk_size: int = 64,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    normalize_read: bool = False,
    normalize_final: bool = False,
    v: Tensor | None = None,
    beta: Tensor | None = None,
    fast_gate: Tensor | None = None,
    initial_fast_state: Tensor | None = None,
    chunk_offset: int = 0,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """o `[B, T, H, V]` in u's dtype, the final state and the final fast state `[N, H, K, V]` in float32 (None unless asked).

    q, k `[B, T, G, K]`, u `[B, T, H, V]`, w `[B, T, H, K]` (None: no delta correction), g, gate `[B, T, H]`,
    chunk_decay `[B, M, H]`, states `[N, H, K, V]`; options as in slow_core. With v `[B, T, H, V]` and beta `[B, T, H]` S_fast is added:

        o = gate * slow + fast_gate * fast_core(q, k, beta * v, chunk_size, chunk_offset, initial_fast_state)

    so that dual_core passes gate = (1 - alpha) * slow_gate and fast_gate = alpha * fast_gate, both `[B, T, H]` or None (1).
    `chunk_offset` tokens of the first chunk of every sequence are absent: u and w must then come from the same grid
    (`uw_transform.transformed` takes it), without chunk_decay, for a carried S is then S at the split and not at the chunk's start.
    normalize_read needs tiling.block_v >= V.
    """
    batch, tokens, heads, values = u.shape
    keys = k.shape[3]
    if normalize_read and tiling.block_v < values:
        raise ValueError(f"normalize_read needs the whole state in one tile: block_v={tiling.block_v} is below V={values}")
    q, k, u = unit_stride(q), unit_stride(k), unit_stride(u)
    w = None if w is None else unit_stride(w)
    v = None if v is None else unit_stride(v)
    cu_seqlens = on_device(cu_seqlens, u)
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    o = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    shape = (sequences, heads, keys, values)
    final = torch.empty(shape, dtype=torch.float32, device=u.device) if output_final_state else None
    final_fast = torch.empty(shape, dtype=torch.float32, device=u.device) if output_final_state and v is not None else None
    initial = None if initial_state is None else initial_state.contiguous()
    initial_fast = None if initial_fast_state is None else initial_fast_state.contiguous()
    chunk = _ONE_CHUNK if chunk_size > tiling.block and chunk_size >= tokens + chunk_offset else chunk_size
    logs = rests = None
    if g is not None and tiling.prepared:
        logs, rests = _sums_of(g, u.dtype == torch.float32, cu_seqlens, chunk, tiling.block, chunk_offset)
    args = (
        q, k, u, w, None if tiling.prepared else g, logs, rests, chunk_decay, gate, initial, v, beta, fast_gate, initial_fast,
        o, final, final_fast, cu_seqlens, tokens, chunk_offset, float(scale),
        *q.stride()[:3], *k.stride()[:3], *u.stride()[:3], *_strides(w), *_strides(g), *_strides(chunk_decay), *_strides(gate),
        *_strides(v), *_strides(beta), *_strides(fast_gate),
    )  # fmt: skip
    tiles = -(-values // tiling.block_v)
    constants = (
        heads, heads // max(k.shape[2], 1), keys, values, chunk, tiling.block, tile_width(keys), tiling.block_v,
        normalize_read, chunk_offset > 0, tiling.dot,
    )  # fmt: skip
    SLOW_SCAN(sequences * heads * tiles, args, constants, tiling.warps, tiling.stages)
    if normalize_final and final is not None:
        normalized(final)
    return o, final, final_fast


def normalized(final: Tensor) -> None:
    """Divides each state `[..., K, V]` by its Frobenius norm + 1e-8, in place."""
    NORMALIZE(final.shape[0] * final.shape[1], (final,), (final.shape[2] * final.shape[3], 1024), 4, 2)


def denormalized(final: Tensor, grad: Tensor) -> Tensor:
    """The gradient at `final` `[..., K, V]`, written over it, from that of `normalized`; both contiguous, float32."""
    DENORMALIZE(final.shape[0] * final.shape[1], (final, grad), (final.shape[2] * final.shape[3], 1024), 4, 2)
    return final


def _sums_of(g: Tensor, split: bool, cu_seqlens: Tensor | None, chunk: int, block: int, offset: int) -> tuple[Tensor, Tensor | None]:
    batch, tokens, heads = g.shape
    logs = torch.empty((batch, heads, tokens), dtype=torch.float32, device=g.device)
    rests = torch.empty_like(logs) if split else None
    unit, tile = block if chunk % block == 0 else chunk, 16
    sequences = 0 if cu_seqlens is None else cu_seqlens.numel() - 1
    slots = slot_count(batch, tokens, unit, cu_seqlens, offset)
    args = (g, logs, rests, cu_seqlens, tokens, sequences, offset, *g.stride())
    RUNNING_LOGS(slots * -(-heads // tile), args, (heads, unit, block, tile), 4, 2)
    return logs, rests


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else x.stride()[:3]
