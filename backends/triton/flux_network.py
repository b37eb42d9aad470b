"""The small network of the flux, for every token (or chunk) and head (SPEC.md 6).

    before = beta (w1_k k + w1_v v) [+ w1_e e] + b1        flux = clamp(sigmoid(w2 . silu(before) + b2), 0.01, 0.99)

A program owns ROWS tokens of one key head and all its value heads: what they share of the product is made once. Floor: k and v read once, 30 us at 1x8192
with 16/32 heads of 128 in bfloat16 over 3.35 TB/s, 4 us at 12 heads of 32; 2 F (G K + H V) FLOP a token with F = K / 2, 6.4 GFLOP, are a fifth of that on
the tensor cores, twice that where w1 is float32 beside 16-bit rows, in float32 ("highest", three products) about as long as the reading.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .grid import chunks_before
from .launch import Kernel

__all__ = ["NETWORK", "known", "product", "vector"]


@triton.jit
def known(tokens, cu_seqlens, sequences, CHUNK: tl.constexpr):
    """How many rows there are: of the chunks of packed sequences fewer than `tokens`."""
    if cu_seqlens is None:
        return tokens
    else:
        return chunks_before(cu_seqlens, sequences, CHUNK)


@triton.jit
def product(inner, x, w1, token, tokens, x_t, feature, inputs, WIDTH: tl.constexpr, F: tl.constexpr, SLAB: tl.constexpr, DOT: tl.constexpr):
    """`inner` and a part of w1 times a block of rows; a float32 w1 beside 16-bit rows is two 16-bit parts, since beta and a sum over keys enlarge rounding."""
    PARTS: tl.constexpr = (w1.dtype.element_ty == tl.float32) and (x.dtype.element_ty != tl.float32)
    here = token < tokens
    for low in range(0, WIDTH, SLAB):
        column = low + tl.arange(0, SLAB)
        tile = tl.load(x + token.to(tl.int64)[:, None] * x_t + column[None, :], mask=here[:, None] & (column < WIDTH)[None, :], other=0.0)
        at = w1 + feature[None, :] * inputs + column[:, None]
        weight = tl.load(at, mask=(column < WIDTH)[:, None] & (feature < F)[None, :], other=0.0)
        rounded = weight.to(tile.dtype)
        inner = tl.dot(tile, rounded, inner, input_precision=DOT)
        if PARTS:
            inner = tl.dot(tile, (weight - rounded.to(tl.float32)).to(tile.dtype), inner, input_precision=DOT)
    return inner


@triton.jit
def vector(x, token, tokens, x_t):
    """One number a token in float32, 0 behind the last."""
    return tl.load(x + token.to(tl.int64) * x_t, mask=token < tokens, other=0.0).to(tl.float32)


@triton.jit
def _network(
    k, v, beta, extra, w1, b1, w2, b2, cu_seqlens, flux,
    tokens, sequences, heads, group, k_b, k_t, k_h, v_b, v_t, v_h, beta_b, beta_t, beta_h,
    K: tl.constexpr, V: tl.constexpr, F: tl.constexpr, SLAB_K: tl.constexpr, SLAB_V: tl.constexpr, BLOCK_F: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of one key head; of those that are not there the flux is 0."""
    there = known(tokens, cu_seqlens, sequences, CHUNK)
    INPUTS: tl.constexpr = K + V + (extra is not None)
    program = tl.program_id(0)
    groups = heads // group
    shared = (program % groups).to(tl.int64)
    slots = tl.cdiv(tokens, ROWS)
    row = (program // groups // slots).to(tl.int64)
    token = program // groups % slots * ROWS + tl.arange(0, ROWS)
    feature = tl.arange(0, BLOCK_F)
    live = feature < F
    bias = tl.load(b1 + feature, mask=live, other=0.0).to(tl.float32)
    last = tl.load(w2 + feature, mask=live, other=0.0).to(tl.float32)
    shift = tl.load(b2).to(tl.float32)
    of_key = tl.zeros([ROWS, BLOCK_F], tl.float32)
    of_key = product(of_key, k + row * k_b + shared * k_h, w1, token, there, k_t, feature, INPUTS, K, F, SLAB_K, DOT)
    for step in range(group):
        head = shared * group + step
        before = product(of_key, v + row * v_b + head * v_h, w1 + K, token, there, v_t, feature, INPUTS, V, F, SLAB_V, DOT)
        place = (row * tokens + token) * heads + head
        if beta is not None:
            before *= vector(beta + row * beta_b + head * beta_h, token, there, beta_t)[:, None]
        if extra is not None:
            column = tl.load(w1 + feature * INPUTS + (K + V), mask=live, other=0.0).to(tl.float32)
            before += tl.load(extra + place, mask=token < there, other=0.0)[:, None] * column[None, :]
        before += bias[None, :]
        logit = tl.sum(before * tl.sigmoid(before) * last[None, :], 1) + shift
        found = tl.where(token < there, tl.minimum(tl.maximum(tl.sigmoid(logit), 0.01), 0.99), 0.0)
        tl.store(flux + place, found.to(flux.dtype.element_ty), mask=token < tokens)


NETWORK = Kernel(_network)
