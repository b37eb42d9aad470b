"""The state's way through the chunks, forward and back: the one loop of this backend (SPEC.md 4, 10).

A slab's products run at once over all its chunks; only what touches the state goes step by step. States are `[sequences, H, K, V]`, updated in
place; everything else is `[n, H, C, *]`, and q already holds the scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .causal import attend, product, row_sum, scores, scores_backward
from .chunk_grid import ChunkGrid, Slab
from .decay import Decay
from .frobenius import normalized, normalized_backward

__all__ = ["OperandGradients", "Operands", "advance", "by_step", "chunk_starts", "corrected", "read", "retreat"]


@dataclass(frozen=True, slots=True)
class Operands:
    """One slab of slow_core: `w` is None without the delta correction, `factor [n, H, 1, 1]` is the per-chunk decay."""

    q: Tensor
    k: Tensor
    u: Tensor
    w: Tensor | None
    decay: Decay | None
    factor: Tensor | None

    @property
    def reading(self) -> Tensor:
        """e^G ⊙ Q."""
        return self.q if self.decay is None else self.q * self.decay.head

    @property
    def writing(self) -> Tensor:
        """e^(G_C - G) ⊙ K."""
        return self.k if self.decay is None else self.k * self.decay.tail


def by_step(slab: Slab, x: Tensor) -> tuple[Tensor, ...]:
    """One view `[rows * H, ...]` of `x [n, H, ...]` per step."""
    return x.flatten(0, 1).split([(step.last - step.first) * x.shape[1] for step in slab.steps])


def advance(state: Tensor, slab: Slab, x: Operands, *, normalize_read: bool, outputs: bool, starts: Tensor | None = None) -> Tensor | None:
    """Moves `state` over the slab, turns `x.u` into U' = u - w S in place, and returns the reads e^G Q S when `outputs`.

    `starts [n, H, K, V]`, where given, receives the state at each chunk's start, before its factor.
    """
    size = x.k.shape[2]
    lefts = [part for part in (x.w, x.reading if outputs else None) if part is not None]
    left = None if not lefts else lefts[0] if len(lefts) == 1 else torch.cat(lefts, dim=2)
    held = None if left is None else torch.empty(*left.shape[:3], x.u.shape[3], dtype=left.dtype, device=left.device)
    left_steps = None if left is None else by_step(slab, left)
    held_steps = None if held is None else by_step(slab, held)
    u_steps, write_steps = by_step(slab, x.u), by_step(slab, x.writing.mT)
    totals = None if x.decay is None else by_step(slab, x.decay.total)
    factors = None if x.factor is None else by_step(slab, x.factor)
    for index, step in enumerate(slab.steps):
        current = state[step.rows].flatten(0, 1)
        if starts is not None:
            starts[step.chunks].copy_(state[step.rows])
        if factors is not None:
            current.mul_(factors[index])
        if left_steps is not None and held_steps is not None:
            torch.bmm(left_steps[index], normalized(current) if normalize_read else current, out=held_steps[index])
            if x.w is not None:
                u_steps[index].sub_(held_steps[index][:, :size])
        if totals is not None:
            current.mul_(totals[index])
        current.baddbmm_(write_steps[index], u_steps[index])
    return None if held is None or not outputs else held[:, :, held.shape[2] - size :]


def corrected(x: Operands, seen: Tensor) -> Operands:
    """The operands with U' = u - w S in u's place, for every chunk at once, from the states `seen` that its reads saw."""
    if x.w is None:
        return x
    u = torch.baddbmm(x.u.flatten(0, 1), x.w.flatten(0, 1), seen.flatten(0, 1), alpha=-1).unflatten(0, x.u.shape[:2])
    return Operands(x.q, x.k, u, x.w, x.decay, x.factor)


def read(x: Operands, held: Tensor | None, m: Tensor | None = None) -> Tensor:
    """Y = held + M U', where `x.u` is U' already, `held` is e^G Q S (None: no state is read), and `m` the scores where they are there already."""
    if m is None:
        m = scores(x.q, x.k, x.decay)
    return product(m, x.u) if held is None else attend(held, m, x.u)


@dataclass(slots=True)
class OperandGradients:
    """Gradients of one slab's operands, dG for g's, without what a token leaves in the state, which is `left`; None where not wanted. q's is that of the
    scaled q."""

    q: Tensor | None = None
    k: Tensor | None = None
    u: Tensor | None = None
    w: Tensor | None = None
    log: Tensor | None = None
    left: Tensor | None = None
    factor: Tensor | None = None
    y: Tensor | None = None


def retreat(
    d_state: Tensor, slab: Slab, x: Operands, starts: Tensor | None, dy: Tensor | None, *, normalize_read: bool, want: frozenset[str]
) -> OperandGradients:
    """Moves `d_state`, the gradient of the state that leaves the slab, back over it, and returns the slab's gradients.

    `starts [n, H, K, V]` are the states at the chunks' starts, before their factor; None means that chunks keep no state at all, and `d_state`
    is not touched. `dy` is the gradient of Y (None: zero). `want` names operands out of q, k, u, w, g, factor, y; "state" keeps `d_state` right.
    """
    seen = scaled = starts
    if starts is not None and x.factor is not None:
        scaled = starts * x.factor
        seen = scaled
    if normalize_read and scaled is not None:
        seen = normalized(scaled)
    if seen is not None:
        x = corrected(x, seen)
    m = scores(x.q, x.k, x.decay)
    out = OperandGradients()
    if "y" in want:
        out.y = product(m, x.u) if seen is None else attend(product(x.reading, seen), m, x.u)
    du = torch.zeros_like(x.u) if dy is None or not want - {"q", "y"} else product(m.mT, dy)
    leaving = None
    if starts is not None and want - {"q", "y"}:
        leaving = _retreat_states(d_state, slab, x, starts, scaled, du, dy, out, normalize_read=normalize_read, want=want)
    out.u = du
    if "w" in want and x.w is not None and seen is not None:
        out.w = product(du, seen.mT).neg_()
    _operand_gradients(out, x, m, seen, scaled, leaving, dy, want)
    return out


def _retreat_states(
    d_state: Tensor,
    slab: Slab,
    x: Operands,
    starts: Tensor,
    scaled: Tensor | None,
    du: Tensor,
    dy: Tensor | None,
    out: OperandGradients,
    *,
    normalize_read: bool,
    want: frozenset[str],
) -> Tensor:
    """The reverse loop: completes `du`, fills `out.factor`, and returns the gradient of the state that leaves each chunk, `[n, H, K, V]`."""
    leaving = torch.empty_like(starts)
    d_read = torch.zeros_like(starts) if dy is None else product(x.reading.mT, dy)
    d_factor = torch.empty(*starts.shape[:2], 1, 1, dtype=starts.dtype, device=starts.device) if "factor" in want and x.factor is not None else None
    writes, dus, reads, outs = (by_step(slab, t) for t in (x.writing, du, d_read, leaving))
    starts_by, scaled_by = by_step(slab, starts), None if scaled is None else by_step(slab, scaled)
    ws = None if x.w is None else by_step(slab, x.w.mT)
    totals = None if x.decay is None else by_step(slab, x.decay.total)
    factors = None if x.factor is None else by_step(slab, x.factor)
    for index in range(len(slab.steps) - 1, -1, -1):
        current = d_state[slab.steps[index].rows].flatten(0, 1)
        outs[index].copy_(current)
        dus[index].baddbmm_(writes[index], current)
        if ws is not None:
            reads[index].baddbmm_(ws[index], dus[index], alpha=-1)
        if totals is not None:
            current.mul_(totals[index])
        if normalize_read and scaled_by is not None:
            current.add_(normalized_backward(scaled_by[index], reads[index]))
        else:
            current.add_(reads[index])
        if factors is not None:
            if d_factor is not None:
                step = slab.steps[index]
                d_factor[step.chunks] = (starts_by[index] * current).sum((-2, -1), keepdim=True).unflatten(0, (-1, starts.shape[1]))
            current.mul_(factors[index])
    out.factor = d_factor
    return leaving


def _operand_gradients(
    out: OperandGradients,
    x: Operands,
    m: Tensor,
    seen: Tensor | None,
    scaled: Tensor | None,
    leaving: Tensor | None,
    dy: Tensor | None,
    want: frozenset[str],
) -> None:
    """dq, dk and dG, from inside the chunk and from the states on both of its sides."""
    if not want & {"q", "k", "g"}:
        return
    if dy is not None:
        inner = scores_backward(x.q, x.k, m, x.decay, product(dy, x.u.mT), want)
        out.q, out.k, out.log = inner.q, inner.k, inner.log
    else:
        out.q = torch.zeros_like(x.q) if "q" in want else None
        out.k = torch.zeros_like(x.k) if "k" in want else None
        out.log = torch.zeros_like(x.decay.head) if "g" in want and x.decay is not None else None
    if seen is not None and dy is not None and want & {"q", "g"}:
        d_reading = product(dy, seen.mT)
        if x.decay is not None:
            d_reading.mul_(x.decay.head)
        if out.q is not None:
            out.q += d_reading
        if out.log is not None:
            out.log += row_sum(d_reading, x.q)
    if leaving is not None and want & {"k", "g"}:
        d_writing = product(x.u, leaving.mT)
        if x.decay is not None:
            d_writing.mul_(x.decay.tail)
        if out.k is not None:
            out.k += d_writing
        if out.log is not None and x.decay is not None and scaled is not None:
            out.left = row_sum(d_writing, x.k)
            out.log[:, :, -1:] += x.decay.total * (scaled * leaving).sum((-2, -1), keepdim=True)


def chunk_starts(state: Tensor, grid: ChunkGrid, slabs: list[Slab], load: Callable[[Slab], Operands], *, normalize_read: bool) -> Tensor:
    """The state at every chunk's start, `[chunks, H, K, V]`, by a sweep that moves `state` to the end."""
    starts = torch.empty(grid.chunks, *state.shape[1:], dtype=state.dtype, device=state.device)
    for slab in slabs:
        advance(state, slab, load(slab), normalize_read=normalize_read, outputs=False, starts=starts[slab.first : slab.last])
    return starts
