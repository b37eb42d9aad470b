"""A call's tensors as FLA's low-level functions take them: contiguous, q and k of unit length where that is asked, with the chunks of packed sequences."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from titans_backends.contracts.gated_delta_rule import GatedDeltaRule

from ..peers import dense, load, own_offsets

__all__ = ["CHUNK", "Inputs", "delta", "made", "rule"]

CHUNK = 64
"""FLA's chunk size, which its users get unless they ask for another."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """`shared` are the arguments of all of FLA's functions; the norms are None where q and k are taken as they are."""

    shared: dict[str, Any]
    beta: Tensor
    g: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None

    @property
    def packing(self) -> dict[str, Any]:
        """The arguments that say how sequences are packed."""
        return {name: self.shared[name] for name in ("cu_seqlens", "chunk_indices")}


def rule() -> ModuleType:
    """FLA's module of the gated delta rule."""
    return load("fla", "fla.ops.gated_delta_rule.chunk")


def delta() -> ModuleType:
    """FLA's module of the delta rule without a decay."""
    return load("fla", "fla.ops.delta_rule.chunk")


def made(call: GatedDeltaRule, *, zero_decay: bool) -> Inputs:
    """The inputs of a call; `zero_decay`: with a decay of nothing where it has none."""
    functions = rule()
    q, k, v, beta = (dense(x) for x in (call.q, call.k, call.v, call.beta))
    g = call.g
    if g is None and zero_decay:
        g = torch.zeros(beta.shape, dtype=torch.float32, device=beta.device)
    q_norm = k_norm = None
    if call.qk_l2norm:
        (q, q_norm), (k, k_norm) = functions.l2norm_fwd(q), functions.l2norm_fwd(k)
    offsets = None if call.cu_seqlens is None else own_offsets(call.cu_seqlens, v.device)
    shared = {
        "q": q,
        "k": k,
        "v": v,
        "scale": k.shape[-1] ** -0.5 if call.scale is None else call.scale,
        "initial_state": None if call.initial_state is None else dense(call.initial_state),
        "cu_seqlens": offsets,
        "chunk_indices": None if offsets is None else functions.prepare_chunk_indices(offsets, CHUNK),
    }
    return Inputs(shared, beta, None if g is None else dense(g), q_norm, k_norm)
