"""dual_core's backward from those of its parts (SPEC.md 10): o = alpha f fast + (1 - alpha) s slow is linear in both, each with a weight of its own.

rule       the exact rule: gated_delta_rule's backward and fast_core's
composed   any other recurrent call: slow_core's backward on u and w computed again, uw_transform's and fast_core's
flat       fast_core's backward on beta v and on u computed again, and uw_transform's

What the parts share (q, k, v, beta, g) is summed, the weights' gradients become those of alpha and of the two gates (dual_joins.py). A part that no gradient
reaches, or that nobody needs, is not run, and what it would have found is zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace

import torch
from torch import Tensor

from titans_backends.backend import Candidate, Param, TrainableOpModule
from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.contract import Call
from titans_backends.contracts.dual_core import DualCore, is_exact_rule
from titans_backends.contracts.fast_core import FastCore
from titans_backends.contracts.gated_delta_rule import GatedDeltaRule
from titans_backends.contracts.slow_core import SlowCore
from titans_backends.contracts.uw_transform import UWTransform
from titans_backends.machine import Machine
from titans_backends.signature import Signature

from . import dual_joins, fast_core, gated_delta_rule, slow_core, uw_transform
from .bounds import bounds_on
from .dual_joins import joined, prepared
from .dual_recurrent import EXACT_CHUNK, is_exact, on_chunks_of
from .sources import source_names
from .strides import unit_stride

__all__ = ["backward_candidates", "run_backward"]

_INPUTS = ("q", "k", "v", "beta", "g", "fast_gate", "slow_gate", "alpha", "chunk_decay", "initial_state", "initial_fast_state")
_MOST = 3
Found = dict[str, Tensor]


def backward_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """The slow part's ways with the default of every other part; none where a part has none."""
    plain = replace(signature, may_save=False)
    fast = fast_core.backward_candidates(plain, machine)
    found: list[Candidate] = []
    if is_exact(plain) and not plain.option("normalize_final"):
        found += _joined("rule", {"slow": gated_delta_rule.backward_candidates(plain, machine), "fast": fast[:1]})
    flat = plain.option("memory") == "flat"
    if (flat and plain.option("chunk_offset")) or found:
        return found
    inner = on_chunks_of(plain, EXACT_CHUNK) if is_exact(plain) else plain
    if not uw_transform.supports(inner, machine):
        return []
    transforms = {"make": uw_transform.candidates(inner, machine)[:1], "transform": uw_transform.backward_candidates(inner, machine)[:1]}
    if flat:
        return _joined("flat", {**transforms, "fast": fast})
    return _joined("composed", {**transforms, "slow": slow_core.backward_candidates(inner, machine), "fast": fast[:1]})


def _joined(variant: str, parts: Mapping[str, list[Candidate]]) -> list[Candidate]:
    """One candidate for each way of the part that has several."""
    if not all(parts.values()):
        return []
    made = []
    for index in range(min(_MOST, max(len(found) for found in parts.values()))):
        params: list[tuple[str, Param]] = []
        sources = dict.fromkeys(source_names(dual_joins.SOURCE))
        for name, found in parts.items():
            part = found[min(index, len(found) - 1)]
            params += [(f"{name}_variant", part.variant), *((f"{name}_{key}", value) for key, value in part.params)]
            sources |= dict.fromkeys(part.sources)
        made.append(Candidate("cupy", variant, tuple(params), "backward", sources=tuple(sources)))
    return made


def _part(candidate: Candidate, name: str) -> Candidate:
    """The candidate of one part."""
    inner = {key.removeprefix(f"{name}_"): value for key, value in candidate.params if key.startswith(f"{name}_")}
    return Candidate("cupy", str(inner.pop("variant")), tuple(inner.items()), "forward" if name == "make" else "backward")


def run_backward(
    call: DualCore, grads: tuple[Tensor | None, ...], states: Tensor | None, needs: frozenset[str], candidate: Candidate
) -> tuple[Tensor | None, ...]:
    """The gradients of every tensor argument but cu_seqlens, in the contract's order."""
    needs = frozenset(name for name in needs if isinstance(getattr(call, name), Tensor))
    if not needs:
        return (None,) * len(_INPUTS)
    call = replace(call, q=unit_stride(call.q), k=unit_stride(call.k), v=unit_stride(call.v), cu_seqlens=bounds_on(call.cu_seqlens, call.v))
    d_o = None if grads[0] is None else unit_stride(grads[0])
    fast_asked = _fast_asked(needs)
    reads = _arrives((d_o, grads[2]), fast_asked) and bool(fast_asked & {"q", "k", "gate"})
    q, k, values, fast_weight, slow_weight = prepared(call, scaled=reads)
    alone = replace(call, q=q, k=k, qk_l2norm=False)
    fast: Found = {}
    if _arrives((d_o, grads[2]), fast_asked):
        fast = _of(fast_core, "fast_core", _fast(alone, values, fast_weight), (d_o, grads[2]), fast_asked, _part(candidate, "fast"))
    if candidate.variant == "rule":
        slow, below = _rule_part(alone, slow_weight, (d_o, grads[1]), needs, candidate)
    else:
        slow, below = _slow_part(alone, slow_weight, (d_o, grads[1]), needs, candidate)
    return _collected(call, fast, slow, below, needs)


def _fast_asked(needs: AbstractSet[str]) -> set[str]:
    """Which of fast_core's gradients are needed; v stands for beta v, which only those of q, k and the gate read: the core is linear in it."""
    asked = set(needs & {"q", "k"})
    asked |= {"v"} if needs & {"v", "beta"} else set()
    asked |= {"gate"} if needs & {"alpha", "fast_gate"} else set()
    return asked | ({"initial_state"} if "initial_fast_state" in needs else set())


def _rule_part(call: DualCore, weight: Tensor, grads: tuple[Tensor | None, ...], needs: frozenset[str], candidate: Candidate) -> tuple[Found, Found]:
    """gated_delta_rule's gradients, those of v and beta apart."""
    asked = set(needs & {"q", "k", "v", "beta", "g", "initial_state"}) | ({"gate"} if needs & {"alpha", "slow_gate"} else set())
    if not _arrives(grads, asked):
        return {}, {}
    rule = GatedDeltaRule(
        call.q, call.k, call.v, call.beta, call.g, gate=weight, scale=call.scale, initial_state=call.initial_state,
        output_final_state=call.output_final_state, cu_seqlens=call.cu_seqlens,
    )  # fmt: skip
    found = _of(gated_delta_rule, "gated_delta_rule", rule, grads, asked, _part(candidate, "slow"))
    return {name: x for name, x in found.items() if name not in ("v", "beta")}, {name: x for name, x in found.items() if name in ("v", "beta")}


def _slow_part(call: DualCore, weight: Tensor, grads: tuple[Tensor | None, ...], needs: frozenset[str], candidate: Candidate) -> tuple[Found, Found]:
    """The gradients of the core on u and w, and what those of u and w make of k, v, beta and g."""
    through = needs & {"k", "v", "beta", "g"}
    flat = candidate.variant == "flat"
    asked = set(needs & {"q", "k", "g"}) | ({"gate"} if needs & {"alpha", "slow_gate"} else set())
    if through:
        asked |= {"v"} if flat else {"u", "w"}
    if flat:
        grads = (grads[0], None)
    else:
        asked |= needs & {"initial_state", "chunk_decay"}
    if not _arrives(grads, asked):
        return {}, {}
    chunk = EXACT_CHUNK if is_exact_rule(call) else call.chunk_size
    transform = UWTransform(call.k, call.v, call.beta, call.g, chunk_size=chunk, transform=call.transform, cu_seqlens=call.cu_seqlens)
    u, w = uw_transform.run(transform, _part(candidate, "make"))
    assert u is not None
    assert w is not None
    if flat:
        core = replace(_fast(call, u, weight), g=call.g, initial_state=None, output_final_state=False)
        slow = _of(fast_core, "fast_core", core, grads, asked, _part(candidate, "fast"))
    else:
        scan = SlowCore(
            call.q, call.k, u, w, g=call.g, gate=weight, chunk_size=chunk, scale=call.scale, initial_state=call.initial_state,
            chunk_decay=call.chunk_decay, output_final_state=call.output_final_state, cu_seqlens=call.cu_seqlens, delta=call.delta,
            normalize_read=call.normalize_read, normalize_final=call.normalize_final,
        )  # fmt: skip
        slow = _of(slow_core, "slow_core", scan, grads, asked, _part(candidate, "slow"))
    arrived = (slow.pop("v" if flat else "u", None), slow.pop("w", None))
    if not _arrives(arrived, through):
        return slow, {}
    return slow, _of(uw_transform, "uw_transform", transform, arrived, through, _part(candidate, "transform"))


def _fast(call: DualCore, values: Tensor, weight: Tensor) -> FastCore:
    return FastCore(
        call.q, call.k, values, gate=weight, chunk_size=call.chunk_size, scale=call.scale, initial_state=call.initial_fast_state,
        chunk_offset=call.chunk_offset, output_final_state=call.output_final_state, cu_seqlens=call.cu_seqlens,
    )  # fmt: skip


def _arrives(grads: tuple[Tensor | None, ...], asked: AbstractSet[str]) -> bool:
    """Whether a part has anything to do."""
    return bool(asked) and any(grad is not None for grad in grads)


def _of(module: TrainableOpModule, op: str, call: Call, grads: tuple[Tensor | None, ...], asked: AbstractSet[str], candidate: Candidate) -> Found:
    """A part's gradients by name."""
    found = module.run_backward(call, grads, None, frozenset(asked), candidate)
    return {name: grad for name, grad in zip(CONTRACTS[op].differentiable, found, strict=True) if grad is not None}


def _collected(call: DualCore, fast: Found, slow: Found, below: Found, needs: frozenset[str]) -> tuple[Tensor | None, ...]:
    """The parts' gradients as those of the call's arguments."""
    into: Found = {}
    whole = (
        ("initial_state", slow.get("initial_state"), call.initial_state), ("chunk_decay", slow.get("chunk_decay"), call.chunk_decay),
        ("initial_fast_state", fast.get("initial_state"), call.initial_fast_state),
    )  # fmt: skip
    for name, found, like in whole:
        if name in needs and like is not None:
            into[name] = torch.zeros_like(like, memory_format=torch.contiguous_format) if found is None else found
    if "g" in needs and "g" in slow and "g" not in below:  # one part's, as it is
        into["g"] = slow["g"]
    into |= joined(call, fast, slow, below, needs - into.keys())
    return tuple(into.get(name) for name in _INPUTS)
