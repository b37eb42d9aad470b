"""deep_core_step: token after token on the carry, each row's block closed by a mask; nothing here waits for the device (SPEC.md 7, 9). Experimental."""

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
        self.ends = [(call.position + t + 1) % self.how.block == 0 for t in range(call.v.shape[1])]

    def heads_first(self, x: Tensor) -> Tensor:
        """`[B, T, G, D]` or `[B, T, H]` as `[B, H, T, D]`, each of the G heads repeated."""
        x = (x[..., None] if x.dim() == 3 else x).transpose(1, 2).to(self.dtype)
        return x if x.shape[1] == self.heads else x.repeat_interleave(self.heads // x.shape[1], 1)

    def carry(self, given: tuple[Tensor | None, ...]) -> Carry:
        """Fresh tensors of the arithmetic's dtype: copies of what is given, zeros for the rest."""
        like = tuple(getattr(self.call, name) for name in _CARRIED)
        made = (torch.zeros_like(y) if x is None else x for x, y in zip(given, like, strict=True))
        return Carry(*(x.to(dtype=self.dtype, copy=True, memory_format=torch.contiguous_format) for x in made))

    def token(self, t: int) -> Tokens:
        part = slice(t, t + 1)
        return Tokens(*(x[:, :, part] for x in (self.x.k, self.x.v, self.x.eta, self.x.written)))

    def forward(self, kept: list[Carry] | None = None) -> tuple[Tensor, Carry]:
        """o `[B, H, T, V]` before scale and gate, and the carry; `kept` collects each token's carry before its block closes."""
        carry = Carry(*(getattr(self.call, name).to(self.dtype) for name in _CARRIED))  # read only: every token makes a new one
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

    def backward(self, grads: tuple[Tensor | None, ...]) -> tuple[dict[str, Tensor], Carry]:
        """Gradients of the inputs as `[B, H, T, D]`, and of the carry before the tokens."""
        call, kept = self.call, list[Carry]()
        read, _ = self.forward(kept)
        d = self.carry(grads[1:])
        do = torch.zeros_like(read) if grads[0] is None else self.heads_first(grads[0])
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


def run(call: DeepCoreStep, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """o `[B, T, H, V]` and the carry after the tokens, in the dtypes of the given one."""
    steps = _Steps(call)
    read, carry = steps.forward()
    read.mul_(call.scale)
    if call.gate is not None:
        read.mul_(steps.heads_first(call.gate))
    return (_tokens_first(read, call.v), *(x.to(getattr(call, name).dtype) for name, x in zip(_CARRIED, carry, strict=True)))


def run_backward(
    call: DeepCoreStep, grads: tuple[Tensor | None, ...], states: Tensor | None, needs: frozenset[str], candidate: Candidate
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, eta, g, gate and the carry, in that order."""
    found, d = _Steps(call).backward(grads)
    carried = dict(zip(_CARRIED, d, strict=True))
    out: list[Tensor | None] = []
    for name in _INPUTS:
        given = getattr(call, name)
        if name not in needs or given is None:
            out.append(None)
        else:
            out.append(carried[name].to(given.dtype) if name in carried else _tokens_first(found[name], given))
    return tuple(out)
