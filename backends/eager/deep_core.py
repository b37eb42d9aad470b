"""deep_core: a block is one product for what it reads and two for what it learns; the carry goes from block to block (SPEC.md 7). Experimental.

A packed call's cu_seqlens is read on the host.
"""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class _Swept:
    """A slab that the carry has passed: its tokens, their v - k D, and at each block's end D, which is that of its start, and all of its sums."""

    tokens: Tokens | None
    missed: Tensor | None
    ends: Carry

    def kept(self, *, whole: bool) -> _Swept:
        """What a backward holds on to; without the tokens, which are gathered again, unless their slab is next."""
        return self if whole else _Swept(None, None, self.ends)


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

    def advance(self, carry: Carry, slab: Slab) -> _Swept:
        """Moves the carry over a slab in place."""
        x, decays = self.tokens(slab), self.summed_decay(slab)
        mass, log_decay = masses(x), decays
        if log_decay is None:
            log_decay = torch.zeros_like(mass)
        state = torch.empty(slab.size, self.heads, *self.widths, dtype=self.dtype, device=x.k.device)
        missed, error = torch.empty_like(x.v), torch.empty_like(state)
        for step in slab.steps:
            rows, chunks = step.rows, step.chunks
            state[chunks] = carry.state[rows]
            torch.sub(x.v[chunks], x.k[chunks] @ state[chunks], out=missed[chunks])
            torch.add(carry.error[rows], x.written[chunks].transpose(-1, -2) @ missed[chunks], out=error[chunks])
            mass[chunks] += carry.mass[rows]
            log_decay[chunks] += carry.log_decay[rows]
            end = Carry(state[chunks], error[chunks], mass[chunks], log_decay[chunks])
            for kept, new in zip(carry, close(end, self.closes(step), self.how), strict=True):
                kept[rows] = new
        return _Swept(x, missed, Carry(state, error, mass, log_decay))

    def forward(self) -> tuple[Tensor | None, ...]:
        call, v = self.call, self.call.v
        o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        carry = self.start()
        for slab in self.slabs():
            starts = self.advance(carry, slab).ends.state
            y = (self.gather(slab, call.q) @ starts).mul_(call.scale)
            if call.gate is not None:
                y.mul_(self.gather(slab, call.gate))
            self.grid.scatter(slab, y, o)
        return (o, *(self.grid.in_call_order(x) if call.output_final_state else None for x in carry))

    def backward(self, grads: tuple[Tensor | None, ...], needs: frozenset[str]) -> dict[str, Tensor]:
        call, slabs = self.call, self.slabs(backward=True)
        carry, last = self.start(), len(slabs) - 1
        swept = [self.advance(carry, slab).kept(whole=number == last) for number, slab in enumerate(slabs)]
        d = self.carry(grads[1:])
        out = {name: torch.empty_like(getattr(call, name), memory_format=torch.contiguous_format) for name in needs if name not in _CARRIED}
        for slab in reversed(slabs):
            self.retreat(d, slab, swept.pop(), grads[0], out)
        for name, x in zip(_CARRIED, d, strict=True):
            if name in needs:
                out[name] = self.grid.in_call_order(x).to(getattr(call, name).dtype)
        return out

    def retreat(self, d: Carry, slab: Slab, swept: _Swept, d_o: Tensor | None, out: dict[str, Tensor]) -> None:
        """Moves `d`, the gradients of the carry after a slab, to those before it, in place; writes the slab's tokens' gradients to `out`."""
        ends, starts = swept.ends, swept.ends.state
        x = self.tokens(slab) if swept.tokens is None else swept.tokens
        missed = x.v - x.k @ starts if swept.missed is None else swept.missed
        d_starts = self.reads_backward(slab, starts, d_o, out)
        d_sums, d_missed = Carry(*(torch.empty_like(end) for end in ends)), torch.empty_like(missed)
        for step in reversed(slab.steps):
            rows, chunks = step.rows, step.chunks
            before = close_backward(Carry(*(part[rows] for part in d)), Carry(*(end[chunks] for end in ends)), self.closes(step), self.how)
            d_missed[chunks] = x.written[chunks] @ before.error
            d_state = before.state - x.k[chunks].transpose(-1, -2) @ d_missed[chunks]
            if d_starts is not None:
                d_state += d_starts[chunks]
            for kept, part, new in zip(d, d_sums, before, strict=True):
                kept[rows] = new
                part[chunks] = new
            d.state[rows] = d_state
        found = token_gradients(x, starts, missed, d_missed, d_sums)
        for name, grad in (("k", found.k), ("v", found.v), ("eta", found.eta)):
            if name in out:
                self.grid.scatter(slab, grad, out[name])
        if "g" in out:
            self.grid.scatter(slab, d_sums.log_decay[..., None, None].expand(-1, -1, self.grid.chunk, 1), out["g"])

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
