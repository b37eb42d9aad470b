"""slow_core, chunk by chunk: the products of a slab at once, the state step by step (SPEC.md 4, 10).

A packed call's cu_seqlens is read on the host.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.slow_core import SlowCore
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict

from .causal import row_sum
from .chunk_grid import ChunkGrid, Slab, compute_dtype
from .decay import Decay, log_decay_gradient
from .frobenius import normalized, normalized_backward
from .packing import refuse_packed_graph
from .recurrence import Operands, advance, chunk_starts, read, retreat
from .scratch import HeadRange, by_heads, chunk_bytes, head_ranges, refuse_huge_chunk, slab_budget

__all__ = ["Recurrence", "backward_candidates", "candidates", "run", "run_backward", "supports"]

_WANTS = {"q": "q", "k": "k", "u": "u", "w": "w", "g": "g", "chunk_decay": "factor", "gate": "y", "initial_state": "state"}


def supports(signature: Signature, machine: Machine) -> Verdict:
    """Everything but chunks above 4096 tokens, and packed calls in a captured graph."""
    return refuse_huge_chunk(signature) & refuse_packed_graph(signature)


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """One way to compute; in training with or without the chunk-start states kept."""
    saving = signature.regime == "training" and signature.may_save and not signature.option("normalize_final")
    kept = [Candidate("eager", "chunked", saves_states=True)] if saving else []
    return [*kept, Candidate("eager", "chunked")]


def backward_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """The reverse sweep, from kept states or from recomputed ones."""
    return [replace(candidate, direction="backward") for candidate in candidates(replace(signature, regime="training"), machine)]


@dataclass(frozen=True, slots=True)
class Recurrence:
    """One call on its grid: what `forward` and `backward` work on. `w` is None without the delta correction."""

    grid: ChunkGrid
    q: Tensor
    k: Tensor
    u: Tensor
    w: Tensor | None
    g: Tensor | None
    chunk_decay: Tensor | None
    gate: Tensor | None
    scale: float
    initial_state: Tensor | None
    normalize_read: bool = False
    normalize_final: bool = False

    def slabs(self, *, backward: bool = False) -> list[Slab]:
        """The call's slabs."""
        heads, values, keys = *self.u.shape[2:], self.k.shape[-1]
        size = chunk_bytes(heads, self.grid.chunk, keys, values, compute_dtype(self.u), states=5 if backward else 0)
        return list(self.grid.slabs(size, slab_budget(self.u.device, backward=backward)))

    def gather(self, slab: Slab, x: Tensor) -> Tensor:
        """A token tensor's chunks."""
        return self.grid.gather(slab, x, self.u.shape[2], compute_dtype(self.u))

    def load(self, slab: Slab) -> Operands:
        """One slab's operands, fresh."""
        factor = None if self.chunk_decay is None else self.grid.gather_per_chunk(slab, self.chunk_decay, compute_dtype(self.u))[..., None, None]
        return Operands(
            self.gather(slab, self.q).mul_(self.scale),
            self.gather(slab, self.k),
            self.gather(slab, self.u),
            None if self.w is None else self.gather(slab, self.w),
            None if self.g is None else Decay.of(self.gather(slab, self.g)),
            factor,
        )

    def states(self, given: Tensor | None) -> Tensor:
        """A fresh state in the grid's order."""
        return self.grid.states(given, self.u, self.u.shape[2], (self.k.shape[-1], self.u.shape[-1]))

    def forward(self, *, final: bool, save: bool) -> tuple[Tensor | None, ...]:
        """o, the final state (None unless `final`), and with `save` the chunk-start states `[B, M, H, K, V]`."""
        state = self.states(self.initial_state)
        o = torch.empty(self.u.shape, dtype=self.u.dtype, device=self.u.device)
        saved = torch.empty(*self.grid.per_chunk_shape, *state.shape[1:], dtype=state.dtype, device=state.device) if save else None
        for slab in self.slabs():
            x = self.load(slab)
            starts = None if saved is None else torch.empty(slab.size, *state.shape[1:], dtype=state.dtype, device=state.device)
            y = read(x, advance(state, slab, x, normalize_read=self.normalize_read, outputs=True, starts=starts))
            if self.gate is not None:
                y.mul_(self.gather(slab, self.gate))
            self.grid.scatter(slab, y, o)
            if saved is not None and starts is not None:
                self.grid.scatter_per_chunk(slab, starts, saved)
        last = self.grid.in_call_order(normalized(state) if self.normalize_final else state) if final else None
        return (o, last) if saved is None else (o, last, saved)

    def backward(self, d_o: Tensor | None, d_final: Tensor | None, saved: Tensor | None, needs: frozenset[str]) -> dict[str, Tensor]:
        """Gradients by argument name, each in its input's dtype."""
        slabs = self.slabs(backward=True)
        d_state = self.states(d_final)
        recomputed, kept = d_state[:0], None if self.normalize_final else saved
        if kept is None:
            state = self.states(self.initial_state)
            recomputed = chunk_starts(state, self.grid, slabs, self.load, normalize_read=self.normalize_read)
            if self.normalize_final:
                d_state = normalized_backward(state, d_state)
        want = frozenset(_WANTS[name] for name in needs)
        out = {name: torch.empty_like(getattr(self, name), memory_format=torch.contiguous_format) for name in needs - {"initial_state"}}
        for slab in reversed(slabs):
            begun = recomputed[slab.first : slab.last] if kept is None else self.grid.gather_per_chunk(slab, kept, d_state.dtype)
            self._backward_slab(slab, d_state, begun, d_o, want, out)
        if "initial_state" in needs and self.initial_state is not None:
            out["initial_state"] = self.grid.in_call_order(d_state).to(self.initial_state.dtype)
        return out

    def _backward_slab(self, slab: Slab, d_state: Tensor, starts: Tensor, d_o: Tensor | None, want: frozenset[str], out: dict[str, Tensor]) -> None:
        x = self.load(slab)
        do = None if d_o is None else self.gather(slab, d_o)
        dy = do if do is None or self.gate is None else do * self.gather(slab, self.gate)
        d = retreat(d_state, slab, x, starts, dy, normalize_read=self.normalize_read, want=want)
        found = {
            "q": None if d.q is None else d.q.mul_(self.scale),
            "k": d.k,
            "u": d.u,
            "w": d.w,
            "g": None if d.log is None else log_decay_gradient(d.log, d.left),
            "gate": None if d.y is None or do is None else row_sum(do, d.y),
        }
        for name, grad in found.items():
            if name in out:
                if grad is None:
                    grad = torch.zeros(1, 1, 1, 1, dtype=x.u.dtype, device=x.u.device).expand(slab.size, x.u.shape[1], self.grid.chunk, 1)
                    grad = grad.expand(-1, -1, -1, out[name].shape[3] if out[name].dim() == 4 else 1)
                self.grid.scatter(slab, grad, out[name])
        if "chunk_decay" in out and d.factor is not None:
            self.grid.scatter_per_chunk(slab, d.factor[..., 0, 0], out["chunk_decay"])


def _recurrence(call: SlowCore) -> Recurrence:
    grid = ChunkGrid(call.u.shape[0], call.u.shape[1], call.chunk_size, cu_seqlens=call.cu_seqlens, device=call.u.device)
    return Recurrence(
        grid,
        call.q,
        call.k,
        call.u,
        call.w if call.delta else None,
        call.g,
        call.chunk_decay,
        call.gate,
        call.scale,
        call.initial_state,
        call.normalize_read,
        call.normalize_final,
    )


def _ranges(call: SlowCore) -> list[HeadRange]:
    chunk = min(call.chunk_size, call.u.shape[1])
    return head_ranges(call.u.shape[2], call.q.shape[2], chunk, compute_dtype(call.u))


def run(call: SlowCore, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """o, the final state, and the chunk-start states where the candidate keeps them."""
    ranges = _ranges(call)
    if len(ranges) > 1:
        return by_heads(call, ranges, lambda part, _: run(part, candidate), (2, 1, 2) if candidate.saves_states else (2, 1))
    return _recurrence(call).forward(final=call.output_final_state, save=candidate.saves_states)


def run_backward(
    call: SlowCore, grads: tuple[Tensor | None, ...], states: Tensor | None, needs: frozenset[str], candidate: Candidate
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, u, w, g, chunk_decay, gate and initial_state, in that order."""
    ranges = _ranges(call)
    if len(ranges) > 1:

        def part(narrowed: SlowCore, heads: HeadRange) -> tuple[Tensor | None, ...]:
            return run_backward(narrowed, (heads.of(grads[0], 2), heads.of(grads[1], 1)), heads.of(states, 2), needs, candidate)

        return by_heads(call, ranges, part, (2, 2, 2, 2, 2, 2, 2, 1))
    given = frozenset(name for name in needs if getattr(call, name) is not None)
    inner = given if call.delta else given - {"w"}
    found = _recurrence(call).backward(grads[0], grads[1], states, inner)
    if "w" in given and not call.delta:
        found["w"] = torch.zeros_like(call.w, memory_format=torch.contiguous_format)
    return tuple(found.get(name) for name in _WANTS)
