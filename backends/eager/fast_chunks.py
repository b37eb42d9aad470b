"""S_fast on a slab: causal attention inside each chunk, plus what a first chunk takes from a carried W and what the last one leaves (SPEC.md 2).

`carry` and `final` are `[sequences, H, K, V]`; the rest is `[n, H, C, *]`, and q already holds the scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .causal import product, scores, scores_backward
from .chunk_grid import ChunkGrid, Slab
from .decay import Decay
from .recurrence import OperandGradients, Operands

__all__ = ["fast_backward", "fast_forward"]


def _decayed(x: Tensor, decay: Decay | None, which: slice) -> Tensor:
    return x if decay is None else x * decay.total[which]


def fast_forward(grid: ChunkGrid, slab: Slab, x: Operands, m: Tensor | None, carry: Tensor | None, final: Tensor | None) -> Tensor:
    """Y of the slab, with `x.u` for V; fills `final` for the sequences that end in it. `m` are the scores, where they are there already."""
    y = product(scores(x.q, x.k, x.decay) if m is None else m, x.u)
    if carry is not None:
        for step in slab.steps:
            if step.level == 0:
                y[step.chunks] += product(x.reading[step.chunks], carry[step.rows])
    if final is not None:
        for step in slab.steps:
            end = grid.ending(step)
            if end is not None:
                writing = x.k[end.chunks] if x.decay is None else x.k[end.chunks] * x.decay.tail[end.chunks]
                left = product(writing.mT, x.u[end.chunks])
                if carry is not None and end.level == 0:
                    left += _decayed(carry[end.rows], x.decay, end.chunks)
                final[end.rows] = left
    return y


def fast_backward(
    grid: ChunkGrid,
    slab: Slab,
    x: Operands,
    dy: Tensor | None,
    carry: Tensor | None,
    d_final: Tensor | None,
    d_carry: Tensor | None,
    want: frozenset[str],
) -> OperandGradients:
    """Gradients of q, k, u (for V), g's dG and, where wanted as "y", Y itself; adds to `d_carry` what the first chunks took."""
    m = scores(x.q, x.k, x.decay)
    out = OperandGradients(u=torch.zeros_like(x.u) if dy is None else product(m.mT, dy))
    if "y" in want:
        out.y = fast_forward(grid, slab, x, m, carry, None)
    zero = torch.zeros_like(x.k)
    log = torch.zeros_like(x.k[..., :1]) if x.decay is not None and "g" in want else None
    out.q, out.k, out.log = zero if "q" in want else None, zero.clone() if "k" in want else None, log
    if dy is not None:
        inner = scores_backward(x.q, x.k, m, x.decay, product(dy, x.u.mT), want)
        out.q, out.k, out.log = inner.q, inner.k, inner.log if log is not None else None
    for step in slab.steps:
        if carry is not None and step.level == 0 and dy is not None:
            _through_carry(out, x, dy, step.chunks, carry[step.rows], None if d_carry is None else d_carry[step.rows])
        end = grid.ending(step)
        if d_final is not None and end is not None:
            started = carry is not None and end.level == 0
            before = carry[end.rows] if carry is not None and started else None
            _through_final(out, x, end.chunks, d_final[end.rows], before, d_carry[end.rows] if d_carry is not None and started else None)
    return out


def _through_carry(out: OperandGradients, x: Operands, dy: Tensor, which: slice, carry: Tensor, d_carry: Tensor | None) -> None:
    """What e^G Q W adds to dq, dG and dW."""
    reading = x.q[which] if x.decay is None else x.q[which] * x.decay.head[which]
    if d_carry is not None:
        d_carry += product(reading.mT, dy[which])
    d_reading = product(dy[which], carry.mT)
    if x.decay is not None:
        d_reading.mul_(x.decay.head[which])
    if out.q is not None:
        out.q[which] += d_reading
    if out.log is not None:
        out.log[which] += (d_reading * x.q[which]).sum(-1, keepdim=True)


def _through_final(out: OperandGradients, x: Operands, which: slice, d_final: Tensor, carry: Tensor | None, d_carry: Tensor | None) -> None:
    """What (e^(G_C - G) K)^T V + e^(G_C) W passes back."""
    writing = x.k[which] if x.decay is None else x.k[which] * x.decay.tail[which]
    assert out.u is not None
    out.u[which] += product(writing, d_final)
    d_writing = product(x.u[which], d_final.mT)
    if x.decay is not None:
        d_writing.mul_(x.decay.tail[which])
    if out.k is not None:
        out.k[which] += d_writing
    if out.log is not None:
        r = (d_writing * x.k[which]).sum(-1, keepdim=True)
        if out.left is None:
            out.left = torch.zeros_like(out.log)
        out.left[which] = r
        if carry is not None:
            out.log[which][:, :, -1:] += _decayed((carry * d_final).sum((-2, -1), keepdim=True), x.decay, which)
    if d_carry is not None:
        d_carry += _decayed(d_final, x.decay, which)
