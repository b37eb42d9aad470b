"""fast_core: each chunk by itself, a slab of chunks at once; a chunk too long for that goes in blocks that hand on W (SPEC.md 2, 10).

A packed call's cu_seqlens is read on the host.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.fast_core import FastCore
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict, refused

from .causal import row_sum
from .chunk_grid import ChunkGrid, Slab, compute_dtype
from .decay import log_decay_gradient
from .fast_chunks import fast_backward, fast_forward
from .packing import refuse_packed_graph
from .scratch import chunk_bytes, slab_budget
from .slow_core import Recurrence

__all__ = ["backward_candidates", "candidates", "run", "run_backward", "supports"]

_WANTS = {"q": "q", "k": "k", "v": "u", "gate": "y", "g": "g", "initial_state": "state"}
_WHOLE_UP_TO = 256
"""Tokens of the largest chunk that is offered as one product."""
_WHOLE_IN_GRAPH = 2048


def _chunk(signature: Signature) -> int:
    return min(int(signature.option("chunk_size") or 1), max(1, signature.dim("T")))


def supports(signature: Signature, machine: Machine) -> Verdict:
    """Everything but, in a captured graph, packed calls and chunks that are too large to be one product."""
    verdict = refuse_packed_graph(signature)
    if signature.launch == "graph" and _chunk(signature) > _WHOLE_IN_GRAPH:
        verdict &= refused(f"chunks of more than {_WHOLE_IN_GRAPH} tokens run in blocks, whose index the host makes, which a captured graph cannot")
    return verdict


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """Whole chunks, or blocks of a chunk that hand on W; in a captured graph whole chunks only."""
    chunk = _chunk(signature)
    if signature.launch == "graph":
        return [Candidate("eager", "chunked")]
    whole = [Candidate("eager", "chunked")] if chunk <= _WHOLE_UP_TO else []
    blocks = [Candidate("eager", "blocked", (("block", block),)) for block in (64, 32) if chunk > block]
    return [*whole, *blocks]


def backward_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """As forward."""
    return [replace(candidate, direction="backward") for candidate in candidates(signature, machine)]


class _Whole:
    """A call on its chunk grid."""

    def __init__(self, call: FastCore) -> None:
        self.call, v = call, call.v
        self.dtype, self.heads = compute_dtype(v), v.shape[2]
        self.grid = ChunkGrid(v.shape[0], v.shape[1], call.chunk_size, offset=call.chunk_offset, cu_seqlens=call.cu_seqlens, device=v.device)
        # Without a decay, slow_core's loader is fast_core's: u is v, no w.
        self.source = Recurrence(self.grid, call.q, call.k, v, None, call.g, None, call.gate, call.scale, call.initial_state)
        self.carry = self.source.states(call.initial_state) if call.chunk_offset and call.initial_state is not None else None

    def slabs(self, *, backward: bool = False) -> list[Slab]:
        size = chunk_bytes(self.heads, self.grid.chunk, self.call.k.shape[3], self.call.v.shape[3], self.dtype)
        return list(self.grid.slabs(size, slab_budget(self.call.v.device, backward=backward)))

    def forward(self) -> tuple[Tensor | None, ...]:
        call, v = self.call, self.call.v
        o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        final = self.source.states(call.initial_state) if call.output_final_state else None
        for slab in self.slabs():
            y = fast_forward(self.grid, slab, self.source.load(slab), None, self.carry, final)
            if call.gate is not None:
                y.mul_(self.source.gather(slab, call.gate))
            self.grid.scatter(slab, y, o)
        return o, None if final is None else self.grid.in_call_order(final)

    def backward(self, d_o: Tensor | None, given_d_final: Tensor | None, needs: frozenset[str]) -> dict[str, Tensor]:
        call = self.call
        d_final = None if given_d_final is None else self.source.states(given_d_final)
        d_carry = self.source.states(None)
        if d_final is not None:  # a sequence without tokens returns its initial state
            d_carry[self._without_tokens()] = d_final[self._without_tokens()]
        out = {name: torch.empty_like(getattr(call, name), memory_format=torch.contiguous_format) for name in needs - {"initial_state"}}
        want = frozenset(_WANTS[name] for name in needs)
        for slab in self.slabs(backward=True):
            x = self.source.load(slab)
            do = None if d_o is None else self.source.gather(slab, d_o)
            dy = do if do is None or call.gate is None else do * self.source.gather(slab, call.gate)
            d = fast_backward(self.grid, slab, x, dy, self.carry, d_final, d_carry, want)
            found = {
                "q": None if d.q is None else d.q.mul_(call.scale),
                "k": d.k,
                "v": d.u,
                "gate": None if d.y is None else torch.zeros_like(d.y[..., :1]) if do is None else row_sum(do, d.y),
                "g": None if d.log is None else log_decay_gradient(d.log, d.left),
            }
            for name, target in out.items():
                grad = found[name]
                assert grad is not None
                self.grid.scatter(slab, grad, target)
        if "initial_state" in needs and call.initial_state is not None:
            out["initial_state"] = self.grid.in_call_order(d_carry).to(call.initial_state.dtype)
        return out

    def _without_tokens(self) -> slice:
        """Their rows, which come last in the grid's order."""
        return slice(self.grid.alive[0] if self.grid.alive else 0, None)


class _Blocked:
    """A call as linear attention over its chunks, each a sequence of its own, in blocks: slow_core's recurrence without a correction."""

    def __init__(self, call: FastCore, block: int) -> None:
        self.call, self.block = call, block
        bounds = [0, call.v.shape[1]] if call.cu_seqlens is None else call.cu_seqlens.tolist()
        self.edges = [0]  # between chunks
        self.firsts: list[int | None] = []  # each sequence's first chunk; None: it has no token
        self.lasts: list[int | None] = []
        for start, stop in itertools.pairwise(bounds):
            self.firsts.append(len(self.edges) - 1 if stop > start else None)
            edge = start + call.chunk_size - call.chunk_offset
            while edge < stop:
                self.edges.append(edge)
                edge += call.chunk_size
            if stop > start:
                self.edges.append(stop)
            self.lasts.append(len(self.edges) - 2 if stop > start else None)

    def _recurrence(self, row: int) -> Recurrence:
        """Batch row `row`; packed calls have one."""
        call, part = self.call, slice(row, row + 1)
        edges = torch.tensor(self.edges)
        grid = ChunkGrid(1, call.v.shape[1], self.block, cu_seqlens=edges, device=call.v.device)
        v, g, gate = call.v[part], None if call.g is None else call.g[part], None if call.gate is None else call.gate[part]
        return Recurrence(grid, call.q[part], call.k[part], v, None, g, None, gate, call.scale, self._started(row))

    def _rows(self, row: int) -> list[tuple[int, int | None, int | None]]:
        """(row of the call's states, first chunk, last chunk) of each sequence in a batch row."""
        if self.call.cu_seqlens is None:
            return [(row, self.firsts[0], self.lasts[0])]
        return list(zip(range(len(self.firsts)), self.firsts, self.lasts, strict=True))

    def _chunk_states(self) -> Tensor:
        v, dtype = self.call.v, compute_dtype(self.call.v)
        return torch.zeros(len(self.edges) - 1, v.shape[2], self.call.k.shape[3], v.shape[3], dtype=dtype, device=v.device)

    def _started(self, row: int) -> Tensor | None:
        if self.call.initial_state is None or not self.call.chunk_offset:
            return None
        states = self._chunk_states()
        for sequence, first, _ in self._rows(row):
            if first is not None:
                states[first] = self.call.initial_state[sequence]
        return states

    def _fresh_state(self, given: Tensor | None) -> Tensor:
        v = self.call.v
        sequences = v.shape[0] if self.call.cu_seqlens is None else len(self.firsts)
        shape = (sequences, v.shape[2], self.call.k.shape[3], v.shape[3])
        if given is None:
            return torch.zeros(shape, dtype=compute_dtype(v), device=v.device)
        return given.to(dtype=compute_dtype(v), copy=True, memory_format=torch.contiguous_format)

    def forward(self) -> tuple[Tensor | None, ...]:
        call = self.call
        o = torch.empty(call.v.shape, dtype=call.v.dtype, device=call.v.device)
        final = self._fresh_state(call.initial_state) if call.output_final_state else None
        for row in range(call.v.shape[0]):
            part, ends = self._recurrence(row).forward(final=True, save=False)
            assert part is not None
            assert ends is not None
            o[row] = part[0]
            for sequence, _, last in self._rows(row):
                if final is not None and last is not None:
                    final[sequence] = ends[last]
        return o, final

    def backward(self, d_o: Tensor | None, d_final: Tensor | None, needs: frozenset[str]) -> dict[str, Tensor]:
        call = self.call
        out = {name: torch.empty_like(getattr(call, name), memory_format=torch.contiguous_format) for name in needs - {"initial_state"}}
        d_initial = self._fresh_state(d_final)
        names = {"v": "u"}
        for row in range(call.v.shape[0]):
            d_ends = self._chunk_states()
            for sequence, _, last in self._rows(row):
                if d_final is not None and last is not None:
                    d_ends[last] = d_final[sequence]
            inner = self._recurrence(row)
            kept = needs if inner.initial_state is not None else needs - {"initial_state"}
            asked = frozenset(names.get(name, name) for name in kept)
            found = inner.backward(None if d_o is None else d_o[row : row + 1], d_ends, None, asked)
            for name, target in out.items():
                target[row] = found[names.get(name, name)][0]
            for sequence, first, _ in self._rows(row):
                if first is not None:
                    d_initial[sequence] = found["initial_state"][first] if "initial_state" in found else 0
        if "initial_state" in needs and call.initial_state is not None:
            out["initial_state"] = d_initial.to(call.initial_state.dtype)
        return out


def _plan(call: FastCore, candidate: Candidate) -> _Whole | _Blocked:
    return _Blocked(call, int(candidate.param("block"))) if candidate.variant == "blocked" else _Whole(call)


def run(call: FastCore, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """o and the final W."""
    return _plan(call, candidate).forward()


def run_backward(
    call: FastCore, grads: tuple[Tensor | None, ...], states: Tensor | None, needs: frozenset[str], candidate: Candidate
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, gate, g and initial_state, in that order."""
    given = frozenset(name for name in needs if getattr(call, name) is not None)
    found = _plan(call, candidate).backward(grads[0], grads[1], given)
    return tuple(found.get(name) for name in ("q", "k", "v", "gate", "g", "initial_state"))
