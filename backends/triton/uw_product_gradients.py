"""fused_uw's backward, from u = A V and w = A K: dA = du V^T + dw K^T, dV = A^T du, dK = A^T dw for many matrices A of C x C.

    whole, series    C of one block: a program a matrix, or several one after the other whose loads overlap. It reads all five inputs once and writes the
                     three gradients: 2 C^2 + 3 C (V + K) elements for 4 C^2 (V + K) FLOP, at C = 64 and head_dim 128 112 KB for 4.2 MFLOP: 37 FLOP a
                     byte, bound by device memory, so that only enough bytes in flight matter. One launch
    tiles            any C, two launches: a program a square block of dA, which moves 2 BLOCK (V + K) elements and BLOCK^2 for 2 BLOCK^2 (V + K) FLOP; and
                     a program a block of rows of dV and dK and a tile of their columns, which moves C (BLOCK + BLOCK_V + BLOCK_K) elements for
                     2 C BLOCK (BLOCK_V + BLOCK_K) FLOP; in 16 bits toward V + K FLOP a byte for long C, where memory and products are about even

A gradient that nobody needs is neither computed nor read for. Only loaded tiles are turned, never the result of a product. What is rounded to a gradient's
dtype is that gradient, so that float16 needs no range but its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans_backends.backend import Candidate, Param
from titans_backends.contracts.fused_uw import FusedUW
from titans_backends.machine import Machine
from titans_backends.signature import Signature

from .launch import Kernel
from .matrices import flat
from .serving import CONSUMER_SHARED_BYTES, dots, tile_width
from .uw_product import _load, _store

__all__ = ["backward_candidates", "run_backward", "shared_bytes"]

Plan = tuple[int, int, bool, int, int]
_SMALL: tuple[Plan, ...] = ((128, 1, True, 4, 1), (128, 1, False, 4, 1), (128, 4, True, 4, 2), (64, 1, True, 4, 1), (128, 8, True, 4, 3))
_USUAL: tuple[Plan, ...] = ((128, 1, True, 4, 1), (128, 1, False, 4, 1), (64, 1, True, 4, 1), (128, 4, True, 4, 2), (64, 8, True, 4, 3))
_LARGE: tuple[Plan, ...] = ((128, 1, True, 8, 1), (64, 1, True, 8, 1), (64, 1, False, 8, 1))
_FLOAT32: tuple[Plan, ...] = ((64, 1, False, 8, 1), (64, 1, True, 8, 1), (32, 1, False, 4, 1), (64, 4, False, 8, 2))
"""Matrices of one block: columns of dV and of dK, matrices a program, whether both sides' loads come first, warps, stages; C up to 32, 64, 128, and
float32 of C up to 64."""
_TILES = ((64, 64, 128, 4, 3), (128, 64, 128, 8, 3), (128, 64, 64, 8, 3), (64, 64, 64, 4, 2), (32, 32, 64, 4, 2))
_FLOAT32_TILES = ((64, 32, 64, 8, 2), (32, 32, 64, 4, 2))
"""Others: rows, inner tile, columns, warps, stages. The last fits every card."""


@triton.jit
def _put(x, value, row, column, rows, columns, row_t, EVEN: tl.constexpr):
    """A block of a matrix whose rows are `row_t` apart. EVEN: all of it exists."""
    at = x + row[:, None] * row_t + column[None, :]
    value = value.to(x.dtype.element_ty)
    if EVEN:
        tl.store(at, value)
    else:
        tl.store(at, value, mask=(row[:, None] < rows) & (column[None, :] < columns))


@triton.jit
def _matrix_back(
    attn, v, k, du, dw, da, dv, dk, matrix, da_t, attn_b, attn_t, v_b, v_t, k_b, k_t, du_b, du_t, dw_b, dw_t,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr,
    EARLY: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The gradients of one matrix of one block. EARLY: both sides of a tile are loaded before anything is computed with them."""
    row = tl.arange(0, BLOCK)
    d_a = tl.zeros([BLOCK, BLOCK], tl.float32)
    WHOLE_V: tl.constexpr = V % BLOCK_V == 0
    WHOLE_K: tl.constexpr = K % BLOCK_K == 0
    TURNED: tl.constexpr = (du is not None and dv is not None) or (dw is not None and dk is not None)
    if TURNED:
        a = _load(attn + matrix * attn_b, row, row, da_t, attn_t, EVEN, da_t, EVEN)
    for part in tl.static_range(0, TILES):
        value = part * BLOCK_V + tl.arange(0, BLOCK_V)
        key = part * BLOCK_K + tl.arange(0, BLOCK_K)
        if du is not None and part * BLOCK_V < V:
            d_u = _load(du + matrix * du_b, row, value, da_t, du_t, EVEN, V, WHOLE_V)
            if da is not None:
                v_tile = _load(v + matrix * v_b, row, value, da_t, v_t, EVEN, V, WHOLE_V)
        if EARLY and dw is not None and part * BLOCK_K < K:
            d_w = _load(dw + matrix * dw_b, row, key, da_t, dw_t, EVEN, K, WHOLE_K)
            if da is not None:
                k_tile = _load(k + matrix * k_b, row, key, da_t, k_t, EVEN, K, WHOLE_K)
        if part * BLOCK_V < V:
            if du is not None and da is not None:
                d_a = tl.dot(d_u, tl.trans(v_tile), d_a, input_precision=DOT)
            if dv is not None:
                d_v = tl.zeros([BLOCK, BLOCK_V], tl.float32)
                if du is not None:
                    d_v = tl.dot(tl.trans(a), d_u, input_precision=DOT)
                _store(dv + matrix * da_t * V, d_v, row, value, da_t, EVEN, V, WHOLE_V)
        if not EARLY and dw is not None and part * BLOCK_K < K:
            d_w = _load(dw + matrix * dw_b, row, key, da_t, dw_t, EVEN, K, WHOLE_K)
            if da is not None:
                k_tile = _load(k + matrix * k_b, row, key, da_t, k_t, EVEN, K, WHOLE_K)
        if part * BLOCK_K < K:
            if dw is not None and da is not None:
                d_a = tl.dot(d_w, tl.trans(k_tile), d_a, input_precision=DOT)
            if dk is not None:
                d_k = tl.zeros([BLOCK, BLOCK_K], tl.float32)
                if dw is not None:
                    d_k = tl.dot(tl.trans(a), d_w, input_precision=DOT)
                _store(dk + matrix * da_t * K, d_k, row, key, da_t, EVEN, K, WHOLE_K)
    if da is not None:
        _put(da + matrix * da_t * da_t, d_a, row, row, da_t, da_t, da_t, EVEN)


@triton.jit
def _uw_product_back(
    attn, v, k, du, dw, da, dv, dk, matrices, da_t, attn_b, attn_t, v_b, v_t, k_b, k_t, du_b, du_t, dw_b, dw_t,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr,
    COUNT: tl.constexpr, EARLY: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """COUNT matrices. `da_t` is C, named as the stride that it is, so that the compiler knows whether 16 divides it."""
    first = tl.program_id(0) * COUNT
    if COUNT == 1:
        _matrix_back(
            attn, v, k, du, dw, da, dv, dk, tl.cast(first, tl.int64), da_t, attn_b, attn_t, v_b, v_t, k_b, k_t, du_b, du_t, dw_b, dw_t,
            K, V, BLOCK_K, BLOCK_V, TILES, BLOCK, EVEN, EARLY, DOT,
        )  # fmt: skip
    else:
        for step in range(tl.minimum(COUNT, matrices - first)):
            _matrix_back(
                attn, v, k, du, dw, da, dv, dk, tl.cast(first, tl.int64) + step, da_t, attn_b, attn_t, v_b, v_t, k_b, k_t, du_b, du_t, dw_b, dw_t,
                K, V, BLOCK_K, BLOCK_V, TILES, BLOCK, EVEN, EARLY, DOT,
            )  # fmt: skip


@triton.jit
def _uw_product_back_attn(
    v, k, du, dw, da, da_t, v_b, v_t, k_b, k_t, du_b, du_t, dw_b, dw_t,
    K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr, EVEN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A square block of dA. EVEN: BLOCK divides C."""
    program = tl.program_id(0)
    blocks = tl.cdiv(da_t, BLOCK)
    matrix = tl.cast(program // blocks // blocks, tl.int64)
    low = program // blocks % blocks * BLOCK
    left = program % blocks * BLOCK
    row = tl.arange(0, BLOCK)
    inner = tl.arange(0, INNER)
    d_a = tl.zeros([BLOCK, BLOCK], tl.float32)
    if du is not None:
        du += matrix * du_b + tl.cast(low, tl.int64) * du_t
        v += matrix * v_b + tl.cast(left, tl.int64) * v_t
        for part in range(0, V, INNER):
            d_u = _load(du, row, part + inner, da_t - low, du_t, EVEN, V, V % INNER == 0)
            v_tile = _load(v, row, part + inner, da_t - left, v_t, EVEN, V, V % INNER == 0)
            d_a = tl.dot(d_u, tl.trans(v_tile), d_a, input_precision=DOT)
    if dw is not None:
        dw += matrix * dw_b + tl.cast(low, tl.int64) * dw_t
        k += matrix * k_b + tl.cast(left, tl.int64) * k_t
        for part in range(0, K, INNER):
            d_w = _load(dw, row, part + inner, da_t - low, dw_t, EVEN, K, K % INNER == 0)
            k_tile = _load(k, row, part + inner, da_t - left, k_t, EVEN, K, K % INNER == 0)
            d_a = tl.dot(d_w, tl.trans(k_tile), d_a, input_precision=DOT)
    _put(da + (matrix * da_t + low) * da_t, d_a, row, left + row, da_t - low, da_t, da_t, EVEN)


@triton.jit
def _uw_product_back_sides(
    attn, du, dw, dv, dk, da_t, attn_b, attn_t, du_b, du_t, dw_b, dw_t,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr,
    EVEN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A block of rows and a tile of columns of dV and dK. EVEN: BLOCK and INNER divide C."""
    program = tl.program_id(0)
    blocks = tl.cdiv(da_t, BLOCK)
    matrix = tl.cast(program // TILES // blocks, tl.int64)
    low = program // TILES % blocks * BLOCK
    row = tl.arange(0, BLOCK)
    inner = tl.arange(0, INNER)
    value = program % TILES * BLOCK_V + tl.arange(0, BLOCK_V)
    key = program % TILES * BLOCK_K + tl.arange(0, BLOCK_K)
    WHOLE_V: tl.constexpr = V == TILES * BLOCK_V
    WHOLE_K: tl.constexpr = K == TILES * BLOCK_K
    LEFT: tl.constexpr = du is not None and dv is not None
    RIGHT: tl.constexpr = dw is not None and dk is not None
    d_v = tl.zeros([BLOCK, BLOCK_V], tl.float32)
    d_k = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    if LEFT or RIGHT:
        for begin in range(0, da_t, INNER):
            at = tl.cast(begin, tl.int64)
            a = _load(attn + matrix * attn_b + at * attn_t, inner, low + row, da_t - begin, attn_t, EVEN, da_t, EVEN)
            if LEFT:
                d_u = _load(du + matrix * du_b + at * du_t, inner, value, da_t - begin, du_t, EVEN, V, WHOLE_V)
                d_v = tl.dot(tl.trans(a), d_u, d_v, input_precision=DOT)
            if RIGHT:
                d_w = _load(dw + matrix * dw_b + at * dw_t, inner, key, da_t - begin, dw_t, EVEN, K, WHOLE_K)
                d_k = tl.dot(tl.trans(a), d_w, d_k, input_precision=DOT)
    if dv is not None:
        _store(dv + (matrix * da_t + low) * V, d_v, row, value, da_t - low, EVEN, V, WHOLE_V)
    if dk is not None:
        _store(dk + (matrix * da_t + low) * K, d_k, row, key, da_t - low, EVEN, K, WHOLE_K)


BACK, BACK_ATTN, BACK_SIDES = Kernel(_uw_product_back), Kernel(_uw_product_back_attn), Kernel(_uw_product_back_sides)


def backward_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """A program a matrix, or several, where a matrix is one block; else tiles of it. The first is the default; one at least fits every card."""
    size, narrow = tile_width(signature.dim("C")), signature.dtype.itemsize == 2
    first, *slower = dots(signature)
    tiles = _tiles(signature, size, first)
    spilling = first == "tf32x3" and size == 64 and (machine.sm or 0) // 10 != 9  # without wgmma the parts of its operands stay in registers
    ways = _whole(signature, size) if size <= (128 if narrow else 64) and not spilling else []
    if size > 64 or not narrow:
        ways += tiles
    room = machine.shared_memory_bytes or CONSUMER_SHARED_BYTES
    fitting = [way for way in ways if shared_bytes(signature, way) <= room] or tiles[-1:]
    return list(dict.fromkeys([*fitting, *(_tiles(signature, size, dot)[-1] for dot in slower)]))


def _candidate(variant: str, **params: Param) -> Candidate:
    return Candidate("triton", variant, tuple(params.items()), direction="backward")


def _columns(signature: Signature, block: int, columns: int) -> tuple[int, int]:
    """Tiles of keys and of values; in 16 bits no product of 64 rows is narrower than 64 columns (see `serving.narrow_warps`)."""
    least = 64 if signature.dtype.itemsize == 2 and block >= 64 else 16
    key_tile, value_tile = (max(min(columns, tile_width(signature.dim(letter))), least) for letter in "KV")
    return key_tile, value_tile


def _whole(signature: Signature, block: int) -> list[Candidate]:
    """Ways through matrices of one block: small ones have fewer warps. Narrow heads in 16 bits are not widened where two warps will do."""
    narrow, dot, found = signature.dtype.itemsize == 2, dots(signature)[0], []
    keys, values = (tile_width(signature.dim(letter)) for letter in "KV")
    if narrow and block == 64 and max(keys, values) < 64:
        params = {"block": block, "key_tile": keys, "value_tile": values, "count": 1, "early": True, "warps": 2, "stages": 1}
        found.append(_candidate("whole", **params, dot=dot))
    for columns, count, early, warps, stages in (_SMALL if block < 64 else _USUAL if block == 64 else _LARGE) if narrow else _FLOAT32:
        if dot == "tf32x3" and count > 1 and block == 64:
            continue  # the parts of its operands, of two matrices at once, spill
        key_tile, value_tile = _columns(signature, block, columns)
        while warps > 1 and block * (key_tile + value_tile) < 1024 * warps:
            warps //= 2
        params = {"block": block, "key_tile": key_tile, "value_tile": value_tile, "count": count, "early": early, "warps": warps, "stages": stages}
        found.append(_candidate("whole" if count == 1 else "series", **params, dot=dot))
    return found


def _tiles(signature: Signature, size: int, dot: str) -> list[Candidate]:
    """Ways through tiles of matrices."""
    found = []
    for rows, inner, columns, warps, stages in _TILES if signature.dtype.itemsize == 2 else _FLOAT32_TILES:
        block, inner = min(rows, size), min(inner, size)
        key_tile, value_tile = _columns(signature, block, columns)
        while warps > 1 and block * (key_tile + value_tile) < 1024 * warps:
            warps //= 2
        params = {"block": block, "inner": inner, "key_tile": key_tile, "value_tile": value_tile, "warps": warps, "stages": stages}
        found.append(_candidate("tiles", **params, dot=dot))
    return found


def shared_bytes(signature: Signature, candidate: Candidate) -> int:
    """Shared memory of a program at most: its operand tiles, as often as the loop that loads them is pipelined, and what a store turns around."""
    p, itemsize = dict(candidate.params), signature.dtype.itemsize
    block, key_tile, value_tile, stages = (int(p[name]) for name in ("block", "key_tile", "value_tile", "stages"))
    turned = block * max(block, key_tile, value_tile) * itemsize
    if candidate.variant == "tiles":
        inner = int(p["inner"])
        return max(2 * block, block + key_tile + value_tile) * inner * stages * itemsize + turned
    columns = key_tile + value_tile
    if candidate.variant == "series":
        columns *= _parts(signature.dim("K"), signature.dim("V"), key_tile, value_tile)  # of all of them at once
    operands = (block + 2 * columns) * block * stages * itemsize
    return max(operands, turned) if candidate.variant == "whole" and itemsize == 2 else operands + turned


def _parts(keys: int, values: int, key_tile: int, value_tile: int) -> int:
    """How many tiles of columns cover dK and dV."""
    return max(-(-keys // key_tile), -(-values // value_tile))


def _read(x: Tensor | None, wanted: bool) -> tuple[Tensor | None, int, int]:
    """A tensor that the kernels read, with its strides from matrix to matrix and from row to row; None where they do not."""
    if x is None or not wanted:
        return None, 0, 0
    x, step = flat(x)
    return x, step, x.stride(-2)


def run_backward(
    call: FusedUW, grads: tuple[Tensor | None, ...], states: Tensor | None, needs: frozenset[str], candidate: Candidate
) -> tuple[Tensor | None, ...]:
    """Gradients of attn_const, v_beta and k_beta, in that order."""
    given = (call.attn_const, call.v_beta, call.k_beta)
    asked = tuple(name in needs for name in ("attn_const", "v_beta", "k_beta"))
    da, dv, dk = outputs = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) if one else None for x, one in zip(given, asked, strict=True))
    size, values, keys = (x.shape[-1] for x in given)
    matrices = call.attn_const.numel() // max(size * size, 1)
    if not matrices or not needs:
        return outputs
    du, *du_s = _read(grads[0], asked[0] or asked[1])
    dw, *dw_s = _read(grads[1], asked[0] or asked[2])
    attn, *attn_s = _read(given[0], (asked[1] and du is not None) or (asked[2] and dw is not None))
    v, *v_s = _read(given[1], asked[0] and du is not None)
    k, *k_s = _read(given[2], asked[0] and dw is not None)
    p = dict(candidate.params)
    block, key_tile, value_tile, warps, stages = (int(p[name]) for name in ("block", "key_tile", "value_tile", "warps", "stages"))
    dot = str(p["dot"])
    columns = (keys, values, key_tile, value_tile, _parts(keys, values, key_tile, value_tile))
    if candidate.variant != "tiles":
        count = int(p["count"])
        args = (attn, v, k, du, dw, da, dv, dk, matrices, size, *attn_s, *v_s, *k_s, *du_s, *dw_s)
        BACK(-(-matrices // count), args, (*columns, block, size == block, count, bool(p["early"]), dot), warps, stages)
        return outputs
    inner, blocks = int(p["inner"]), -(-size // block)
    if da is not None:
        args = (v, k, du, dw, da, size, *v_s, *k_s, *du_s, *dw_s)
        constants = (keys, values, block, min(inner, tile_width(max(keys, values))), size % block == 0, dot)
        BACK_ATTN(matrices * blocks * blocks, args, constants, warps, stages)
    if dv is not None or dk is not None:
        args = (attn, du, dw, dv, dk, size, *attn_s, *du_s, *dw_s)
        BACK_SIDES(matrices * blocks * columns[-1], args, (*columns, block, inner, size % block == 0 and size % inner == 0, dot), warps, stages)
    return outputs
