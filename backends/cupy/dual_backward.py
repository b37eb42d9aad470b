"""dual_core's backward from those of its parts (backends/dual_parts.py), with one launch before them and one behind (dual_joins.py); its variants:

rule       the exact rule: gated_delta_rule's backward and fast_core's
composed   any other recurrent call: slow_core's backward on u and w computed again, uw_transform's and fast_core's
flat       fast_core's backward on beta v and on u computed again, and uw_transform's
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.dual_core import DualCore, is_exact_rule
from titans_backends.machine import Machine
from titans_backends.signature import Signature

from ..dual_parts import Parts, joined_candidates
from . import dual_joins, fast_core, gated_delta_rule, slow_core, uw_transform
from .bounds import bounds_on
from .dual_recurrent import EXACT_CHUNK, is_exact, on_chunks_of
from .sources import source_names
from .strides import unit_stride

__all__ = ["backward_candidates", "run_backward"]

_MOST = 5
"""Ways of the slow part: three of any card's, and two with Hopper's products."""


def _chunk_of(call: DualCore) -> int:
    return EXACT_CHUNK if is_exact_rule(call) else call.chunk_size


PARTS = Parts(fast_core, slow_core, uw_transform, gated_delta_rule, "rule", _chunk_of, dual_joins.prepared, dual_joins.joined)


def backward_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """The slow part's ways with the default of every other part; none where a part has none."""
    plain = replace(signature, may_save=False)
    fast = fast_core.backward_candidates(plain, machine)
    sources = source_names(dual_joins.SOURCE)
    found: list[Candidate] = []
    if is_exact(plain) and not plain.option("normalize_final"):
        rule = {"slow": gated_delta_rule.backward_candidates(plain, machine), "fast": fast[:1]}
        found += joined_candidates("cupy", "rule", rule, _MOST, sources)
    flat = plain.option("memory") == "flat"
    if (flat and plain.option("chunk_offset")) or found:
        return found
    inner = on_chunks_of(plain, EXACT_CHUNK) if is_exact(plain) else plain
    if not uw_transform.supports(inner, machine):
        return []
    transforms = {"make": uw_transform.candidates(inner, machine)[:1], "transform": uw_transform.backward_candidates(inner, machine)[:1]}
    if flat:
        return joined_candidates("cupy", "flat", {**transforms, "fast": fast}, _MOST, sources)
    parts = {**transforms, "slow": slow_core.backward_candidates(inner, machine), "fast": fast[:1]}
    return joined_candidates("cupy", "composed", parts, _MOST, sources)


def run_backward(
    call: DualCore, grads: tuple[Tensor | None, ...], states: Tensor | None, needs: frozenset[str], candidate: Candidate
) -> tuple[Tensor | None, ...]:
    """The gradients of every tensor argument but cu_seqlens, in the contract's order."""
    call = replace(call, q=unit_stride(call.q), k=unit_stride(call.k), v=unit_stride(call.v), cu_seqlens=bounds_on(call.cu_seqlens, call.v))
    d_o = None if grads[0] is None else unit_stride(grads[0])
    return PARTS.gradients(call, (d_o, *grads[1:]), needs, candidate)
