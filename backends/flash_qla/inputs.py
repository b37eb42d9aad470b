"""A call's tensors as FlashQLA's low-level functions take them: contiguous, the decay in float32, no sequence of a packed call empty.

FlashQLA numbers the sequences of a packed call by their first chunks and so counts no empty one; those are left out here, and their states put back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from titans_backends.backend import Candidate
from titans_backends.contracts.gated_delta_rule import GatedDeltaRule
from titans_backends.signature import Signature

from ..peers import dense, load, own_offsets

__all__ = ["Inputs", "cuts", "keeping", "kernels", "made"]

_FILLED = WeakTensorKeyDictionary()


@dataclass(frozen=True, slots=True)
class Inputs:
    """`shared` are the arguments of FlashQLA's forward and backward. Of a packed call with empty sequences, `filled` are the rows of the others, and
    `sequences` counts all."""

    shared: dict[str, Any]
    g: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    filled: Tensor | None
    sequences: int

    def of_filled(self, states: Tensor | None) -> Tensor | None:
        """The states of the sequences that have tokens, of one for each sequence."""
        if states is None or self.filled is None:
            return None if states is None else dense(states)
        return states[self.filled]

    def of_all(self, states: Tensor, others: Tensor | None) -> Tensor:
        """One state for each sequence, where an empty one's is that of `others`, or zero."""
        if self.filled is None:
            return states
        found = states.new_zeros(self.sequences, *states.shape[1:]) if others is None else others.to(states.dtype, copy=True).contiguous()
        found[self.filled] = states
        return found


def cuts(signature: Signature) -> tuple[bool, ...]:
    """Context parallelism, as FlashQLA's users have it, and without, where that can cut anything."""
    return (True, False) if signature.packed or signature.dim("B") == 1 else (False,)


def keeping(candidate: Candidate) -> Candidate:
    """One direction of the pair that hands on the inverse of each chunk's triangle, `[B, T, H, 64]` in the dtype of k."""
    name = "flash_qla/inverses of segments" if candidate.param("auto_cp") else "flash_qla/inverses"
    return replace(candidate, variant="kept", saves_states=True, residual=name)


def kernels() -> ModuleType:
    """FlashQLA's module of the gated delta rule."""
    return load("flash_qla", "flash_qla.ops.gated_delta_rule.chunk")


def made(call: GatedDeltaRule) -> Inputs:
    """The inputs of a call, a decay of nothing where it has none."""
    functions = kernels()
    q, k, v, beta = (dense(x) for x in (call.q, call.k, call.v, call.beta))
    g = torch.zeros(beta.shape, dtype=torch.float32, device=beta.device) if call.g is None else dense(call.g.to(torch.float32))
    q_norm = k_norm = None
    if call.qk_l2norm:
        (q, q_norm), (k, k_norm) = functions.l2norm_fwd(q), functions.l2norm_fwd(k)
    offsets, filled = (None, None) if call.cu_seqlens is None else _without_empty(own_offsets(call.cu_seqlens, v.device))
    sequences = q.shape[0] if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
    shared = {"q": q, "k": k, "v": v, "beta": beta, "scale": k.shape[-1] ** -0.5 if call.scale is None else call.scale, "cu_seqlens": offsets}
    found = Inputs(shared, g, q_norm, k_norm, filled, sequences)
    shared["initial_state"] = found.of_filled(call.initial_state)
    return found


def _without_empty(offsets: Tensor) -> tuple[Tensor, Tensor | None]:
    """The offsets without empty sequences, and the rows of the others; None where there is no empty one. Read on the host once for a tensor."""
    known = _FILLED.get(offsets)
    if known is None:
        lengths = offsets.diff()
        rows = torch.nonzero(lengths).flatten()
        whole = rows.shape[0] == lengths.shape[0]
        known = _FILLED[offsets] = None if whole else torch.cat([offsets[:1], offsets[1:][rows]]), None if whole else rows
    fewer, filled = known
    return (offsets, None) if fewer is None else (fewer, filled)
