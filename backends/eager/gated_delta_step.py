"""gated_delta_step: the token loop on a state, or on the slots of a pool; nothing here waits for the device (SPEC.md 9).

A row with index -1 is skipped: its o is 0 and no slot changes for it. In place, the given state is written and returned.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.gated_delta_step import GatedDeltaStep
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import ACCEPTED, Verdict

from .chunk_grid import compute_dtype
from .token_recurrence import Tokens, token_steps, token_steps_backward
from .unit_norm import unit, unit_backward

__all__ = ["backward_candidates", "candidates", "run", "run_backward", "supports"]

_INPUTS = ("q", "k", "v", "beta", "g", "state")


def supports(signature: Signature, machine: Machine) -> Verdict:
    """Everything."""
    return ACCEPTED


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """One way."""
    return [Candidate("eager", "tokens")]


def backward_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """One way."""
    return [Candidate("eager", "tokens", direction="backward")]


def _heads_first(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """`[B, T, G, D]` as a contiguous `[B, H, T, D]`, each of the G heads repeated."""
    x = x.transpose(1, 2).to(dtype)
    return (x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)).contiguous()


def _tokens(call: GatedDeltaStep) -> Tokens:
    heads, dtype = call.v.shape[2], compute_dtype(call.v)
    q, k, v = (_heads_first(x, heads, dtype) for x in (call.q, call.k, call.v))
    if call.qk_l2norm:
        q, k = unit(q), unit(k)
    scale = call.k.shape[-1] ** -0.5 if call.scale is None else call.scale
    beta = _heads_first(call.beta[..., None], heads, dtype)
    decay = None if call.g is None else _heads_first(call.g[..., None], heads, dtype).exp()
    return Tokens(q * scale, k, v, beta, decay)


def _tokens_first(x: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """`[B, H, T, D]` as a contiguous `[B, T, G, D]`, summed over the heads that share one of the G."""
    if x.shape[1] != groups:
        x = x.unflatten(1, (groups, -1)).sum(2)
    return x.transpose(1, 2).to(dtype, copy=True, memory_format=torch.contiguous_format)


class _Slots:
    """The rows of a pool that a call selects. Skipped rows stand in for slot 0 on reading and repeat a real row on writing, so no sync is needed."""

    def __init__(self, indices: Tensor, pool: Tensor) -> None:
        indices = indices.to(device=pool.device, dtype=torch.int64)
        self.used = indices >= 0
        self.read = indices.clamp_min(0)
        self.donor = self.used.to(torch.int8).argmax() if indices.numel() else self.read.new_zeros(())
        self.mask = self.used[:, None, None, None]

    def take(self, pool: Tensor) -> Tensor:
        """The selected states, `[B, H, K, V]`, a copy."""
        return pool.index_select(0, self.read)

    def put(self, pool: Tensor, rows: Tensor) -> None:
        """Writes the selected rows into `pool`; without one, slot 0 is written with what it holds."""
        if not rows.shape[0]:
            return
        rows = rows.where(self.mask, self.take(pool).to(rows.dtype))
        donor = self.donor.view(1)
        index = self.read.where(self.used, self.read.index_select(0, donor))
        pool.index_copy_(0, index, rows.where(self.mask, rows.index_select(0, donor)).to(pool.dtype))


def run(call: GatedDeltaStep, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """o `[B, T, H, V]` and the state after the tokens: a new tensor, or the given one when in place."""
    dtype, after = compute_dtype(call.v), call.state if call.inplace else None
    if call.state_indices is None:
        rows = call.state.to(dtype=dtype, copy=True, memory_format=torch.contiguous_format)
        o = token_steps(_tokens(call), rows)
        after = rows if after is None else after.copy_(rows)
    else:
        after = call.state.clone(memory_format=torch.contiguous_format) if after is None else after
        if not call.state.shape[0]:  # an empty pool: every row is skipped
            return torch.zeros(call.v.shape, dtype=call.v.dtype, device=call.v.device), after
        slots = _Slots(call.state_indices, call.state)
        rows = slots.take(call.state).to(dtype)
        o = token_steps(_tokens(call), rows).where(slots.mask, 0.0)
        slots.put(after, rows)
    return _tokens_first(o, call.v.shape[2], call.v.dtype), after


def run_backward(
    call: GatedDeltaStep, grads: tuple[Tensor | None, ...], states: Tensor | None, needs: frozenset[str], candidate: Candidate
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, beta, g and state, in that order, for the form that is not in place."""
    heads, dtype = call.v.shape[2], compute_dtype(call.v)
    d_o = None if grads[0] is None else _heads_first(grads[0], heads, dtype)
    d_pool = (torch.zeros_like(call.state) if grads[1] is None else grads[1]).clone(memory_format=torch.contiguous_format)
    if call.state_indices is None:
        rows, d_rows, slots = call.state.to(dtype=dtype, copy=True, memory_format=torch.contiguous_format), d_pool, None
    elif not call.state.shape[0]:
        return tuple(torch.zeros_like(getattr(call, name)) if name in needs and getattr(call, name) is not None else None for name in _INPUTS)
    else:
        slots = _Slots(call.state_indices, call.state)
        rows, d_rows = slots.take(call.state).to(dtype), slots.take(d_pool).where(slots.mask, 0.0)
        d_o = None if d_o is None else d_o.where(slots.mask, 0.0)
    x, before = _tokens(call), list[Tensor]()
    token_steps(x, rows, before)
    d = token_steps_backward(x, before, d_o, d_rows)
    if slots is not None:
        slots.put(d_pool, d_rows)
    return _in_call_terms(call, d.q, d.k, d.v, d.beta, d.g, d_pool, needs)


def _in_call_terms(
    call: GatedDeltaStep, dq: Tensor, dk: Tensor, dv: Tensor, dbeta: Tensor, dg: Tensor | None, d_state: Tensor, needs: frozenset[str]
) -> tuple[Tensor | None, ...]:
    """The gradients before scale and norm, in the inputs' shapes and dtypes; None where not needed."""
    heads, dtype = call.v.shape[2], compute_dtype(call.v)
    dq = dq * (call.k.shape[-1] ** -0.5 if call.scale is None else call.scale)
    if call.qk_l2norm:
        dq, dk = unit_backward(_heads_first(call.q, heads, dtype), dq), unit_backward(_heads_first(call.k, heads, dtype), dk)
    groups = call.q.shape[2]
    out: dict[str, Tensor | None] = {
        "q": _tokens_first(dq, groups, call.q.dtype),
        "k": _tokens_first(dk, groups, call.k.dtype),
        "v": _tokens_first(dv, heads, call.v.dtype),
        "beta": _tokens_first(dbeta, heads, call.beta.dtype)[..., 0],
        "g": None if dg is None or call.g is None else _tokens_first(dg, heads, call.g.dtype)[..., 0],
        "state": d_state,
    }
    return tuple(out[name] if name in needs else None for name in _INPUTS)
