"""gated_delta_step: decode in one launch, on a state for each sequence or on the slots of a pool (SPEC.md 9).

Out of place, a pool's other slots must be in the result too: it is cloned, and the clone's slots are written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.gated_delta_step import GatedDeltaStep
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict

from .serving import serves, wide
from .token_step import step_tokens
from .unit_rows import unit

__all__ = ["candidates", "run", "supports"]


def supports(signature: Signature, machine: Machine) -> Verdict:
    """Every option."""
    return serves(signature, machine)


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """One way."""
    return [Candidate("numba", "tokens")]


def run(call: GatedDeltaStep, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """o `[B, T, H, V]` and the state after the tokens: a new tensor, or the given one when in place."""
    q, k, v = wide(call.q), wide(call.k), wide(call.v)
    if call.qk_l2norm:
        q, k = unit(q), unit(k)
    slots = _own_slots(v.shape[0], v.device) if call.state_indices is None else call.state_indices.to(v.device, torch.int64)
    if call.inplace:
        after = call.state
    elif call.state_indices is None:
        after = torch.empty(call.state.shape, dtype=call.state.dtype, device=v.device)
    else:
        after = call.state.clone(memory_format=torch.contiguous_format)
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    scale = k.shape[3] ** -0.5 if call.scale is None else call.scale
    g = None if call.g is None else wide(call.g)
    step_tokens(q, k, v, wide(call.beta), g, slots, call.state, scale, o, after)
    return o.to(call.v.dtype), after


def _own_slots(batch: int, device: torch.device) -> Tensor:
    """Row b has slot b."""
    return torch.arange(batch, device=device)
