"""dual_core_step: S_slow token after token, S_fast of all tokens at once, on the states or on the slots of pools; nothing here waits for the device.

Which tokens of a call share a chunk is a mask: their positions' chunks are numbered, and W's number is that of the token before the first (SPEC.md 2, 9).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.dual_core_step import DualCoreStep
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import ACCEPTED, Verdict

from .chunk_grid import compute_dtype
from .pool_slots import PoolSlots
from .token_recurrence import Tokens, token_steps, token_steps_backward
from .unit_norm import unit, unit_backward

__all__ = ["backward_candidates", "candidates", "run", "run_backward", "supports"]

_INPUTS = ("q", "k", "v", "beta", "g", "fast_gate", "slow_gate", "alpha", "state", "fast_state")


def supports(signature: Signature, machine: Machine) -> Verdict:
    """Everything."""
    return ACCEPTED


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """One way."""
    return [Candidate("eager", "tokens")]


def backward_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """One way."""
    return [Candidate("eager", "tokens", direction="backward")]


@dataclass(frozen=True, slots=True)
class _Chunks:
    """Who shares a chunk: `same [B, 1, T, T]` token with an earlier one or itself; `first`, `last [B, 1, 1, 1]` W with the first, the last token;
    `reading [B, 1, T, 1]` W with each token; `staying [B, 1, T, 1]` each token with the last."""

    same: Tensor
    first: Tensor
    last: Tensor
    reading: Tensor
    staying: Tensor

    @classmethod
    def of(cls, call: DualCoreStep) -> _Chunks:
        tokens, device = call.v.shape[1], call.v.device
        steps = torch.arange(-1, tokens, device=device)
        number = (call.position.to(device=device, dtype=torch.int64)[:, None] + steps).div(call.chunk_size, rounding_mode="floor")
        before, each = number[:, :1], number[:, 1:]
        same = (each[:, :, None] == each[:, None, :]).tril()
        reading, staying = each == before, each == each[:, -1:]
        return cls(same[:, None], reading[:, None, :1, None], reading[:, None, -1:, None], reading[:, None, :, None], staying[:, None, :, None])


class _Steps:
    """A call as `[B, H, T, *]`, its states' rows, and both cores on them."""

    def __init__(self, call: DualCoreStep) -> None:
        self.call, self.dtype, self.heads = call, compute_dtype(call.v), call.v.shape[2]
        q, k, v = (self.heads_first(x) for x in (call.q, call.k, call.v))
        if call.qk_l2norm:
            q, k = unit(q), unit(k)
        decay = None if call.g is None else self.heads_first(call.g).exp()
        self.x = Tokens(q * call.scale, k, v, self.heads_first(call.beta), decay)
        self.written = self.x.beta * v
        self.chunks = _Chunks.of(call)
        self.gates = tuple(None if gate is None else self.heads_first(gate) for gate in (call.fast_gate, call.slow_gate))
        self.alpha = self.mixing(call.alpha)
        self.slots = None if call.state_indices is None else PoolSlots(call.state_indices, call.v.device)

    def heads_first(self, x: Tensor) -> Tensor:
        """`[B, T, G, D]` or `[B, T, H]` as a contiguous `[B, H, T, D]`, each of the G heads repeated."""
        x = (x[..., None] if x.dim() == 3 else x).transpose(1, 2).to(self.dtype)
        return (x if x.shape[1] == self.heads else x.repeat_interleave(self.heads // x.shape[1], 1)).contiguous()

    def mixing(self, alpha: float | Tensor) -> float | Tensor:
        """alpha as what multiplies `[B, H, T, 1]`."""
        if not isinstance(alpha, Tensor):
            return alpha
        if alpha.dim() == 3:
            return self.heads_first(alpha)
        return alpha.to(self.dtype)[:, None, None] if alpha.dim() else alpha.to(self.dtype)

    def rows(self, pool: Tensor) -> Tensor:
        """A pool's rows of this call's sequences in the arithmetic's dtype, a contiguous copy."""
        rows = pool if self.slots is None else self.slots.take(pool)
        return rows.to(dtype=self.dtype, copy=True, memory_format=torch.contiguous_format)

    def start(self) -> Tensor:
        """W at the first token: nothing of it is left where that begins a chunk, whatever it held."""
        return self.rows(self.call.fast_state).where(self.chunks.first, 0.0)

    def weighed(self) -> tuple[float | Tensor, float | Tensor]:
        """alpha f and (1 - alpha) s."""
        shares = (self.alpha, 1 - self.alpha)
        fast, slow = (share if gate is None else share * gate for share, gate in zip(shares, self.gates, strict=True))
        return fast, slow

    def scores(self) -> Tensor:
        """q k^T of the tokens that share a chunk, `[B, H, T, T]`."""
        return (self.x.q @ self.x.k.mT).where(self.chunks.same, 0.0)

    def fast(self, before: Tensor) -> tuple[Tensor, Tensor]:
        """S_fast's y `[B, H, T, V]` without its gate, and W after the tokens."""
        y = self.scores() @ self.written + (self.x.q @ before).where(self.chunks.reading, 0.0)
        return y, before.where(self.chunks.last, 0.0) + self.x.k.where(self.chunks.staying, 0.0).mT @ self.written

    def tokens_first(self, x: Tensor, like: Tensor) -> Tensor:
        """`[B, H, T, D]` in the layout and dtype of the input it belongs to, summed over the heads that share one of the G."""
        if x.shape[1] != like.shape[2]:
            x = x.unflatten(1, (like.shape[2], -1)).sum(2)
        x = x.transpose(1, 2).to(like.dtype, copy=True, memory_format=torch.contiguous_format)
        return x if like.dim() == 4 else x[..., 0]


def run(call: DualCoreStep, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """o `[B, T, H, V]` and both states after the tokens: new tensors, or the given ones when in place."""
    given = call.state, call.fast_state
    if not call.state.shape[0]:  # an empty pool: every row is skipped
        return torch.zeros(call.v.shape, dtype=call.v.dtype, device=call.v.device), *(x if call.inplace else x.clone() for x in given)
    steps = _Steps(call)
    state = steps.rows(call.state)
    slow = token_steps(steps.x, state)
    fast, fast_state = steps.fast(steps.start())
    by_fast, by_slow = steps.weighed()
    o, rows = by_fast * fast + by_slow * slow, (state, fast_state)
    if steps.slots is None:
        after = tuple(old.copy_(new) if call.inplace else new.to(old.dtype) for old, new in zip(given, rows, strict=True))
        return steps.tokens_first(o, call.v), *after
    after = given if call.inplace else tuple(x.clone(memory_format=torch.contiguous_format) for x in given)
    for pool, new in zip(after, rows, strict=True):
        steps.slots.put(pool, new)
    return steps.tokens_first(steps.slots.where_used(o), call.v), *after


def run_backward(
    call: DualCoreStep, grads: tuple[Tensor | None, ...], states: Tensor | None, needs: frozenset[str], candidate: Candidate
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, beta, g, fast_gate, slow_gate, alpha, state and fast_state, in that order, for the form that is not in place."""
    if not call.state.shape[0]:
        return tuple(torch.zeros_like(x) if name in needs and isinstance(x := getattr(call, name), Tensor) else None for name in _INPUTS)
    steps = _Steps(call)
    pools = [
        (torch.zeros_like(x) if grad is None else grad).clone(memory_format=torch.contiguous_format)
        for x, grad in zip((call.state, call.fast_state), grads[1:], strict=True)
    ]
    d_o = torch.zeros_like(steps.x.v) if grads[0] is None else steps.heads_first(grads[0])
    if steps.slots is not None:
        d_o = steps.slots.where_used(d_o)
    rows = [steps.rows(pool) if steps.slots is None else steps.slots.where_used(steps.rows(pool)) for pool in pools]
    found, d_rows = _gradients(steps, d_o, rows[0], rows[1])
    for name, pool, d in zip(("state", "fast_state"), pools, d_rows, strict=True):
        if steps.slots is None:
            found[name] = d.to(pool.dtype)
        else:
            steps.slots.put(pool, d)
            found[name] = pool
    return tuple(found.get(name) if name in needs and isinstance(getattr(call, name), Tensor) else None for name in _INPUTS)


def _gradients(steps: _Steps, d_o: Tensor, d_state: Tensor, d_fast: Tensor) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
    """The inputs' gradients in their layouts, and those of both states' rows before the tokens; `d_state` is changed."""
    call, x, chunks, kept = steps.call, steps.x, steps.chunks, list[Tensor]()
    slow = token_steps(x, steps.rows(call.state), kept)
    before = steps.start()
    fast, _ = steps.fast(before)
    by_fast, by_slow = steps.weighed()
    rule = token_steps_backward(x, kept, d_o * by_slow, d_state)

    dy = d_o * by_fast
    from_state = dy.where(chunks.reading, 0.0)
    d_scores = (dy @ steps.written.mT).where(chunks.same, 0.0)
    d_written = steps.scores().mT @ dy + x.k.where(chunks.staying, 0.0) @ d_fast
    dq = (rule.q + d_scores @ x.k + from_state @ before.mT) * call.scale
    dk = rule.k + d_scores.mT @ x.q + (steps.written @ d_fast.mT).where(chunks.staying, 0.0)
    d_before = (x.q.mT @ from_state + d_fast.where(chunks.last, 0.0)).where(chunks.first, 0.0)
    if call.qk_l2norm:
        dq, dk = unit_backward(steps.heads_first(call.q), dq), unit_backward(steps.heads_first(call.k), dk)
    found = {
        "q": steps.tokens_first(dq, call.q),
        "k": steps.tokens_first(dk, call.k),
        "v": steps.tokens_first(rule.v + d_written * x.beta, call.v),
        "beta": steps.tokens_first(rule.beta + (d_written * x.v).sum(-1, keepdim=True), call.beta),
    }
    if call.g is not None and rule.g is not None:
        found["g"] = steps.tokens_first(rule.g, call.g)
    seen = (d_o * fast).sum(-1, keepdim=True), (d_o * slow).sum(-1, keepdim=True)
    for name, core, share in zip(("fast_gate", "slow_gate"), seen, (steps.alpha, 1 - steps.alpha), strict=True):
        gate = getattr(call, name)
        if gate is not None:
            found[name] = steps.tokens_first(core * share, gate)
    if isinstance(call.alpha, Tensor):
        by_gate = [core if gate is None else core * gate for core, gate in zip(seen, steps.gates, strict=True)]
        found["alpha"] = _like_alpha((by_gate[0] - by_gate[1])[..., 0].transpose(1, 2), call.alpha)
    return found, (d_state, d_before)


def _like_alpha(grad: Tensor, alpha: Tensor) -> Tensor:
    """dalpha `[B, T, H]` summed to alpha's shape."""
    summed = grad.sum_to_size(alpha.shape) if alpha.dim() else grad.sum()
    return summed.to(alpha.dtype, copy=True, memory_format=torch.contiguous_format)
