"""deep_core: a block is one product for what it reads and two for what it learns; the carry goes from block to block (SPEC.md 7). Experimental.

A packed call's cu_seqlens is read on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.deep_core import Carry, DeepCore
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict

from .causal import row_sum
from .chunk_grid import ChunkGrid, Slab, Step, compute_dtype
from .deep_blocks import Closing, Tokens, close, close_backward, masses, token_gradients
from .packing import refuse_packed_graph
from .scratch import slab_budget

__all__ = ["backward_candidates", "candidates", "run", "run_backward", "supports"]

_CARRIED = ("initial_state", "initial_error", "initial_mass", "initial_log_decay")
_INPUTS = ("q", "k", "v", "eta", "g", "gate", *_CARRIED)


def supports(signature: Signature, machine: Machine) -> Verdict:
    """Everything but packed calls in a captured graph."""
    return refuse_packed_graph(signature)


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """One way."""
    return [Candidate("eager", "blocks")]


def backward_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """The reverse sweep, from states that are computed again."""
    return [Candidate("eager", "blocks", direction="backward")]


class _Blocks:
    """A call on the grid of its blocks."""

    def __init__(self, call: DeepCore) -> None:
        self.call, v = call, call.v
        self.dtype, self.heads = compute_dtype(v), v.shape[2]
        self.widths = (call.k.shape[3], v.shape[3])
        self.how = Closing(call.normalize, call.chunk_size * call.period)
        self.grid = ChunkGrid(v.shape[0], v.shape[1], self.how.block, offset=call.block_offset, cu_seqlens=call.cu_seqlens, device=v.device)
        self.closed = self._closed()

    def _closed(self) -> Tensor:
        """How many blocks each sequence closes, in the grid's order, on the device."""
        call, order = self.call, self.grid.order
        if call.cu_seqlens is None or order is None:
            return torch.full((self.grid.sequences,), (call.block_offset + self.grid.tokens) // self.how.block, device=call.v.device)
        closed = (call.cu_seqlens.to(device=order.device, dtype=torch.int64).diff() + call.block_offset) // self.how.block
        return closed.index_select(0, order)

    def closes(self, step: Step) -> Tensor:
        """Which of a step's sequences close the block of its level."""
        return self.closed[step.rows] > step.level

    def slabs(self, *, backward: bool = False) -> list[Slab]:
        keys, values = self.widths
        size = self.heads * (4 * self.grid.chunk * (keys + values) + 6 * keys * values) * self.dtype.itemsize
        return list(self.grid.slabs(size, slab_budget(self.call.v.device, backward=backward)))

    def carry(self, given: tuple[Tensor | None, ...]) -> Carry:
        """Fresh tensors in the grid's order: copies of what is given, zeros for the rest."""
        like = self.call.v
        state, error = (self.grid.states(x, like, self.heads, self.widths) for x in given[:2])
        mass, log_decay = (
            self.grid.states(None if x is None else x[..., None, None], like, self.heads, (1, 1)).squeeze(-1).squeeze(-1) for x in given[2:]
        )
        return Carry(state, error, mass, log_decay)

    def gather(self, slab: Slab, x: Tensor) -> Tensor:
        return self.grid.gather(slab, x, self.heads, self.dtype)

    def tokens(self, slab: Slab) -> Tokens:
        k, v, eta = (self.gather(slab, x) for x in (self.call.k, self.call.v, self.call.eta))
        return Tokens(k, v, eta, eta * k)

    def summed_decay(self, slab: Slab) -> Tensor | None:
        return None if self.call.g is None else self.gather(slab, self.call.g).sum((-2, -1))

    def start(self) -> Carry:
        return self.carry(tuple(getattr(self.call, name) for name in _CARRIED))

    def advance(self, carry: Carry, slab: Slab) -> Tensor:
        """Moves the carry over a slab in place; returns D at each block's start, `[n, H, K, V]`."""
        x, decays = self.tokens(slab), self.summed_decay(slab)
        mass = masses(x)
        starts = torch.empty(slab.size, self.heads, *self.widths, dtype=self.dtype, device=x.k.device)
        for step in slab.steps:
            rows, chunks = step.rows, step.chunks
            state = starts[chunks].copy_(carry.state[rows])
            error = carry.error[rows] + x.written[chunks].transpose(-1, -2) @ (x.v[chunks] - x.k[chunks] @ state)
            log_decay = carry.log_decay[rows] if decays is None else carry.log_decay[rows] + decays[chunks]
            after = close(Carry(state, error, carry.mass[rows] + mass[chunks], log_decay), self.closes(step), self.how)
            for kept, new in zip(carry, after, strict=True):
                kept[rows] = new
        return starts

    def forward(self) -> tuple[Tensor | None, ...]:
        call, v = self.call, self.call.v
        o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        carry = self.start()
        for slab in self.slabs():
            starts = self.advance(carry, slab)
            y = (self.gather(slab, call.q) @ starts).mul_(call.scale)
            if call.gate is not None:
                y.mul_(self.gather(slab, call.gate))
            self.grid.scatter(slab, y, o)
        return (o, *(self.grid.in_call_order(x) if call.output_final_state else None for x in carry))

    def backward(self, grads: tuple[Tensor | None, ...], needs: frozenset[str]) -> dict[str, Tensor]:
        call, slabs = self.call, self.slabs(backward=True)
        carry = self.start()
        starts = [self.advance(carry, slab) for slab in slabs]
        d = self.carry(grads[1:])
        out = {name: torch.empty_like(getattr(call, name), memory_format=torch.contiguous_format) for name in needs if name not in _CARRIED}
        for slab, state in zip(reversed(slabs), reversed(starts), strict=True):
            self.retreat(d, slab, state, grads[0], out)
        for name, x in zip(_CARRIED, d, strict=True):
            if name in needs:
                out[name] = self.grid.in_call_order(x).to(getattr(call, name).dtype)
        return out

    def retreat(self, d: Carry, slab: Slab, starts: Tensor, d_o: Tensor | None, out: dict[str, Tensor]) -> None:
        """Moves `d`, the gradients of the carry after a slab, to those before it, in place; writes the slab's tokens' gradients to `out`."""
        x = self.tokens(slab)
        missed = x.v - x.k @ starts
        ends = self.at_the_ends(slab, x, missed, starts)
        d_starts = self.reads_backward(slab, starts, d_o, out)
        d_sums = Carry(*(torch.empty_like(end) for end in ends))
        for step in reversed(slab.steps):
            rows, chunks = step.rows, step.chunks
            before = close_backward(Carry(*(part[rows] for part in d)), Carry(*(end[chunks] for end in ends)), self.closes(step), self.how)
            d_missed = x.written[chunks] @ before.error
            d_state = before.state - x.k[chunks].transpose(-1, -2) @ d_missed
            if d_starts is not None:
                d_state += d_starts[chunks]
            for kept, part, new in zip(d, d_sums, before, strict=True):
                kept[rows] = new
                part[chunks] = new
            d.state[rows] = d_state
        found = token_gradients(x, starts, missed, d_sums)
        for name, grad in (("k", found.k), ("v", found.v), ("eta", found.eta)):
            if name in out:
                self.grid.scatter(slab, grad, out[name])
        if "g" in out:
            self.grid.scatter(slab, d_sums.log_decay[..., None, None].expand(-1, -1, self.grid.chunk, 1), out["g"])

    def at_the_ends(self, slab: Slab, x: Tokens, missed: Tensor, starts: Tensor) -> Carry:
        """The carry at each block's end, with all of its sums, before it closes. Only a sequence's first block starts with some."""
        error, mass, decays = x.written.transpose(-1, -2) @ missed, masses(x), self.summed_decay(slab)
        log_decay = torch.zeros_like(mass) if decays is None else decays
        first = self.start() if any(step.level == 0 for step in slab.steps) else None
        for step in slab.steps:
            if first is not None and step.level == 0:
                error[step.chunks] += first.error[step.rows]
                mass[step.chunks] += first.mass[step.rows]
                log_decay[step.chunks] += first.log_decay[step.rows]
        return Carry(starts, error, mass, log_decay)

    def reads_backward(self, slab: Slab, starts: Tensor, d_o: Tensor | None, out: dict[str, Tensor]) -> Tensor | None:
        """What the reads give to D at each block's start, None without a gradient of o; writes the gradients of q and gate."""
        call, grid = self.call, self.grid
        if d_o is None:
            for name in ("q", "gate"):
                if name in out:
                    out[name].zero_()
            return None
        q, dy = self.gather(slab, call.q), self.gather(slab, d_o)
        if "gate" in out:
            grid.scatter(slab, row_sum(dy, (q @ starts).mul_(call.scale)), out["gate"])
        if call.gate is not None:
            dy.mul_(self.gather(slab, call.gate))
        dy.mul_(call.scale)
        if "q" in out:
            grid.scatter(slab, dy @ starts.transpose(-1, -2), out["q"])
        return q.transpose(-1, -2) @ dy


def run(call: DeepCore, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """o and the final carry."""
    return _Blocks(call).forward()


def run_backward(
    call: DeepCore, grads: tuple[Tensor | None, ...], states: Tensor | None, needs: frozenset[str], candidate: Candidate
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, eta, g, gate and the initial carry, in that order."""
    given = frozenset(name for name in needs if getattr(call, name) is not None)
    found = _Blocks(call).backward(grads, given)
    return tuple(found.get(name) for name in _INPUTS)
