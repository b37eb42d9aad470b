"""Two states side by side on their way through the chunks, forward and back: `coupled_core`'s loop (SPEC.md 5).

A pair is `[sequences, H, K, 2V]`, the fast state in the first V columns, the slow one in the others, so that one product serves both: they share
q, k, w, and everything that they make (`U'`, reads, their gradients) is `[n, H, C, 2V]` alike. What each has of its own is a number per chunk and
head, `[n, H, 1, 2, 1]`. A slab's products run at once; only what touches the states goes step by step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .causal import attend, product
from .chunk_grid import Slab
from .recurrence import Operands, by_step

__all__ = ["Mixing", "Pair", "PairGradients", "Seen", "advance", "halves", "retreat"]

_EPS = 1e-8


def halves(pair: Tensor) -> Tensor:
    """`[..., 2V]` as `[..., 2, V]`."""
    return pair.unflatten(-1, (2, -1))


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """The sum of `a ⊙ b` over K and V, for each half: `[..., K, 2V]` to `[..., 1, 2, 1]`."""
    return halves((a * b).sum(-2, keepdim=True)).sum(-1, keepdim=True)


@dataclass(frozen=True, slots=True)
class Mixing:
    """A slab's numbers: what flows into the fast state out of the slow one and back, `[n, H, 1, 1]`, and both decays (None: they are 1)."""

    to_fast: Tensor
    to_slow: Tensor
    decay: Tensor | None

    def mixed(self, pair: Tensor) -> Tensor:
        """Both states `[n, H, K, 2V]`, each with its share of the other."""
        out = torch.empty_like(pair)
        _mix(pair, self.to_fast, self.to_slow, out)
        return out


def _mix(pair: Tensor, to_fast: Tensor, to_slow: Tensor, out: Tensor) -> None:
    fast, slow = pair.chunk(2, -1)
    into_fast, into_slow = out.chunk(2, -1)
    torch.addcmul(fast, slow, to_fast, out=into_fast)
    torch.addcmul(slow, fast, to_slow, out=into_slow)


@dataclass(frozen=True, slots=True)
class Pair:
    """The pairs on their way: each half of `states` is the true state times a number, kept apart so that dividing by the norm costs no pass.

    `scale` turns the halves into the true states, `norm` is what these then measure; both are `[sequences, H, 1, 2, 1]`.
    """

    states: Tensor
    scale: Tensor
    norm: Tensor

    @classmethod
    def of(cls, states: Tensor) -> Pair:
        """From true states, which it takes over."""
        norm = _inner(states, states).sqrt_()
        return cls(states, torch.ones_like(norm), norm)

    def value(self) -> Tensor:
        """The true states; the pair is used up."""
        halves(self.states).mul_(self.scale)
        return self.states


def advance(pair: Pair, slab: Slab, x: Operands, mixing: Mixing, *, outputs: bool, starts: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Moves `pair` over the slab; returns U' and, with `outputs`, the reads Q N(S~), both `[n, H, C, 2V]`.

    `starts [n, H, K, 2V]`, where given, receives the true pair at each chunk's start.
    """
    shape = (*x.u.shape[:3], pair.states.shape[-1])
    updates = torch.empty(shape, dtype=x.u.dtype, device=x.u.device) if x.w is not None else torch.cat([x.u, x.u], -1)
    held = torch.empty(shape, dtype=x.u.dtype, device=x.u.device) if outputs else None
    u_by, update_by, write_by, q_by = (by_step(slab, t) for t in (x.u.unsqueeze(-2), updates, x.k.mT, x.q))
    w_by, held_by, decay_by = (None if t is None else by_step(slab, t) for t in (x.w, held, mixing.decay))
    to_fast, to_slow = by_step(slab, mixing.to_fast), by_step(slab, mixing.to_slow)
    mixed = torch.empty((slab.widest * shape[1], *shape[2:]), dtype=x.u.dtype, device=x.u.device)
    for index, step in enumerate(slab.steps):
        current, scale, norm = (t[step.rows].flatten(0, 1) for t in (pair.states, pair.scale, pair.norm))
        if starts is not None:
            torch.mul(halves(pair.states[step.rows]), pair.scale[step.rows], out=halves(starts[step.chunks]))
        factor, kept_norm = (scale, norm) if decay_by is None else (scale * decay_by[index], norm * decay_by[index].abs())
        reading = factor / (kept_norm + _EPS)
        update = update_by[index]
        if w_by is not None:
            torch.bmm(w_by[index], current, out=update)
            torch.addcmul(u_by[index], halves(update), reading, value=-1, out=halves(update))
        if held_by is not None:
            torch.bmm(q_by[index], current, out=held_by[index])
            halves(held_by[index]).mul_(reading)
        added = mixed[: update.shape[0]]
        _mix(update, to_fast[index], to_slow[index], added)
        _mix_scaled(current, factor, to_fast[index], to_slow[index])
        current.baddbmm_(write_by[index], added)
        size = _inner(current, current).sqrt_()
        torch.reciprocal(size + _EPS, out=scale)
        torch.mul(size, scale, out=norm)
    return updates, held


def _mix_scaled(pair: Tensor, factor: Tensor, to_fast: Tensor, to_slow: Tensor) -> None:
    """Both halves times their factor, then mixed, in place."""
    fast, slow = pair.chunk(2, -1)
    by_fast, by_slow = factor.unbind(-2)
    into_slow = fast * (to_slow * by_fast)
    fast.mul_(by_fast).addcmul_(slow, to_fast * by_slow)
    slow.mul_(by_slow).add_(into_slow)


@dataclass(frozen=True, slots=True)
class _Normalized:
    """N(S) for a slab's pairs, with what its gradient needs; S = 0 has the gradient 0."""

    pair: Tensor
    inverse: Tensor
    along: Tensor

    @classmethod
    def of(cls, pair: Tensor) -> _Normalized:
        norm = _inner(pair, pair).sqrt_()
        inverse = (norm + _EPS).reciprocal_()
        there = norm > 0
        return cls(pair, inverse.where(there, 0.0), (inverse.square() / norm).where(there, 0.0))

    def value(self) -> Tensor:
        return (halves(self.pair) * self.inverse).flatten(-2)


@dataclass(frozen=True, slots=True)
class Seen:
    """What a slab's chunks saw and wrote, all of them at once, from the pairs `starts [n, H, K, 2V]`: S~, N(S~), U', X, and X mixed."""

    starts: Tensor
    kept: _Normalized
    read: Tensor
    update: Tensor
    written: Tensor
    mixed: _Normalized

    @classmethod
    def of(cls, starts: Tensor, x: Operands, mixing: Mixing) -> Seen:
        """From the operands of the slab; `x.u` stays as it is."""
        kept = _Normalized.of(starts if mixing.decay is None else (halves(starts) * mixing.decay).flatten(-2))
        read = kept.value()
        if x.w is None:
            update = torch.cat([x.u, x.u], -1)
        else:
            update = product(x.w, read)
            torch.sub(x.u.unsqueeze(-2), halves(update), out=halves(update))
        written = attend(kept.pair, x.k.mT, update)
        return cls(starts, kept, read, update, written, _Normalized.of(mixing.mixed(written)))


@dataclass(frozen=True, slots=True)
class PairGradients:
    """What the reverse loop leaves: dU' `[n, H, C, 2V]`, dX, and the gradients of the slab's numbers."""

    update: Tensor
    written: Tensor
    to_fast: Tensor
    to_slow: Tensor
    decay: Tensor | None


def retreat(d_pair: Tensor, slab: Slab, x: Operands, seen: Seen, mixing: Mixing, du: Tensor, d_read: Tensor) -> PairGradients:
    """Moves `d_pair`, the gradient of the pair that leaves the slab, back over it.

    `du` and `d_read` are what the outputs pass to U' and to N(S~); both are completed in place.
    """
    d_mixed, d_written = torch.empty_like(seen.written), torch.empty_like(seen.written)
    mixed, kept = seen.mixed, seen.kept
    d_mixed_by, d_written_by, du_by, d_read_by, write_by = (by_step(slab, t) for t in (d_mixed, d_written, du, d_read, x.k))
    w_by = None if x.w is None else by_step(slab, x.w.mT)
    mixed_by, mixed_inverse, mixed_along = (by_step(slab, t) for t in (mixed.pair, mixed.inverse, mixed.along))
    kept_by, kept_inverse, kept_along = (by_step(slab, t) for t in (kept.pair, kept.inverse, kept.along))
    to_fast, to_slow = by_step(slab, mixing.to_fast), by_step(slab, mixing.to_slow)
    decay_by = None if mixing.decay is None else by_step(slab, mixing.decay)
    for index in range(len(slab.steps) - 1, -1, -1):
        current, through, written = d_pair[slab.steps[index].rows].flatten(0, 1), d_mixed_by[index], d_written_by[index]
        torch.mul(halves(current), mixed_inverse[index], out=halves(through))
        halves(through).addcmul_(halves(mixed_by[index]), _inner(mixed_by[index], current).mul_(mixed_along[index]), value=-1)
        _mix(through, to_slow[index], to_fast[index], written)
        du_by[index].baddbmm_(write_by[index], written)
        if w_by is not None:
            d_read_by[index].baddbmm_(w_by[index], du_by[index], alpha=-1)
        torch.addcmul(halves(written), halves(d_read_by[index]), kept_inverse[index], out=halves(current))
        halves(current).addcmul_(halves(kept_by[index]), _inner(kept_by[index], d_read_by[index]).mul_(kept_along[index]), value=-1)
        if decay_by is not None:
            halves(current).mul_(decay_by[index])
    fast, slow = seen.written.chunk(2, -1)
    into_fast, into_slow = d_mixed.chunk(2, -1)
    d_decay = None
    if mixing.decay is not None:  # S times the gradient of S~, where N(S~) passes on next to nothing along S~ itself: 1 / (n + eps) - n / (n + eps)^2
        d_decay = _inner(seen.starts, d_written) + _inner(seen.starts, d_read) * (_EPS * kept.inverse.square())
    return PairGradients(du, d_written, (into_fast * slow).sum((-2, -1)), (into_slow * fast).sum((-2, -1)), d_decay)
