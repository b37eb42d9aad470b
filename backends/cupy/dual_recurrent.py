"""dual_core's recurrent mode; its variants, each of which ends with the fast core added in place (dual_fast.py):

rule       the exact rule: gated_delta_rule's launches; two in all where its segments are one
composed   uw_transform and slow_core: every option
flat, prefix  one launch, where every sequence is one chunk and no state comes or goes: then no memory is read
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from titans_backends.backend import Candidate, Param
from titans_backends.contracts.dual_core import DualCore, is_exact_rule
from titans_backends.contracts.gated_delta_rule import GatedDeltaRule
from titans_backends.contracts.slow_core import SlowCore
from titans_backends.contracts.uw_transform import UWTransform
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict, refused

from . import dual_fast, dual_joins, gated_delta_rule, slow_core, uw_transform
from .bounds import bounds_on
from .dual_fast import fast_plans, merge_fast
from .dual_flat import FLAT_VARIANTS, flat, flat_candidates, serves_flat
from .dual_joins import normalize_states, unit_operands
from .serving import WIDEST, candidate, serves
from .strides import unit_stride

__all__ = ["EXACT_CHUNK", "is_exact", "on_chunks_of", "recurrent", "recurrent_candidates", "serves_recurrent"]

EXACT_CHUNK = 64
"""Tokens of the slow core's chunks where it is the exact rule, for which any will do."""
_MOST = 7


def serves_recurrent(signature: Signature, machine: Machine) -> Verdict:
    """What `serving.serves` says, chunks that one tile holds unless the slow core is the exact rule, and tiles that fit the card."""
    verdict = serves(signature, machine, WIDEST)
    if not verdict:
        return verdict
    inner = _inner(signature)
    verdict &= uw_transform.supports(inner, machine) & slow_core.supports(inner, machine)
    if not fast_plans(signature, machine):
        sizes = f"K={signature.dim('K')}, V={signature.dim('V')} in {str(signature.dtype).removeprefix('torch.')}"
        verdict &= refused(f"no tiles of {sizes} fit the shared memory of {machine.name}; use backend='triton'")
    return verdict


def is_exact(signature: Signature) -> bool:
    """Whether the slow core is the exact delta rule, whose chunks are free."""
    options = dict(signature.options)
    exact = options["memory"] == "recurrent" and options["transform"] == "exact" and bool(options["delta"])
    return exact and not options["normalize_read"] and not signature.has("chunk_decay")


def on_chunks_of(signature: Signature, chunk: int) -> Signature:
    """The signature with another chunk_size."""
    return replace(signature, options=tuple((name, chunk if name == "chunk_size" else value) for name, value in signature.options))


def _inner(signature: Signature) -> Signature:
    """The signature as the slow core's parts see it."""
    return on_chunks_of(signature, EXACT_CHUNK) if is_exact(signature) else signature


def _is_one_chunk(signature: Signature) -> bool:
    """Whether every sequence is one chunk without a state before or after it."""
    states = signature.option("output_final_state") or signature.has("initial_state") or signature.has("initial_fast_state")
    tokens, chunk = signature.dim("T") + int(str(signature.option("chunk_offset"))), signature.option("chunk_size")
    assert isinstance(chunk, int)
    return not states and tokens <= chunk and not signature.batch_invariant


def recurrent_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """The exact rule's own launches, or the composition; one launch where that will do, first for other transforms. A slow core's ways have the fast core's
    default."""
    plans = fast_plans(signature, machine)
    single = flat_candidates(signature, machine) if _is_one_chunk(signature) and serves_flat(signature, machine) else []
    rules = gated_delta_rule.candidates(signature, machine)[: _MOST - 1] if is_exact(signature) else []
    if rules:
        other = single[:1] or [_joined("rule", {"slow": rules[0]}, plan) for plan in plans[1:2]]
        return [*(_joined("rule", {"slow": way}, plans[0]) for way in rules), *other]
    inner = _inner(signature)
    transforms, scans = uw_transform.candidates(inner, machine), slow_core.candidates(inner, machine)
    found = [_joined("composed", {"transform": transforms[0], "slow": scan}, plans[0]) for scan in scans[: _MOST - 1]]
    found += [_joined("composed", {"transform": way, "slow": scans[0]}, plans[-1]) for way in transforms[1:2]]
    return [*single[:2], *dict.fromkeys(found)][:_MOST]


def _joined(variant: str, parts: dict[str, Candidate], plan: tuple[int, int]) -> Candidate:
    params: dict[str, Param] = {"fast_side": plan[0], "fast_buffers": plan[1]}
    for name, part in parts.items():
        params |= {f"{name}_variant": part.variant, **{f"{name}_{key}": value for key, value in part.params}}
    made = candidate(variant, (dual_fast.SOURCE, dual_joins.SOURCE), **params)
    return replace(made, sources=tuple(dict.fromkeys((*made.sources, *(name for part in parts.values() for name in part.sources)))))


def _part(joined: Candidate, name: str) -> Candidate:
    """One part's candidate."""
    inner = {key.removeprefix(f"{name}_"): value for key, value in joined.params if key.startswith(f"{name}_")}
    return Candidate("cupy", str(inner.pop("variant")), tuple(inner.items()))


def recurrent(call: DualCore, chosen: Candidate) -> tuple[Tensor | None, ...]:
    """`o` `[B, T, H, V]` in v's dtype, and both final states `[N, H, K, V]` in float32, None unless asked."""
    if chosen.variant in FLAT_VARIANTS:
        return flat(call, chosen), None, None
    call = replace(call, q=unit_stride(call.q), k=unit_stride(call.k), v=unit_stride(call.v), cu_seqlens=bounds_on(call.cu_seqlens, call.v))
    o, final = _by_rule(call, chosen) if chosen.variant == "rule" else _composed(call, chosen)
    fast_final = None
    if o.numel() or call.output_final_state:
        fast_final = merge_fast(call, o, int(chosen.param("fast_side")), int(chosen.param("fast_buffers")))
    return o, final, fast_final


def _by_rule(call: DualCore, chosen: Candidate) -> tuple[Tensor, Tensor | None]:
    rule = GatedDeltaRule(
        call.q, call.k, call.v, call.beta, call.g, gate=call.slow_gate, scale=call.scale, initial_state=call.initial_state,
        output_final_state=call.output_final_state, qk_l2norm=call.qk_l2norm, cu_seqlens=call.cu_seqlens,
    )  # fmt: skip
    o, final = gated_delta_rule.run(rule, _part(chosen, "slow"))
    assert o is not None
    if final is not None and call.normalize_final:
        normalize_states(call, final)
    return o, final


def _composed(call: DualCore, chosen: Candidate) -> tuple[Tensor, Tensor | None]:
    chunk = EXACT_CHUNK if is_exact_rule(call) else call.chunk_size
    q, k = unit_operands(call)
    u, w = uw_transform.run(
        UWTransform(k, call.v, call.beta, call.g, chunk_size=chunk, transform=call.transform, cu_seqlens=call.cu_seqlens), _part(chosen, "transform")
    )
    assert u is not None
    assert w is not None
    o, final = slow_core.run(
        SlowCore(
            q, k, u, w, g=call.g, chunk_decay=call.chunk_decay, gate=call.slow_gate, chunk_size=chunk, scale=call.scale,
            initial_state=call.initial_state, output_final_state=call.output_final_state, cu_seqlens=call.cu_seqlens, delta=call.delta,
            normalize_read=call.normalize_read, normalize_final=call.normalize_final,
        ),
        _part(chosen, "slow"),
    )  # fmt: skip
    assert o is not None
    return o, final
