"""deep_core_step: token after token on the carry, each row's block closed by a mask; nothing here waits for the device (SPEC.md 7, 9). Experimental.

A row with index -1 is skipped: its o is 0 and no slot changes for it. In place, the given carry is written and returned.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.deep_core import Carry
from titans_backends.contracts.deep_core_step import DeepCoreStep
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import ACCEPTED, Verdict

from .chunk_grid import compute_dtype
from .deep_blocks import Closing, Tokens, close, close_backward, masses, token_gradients
from .pool_slots import PoolSlots

__all__ = ["backward_candidates", "candidates", "run", "run_backward", "supports"]

_CARRIED = ("state", "error", "mass", "log_decay")
_INPUTS = ("q", "k", "v", "eta", "g", "gate", *_CARRIED)


def supports(signature: Signature, machine: Machine) -> Verdict:
    """Everything."""
    return ACCEPTED


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """One way."""
    return [Candidate("eager", "tokens")]


def backward_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """One way."""
    return [Candidate("eager", "tokens", direction="backward")]


class _Steps:
    """A call's tokens one by one; a token is a block's part of one token."""

    def __init__(self, call: DeepCoreStep) -> None:
        self.call, self.dtype, self.heads = call, compute_dtype(call.v), call.v.shape[2]
        self.how = Closing(call.normalize, call.chunk_size * call.period)
        self.q, k, v, eta = (self.heads_first(x) for x in (call.q, call.k, call.v, call.eta))
        self.x = Tokens(k, v, eta, eta * k)
        self.g = None if call.g is None else self.heads_first(call.g)[..., 0]
        position = call.position.to(call.v.device)
        self.ends = [(position + t + 1) % self.how.block == 0 for t in range(call.v.shape[1])]
        self.slots = None if call.state_indices is None else PoolSlots(call.state_indices, call.v.device)

    def heads_first(self, x: Tensor) -> Tensor:
        """`[B, T, G, D]` or `[B, T, H]` as `[B, H, T, D]`, each of the G heads repeated."""
        x = (x[..., None] if x.dim() == 3 else x).transpose(1, 2).to(self.dtype)
        return x if x.shape[1] == self.heads else x.repeat_interleave(self.heads // x.shape[1], 1)

    def rows(self, pools: tuple[Tensor, ...]) -> Carry:
        """The carry's rows of this call's sequences in the arithmetic's dtype, to be read only."""
        return Carry(*((x if self.slots is None else self.slots.take(x)).to(self.dtype) for x in pools))

    def token(self, t: int) -> Tokens:
        part = slice(t, t + 1)
        return Tokens(*(x[:, :, part] for x in (self.x.k, self.x.v, self.x.eta, self.x.written)))

    def forward(self, kept: list[Carry] | None = None) -> tuple[Tensor, Carry]:
        """o `[B, H, T, V]` before scale and gate, and the carry; `kept` collects each token's carry before its block closes."""
        carry = self.rows(_carried(self.call))  # every token makes a new one
        read = torch.empty_like(self.x.v, memory_format=torch.contiguous_format)
        for t, ends in enumerate(self.ends):
            x = self.token(t)
            read[:, :, t : t + 1] = self.q[:, :, t : t + 1] @ carry.state
            error = carry.error + x.written.transpose(-1, -2) @ (x.v - x.k @ carry.state)
            log_decay = carry.log_decay if self.g is None else carry.log_decay + self.g[:, :, t]
            before = Carry(carry.state, error, carry.mass + masses(x), log_decay)
            if kept is not None:
                kept.append(before)
            carry = close(before, ends, self.how)
        return read, carry

    def backward(self, d_o: Tensor | None, d: Carry) -> tuple[dict[str, Tensor], Carry]:
        """Gradients of the inputs as `[B, H, T, D]`, and of the carry's rows before the tokens, from those of what came out."""
        call, kept = self.call, list[Carry]()
        read, _ = self.forward(kept)
        do = torch.zeros_like(read) if d_o is None else self.heads_first(d_o)
        dy = call.scale * (do if call.gate is None else do * self.heads_first(call.gate))
        out = {name: torch.empty_like(x) for name, x in (("q", self.q), ("k", self.x.k), ("v", self.x.v), ("eta", self.x.eta), ("g", self.x.eta))}
        out["gate"] = call.scale * (do * read).sum(-1, keepdim=True)
        for t in range(len(kept) - 1, -1, -1):
            x, part, state = self.token(t), slice(t, t + 1), kept[t].state
            d = close_backward(d, kept[t], self.ends[t], self.how)
            found = token_gradients(x, state, x.v - x.k @ state, x.written @ d.error, d)
            out["q"][:, :, part] = dy[:, :, part] @ state.transpose(-1, -2)
            out["k"][:, :, part], out["v"][:, :, part], out["eta"][:, :, part] = found.k, found.v, found.eta
            out["g"][:, :, part] = d.log_decay[..., None, None]
            read_back = self.q[:, :, part].transpose(-1, -2) @ dy[:, :, part]
            d = d._replace(state=d.state + read_back - x.k.transpose(-1, -2) @ found.v)
        return out, d


def _tokens_first(x: Tensor, like: Tensor) -> Tensor:
    """`[B, H, T, D]` in the layout and dtype of the input it belongs to, summed over the heads that share one of the G."""
    if x.shape[1] != like.shape[2]:
        x = x.unflatten(1, (like.shape[2], -1)).sum(2)
    x = x.transpose(1, 2).to(like.dtype, copy=True, memory_format=torch.contiguous_format)
    return x if like.dim() == 4 else x[..., 0]


def _carried(call: DeepCoreStep) -> tuple[Tensor, ...]:
    return call.state, call.error, call.mass, call.log_decay


def run(call: DeepCoreStep, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """o `[B, T, H, V]` and the carry after the tokens, in the dtypes of the given one: new tensors, or the given ones when in place."""
    given = _carried(call)
    if not call.state.shape[0]:  # an empty pool: every row is skipped
        return torch.zeros(call.v.shape, dtype=call.v.dtype, device=call.v.device), *(x if call.inplace else x.clone() for x in given)
    steps = _Steps(call)
    read, rows = steps.forward()
    read.mul_(call.scale)
    if call.gate is not None:
        read.mul_(steps.heads_first(call.gate))
    if steps.slots is None:
        after = tuple(old.copy_(new) if call.inplace else new.to(old.dtype) for old, new in zip(given, rows, strict=True))
        return _tokens_first(read, call.v), *after
    after = given if call.inplace else tuple(x.clone(memory_format=torch.contiguous_format) for x in given)
    for pool, new in zip(after, rows, strict=True):
        steps.slots.put(pool, new)
    return _tokens_first(steps.slots.where_used(read), call.v), *after


def run_backward(
    call: DeepCoreStep, grads: tuple[Tensor | None, ...], states: Tensor | None, needs: frozenset[str], candidate: Candidate
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, eta, g, gate and the carry, in that order, for the form that is not in place."""
    if not call.state.shape[0]:
        return tuple(torch.zeros_like(x) if name in needs and (x := getattr(call, name)) is not None else None for name in _INPUTS)
    steps, d_o = _Steps(call), grads[0]
    arrived = zip(grads[1:], _carried(call), strict=True)
    pools = Carry(*(torch.zeros_like(x, memory_format=torch.contiguous_format) if d is None else d for d, x in arrived))
    d_rows = steps.rows(pools)
    if steps.slots is not None:
        d_rows = Carry(*map(steps.slots.where_used, d_rows))
        d_o = None if d_o is None else steps.slots.where_used(d_o)
    found, d = steps.backward(d_o, d_rows)
    if steps.slots is not None:
        pools, rows = Carry(*(x.clone(memory_format=torch.contiguous_format) for x in pools)), d
        for pool, new in zip(pools, rows, strict=True):
            steps.slots.put(pool, new)
        d = pools
    carried = dict(zip(_CARRIED, d, strict=True))
    out: list[Tensor | None] = []
    for name in _INPUTS:
        given = getattr(call, name)
        if name not in needs or given is None:
            out.append(None)
        else:
            out.append(carried[name].to(given.dtype) if name in carried else _tokens_first(found[name], given))
    return tuple(out)
