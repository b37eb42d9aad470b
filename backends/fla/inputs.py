"""A call's tensors as FLA's low-level functions take them: contiguous, q and k of unit length where that is asked, with the chunks of packed sequences."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.gated_delta_rule import GatedDeltaRule

from ..peers import dense, load, own_offsets

__all__ = ["CHUNK", "Inputs", "delta", "is_gated", "keeping", "made", "rule"]

CHUNK = 64
"""FLA's chunk size, which its users get unless they ask for another."""

_RULE = (
    "RCP_LN2", "chunk_gated_delta_rule_bwd", "chunk_gated_delta_rule_fwd", "chunk_gated_delta_rule_fwd_intra", "chunk_local_cumsum",
    "l2norm_bwd", "l2norm_fwd", "prepare_chunk_indices",
)  # fmt: skip
_DELTA = ("chunk_delta_rule_bwd", "chunk_delta_rule_fwd", "prepare_wy_repr_fwd")


class Inputs(NamedTuple):  # a tuple is made in a third of a dataclass's time, and this is in every call
    """`shared` are the arguments of all of FLA's functions; `units` q, k and their norms, nothing where q and k are taken as they are."""

    shared: dict[str, Any]
    beta: Tensor
    g: Tensor | None
    units: tuple[Tensor, ...]

    @property
    def packing(self) -> dict[str, Any]:
        """The arguments that say how sequences are packed."""
        return {name: self.shared[name] for name in ("cu_seqlens", "chunk_indices")}


def keeping(candidate: Candidate) -> Candidate:
    """One direction of the pair that hands on what FLA's autograd keeps: the inverse of each chunk's triangle `[B, T, H, 64]`, of the gated rule the running
    decay, and q and k of unit length with their norms where those were asked for."""
    return replace(candidate, variant=f"{candidate.variant}_kept", saves_states=True, residual=f"fla/{candidate.variant}")


def is_gated(candidate: Candidate) -> bool:
    """Whether it is the rule with a decay."""
    return candidate.variant.startswith("gated_delta_rule")


def rule() -> ModuleType:
    """FLA's module of the gated delta rule."""
    return load("fla", "fla.ops.gated_delta_rule.chunk", _RULE)


def delta() -> ModuleType:
    """FLA's module of the delta rule without a decay."""
    return load("fla", "fla.ops.delta_rule.chunk", _DELTA)


def made(call: GatedDeltaRule, units: tuple[Tensor, ...] = (), *, decayed: bool = True, zero_decay: bool = False) -> Inputs:
    """The inputs of a call; `zero_decay`: with a decay of nothing where it has none; not `decayed`: without any. `units` are q, k and their norms where they
    are known."""
    functions = rule()
    v, beta, g, state = dense(call.v), dense(call.beta), call.g, call.initial_state
    if not decayed:
        g = None
    elif g is not None:
        g = dense(g)
    elif zero_decay:
        g = torch.zeros(beta.shape, dtype=torch.float32, device=beta.device)
    if call.qk_l2norm and not units:
        units = (*functions.l2norm_fwd(dense(call.q)), *functions.l2norm_fwd(dense(call.k)))
    q, _, k, _ = units or (dense(call.q), None, dense(call.k), None)
    offsets = None if call.cu_seqlens is None else own_offsets(call.cu_seqlens, v.device)
    shared = {
        "q": q,
        "k": k,
        "v": v,
        "scale": k.shape[-1] ** -0.5 if call.scale is None else call.scale,
        "initial_state": None if state is None else dense(state),
        "cu_seqlens": offsets,
        "chunk_indices": None if offsets is None else functions.prepare_chunk_indices(offsets, CHUNK),
    }
    return Inputs(shared, beta, g, units)
