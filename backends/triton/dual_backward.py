"""dual_core's backward, put together from those of its parts (backends/dual_parts.py); its variants:

exact       the exact rule: gated_delta_rule's backward and fast_core's
recurrent   any other recurrent call: slow_core's backward on u and w computed again, uw_transform's and fast_core's
flat        fast_core's backward on beta v and on u computed again, and uw_transform's
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import replace

from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.dual_core import DualCore
from titans_backends.contracts.gated_delta_rule import GRID
from titans_backends.machine import Machine
from titans_backends.signature import Signature

from ..dual_parts import Found, Parts, joined_candidates
from . import fast_core, gated_delta_rule, slow_core, uw_transform
from .delta_backward_plans import backward_plans
from .dual_exact import is_exact
from .dual_inputs import core_weights, unit_operands
from .dual_joins import joined_operands, joined_values, scaled_values
from .dual_recurrent import transform_signature
from .grid import on_device, unit_stride

__all__ = ["backward_candidates", "run_backward"]

_MOST = 4
_EXACT = "exact"


def backward_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """The slow part's plans with the default of every other part; none where a part refuses."""
    plain = replace(signature, may_save=False)
    fast = fast_core.backward_candidates(plain, machine)
    if not fast:
        return []
    if is_exact(signature):
        if signature.option("normalize_final"):
            return []
        return joined_candidates("triton", _EXACT, {"slow": backward_plans(plain, machine, GRID), "fast": fast[:1]}, _MOST)
    if signature.option("chunk_offset"):
        return []
    inner = transform_signature(plain)
    transforms = {"make": uw_transform.candidates(inner, machine)[:1], "transform": uw_transform.backward_candidates(inner, machine)[:1]}
    if signature.option("memory") == "flat":
        return joined_candidates("triton", "flat", {**transforms, "fast": fast}, _MOST)
    return joined_candidates("triton", "recurrent", {**transforms, "slow": slow_core.backward_candidates(plain, machine), "fast": fast[:1]}, _MOST)


def run_backward(
    call: DualCore, grads: tuple[Tensor | None, ...], states: Tensor | None, needs: frozenset[str], candidate: Candidate
) -> tuple[Tensor | None, ...]:
    """The gradients of every tensor argument but cu_seqlens, in the contract's order."""
    call = replace(call, q=unit_stride(call.q), k=unit_stride(call.k), v=unit_stride(call.v), cu_seqlens=on_device(call.cu_seqlens, call.v))
    d_o = None if grads[0] is None else unit_stride(grads[0])
    return PARTS.gradients(call, (d_o, *grads[1:]), needs, candidate)


def _prepared(call: DualCore, scaled: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the parts take: a launch for the operands' norms, one for the weights, one for beta v."""
    q, k = unit_operands(call)
    fast, slow = core_weights(call)
    return q, k, scaled_values(call.v, call.beta) if scaled else call.v, fast, slow


def _joined(call: DualCore, fast: Found, slow: Found, below: Found, needs: AbstractSet[str]) -> Found:
    """The sums of the parts' gradients: a launch for q's and k's, one for all others."""
    into = joined_operands(call, fast, slow, below, frozenset(needs))
    return into | joined_values(call, fast, slow, below, frozenset(needs - into.keys()))


PARTS = Parts(fast_core, slow_core, uw_transform, gated_delta_rule, _EXACT, lambda call: call.chunk_size, _prepared, _joined)
