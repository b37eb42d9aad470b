"""A call's tensors as FlashQLA's low-level functions take them: contiguous, the decay in float32, no sequence of a packed call empty.

FlashQLA numbers the sequences of a packed call by their first chunks and so counts no empty one; those are left out here, and their states put back.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from titans_backends.backend import Candidate
from titans_backends.contracts.gated_delta_rule import GatedDeltaRule
from titans_backends.signature import Signature

from ..peers import dense, load, own_offsets

__all__ = ["Inputs", "Kept", "cuts", "keeping", "kept_of", "kernels", "made", "plan_of"]

_FILLED = WeakTensorKeyDictionary()
_CACHED = ("h0", "mt", "fallback_bwd", "num_warmup_bwd")
_PLAN = "_titans_backends_plan"
_UNITS = 4
_FUNCTIONS = (
    "CHUNK_SIZE", "_auto_intra_cp_context", "chunk_gated_delta_rule_bwd", "chunk_gated_delta_rule_fwd", "chunk_local_cumsum", "kkt_solve",
    "l2norm_bwd", "l2norm_fwd",
)  # fmt: skip


class Inputs(NamedTuple):  # a tuple is made in a third of a dataclass's time, and this is in every call
    """`shared` are the arguments of FlashQLA's forward and backward, `units` q, k and their norms where they were brought to unit length. Of a packed
    call with empty sequences, `filled` are the rows of the others, and `sequences` counts all."""

    shared: dict[str, Any]
    g: Tensor | None
    units: tuple[Tensor, ...]
    filled: Tensor | None
    sequences: int

    def of_filled(self, states: Tensor | None) -> Tensor | None:
        """The states of the sequences that have tokens, of one for each sequence."""
        if states is None:
            return None
        return dense(states if self.filled is None else states[self.filled])  # rows of a transposed state come out transposed

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
    """One direction of the pair that hands on what FlashQLA's autograd keeps; `Kept` says what that is."""
    name = "flash_qla/cut" if candidate.param("auto_cp") else "flash_qla/whole"
    return replace(candidate, variant="kept", saves_states=True, residual=name)


class Kept(NamedTuple):
    """What FlashQLA's autograd keeps: the running decay, the inverse of each chunk's triangle `[B, T, H, 64]`, q and k of unit length with their norms
    where those were asked for, and where sequences are cut what the segments begin with.

    `plan` is FlashQLA's plan of the cut, which is no tensor: it goes with the inverses themselves, and is None where those come back as others.
    """

    running: Tensor
    inverse: Tensor
    units: tuple[Tensor, ...]
    segments: Any
    plan: Any

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """To be handed on, the plan with them."""
        setattr(self.inverse, _PLAN, self.plan)
        cut = () if self.segments is None else tuple(getattr(self.segments, name) for name in _CACHED)
        return self.running, self.inverse, *self.units, *cut


def kept_of(call: GatedDeltaRule, tensors: tuple[Tensor, ...]) -> Kept:
    """What was handed on by a forward of the same call."""
    running, inverse, *more = tensors
    begin = _UNITS if call.qk_l2norm else 0
    segments = None
    if cut := more[begin:]:
        segments = load("flash_qla", "flash_qla.ops.gated_delta_rule.chunk.cp", ("CPCache",)).CPCache(**dict(zip(_CACHED, cut, strict=True)))
    return Kept(running, inverse, tuple(more[:begin]), segments, getattr(inverse, _PLAN, None))


def kernels() -> ModuleType:
    """FlashQLA's module of the gated delta rule."""
    return load("flash_qla", "flash_qla.ops.gated_delta_rule.chunk", _FUNCTIONS)


def plan_of(x: Inputs, auto: bool) -> Any:
    """FlashQLA's plan of a training call: where it is cut, if anywhere. Its forward and its backward take the same one."""
    functions = kernels()
    return functions._auto_intra_cp_context(x.shared["k"], x.shared["v"], x.shared["cu_seqlens"], functions.CHUNK_SIZE, auto, True)


def made(call: GatedDeltaRule, units: tuple[Tensor, ...] = (), *, decayed: bool = True) -> Inputs:
    """The inputs of a call, a decay of nothing where it has none, or none at all unless `decayed`; `units` are q, k and their norms where they are known."""
    v, beta = dense(call.v), dense(call.beta)
    if call.qk_l2norm and not units:
        functions = kernels()
        units = (*functions.l2norm_fwd(dense(call.q)), *functions.l2norm_fwd(dense(call.k)))
    q, _, k, _ = units or (dense(call.q), None, dense(call.k), None)
    g = call.g if decayed else None
    if g is not None:
        g = dense(g if g.dtype is torch.float32 else g.float())
    elif decayed:
        g = torch.zeros(beta.shape, dtype=torch.float32, device=beta.device)
    offsets, filled, sequences = None, None, q.shape[0]
    if call.cu_seqlens is not None:
        (offsets, filled), sequences = _without_empty(own_offsets(call.cu_seqlens, v.device)), call.cu_seqlens.shape[0] - 1
    scale = k.shape[-1] ** -0.5 if call.scale is None else call.scale
    state = call.initial_state
    if state is not None:
        state = dense(state if filled is None else state[filled])
    shared = {"q": q, "k": k, "v": v, "beta": beta, "scale": scale, "cu_seqlens": offsets, "initial_state": state}
    return Inputs(shared, g, units, filled, sequences)


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
