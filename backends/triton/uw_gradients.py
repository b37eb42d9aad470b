"""The kernels of uw_transform's backward: dk, dv, dbeta and dg of a chunk from du and dw in one launch (SPEC.md 10).

`uw_back`: a chunk of at most BLOCK tokens, a program per q/k head that loops over its v heads. Only R = T^T is needed, the inverse of I + L^T, and
L^T comes from the symmetric K K^T: nothing is transposed for a product. With P = du V^T and Q = dw K^T, D = stril(P diag(b) + Q diag(b e^G)) is the
gradient of T; exact: dA = stril(R D R), so that u and w are not computed again; rowsum(dX V) and rowsum(dZ K) are the column sums of T P and T Q.
R is rounded `evenly`: where tokens are alike, D R is what is left of sums over R that nearly cancel.
Per program and v head it moves BLOCK (3 V + K) elements, and 2 BLOCK K a q/k head, and computes BLOCK^2 (2 V + 3 K) + (2/3 + 2) BLOCK^3 multiply-adds.
`uw_back_scaled`: transform="none", a chunk of any length in blocks, the last one first. Sums over v heads are made in the output where it is float32
and in a float32 scratch where not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.uw_transform import UWTransform
from titans_backends.machine import Machine
from titans_backends.signature import Signature

from .decay import between, running_log
from .grid import on_device, slot_count, strides, unit_stride
from .inverse import unit_lower_inverse
from .launch import Kernel
from .rounding import evenly
from .rounding import operand as as_operand
from .serving import CONSUMER_SHARED_BYTES, dots, tile_width
from .uw_blocks import _lower, _upper, chunk_of, load_tile, load_vector, store_tile

__all__ = ["backward_candidates", "run_backward", "transformed_gradients"]

_SOURCES = tuple(f"titans_backends.backends.triton.{name}" for name in ("uw_gradients", "uw_blocks", "decay", "inverse", "grid", "launch"))
_WIDEST_BLOCK = 128
_SCALED_BYTES = 8192
"""Shared memory of a program without a transform, at most: sums of rows and running sums."""
_LONGEST = 2**30
"""As the forward's: the kernels count tokens in 32 bits, and add a chunk to them."""


@triton.jit
def _turned_triangle(
    gram, beta, coarse, fine,
    DECAYED: tl.constexpr, OPERAND: tl.constexpr, BLOCK: tl.constexpr, LAM: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """T^T `[BLOCK, BLOCK]` in float32: `uw_blocks.block_triangle`, computed above the diagonal from the start."""
    SPLIT: tl.constexpr = OPERAND.primitive_bitwidth == 32
    upper = _upper(gram, beta, coarse, fine, DECAYED, False, BLOCK, SPLIT)
    if LAM:
        row = tl.arange(0, BLOCK)
        lower = _lower(gram, beta, coarse, fine, DECAYED, BLOCK, SPLIT)
        square = tl.dot(as_operand(lower, OPERAND, DOT), as_operand(upper, OPERAND, DOT), input_precision=DOT)
        turned = tl.where(row[:, None] == row[None, :], 1.0, 0.0) - upper + tl.where(row[:, None] < row[None, :], square, 0.0)
    else:
        turned = unit_lower_inverse(upper, BLOCK, OPERAND, DOT)
        if BLOCK > 64:  # two diagonal blocks are inverted; with N the rest above them: X - X N X
            MERGE: tl.constexpr = tl.float16 if OPERAND == tl.bfloat16 else tl.float32
            PRECISION: tl.constexpr = "tf32x3" if OPERAND == tl.float16 else DOT
            half = tl.arange(0, BLOCK) // 64
            corner = tl.where(half[:, None] < half[None, :], upper, 0.0)
            blocks = as_operand(turned, MERGE, PRECISION)
            product = tl.dot(blocks, as_operand(corner, MERGE, PRECISION), input_precision=PRECISION)
            turned -= tl.dot(as_operand(product, MERGE, PRECISION), blocks, input_precision=PRECISION)
    return turned


@triton.jit
def _mirrored(lower, room, below, BLOCK: tl.constexpr):
    """A strictly lower block and its transpose above it; the transpose through memory where there is room for a block."""
    if room is None:
        turned = tl.trans(lower)
    else:
        line = tl.arange(0, BLOCK)
        tl.debug_barrier()
        tl.store(room + line[:, None] * BLOCK + line[None, :], lower)
        tl.debug_barrier()
        turned = tl.load(room + line[None, :] * BLOCK + line[:, None])
    return tl.where(below, lower, turned)


@triton.jit
def _uw_back(
    k, v, beta, g, du, dw, dk, dv, dbeta, dg, wide, room, cu_seqlens, tokens, sequences, offset,
    k_b, k_t, k_h, v_b, v_t, v_h, beta_b, beta_t, beta_h, g_b, g_t, g_h, du_b, du_t, du_h, dw_b, dw_t, dw_h,
    HEADS: tl.constexpr, GROUP: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, LAM: tl.constexpr, DOT: tl.constexpr,
    SHIFTED: tl.constexpr,
):  # fmt: skip
    """The gradients of one chunk of one q/k head and its v heads. Blocks: slots * HEADS // GROUP. BLOCK_K < KEYS: float32 only."""
    OPERAND: tl.constexpr = k.dtype.element_ty
    INNER: tl.constexpr = tl.float32 if OPERAND == tl.float16 else OPERAND  # products of gradients may leave float16's range
    DECAYED: tl.constexpr = g is not None
    SPLIT: tl.constexpr = k.dtype.element_ty == tl.float32
    THROUGH: tl.constexpr = dk is not None or dbeta is not None or dg is not None
    KEPT: tl.constexpr = BLOCK_K >= KEYS and (GROUP == 1 or not SPLIT)  # float32: six tiles in shared memory
    slot = tl.program_id(0) // (HEADS // GROUP)
    key_head = tl.program_id(0) % (HEADS // GROUP)
    row, first, low, stop = chunk_of(cu_seqlens, slot, tokens, sequences, offset, CHUNK)
    if first >= stop:
        return
    height = stop - first
    absent = low - first
    row = tl.cast(row, tl.int64)
    first = tl.cast(first, tl.int64)
    line = tl.arange(0, BLOCK)
    ok = line < height
    if SHIFTED:
        ok = ok & (line >= absent)
    token = row * tokens + first
    key_t = HEADS // GROUP * KEYS
    nothing = tl.program_id(1)  # 0, but the compiler does not know: what is computed with it is computed again and not kept in registers
    k += row * k_b + first * k_t + key_head * k_h
    keys = load_tile(k, line, ok, k_t, 0, KEYS, BLOCK_K)
    v += row * v_b + first * v_t
    beta += row * beta_b + first * beta_t
    if DECAYED:
        g += row * g_b + first * g_t
    if du is not None:
        du += row * du_b + first * du_t
    if dw is not None:
        dw += row * dw_b + first * dw_t
    if dk is not None:
        dk += (token * (HEADS // GROUP) + key_head) * KEYS
        if GROUP > 1:
            wide += (token * (HEADS // GROUP) + key_head) * KEYS
    if room is not None:
        room += tl.cast(tl.program_id(0), tl.int64) * (BLOCK * BLOCK)
    for member in tl.range(0, GROUP, disable_licm=True):
        head = key_head * GROUP + member
        rows = line + (nothing & member)
        below = rows[:, None] > rows[None, :]
        real = rows < height
        if SHIFTED:
            real = real & (rows >= absent)
        b = load_vector(beta + head * beta_h, rows, real, beta_t)
        coarse = b
        fine = b
        if DECAYED:
            coarse, fine, _, _ = running_log(load_vector(g + head * g_h, rows, real, g_t), SPLIT)
        gram = tl.zeros([BLOCK, BLOCK], tl.float32)
        for part in tl.static_range(0, KEYS, BLOCK_K):
            if not KEPT:
                keys = load_tile(k, rows, real, k_t, part, KEYS, BLOCK_K)
            gram = tl.dot(keys, tl.trans(keys), gram, input_precision=DOT)
        turned = gram
        if nothing == 0:
            turned = _turned_triangle(gram, b, coarse, fine, DECAYED, OPERAND, BLOCK, LAM, DOT)
        right = as_operand(turned, OPERAND, DOT) if SPLIT else evenly(turned, OPERAND, BLOCK)
        into = tl.zeros([BLOCK, BLOCK], tl.float32)
        if THROUGH:
            reach = b
            if DECAYED:
                reach = b * tl.exp(coarse + fine)
            scaled = as_operand(turned * reach[:, None], OPERAND, DOT)
            if dw is not None:
                for part in tl.static_range(0, KEYS, BLOCK_K):
                    d_w = load_tile(dw + head * dw_h, rows, real, dw_t, part, KEYS, BLOCK_K)
                    if not KEPT:
                        keys = load_tile(k, rows, real, k_t, part, KEYS, BLOCK_K)
                    into = tl.dot(d_w, tl.trans(keys), into, input_precision=DOT)
            if dg is not None:
                log = tl.sum(tl.trans(scaled).to(tl.float32) * into, 0)
            if DECAYED:
                into *= tl.exp(coarse + fine)[None, :]
        for part in tl.range(0, VALUES, BLOCK_V, disable_licm=True):
            if du is not None:
                d_u = load_tile(du + head * du_h, rows, real, du_t, part, VALUES, BLOCK_V)
                if dv is not None:
                    d_x = tl.dot(right, d_u, input_precision=DOT) * b[:, None]
                    store_tile(dv + (token * HEADS + head) * VALUES, rows, real, HEADS * VALUES, part, d_x, VALUES, BLOCK_V)
                if THROUGH:
                    values = load_tile(v + head * v_h, rows, real, v_t, part, VALUES, BLOCK_V)
                    into = tl.dot(d_u, tl.trans(values), into, input_precision=DOT)
            elif dv is not None:
                d_x = tl.zeros([BLOCK, BLOCK_V], tl.float32)
                store_tile(dv + (token * HEADS + head) * VALUES, rows, real, HEADS * VALUES, part, d_x, VALUES, BLOCK_V)
        if THROUGH:
            if dbeta is not None:
                rate = tl.sum(tl.trans(right).to(tl.float32) * into, 0)
            d_t = tl.where(below, into * b[None, :], 0.0)
            if not LAM:
                inner = as_operand(right, INNER, DOT)
                half = tl.dot(as_operand(d_t, INNER, DOT), inner, input_precision=DOT)
                d_t = tl.dot(inner, as_operand(half, INNER, DOT), input_precision=DOT)
            gram = tl.zeros([BLOCK, BLOCK], tl.float32) + nothing.to(tl.float32)
            for part in tl.static_range(0, KEYS, BLOCK_K):
                if not KEPT:
                    keys = load_tile(k, rows, real, k_t, part, KEYS, BLOCK_K)
                gram = tl.dot(keys, tl.trans(keys), gram, input_precision=DOT)
            coarse += nothing.to(tl.float32)
            if LAM:
                both = _mirrored(as_operand(d_t, INNER, DOT), room, below, BLOCK)
                lower = as_operand(_lower(gram, b, coarse, fine, DECAYED, BLOCK, SPLIT), INNER, DOT)
                d_lower = tl.where(below, tl.dot(both, lower, -d_t, input_precision=DOT), 0.0)
            else:
                d_lower = tl.where(below, -d_t, 0.0)
            if DECAYED:
                d_lower *= between(coarse, fine, below, SPLIT)
            d_gram = d_lower * b[:, None]
            if dbeta is not None:
                rate += tl.sum(d_lower * gram, 1)
                tl.store(dbeta + (token + rows) * HEADS + head, rate.to(dbeta.dtype.element_ty), mask=real)
            if dg is not None:
                h = d_gram * gram
                log += tl.sum(h, 1) - tl.sum(h, 0)
                tl.store(dg + (token + rows) * HEADS + head, tl.cumsum(log, 0, reverse=True).to(dg.dtype.element_ty), mask=real)
            if dk is not None:
                pairs = _mirrored(as_operand(d_gram, INNER, DOT), room, below, BLOCK)
                for part in tl.static_range(0, KEYS, BLOCK_K):
                    d_key = tl.zeros([BLOCK, BLOCK_K], tl.float32)
                    if dw is not None:
                        if not KEPT:
                            d_w = load_tile(dw + head * dw_h, rows, real, dw_t, part, KEYS, BLOCK_K)
                        d_key = tl.dot(right, d_w, input_precision=DOT) * reach[:, None]
                    if not KEPT:
                        keys = load_tile(k, rows, real, k_t, part, KEYS, BLOCK_K)
                    d_key = tl.dot(pairs, keys.to(INNER), d_key, input_precision=DOT)
                    if GROUP > 1:
                        d_key += load_tile(wide, rows, real & (member > 0), key_t, part, KEYS, BLOCK_K)
                        tl.debug_barrier()
                        store_tile(wide, rows, real & (member < GROUP - 1), key_t, part, d_key, KEYS, BLOCK_K)
                    store_tile(dk, rows, real & (member == GROUP - 1), key_t, part, d_key, KEYS, BLOCK_K)
        if GROUP > 1 and dk is not None:
            tl.debug_barrier()


@triton.jit
def _uw_back_scaled(
    k, v, beta, g, du, dw, dk, dv, dbeta, dg, wide, cu_seqlens, tokens, sequences, offset,
    k_b, k_t, k_h, v_b, v_t, v_h, beta_b, beta_t, beta_h, g_b, g_t, g_h, du_b, du_t, du_h, dw_b, dw_t, dw_h,
    HEADS: tl.constexpr, GROUP: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The same for u = b V, w = b e^G K. `wide`: float32, in dk's shape, where a group's dk is summed; it may be dk itself."""
    DECAYED: tl.constexpr = g is not None
    slot = tl.program_id(0) // (HEADS // GROUP)
    key_head = tl.program_id(0) % (HEADS // GROUP)
    row, first, low, stop = chunk_of(cu_seqlens, slot, tokens, sequences, offset, CHUNK)
    if first >= stop:
        return
    row = tl.cast(row, tl.int64)
    first = tl.cast(first, tl.int64)
    line = tl.arange(0, BLOCK)
    token = row * tokens + first
    count = tl.cdiv(tl.cast(stop - first, tl.int32), BLOCK)
    key_t = HEADS // GROUP * KEYS
    k += row * k_b + first * k_t + key_head * k_h
    v += row * v_b + first * v_t
    beta += row * beta_b + first * beta_t
    if DECAYED:
        g += row * g_b + first * g_t
    if du is not None:
        du += row * du_b + first * du_t
    if dw is not None:
        dw += row * dw_b + first * dw_t
    for member in tl.range(0, GROUP, disable_licm=True):
        head = key_head * GROUP + member
        passed = 0.0
        passed_fine = 0.0
        later = 0.0
        if DECAYED:
            for step in tl.range(0, count, disable_licm=True):
                at = tl.cast(step * BLOCK, tl.int64)
                ok = (line < stop - first - at) & (line >= low - first - at)
                _, _, total, total_fine = running_log(load_vector(g + head * g_h + at * g_t, line, ok, g_t), True)
                passed += total
                passed_fine += total_fine
        for step in tl.range(0, count, disable_licm=True):
            at = tl.cast((count - 1 - step) * BLOCK, tl.int64)
            ok = (line < stop - first - at) & (line >= low - first - at)
            b = load_vector(beta + head * beta_h + at * beta_t, line, ok, beta_t)
            decay = tl.zeros([BLOCK], tl.float32) + 1.0
            if DECAYED:
                coarse, fine, total, total_fine = running_log(load_vector(g + head * g_h + at * g_t, line, ok, g_t), True)
                passed -= total
                passed_fine -= total_fine
                decay = tl.exp((coarse + passed) + (fine + passed_fine))
            rate = tl.zeros([BLOCK], tl.float32)
            met = tl.zeros([BLOCK], tl.float32)
            for part in tl.static_range(0, VALUES, BLOCK_V):
                d_x = tl.zeros([BLOCK, BLOCK_V], tl.float32)
                if du is not None:
                    d_x = load_tile(du + head * du_h + at * du_t, line, ok, du_t, part, VALUES, BLOCK_V).to(tl.float32)
                    if dbeta is not None:
                        rate += tl.sum(d_x * load_tile(v + head * v_h + at * v_t, line, ok, v_t, part, VALUES, BLOCK_V), 1)
                if dv is not None:
                    out = dv + ((token + at) * HEADS + head) * VALUES
                    store_tile(out, line, ok, HEADS * VALUES, part, d_x * b[:, None], VALUES, BLOCK_V)
            for part in tl.static_range(0, KEYS, BLOCK_K):
                d_z = tl.zeros([BLOCK, BLOCK_K], tl.float32)
                if dw is not None:
                    d_z = load_tile(dw + head * dw_h + at * dw_t, line, ok, dw_t, part, KEYS, BLOCK_K).to(tl.float32)
                    if dbeta is not None or dg is not None:
                        met += tl.sum(d_z * load_tile(k + at * k_t, line, ok, k_t, part, KEYS, BLOCK_K), 1)
                if dk is not None:
                    d_z *= (b * decay)[:, None]
                    place = ((token + at) * (HEADS // GROUP) + key_head) * KEYS
                    if GROUP > 1:
                        d_z += load_tile(wide + place, line, ok & (member > 0), key_t, part, KEYS, BLOCK_K)
                        store_tile(wide + place, line, ok & (member < GROUP - 1), key_t, part, d_z, KEYS, BLOCK_K)
                    store_tile(dk + place, line, ok & (member == GROUP - 1), key_t, part, d_z, KEYS, BLOCK_K)
            if dbeta is not None:
                rate += decay * met
                tl.store(dbeta + (token + at + line) * HEADS + head, rate.to(dbeta.dtype.element_ty), mask=ok)
            if dg is not None:
                log = b * decay * met
                tl.store(dg + (token + at + line) * HEADS + head, (tl.cumsum(log, 0, reverse=True) + later).to(dg.dtype.element_ty), mask=ok)
                later += tl.sum(log, 0)
        tl.debug_barrier()


UW_BACK = Kernel(_uw_back)
UW_BACK_SCALED = Kernel(_uw_back_scaled)


def backward_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """Tiles that fit the card, the first is the default; none with a transform for chunks of more than 128 tokens (float32: 64)."""
    chunk = signature.option("chunk_size")
    assert isinstance(chunk, int)
    if not signature.batch_invariant:
        chunk = min(chunk, max(signature.dim("T"), 1))
    if signature.option("transform") == "none":
        return [_candidate("scaled", block=block, warps=4, stages=1) for block in (64, 32, 16) if block < 2 * max(chunk, 16)]
    if chunk > (_WIDEST_BLOCK if signature.dtype.itemsize == 2 else 64):
        return []
    room = machine.shared_memory_bytes or CONSUMER_SHARED_BYTES
    return [way for way in _blocks(signature, tile_width(chunk)) if shared_bytes(signature, way, machine) <= room]


def _candidate(variant: str, **params: int | str) -> Candidate:
    return Candidate("triton", variant, tuple(params.items()), direction="backward", sources=_SOURCES)


def _blocks(signature: Signature, block: int) -> list[Candidate]:
    """Tiles of keys and of values, warps, registers, where a block is transposed. No product of 64 rows is narrower than 64 columns in 16 bits."""
    narrow = signature.dtype.itemsize == 2
    keys, values = (tile_width(signature.dim(letter)) for letter in "KV")
    grouped = signature.dim("H") > signature.dim("G")
    if not narrow:
        ways = [(32, 32, 4, 0, "chip"), (64, 64, 4, 0, "chip")]
    elif block == 128:
        ways = [(128, 64, 8, 0, "chip"), (64, 64, 8, 0, "chip"), (128, 64, 8, 0, "memory")]
    elif block == 64:
        least = 64 if grouped and keys > 128 else 128
        ways = [
            (least, 64, 4, 0, "chip"),
            (least, 128, 4, 0, "chip"),
            (64, 64, 4, 0, "chip"),
            (least, 64, 4, 168, "chip"),
            (least, 64, 4, 0, "memory"),
        ]
        if max(keys, values) <= 32 and not grouped:  # wider ones spill hundreds of bytes, grouped ones thousands
            ways.append((64, 64, 2, 0, "chip"))
    else:
        usual = 4 if block == 32 and max(keys, values) > 32 else 2
        ways = [(128, 64, usual, 0, "chip"), (64, 64, usual, 0, "chip"), (128, 128, usual, 0, "chip"), (128, 64, usual // 2, 0, "chip")]
    found: dict[Candidate, None] = {}
    for dot in dots(signature):
        for key_tile, value_tile, warps, registers, turn in ways:
            floor = 32 if not narrow else 64 if block >= 64 and warps >= 4 else 16  # float32: with 16 Triton 3.6.0's LLVM mixes up two lanes' places
            tiles = {"keys": max(min(key_tile, keys), floor), "columns": max(min(value_tile, values), floor)}
            if not (dot == "ieee" and block == 64):  # its products take minutes to compile and thousands of registers
                found[_candidate("block", block=block, **tiles, warps=warps, stages=1, dot=dot, registers=registers, turn=turn)] = None
    return list(found)


def shared_bytes(signature: Signature, candidate: Candidate, machine: Machine) -> int:
    """An upper bound of a program's shared memory, fitted to what Triton 3.6.0 and 3.7.1 take: tiles and squares, here in rows of a block's height.

    Products of Hopper and after read operands from shared memory: tiles of all keys where they do not fit one. Elsewhere operands only pass through.
    """
    p = dict(candidate.params)
    if candidate.variant == "scaled":
        return _SCALED_BYTES
    block, key_tile, columns = int(p["block"]), int(p["keys"]), int(p["columns"])
    whole, keys = key_tile >= signature.dim("K"), max(key_tile, tile_width(signature.dim("K")))
    exact, grouped, split = signature.option("transform") != "lam", signature.dim("H") > signature.dim("G"), p["dot"] == "tf32x3"
    sm, narrow = machine.sm or 0, signature.dtype.itemsize == 2
    hopper = sm // 10 in (9, 10, 11) and block >= 64 and int(p["warps"]) >= 4
    if hopper and narrow:
        row = exact * block + (2 * key_tile if whole else keys) + 2 * columns
    elif hopper and split:
        row = (4 if exact else 2) * block + 2 * keys
    elif hopper:
        row = (4 if exact else 3) * block // 2 + keys + whole * 5 * key_tile // 2
    elif narrow and whole:
        row = max(block + 2 * key_tile + 2 * columns, 9 * block // 4) + (exact and grouped) * 4 * block
    elif narrow:
        row = block + 2 * key_tile + max(columns, 64) + (grouped and not exact) * 3 * block // 2
    elif split:
        row = (3 if exact else 1) * block + whole * (key_tile + grouped * block) + 3 * columns
    else:
        row = (11 if grouped and whole else 5) * block // 4 + (2 * key_tile if whole else keys // 4) + 2 * columns
    return row * block * signature.dtype.itemsize + (1024 if hopper and sm >= 100 else 0)  # barriers


def run_backward(
    call: UWTransform, grads: tuple[Tensor | None, ...], states: Tensor | None, needs: frozenset[str], candidate: Candidate
) -> tuple[Tensor | None, ...]:
    """Gradients of k, v, beta and g, in that order."""
    return transformed_gradients(call, grads, needs, candidate)


def transformed_gradients(
    call: UWTransform, grads: tuple[Tensor | None, ...], needs: frozenset[str], candidate: Candidate, chunk_offset: int = 0
) -> tuple[Tensor | None, ...]:
    """The same; with `chunk_offset` the first chunk of every sequence is that many tokens shorter (transform exact or lam)."""
    k, v, beta, g = unit_stride(call.k), unit_stride(call.v), call.beta, call.g
    du, dw = (None if grad is None else unit_stride(grad) for grad in grads)
    given = {"k": k, "v": v, "beta": beta, "g": g}
    made = {name: torch.empty(x.shape, dtype=x.dtype, device=x.device) for name, x in given.items() if name in needs and x is not None}
    (batch, tokens, heads, values), groups, keys = v.shape, k.shape[2], k.shape[3]
    cu_seqlens = on_device(call.cu_seqlens, v)
    blocks = slot_count(batch, tokens, call.chunk_size, cu_seqlens, chunk_offset) * groups
    if not blocks or not made:
        return tuple(made.get(name) for name in given)
    p = dict(candidate.params)
    block, warps, stages = int(p["block"]), int(p["warps"]), int(p["stages"])
    summed, wide = "k" in made and heads != groups, None
    if summed:
        wide = made["k"] if k.dtype == torch.float32 else torch.empty(k.shape, dtype=torch.float32, device=k.device)
    outputs = (*(made.get(name) for name in given), wide)
    sizes = (cu_seqlens, tokens, 0 if cu_seqlens is None else cu_seqlens.numel() - 1, chunk_offset)
    steps = tuple(step for x in (k, v, beta, g, du, dw) for step in strides(x))
    shape = (heads, heads // groups, keys, values, min(call.chunk_size, _LONGEST), block)
    if candidate.variant == "scaled":
        tiles = (min(tile_width(keys), 128), min(tile_width(values), 128))
        UW_BACK_SCALED(blocks, (k, v, beta, g, du, dw, *outputs, *sizes, *steps), (*shape, *tiles), warps, stages)
    else:
        room = None
        if p["turn"] == "memory":
            room = torch.empty(blocks * block * block, dtype=torch.float32 if k.dtype == torch.float16 else k.dtype, device=k.device)
        constants = (*shape, int(p["keys"]), int(p["columns"]), call.transform == "lam", p["dot"], chunk_offset > 0)
        UW_BACK(blocks, (k, v, beta, g, du, dw, *outputs, room, *sizes, *steps), constants, warps, stages, int(p["registers"]))
    return tuple(made.get(name) for name in given)
