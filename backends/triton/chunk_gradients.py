"""From the gradients of a chunk's means to its tokens and to the bilinear form: a = d mean e / (length temp), the same for all tokens of a chunk.

    dk_i = d mean k / length + sum over heads of a bilinear u_i        du_i = d mean u / length + a bilinear^T k_i
    dbilinear_h = sum over chunks of a sum_i k_i u_i^T                 dtemp_h = - sum over chunks of d mean e mean e / temp

Two kernels. The first owns a chunk of one key head; it reads k and u once and writes as much: floor 60 us at 1x8192 with 16/32 heads of 128 in bfloat16,
8 us at 12 heads of 32; 4 K V FLOP a token and head. The second owns a tile of one head's bilinear form over some of the chunks (a slot in SPLITS), whose
parts `partial_sums` adds up in order: it reads k and u once for each 64 columns of the other, from cache if at all.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .chunk_means import chunk_at
from .launch import Kernel

__all__ = ["FORM_GRADIENTS", "TOKEN_GRADIENTS"]


@triton.jit
def _token_gradients(
    k, u, bilinear, temp, d_mean_k, d_mean_u, d_mean_e, cu_seqlens, dk, du,
    tokens, sequences, rows, chunk, heads, group, k_b, k_t, k_h, u_b, u_t, u_h,
    K: tl.constexpr, V: tl.constexpr, SLAB_K: tl.constexpr, SLAB_V: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One chunk of one key head."""
    DTYPE: tl.constexpr = k.dtype.element_ty
    program = tl.program_id(0)
    groups = heads // group
    shared = (program % groups).to(tl.int64)
    row, start, end, index = chunk_at(cu_seqlens, program // groups, tokens, sequences, chunk, CHUNK)
    place = row * rows + index
    if start < end:
        share = 1.0 / (end - start).to(tl.float32)
        line = tl.arange(0, ROWS)
        k += row * k_b + shared * k_h
        for low in range(0, end - start, ROWS):
            token = start + low + line
            here = (token < end)[:, None]
            wide = token.to(tl.int64)[:, None]
            if dk is not None:
                for first in range(0, K, SLAB_K):
                    column = first + tl.arange(0, SLAB_K)
                    mean = tl.load(d_mean_k + (place * groups + shared) * K + column, mask=column < K, other=0.0) * share
                    found = tl.zeros([ROWS, SLAB_K], tl.float32) + mean[None, :]
                    for step in range(group):
                        head = shared * group + step
                        weigh = tl.load(d_mean_e + place * heads + head) * share / tl.load(temp + head).to(tl.float32)
                        part = tl.zeros([ROWS, SLAB_K], tl.float32)
                        for of in range(0, V, SLAB_V):
                            value = of + tl.arange(0, SLAB_V)
                            tile = tl.load(u + row * u_b + head * u_h + wide * u_t + value[None, :], mask=here & (value < V)[None, :], other=0.0)
                            forms = bilinear + (head * K + column)[None, :] * V + value[:, None]
                            form = tl.load(forms, mask=(column < K)[None, :] & (value < V)[:, None], other=0.0)
                            part = tl.dot(tile, form.to(DTYPE), part, input_precision=DOT)
                        found += part * weigh
                    keys = dk + ((row * tokens + token) * groups + shared)[:, None] * K + column[None, :]
                    tl.store(keys, found.to(DTYPE), mask=here & (column < K)[None, :])
            if du is not None:
                for step in range(group):
                    h = shared * group + step
                    scale = tl.load(d_mean_e + place * heads + h) * share / tl.load(temp + h).to(tl.float32)
                    for at_u in range(0, V, SLAB_V):
                        of_u = at_u + tl.arange(0, SLAB_V)
                        sum_u = tl.zeros([ROWS, SLAB_V], tl.float32)
                        for at_k in range(0, K, SLAB_K):
                            of_k = at_k + tl.arange(0, SLAB_K)
                            tall = tl.load(k + wide * k_t + of_k[None, :], mask=here & (of_k < K)[None, :], other=0.0)
                            turned = bilinear + (h * K + of_k)[:, None] * V + of_u[None, :]
                            held = tl.load(turned, mask=(of_k < K)[:, None] & (of_u < V)[None, :], other=0.0)
                            sum_u = tl.dot(tall, held.to(DTYPE), sum_u, input_precision=DOT)
                        middle = tl.load(d_mean_u + (place * heads + h) * V + of_u, mask=of_u < V, other=0.0) * share
                        values = du + ((row * tokens + token) * heads + h)[:, None] * V + of_u[None, :]
                        tl.store(values, (sum_u * scale + middle[None, :]).to(DTYPE), mask=here & (of_u < V)[None, :])


@triton.jit
def _form_gradients(
    k, u, temp, mean_e, d_mean_e, cu_seqlens, partial,
    slots, splits, tokens, sequences, rows, chunk, heads, group, k_b, k_t, k_h, u_b, u_t, u_h,
    K: tl.constexpr, V: tl.constexpr, SLAB_K: tl.constexpr, SLAB_V: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A tile of one head's bilinear form over every `splits`-th slot; the first tile has the head's temperature too."""
    ACROSS: tl.constexpr = (V + SLAB_V - 1) // SLAB_V
    TILES: tl.constexpr = (K + SLAB_K - 1) // SLAB_K * ACROSS
    program = tl.program_id(0)
    tile = program % TILES
    head = (program // TILES % heads).to(tl.int64)
    split = program // TILES // heads
    column = tile // ACROSS * SLAB_K + tl.arange(0, SLAB_K)
    value = tile % ACROSS * SLAB_V + tl.arange(0, SLAB_V)
    line = tl.arange(0, ROWS)
    k += head // group * k_h
    u += head * u_h
    warmth = tl.load(temp + head).to(tl.float32)
    found = tl.zeros([SLAB_K, SLAB_V], tl.float32)
    d_temp = warmth * 0.0
    for round in range(tl.cdiv(slots - split, splits)):
        row, start, end, place = chunk_at(cu_seqlens, split + round * splits, tokens, sequences, chunk, CHUNK)
        if start < end:
            arrived = tl.load(d_mean_e + (row * rows + place) * heads + head)
            d_temp -= arrived * tl.load(mean_e + (row * rows + place) * heads + head) / warmth
            part = tl.zeros([SLAB_K, SLAB_V], tl.float32)
            for low in range(0, end - start, ROWS):
                token = start + low + line
                here = token < end
                wide = token.to(tl.int64)
                turned = tl.load(k + row * k_b + wide[None, :] * k_t + column[:, None], mask=here[None, :] & (column < K)[:, None], other=0.0)
                tall = tl.load(u + row * u_b + wide[:, None] * u_t + value[None, :], mask=here[:, None] & (value < V)[None, :], other=0.0)
                part = tl.dot(turned, tall, part, input_precision=DOT)
            found += part * (arrived / (warmth * (end - start).to(tl.float32)))
    partial += split.to(tl.int64) * (heads * (K * V + 1))
    tl.store(partial + (head * K + column)[:, None] * V + value[None, :], found, mask=(column < K)[:, None] & (value < V)[None, :])
    if tile == 0:
        tl.store(partial + heads * K * V + head, d_temp)


TOKEN_GRADIENTS, FORM_GRADIENTS = Kernel(_token_gradients), Kernel(_form_gradients)
