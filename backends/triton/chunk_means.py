"""What the chunk flux reads of a chunk: mean k, mean u and mean energy, e_i = k_i^T bilinear_h u_i / temp_h, in float32 (SPEC.md 6).

A program owns one chunk of one key head and all its value heads, and walks its tokens ROWS at a time for each slab of the columns of u: the slab of the
bilinear form stays, k comes from cache. Floor: k and u read once, 30 us at 1x8192 with 16/32 heads of 128 in bfloat16 over 3.35 TB/s, 4 us at 12 heads
of 32; 2 K V FLOP a token and head, 8.6 GFLOP, are a third of that on the tensor cores.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .grid import chunks_before, locate
from .launch import Kernel

__all__ = ["MEANS", "chunk_at"]


@triton.jit
def chunk_at(cu_seqlens, slot, tokens, sequences, chunk, CHUNK: tl.constexpr):
    """(batch row, first token, end, row among the results of the batch row) of a chunk; packed, `CHUNK` is the chunk size, and an empty slot's end is its start."""
    if cu_seqlens is None:
        count = tl.cdiv(tokens, chunk)
        start = slot % count * chunk
        return (slot // count).to(tl.int64), start, tl.minimum(start + chunk, tokens), slot % count
    else:
        row, sequence, index, start, _begin, end = locate(cu_seqlens, slot, tokens, sequences, 0, CHUNK)
        place = chunks_before(cu_seqlens, sequence, CHUNK) + index
        return row.to(tl.int64), start, tl.maximum(start, tl.minimum(start + CHUNK, end)), place


@triton.jit
def _means(
    k, u, bilinear, temp, cu_seqlens, mean_k, mean_u, mean_e,
    tokens, sequences, rows, chunk, heads, group, k_b, k_t, k_h, u_b, u_t, u_h,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, SLAB: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One chunk of one key head; an empty slot writes nothing."""
    program = tl.program_id(0)
    groups = heads // group
    shared = (program % groups).to(tl.int64)
    row, start, end, index = chunk_at(cu_seqlens, program // groups, tokens, sequences, chunk, CHUNK)
    place = row * rows + index
    if start < end:
        share = 1.0 / (end - start).to(tl.float32)
        column = tl.arange(0, BLOCK_K)
        k += row * k_b + shared * k_h
        line = tl.arange(0, ROWS)
        total = tl.zeros([BLOCK_K], tl.float32)
        for low in range(0, end - start, ROWS):
            token = start + low + line
            keys = k + token.to(tl.int64)[:, None] * k_t + column[None, :]
            total += tl.sum(tl.load(keys, mask=(token < end)[:, None] & (column < K)[None, :], other=0.0).to(tl.float32), 0)
        tl.store(mean_k + (place * groups + shared) * K + column, total * share, mask=column < K)
        for step in range(group):
            head = shared * group + step
            energy = tl.zeros([ROWS], tl.float32)
            for first in range(0, V, SLAB):
                value = first + tl.arange(0, SLAB)
                forms = bilinear + (head * K + column)[:, None] * V + value[None, :]
                form = tl.load(forms, mask=(column < K)[:, None] & (value < V)[None, :], other=0.0).to(k.dtype.element_ty)
                summed = tl.zeros([SLAB], tl.float32)
                for low in range(0, end - start, ROWS):
                    late = start + low + line
                    wide = late.to(tl.int64)[:, None]
                    here = (late < end)[:, None]
                    key = tl.load(k + wide * k_t + column[None, :], mask=here & (column < K)[None, :], other=0.0)
                    values = u + row * u_b + head * u_h + wide * u_t + value[None, :]
                    tile = tl.load(values, mask=here & (value < V)[None, :], other=0.0).to(tl.float32)
                    energy += tl.sum(tl.dot(key, form, input_precision=DOT) * tile, 1)
                    summed += tl.sum(tile, 0)
                tl.store(mean_u + (place * heads + head) * V + value, summed * share, mask=value < V)
            tl.store(mean_e + place * heads + head, tl.sum(energy, 0) * share / tl.load(temp + head).to(tl.float32))


MEANS = Kernel(_means)
