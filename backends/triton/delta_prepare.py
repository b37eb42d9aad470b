"""What the exact gated delta rule needs of a block of tokens before its state is known, in parallel over blocks (SPEC.md 3, 4).

With D = diag(e^G): (I + D L D^-1)^-1 = D (I + L)^-1 D^-1, so the inverse is taken without gates, and every exponent stays <= 0. Written for
each block and v head: the gated inverse A' = Gamma * (I + stril(beta K K^T))^-1 * beta^T and the gated scores P, BLOCK x BLOCK, and the vectors

    read = scale gate e^G |q|      erase = e^G |k|      write = e^(G_C - G) |k|      total = e^(G_C)

(|q|, |k|: the reciprocal norms under qk_l2norm, else 1), so that the scan works on q, k, v as they are given. A block computes 4 BLOCK^2 K FLOP
and the inverse's ten small products, reads 2 BLOCK K elements and writes 2 BLOCK^2: bound by the latency of those products, hidden by the
programs beside it.

With `weight`, for a backward, A' is left without beta, which is written there: the gradient wants both sides of beta. It is rounded `evenly`: on similar
tokens the gradients are small differences of sums over A'.
Without `inverses` the block is prepared for a scan from given u and w, which needs no A', and erase only with a `chunk_decay` d, which is a chunk's, and
the block a chunk: then erase = d, read = scale gate d, total = d.

With `fast_scores`, what the fast core needs beside it (SPEC.md 2, 5): alpha fast_gate scale tril(Q K^T) beta^T, and its own read and write
vectors; the slow core's rows are then weighed by 1 - alpha.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decay import between, running_log
from .grid import chunks_before, locate
from .inverse import unit_lower_inverse
from .launch import Kernel
from .rounding import evenly

__all__ = ["PREPARE", "row_norm"]


@triton.jit
def row_norm(x):
    """1 / |row|, as `qk_l2norm` wants it."""
    wide = x.to(tl.float32)
    return tl.rsqrt(tl.sum(wide * wide, 1) + 1e-6)


@triton.jit
def _prepare(
    q, k, beta, g, chunk_decay, gate, fast_gate, alpha, cu_seqlens, inverses, weight, scores, read, erase, write, total, fast_scores, fast_read, fast_write,
    tokens, sequences, offset, heads, group, scale, alpha_value,
    q_b, q_t, q_h, k_b, k_t, k_h, beta_b, beta_t, beta_h, g_b, g_t, g_h, decay_b, decay_m, decay_h, gate_b, gate_t, gate_h,
    fast_b, fast_t, fast_h, alpha_b, alpha_t, alpha_h,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, L2NORM: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head = program % heads
    slot = program // heads
    batch, sequence, index, start, begin, end = locate(cu_seqlens, slot, tokens, sequences, offset, BLOCK)
    if start >= end:
        return
    DTYPE: tl.constexpr = k.dtype.element_ty
    SPLIT: tl.constexpr = DTYPE == tl.float32
    row = tl.arange(0, BLOCK)
    key = tl.arange(0, BLOCK_K)
    here = (start + row >= begin) & (start + row < end)
    inside = here[:, None]
    if K != BLOCK_K:
        inside = inside & (key[None, :] < K)
    at = batch.to(tl.int64)
    first = start.to(tl.int64)
    shared = head // group
    place = slot.to(tl.int64) * heads + head
    square = place * (BLOCK * BLOCK) + row[:, None] * BLOCK + row[None, :]
    line = place * BLOCK + row
    causal = row[:, None] >= row[None, :]
    k_tile = tl.load(k + at * k_b + first * k_t + shared * k_h + row[:, None] * k_t + key[None, :], mask=inside, other=0.0)
    b = tl.full([BLOCK], 1.0, tl.float32)
    if beta is not None:
        b = tl.load(beta + at * beta_b + first * beta_t + head * beta_h + row * beta_t, mask=here, other=0.0).to(tl.float32)
    back = tl.full([BLOCK], 1.0, tl.float32)
    on = back
    fade = 1.0
    if g is not None:
        step = tl.load(g + at * g_b + first * g_t + head * g_h + row * g_t, mask=here, other=0.0).to(tl.float32)
        coarse, fine, coarse_last, fine_last = running_log(step, SPLIT)
        fade = tl.exp(coarse_last + fine_last)
        back = tl.exp(coarse + fine)
        on = tl.exp((coarse_last - coarse) + (fine_last - fine))
        decay = between(coarse, fine, causal, SPLIT)
    if chunk_decay is not None:
        if cu_seqlens is not None:
            index += chunks_before(cu_seqlens, sequence, BLOCK)
        fade = tl.load(chunk_decay + at * decay_b + index.to(tl.int64) * decay_m + head * decay_h).to(tl.float32)
        back *= fade
    ahead = back * scale
    if L2NORM:
        k_norm = row_norm(k_tile)
        back *= k_norm
        on *= k_norm
    if scores is not None:
        q_tile = tl.load(q + at * q_b + first * q_t + shared * q_h + row[:, None] * q_t + key[None, :], mask=inside, other=0.0)
        mixed = tl.where(causal, tl.dot(q_tile, tl.trans(k_tile), input_precision=DOT) * scale, 0.0)
        if L2NORM:
            q_norm = row_norm(q_tile)
            mixed *= q_norm[:, None] * k_norm[None, :]
            ahead *= q_norm
        if fast_scores is not None:
            share = tl.full([BLOCK], alpha_value, tl.float32)
            if alpha is not None:
                share = tl.load(alpha + at * alpha_b + first * alpha_t + head * alpha_h + row * alpha_t, mask=here, other=0.0).to(tl.float32)
            quick = share
            if fast_gate is not None:
                quick *= tl.load(fast_gate + at * fast_b + first * fast_t + head * fast_h + row * fast_t, mask=here, other=0.0).to(tl.float32)
            tl.store(fast_scores + square, (mixed * quick[:, None] * b[None, :]).to(DTYPE))
            into = b
            quick *= scale
            if L2NORM:
                quick *= q_norm
                into *= k_norm
            tl.store(fast_read + line, quick)
            tl.store(fast_write + line, into)
            mixed *= (1.0 - share)[:, None]
            ahead *= 1.0 - share
        if gate is not None:
            through = tl.load(gate + at * gate_b + first * gate_t + head * gate_h + row * gate_t, mask=here, other=0.0).to(tl.float32)
            mixed *= through[:, None]
            ahead *= through
        if g is not None:
            mixed *= decay
        tl.store(scores + square, mixed.to(DTYPE))
        tl.store(read + line, ahead)
    if inverses is not None:
        gram = tl.dot(k_tile, tl.trans(k_tile), input_precision=DOT)
        if L2NORM:
            gram *= k_norm[:, None] * k_norm[None, :]
        lower = tl.where(row[:, None] > row[None, :], b[:, None] * gram, 0.0)
        inverse = unit_lower_inverse(lower, BLOCK, DTYPE, DOT)
        if weight is not None:
            tl.store(weight + line, b)
        else:
            inverse *= b[None, :]
        if g is not None:
            inverse *= decay
        if weight is not None:
            inverse = evenly(inverse, DTYPE, BLOCK)
        tl.store(inverses + square, inverse.to(DTYPE))
    if erase is not None:
        tl.store(erase + line, back)
    tl.store(write + line, on)
    tl.store(total + place, fade)


PREPARE = Kernel(_prepare)
