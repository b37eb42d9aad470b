"""dg from what q and k say of G (SPEC.md 10), and rows' dot products: every gradient of G here is one.

    dG_i = q_i . dq_i - k_i . dk_i,  dG_C += <S', dS'>,  dg_t = sum over i >= t of dG_i in t's chunk

since rowsum(H) + rowsum(dQ~ * Q~) = q . dq, colsum(H) + rowsum(dK~ * K~) = k . dk, and what the last token adds is the state that leaves the chunk
times its gradient: exp(G_C) S and every token's exp(G_C - G_i) k_i U_i^T. From t on the latter stands in k . dk too, so dG is summed without it, and what
the tokens before t left is added: a difference of large sums would keep their rounding alone where gates forget within a few tokens.

FLOP a token and head: 6 K + C. Bytes: 24 K. Floor for 2048 tokens of 12 heads of 32 on an H100: 6 us by the bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .absent import given_or, nothing
from .grid import Grid, locate
from .launch import Kernel
from .settings import THREADS
from .target import ZERO, cuda, float32, float64

__all__ = ["decay_gradient", "row_dot"]


def log_gradient(threads: int) -> Callable[..., None]:
    """The kernel: a block per chunk and head. `each`: a state comes to every chunk and leaves it; else only to one that is its sequence's first and last."""

    def kernel(bounds, packed, tokens, chunk, offset, each, log, d_log, left, states, d_states, dg):
        parts = cuda.shared.array(threads, float32)
        thread = cuda.threadIdx.x
        head = cuda.blockIdx.y
        slot = cuda.blockIdx.x
        row, sequence, index, first, stop, end = locate(bounds, packed, tokens, chunk, offset, slot)
        if first >= stop:
            return
        values = states.shape[3]
        part = ZERO
        if each or (index == 0 and stop == end):
            at = slot if each else sequence
            for place in range(thread, states.shape[2] * values, threads):
                part += states[at, head, place // values, place % values] * d_states[at, head, place // values, place % values]
        parts[thread] = math.exp(float32(log[row, stop - 1, head])) * part
        cuda.syncthreads()
        through = float64(0)
        for other in range(threads):
            through += parts[other]
        for token in range(first + thread, stop, threads):
            total = through
            for earlier in range(first, token):
                total += float64(left[row, earlier, head])
            for later in range(token, stop):
                total += float64(d_log[row, later, head])
            dg[row, token, head] = float32(total)

    return kernel


def dot_rows() -> Callable[..., None]:
    """The kernel: a thread per token and head; `x` may have fewer heads than `y`."""

    def kernel(scale, add, x, y, out):
        token = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
        head = cuda.blockIdx.y
        if token < y.shape[0] * y.shape[1]:
            row = token // y.shape[1]
            t = token % y.shape[1]
            group = head // (y.shape[2] // x.shape[2])
            total = out[row, t, head] if add else ZERO
            dot = ZERO
            for d in range(y.shape[3]):
                dot += x[row, t, group, d] * y[row, t, head, d]
            out[row, t, head] = total + float32(scale) * dot

    return kernel


_DG = Kernel(log_gradient)
_DOT = Kernel(dot_rows)


def row_dot(x: Tensor, y: Tensor, out: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """`scale * x_i . y_i` `[B, T, H]` for rows of `x [B, T, G, D]` and `y [B, T, H, D]`, added to `out` where there is one."""
    made = torch.empty(y.shape[:3], dtype=y.dtype, device=y.device) if out is None else out
    _DOT((-(-y.shape[0] * y.shape[1] // THREADS), y.shape[2]), THREADS, (), float(scale), int(out is not None), x, y, made)
    return made


def decay_gradient(
    d_log: Tensor,
    log: Tensor,
    grid: Grid,
    left: Tensor | None = None,
    states: Tensor | None = None,
    d_states: Tensor | None = None,
    *,
    each: bool = False,
) -> Tensor:
    """dg `[B, T, H]` from dG without what leaves with a state, and from that: `left`, k . dk of a token's own part, and the `states` that came to the
    chunks, or to sequences of one chunk, with the gradients of those that leave; an absent one is zero."""
    dg = torch.empty(d_log.shape, dtype=d_log.dtype, device=d_log.device)
    none = nothing(d_log, grid.sequences, d_log.shape[2], 1, 1)
    came, went = (none, none) if states is None or d_states is None else (states, d_states)
    each = each and states is not None
    left = given_or(left, nothing(d_log, *d_log.shape))
    _DG((grid.slots, d_log.shape[2]), THREADS, (THREADS,), *grid.args, int(each), log, d_log, left, came, went, dg)
    return dg
