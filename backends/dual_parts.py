"""dual_core's backward from those of its parts, for every backend that has them (SPEC.md 10).

o = alpha f fast + (1 - alpha) s slow is linear in both cores, each with a weight of its own. What the slow one is made of, a candidate's variant says:

the rule's own    the exact rule: gated_delta_rule's backward
flat              fast_core's backward on u computed again, and uw_transform's
any other         slow_core's backward on u and w computed again, and uw_transform's

What the parts share (q, k, v, beta, g) is summed, the weights' gradients become those of alpha and of the two gates: the backend's `joined`. A part that no
gradient reaches, or that nobody needs, is not run, and what it would have found is zero. Which ways of the parts are candidates, each backend says itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from titans_backends.backend import Candidate, Param, TrainableOpModule
from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.contract import Call
from titans_backends.contracts.dual_core import DualCore
from titans_backends.contracts.fast_core import FastCore
from titans_backends.contracts.gated_delta_rule import GatedDeltaRule
from titans_backends.contracts.slow_core import SlowCore
from titans_backends.contracts.uw_transform import UWTransform

__all__ = ["Found", "Grads", "Parts", "joined_candidates"]

_INPUTS = ("q", "k", "v", "beta", "g", "fast_gate", "slow_gate", "alpha", "chunk_decay", "initial_state", "initial_fast_state")
Found = dict[str, Tensor]
Grads = tuple[Tensor | None, ...]


def joined_candidates(backend: str, variant: str, parts: Mapping[str, list[Candidate]], most: int, sources: Iterable[str] = ()) -> list[Candidate]:
    """One candidate for each way of the part that has several, at most so many: the parts' parameters behind their names, their sources behind `sources`."""
    if not all(parts.values()):
        return []
    made = []
    for index in range(min(most, max(len(found) for found in parts.values()))):
        params: list[tuple[str, Param]] = []
        all_sources = dict.fromkeys(sources)
        for name, found in parts.items():
            part = found[min(index, len(found) - 1)]
            params += [(f"{name}_variant", part.variant), *((f"{name}_{key}", value) for key, value in part.params)]
            all_sources |= dict.fromkeys(part.sources)
        made.append(Candidate(backend, variant, tuple(params), "backward", sources=tuple(all_sources)))
    return made


def _part(candidate: Candidate, name: str) -> Candidate:
    """The candidate of one part."""
    inner = {key.removeprefix(f"{name}_"): value for key, value in candidate.params if key.startswith(f"{name}_")}
    return Candidate(candidate.backend, str(inner.pop("variant")), tuple(inner.items()), "forward" if name == "make" else "backward")


@dataclass(frozen=True, slots=True)
class Parts:
    """What a backend brings: its modules of the parts, and what it launches before and behind them.

    `rule_variant`: which of its variants runs gated_delta_rule; `chunk_of(call)`: the chunks of the others' transform and slow core;
    `prepared(call, scaled)`: q and k as the parts take them, beta v (v itself unless `scaled`), and the weights alpha f and (1 - alpha) s `[B, T, H]`;
    `joined(call, fast, slow, below, needs)`: those gradients of q, k, v, beta, g, alpha and the gates that are needed, `below` what came of k, v, beta and g
    behind the slow core's operands.
    """

    fast_core: TrainableOpModule
    slow_core: TrainableOpModule
    uw_transform: TrainableOpModule
    gated_delta_rule: TrainableOpModule
    rule_variant: str
    chunk_of: Callable[[DualCore], int]
    prepared: Callable[[DualCore, bool], tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]
    joined: Callable[[DualCore, Found, Found, Found, AbstractSet[str]], Found]

    def gradients(self, call: DualCore, grads: Grads, needs: AbstractSet[str], candidate: Candidate) -> Grads:
        """The gradients of every tensor argument but cu_seqlens, in the contract's order; rows of q, k, v and of o's gradient are contiguous."""
        needs = {name for name in needs if isinstance(getattr(call, name), Tensor)}
        if not needs:
            return (None,) * len(_INPUTS)
        d_o, d_state, d_fast_state = grads
        asked = _fast_asked(needs)
        arrives = _arrives((d_o, d_fast_state), asked)
        q, k, values, fast_weight, slow_weight = self.prepared(call, arrives and bool(asked & {"q", "k", "gate"}))
        alone = replace(call, q=q, k=k, qk_l2norm=False)
        fast: Found = {}
        if arrives:
            fast = _of(self.fast_core, "fast_core", _fast(alone, values, fast_weight), (d_o, d_fast_state), asked, _part(candidate, "fast"))
        if candidate.variant == self.rule_variant:
            slow = self._rule(alone, slow_weight, (d_o, d_state), needs, candidate)
            below = {name: slow[name] for name in ("v", "beta", "g") if name in slow}
        else:
            slow, below = self._composed(alone, slow_weight, (d_o, d_state), needs, candidate)
        return self._collected(call, fast, slow, below, needs)

    def _rule(self, call: DualCore, weight: Tensor, grads: Grads, needs: AbstractSet[str], candidate: Candidate) -> Found:
        """gated_delta_rule's gradients."""
        asked = needs & {"q", "k", "v", "beta", "g", "initial_state"} | _gate(needs)
        if not _arrives(grads, asked):
            return {}
        rule = GatedDeltaRule(
            call.q, call.k, call.v, call.beta, call.g, gate=weight, scale=call.scale, initial_state=call.initial_state,
            output_final_state=call.output_final_state, cu_seqlens=call.cu_seqlens,
        )  # fmt: skip
        return _of(self.gated_delta_rule, "gated_delta_rule", rule, grads, asked, _part(candidate, "slow"))

    def _composed(self, call: DualCore, weight: Tensor, grads: Grads, needs: AbstractSet[str], candidate: Candidate) -> tuple[Found, Found]:
        """The gradients of the core on u and w, and what those of u and w make of k, v, beta and g."""
        through = needs & {"k", "v", "beta", "g"}
        flat = candidate.variant == "flat"
        asked = needs & {"q", "k", "g"} | _gate(needs)
        if through:
            asked |= {"v"} if flat else {"u", "w"}
        if flat:
            grads = (grads[0], None)
        else:
            asked |= needs & {"initial_state", "chunk_decay"}
        if not _arrives(grads, asked):
            return {}, {}
        chunk = self.chunk_of(call)
        transform = UWTransform(call.k, call.v, call.beta, call.g, chunk_size=chunk, transform=call.transform, cu_seqlens=call.cu_seqlens)
        u, w = self.uw_transform.run(transform, _part(candidate, "make"))
        assert u is not None
        assert w is not None
        if flat:
            core = replace(_fast(call, u, weight), g=call.g, initial_state=None, output_final_state=False)
            slow = _of(self.fast_core, "fast_core", core, grads, asked, _part(candidate, "fast"))
        else:
            scan = SlowCore(
                call.q, call.k, u, w, g=call.g, gate=weight, chunk_size=chunk, scale=call.scale, initial_state=call.initial_state,
                chunk_decay=call.chunk_decay, output_final_state=call.output_final_state, cu_seqlens=call.cu_seqlens, delta=call.delta,
                normalize_read=call.normalize_read, normalize_final=call.normalize_final,
            )  # fmt: skip
            slow = _of(self.slow_core, "slow_core", scan, grads, asked, _part(candidate, "slow"))
        arrived = (slow.pop("v" if flat else "u", None), slow.pop("w", None))
        if not _arrives(arrived, through):
            return slow, {}
        return slow, _of(self.uw_transform, "uw_transform", transform, arrived, through, _part(candidate, "transform"))

    def _collected(self, call: DualCore, fast: Found, slow: Found, below: Found, needs: AbstractSet[str]) -> Grads:
        """The parts' gradients as those of the call's arguments."""
        into: Found = {}
        whole = (
            ("initial_state", slow.get("initial_state"), call.initial_state), ("chunk_decay", slow.get("chunk_decay"), call.chunk_decay),
            ("initial_fast_state", fast.get("initial_state"), call.initial_fast_state),
        )  # fmt: skip
        for name, found, like in whole:
            if name in needs and like is not None:
                into[name] = torch.zeros_like(like, memory_format=torch.contiguous_format) if found is None else found
        if "g" in needs and "g" in slow and below.get("g", slow["g"]) is slow["g"]:  # one part's, as it is
            into["g"] = slow["g"]
        into |= self.joined(call, fast, slow, below, needs - into.keys())
        return tuple(into.get(name) for name in _INPUTS)


def _fast_asked(needs: AbstractSet[str]) -> set[str]:
    """Which of fast_core's gradients are needed; v stands for beta v, which only those of q, k and the gate read: the core is linear in it."""
    asked = set(needs & {"q", "k"})
    asked |= {"v"} if needs & {"v", "beta"} else set()
    asked |= {"gate"} if needs & {"alpha", "fast_gate"} else set()
    return asked | ({"initial_state"} if "initial_fast_state" in needs else set())


def _gate(needs: AbstractSet[str]) -> set[str]:
    return {"gate"} if needs & {"alpha", "slow_gate"} else set()


def _fast(call: DualCore, values: Tensor, weight: Tensor) -> FastCore:
    return FastCore(
        call.q, call.k, values, gate=weight, chunk_size=call.chunk_size, scale=call.scale, initial_state=call.initial_fast_state,
        chunk_offset=call.chunk_offset, output_final_state=call.output_final_state, cu_seqlens=call.cu_seqlens,
    )  # fmt: skip


def _arrives(grads: Grads, asked: AbstractSet[str]) -> bool:
    """Whether a part has anything to do."""
    return bool(asked) and any(grad is not None for grad in grads)


def _of(module: TrainableOpModule, op: str, call: Call, grads: Grads, asked: AbstractSet[str], candidate: Candidate) -> Found:
    """A part's gradients by name."""
    found = module.run_backward(call, grads, None, frozenset(asked), candidate)
    return {name: grad for name, grad in zip(CONTRACTS[op].differentiable, found, strict=True) if grad is not None}
