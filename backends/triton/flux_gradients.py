"""The gradients of the flux network: one kernel for what belongs to a token, one for w1, whose parts of ROWS tokens are added up in order.

Everything up to the logit is computed again. d_inner, the gradient of w1's product, `[B, T, H, F]`, passes through memory between the two, and for heads
that share keys its sums do. Floor: k and v read twice, dk and dv written, d_inner written and read, 110 us at 1x8192 with 16/32 heads of 128 in bfloat16
over 3.35 TB/s, 17 us at 12 heads of 32; three times the forward's FLOP; the sums of w1 are 4 F (K + V) / ROWS bytes a token, twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .flux_network import known, product, vector
from .launch import Kernel

__all__ = ["NETWORK_GRADIENTS", "NETWORK_WEIGHTS"]


@triton.jit
def _spread(grad, w1, out, token, tokens, out_t, feature, inputs, WIDTH: tl.constexpr, F: tl.constexpr, SLAB: tl.constexpr, DOT: tl.constexpr):
    """Writes grad times a part of w1, whose gradient in `out` is contiguous."""
    for low in range(0, WIDTH, SLAB):
        column = low + tl.arange(0, SLAB)
        at = w1 + feature[:, None] * inputs + column[None, :]
        weight = tl.load(at, mask=(feature < F)[:, None] & (column < WIDTH)[None, :], other=0.0)
        found = tl.dot(grad, weight.to(grad.dtype), input_precision=DOT)
        place = out + token.to(tl.int64)[:, None] * out_t + column[None, :]
        tl.store(place, found.to(out.dtype.element_ty), mask=(token < tokens)[:, None] & (column < WIDTH)[None, :])


@triton.jit
def _network_gradients(
    k, v, beta, extra, w1, b1, w2, b2, cu_seqlens, d_flux, dk, dv, d_beta, d_extra, d_inner, d_keys, partial,
    tokens, sequences, heads, group, k_b, k_t, k_h, v_b, v_t, v_h, beta_b, beta_t, beta_h, df_b, df_t, df_h,
    K: tl.constexpr, V: tl.constexpr, F: tl.constexpr, SLAB_K: tl.constexpr, SLAB_V: tl.constexpr, BLOCK_F: tl.constexpr, ROWS: tl.constexpr,
    BLOCKS: tl.constexpr, CHUNK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """BLOCKS times ROWS tokens of one key head. `d_inner` `[B, T, H, F]` and, for heads that share keys, its sums `d_keys` `[B, T, G, F]` go to the weights."""
    INPUTS: tl.constexpr = K + V + (extra is not None)
    DTYPE: tl.constexpr = k.dtype.element_ty
    there = known(tokens, cu_seqlens, sequences, CHUNK)
    program = tl.program_id(0)
    groups = heads // group
    shared = (program % groups).to(tl.int64)
    slots = tl.cdiv(tokens, ROWS * BLOCKS)
    row = (program // groups // slots).to(tl.int64)
    start = program // groups % slots * ROWS * BLOCKS
    feature = tl.arange(0, BLOCK_F)
    live = feature < F
    bias = tl.load(b1 + feature, mask=live, other=0.0).to(tl.float32)
    last = tl.load(w2 + feature, mask=live, other=0.0).to(tl.float32)
    shift = tl.load(b2).to(tl.float32)
    d_bias = tl.zeros([BLOCK_F], tl.float32)
    d_last = tl.zeros([BLOCK_F], tl.float32)
    d_shift = tl.zeros([ROWS], tl.float32)
    for low in range(0, tl.minimum(tokens - start, ROWS * BLOCKS), ROWS):
        token = start + low + tl.arange(0, ROWS)
        here = token < there
        of_key = tl.zeros([ROWS, BLOCK_F], tl.float32)
        of_key = product(of_key, k + row * k_b + shared * k_h, w1, token, there, k_t, feature, INPUTS, K, F, SLAB_K, DOT)
        d_key = tl.zeros([ROWS, BLOCK_F], tl.float32)
        for step in range(group):
            head = shared * group + step
            inner = product(of_key, v + row * v_b + head * v_h, w1 + K, token, there, v_t, feature, INPUTS, V, F, SLAB_V, DOT)
            place = (row * tokens + token) * heads + head
            before = inner + bias[None, :]
            weigh = tl.zeros([ROWS], tl.float32) + 1.0
            if beta is not None:
                weigh = vector(beta + row * beta_b + head * beta_h, token, there, beta_t)
                before = inner * weigh[:, None] + bias[None, :]
            if extra is not None:
                column = tl.load(w1 + feature * INPUTS + (K + V), mask=live, other=0.0).to(tl.float32)
                before += tl.load(extra + place, mask=here, other=0.0)[:, None] * column[None, :]
            gate = tl.sigmoid(before)
            logit = tl.sum(before * gate * last[None, :], 1) + shift
            found = tl.sigmoid(logit)
            arrived = vector(d_flux + row * df_b + head * df_h, token, there, df_t)
            d_logit = tl.where((found < 0.01) | (found > 0.99), 0.0, arrived * found * (1.0 - found))
            d_before = d_logit[:, None] * last[None, :] * gate * (1.0 + before * (1.0 - gate))
            if partial is not None:
                d_bias += tl.sum(d_before, 0)
                d_last += tl.sum(d_logit[:, None] * before * gate, 0)
                d_shift += d_logit
            if d_beta is not None:
                tl.store(d_beta + place, tl.sum(d_before * inner, 1).to(d_beta.dtype.element_ty), mask=here)
            if extra is not None:
                if d_extra is not None:
                    tl.store(d_extra + place, tl.sum(d_before * column[None, :], 1), mask=here)
            d_before *= weigh[:, None]
            grad = d_before.to(DTYPE)
            if d_inner is not None:
                tl.store(d_inner + place[:, None] * F + feature[None, :], grad, mask=here[:, None] & live[None, :])
            if dv is not None:
                out = dv + (row * tokens * heads + head) * V
                _spread(grad, w1 + K, out, token, there, heads * V, feature, INPUTS, V, F, SLAB_V, DOT)
            d_key += d_before
        if d_keys is not None:
            place = (row * tokens + token) * groups + shared
            tl.store(d_keys + place[:, None] * F + feature[None, :], d_key.to(DTYPE), mask=here[:, None] & live[None, :])
        if dk is not None:
            out = dk + (row * tokens * groups + shared) * K
            _spread(d_key.to(DTYPE), w1, out, token, there, groups * K, feature, INPUTS, K, F, SLAB_K, DOT)
    if partial is not None:
        partial += program.to(tl.int64) * (2 * F + 1)
        tl.store(partial + feature, d_bias, mask=live)
        tl.store(partial + F + feature, d_last, mask=live)
        tl.store(partial + 2 * F, tl.sum(d_shift, 0))


@triton.jit
def _outer(
    x, grad, out, row, token, tokens, there, heads, low, inputs, x_t, x_h,
    WIDTH: tl.constexpr, F: tl.constexpr, SLAB: tl.constexpr, BLOCK_F: tl.constexpr, ROWS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A slab of columns of w1's gradient from a block of tokens of all heads."""
    column = low + tl.arange(0, SLAB)
    feature = tl.arange(0, BLOCK_F)
    here = token < there
    found = tl.zeros([BLOCK_F, SLAB], tl.float32)
    for head in range(heads):
        tile = tl.load(
            x + head * x_h + token.to(tl.int64)[:, None] * x_t + column[None, :], mask=here[:, None] & (column < WIDTH)[None, :], other=0.0
        )
        place = (row * tokens + token) * heads + head
        turned = tl.load(grad + place[None, :] * F + feature[:, None], mask=here[None, :] & (feature < F)[:, None], other=0.0)
        found = tl.dot(turned, tile, found, input_precision=DOT)
    tl.store(out + feature[:, None] * inputs + column[None, :], found, mask=(feature < F)[:, None] & (column < WIDTH)[None, :])


@triton.jit
def _network_weights(
    k, v, extra, d_inner, d_keys, cu_seqlens, partial,
    tokens, sequences, heads, group, k_b, k_t, k_h, v_b, v_t, v_h,
    K: tl.constexpr, V: tl.constexpr, F: tl.constexpr, SLAB_K: tl.constexpr, SLAB_V: tl.constexpr, BLOCK_F: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """ROWS tokens and a slab of the columns of k, or of v, or the extra one: their part of w1's gradient."""
    INPUTS: tl.constexpr = K + V + (extra is not None)
    OF_K: tl.constexpr = (K + SLAB_K - 1) // SLAB_K
    OF_V: tl.constexpr = (V + SLAB_V - 1) // SLAB_V
    PARTS: tl.constexpr = OF_K + OF_V + (extra is not None)
    there = known(tokens, cu_seqlens, sequences, CHUNK)
    program = tl.program_id(0)
    part = program % PARTS
    slots = tl.cdiv(tokens, ROWS)
    row = (program // PARTS // slots).to(tl.int64)
    token = program // PARTS % slots * ROWS + tl.arange(0, ROWS)
    out = partial + (program // PARTS).to(tl.int64) * F * INPUTS
    if part < OF_K:
        of = d_inner if d_keys is None else d_keys
        _outer(k + row * k_b, of, out, row, token, tokens, there, heads // group, part * SLAB_K, INPUTS, k_t, k_h, K, F, SLAB_K, BLOCK_F, ROWS, DOT)
    elif part < OF_K + OF_V:
        low = (part - OF_K) * SLAB_V
        _outer(v + row * v_b, d_inner, out + K, row, token, tokens, there, heads, low, INPUTS, v_t, v_h, V, F, SLAB_V, BLOCK_F, ROWS, DOT)
    else:
        if extra is not None:
            feature = tl.arange(0, BLOCK_F)
            found = tl.zeros([ROWS, BLOCK_F], tl.float32)
            for head in range(heads):
                place = (row * tokens + token) * heads + head
                here = token < there
                grad = tl.load(d_inner + place[:, None] * F + feature[None, :], mask=here[:, None] & (feature < F)[None, :], other=0.0).to(tl.float32)
                found += grad * tl.load(extra + place, mask=here, other=0.0)[:, None]
            tl.store(out + feature * INPUTS + (K + V), tl.sum(found, 0), mask=feature < F)


NETWORK_GRADIENTS, NETWORK_WEIGHTS = Kernel(_network_gradients), Kernel(_network_weights)
