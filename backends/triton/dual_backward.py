"""dual_core's backward, put together from those of its parts: o = alpha f fast + (1 - alpha) s slow is linear in both, each with its own weight.

exact       the exact rule: gated_delta_rule's backward and fast_core's
recurrent   any other recurrent call: slow_core's backward on u and w computed again, uw_transform's and fast_core's
flat        fast_core's backward on beta v and on u computed again, and uw_transform's

What the parts share (q, k, v, beta, g) is summed; the weights' gradients become those of alpha and of the two gates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from titans_backends.backend import Candidate, Param
from titans_backends.contracts.dual_core import DualCore
from titans_backends.contracts.fast_core import FastCore
from titans_backends.contracts.gated_delta_rule import GRID, GatedDeltaRule
from titans_backends.contracts.slow_core import SlowCore
from titans_backends.contracts.uw_transform import UWTransform
from titans_backends.machine import Machine
from titans_backends.signature import Signature

from . import fast_core, gated_delta_rule, slow_core, uw_transform
from .delta_plans import backward_plans
from .dual_exact import is_exact
from .dual_inputs import core_weights, unit_operands
from .dual_recurrent import transform_signature

__all__ = ["backward_candidates", "run_backward"]

_INPUTS = ("q", "k", "v", "beta", "g", "fast_gate", "slow_gate", "alpha", "chunk_decay", "initial_state", "initial_fast_state")
_MOST = 4
Found = dict[str, Tensor]


def backward_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """The slow part's plans with the default of every other part; none where a part refuses."""
    if signature.option("normalize_final"):
        return []
    plain = replace(signature, may_save=False)
    fast = fast_core.backward_candidates(plain, machine)
    if not fast:
        return []
    if is_exact(signature):
        return _joined("exact", {"slow": backward_plans(plain, machine, GRID)[:_MOST], "fast": fast[:1]})
    if signature.option("chunk_offset"):
        return []
    inner = transform_signature(plain)
    transforms = {"make": uw_transform.candidates(inner, machine)[:1], "transform": uw_transform.backward_candidates(inner, machine)[:1]}
    if signature.option("memory") == "flat":
        return _joined("flat", {**transforms, "fast": fast[:_MOST]})
    return _joined("recurrent", {**transforms, "slow": slow_core.backward_candidates(plain, machine)[:_MOST], "fast": fast[:1]})


def _joined(variant: str, parts: Mapping[str, list[Candidate]]) -> list[Candidate]:
    """One candidate for each way of the part that has several."""
    if not all(parts.values()):
        return []
    ways = max(len(found) for found in parts.values())
    made = []
    for index in range(ways):
        params: list[tuple[str, Param]] = []
        for name, found in parts.items():
            part = found[min(index, len(found) - 1)]
            params += [(f"{name}_variant", part.variant), *((f"{name}_{key}", value) for key, value in part.params)]
        made.append(Candidate("triton", variant, tuple(params), direction="backward"))
    return made


def _part(candidate: Candidate, name: str, direction: str = "backward") -> Candidate:
    """The candidate of one part."""
    inner = {key.removeprefix(f"{name}_"): value for key, value in candidate.params if key.startswith(f"{name}_")}
    return Candidate("triton", str(inner.pop("variant")), tuple(inner.items()), direction="backward" if direction == "backward" else "forward")


def run_backward(
    call: DualCore, grads: tuple[Tensor | None, ...], states: Tensor | None, needs: frozenset[str], candidate: Candidate
) -> tuple[Tensor | None, ...]:
    """The gradients of every tensor argument but cu_seqlens, in the contract's order."""
    q, k = unit_operands(call)
    fast_weight, slow_weight = core_weights(call)
    alone = replace(call, q=q, k=k, qk_l2norm=False)
    wanted = needs & {"q", "k", "v", "beta", "g"}
    weights = bool(needs & {"alpha", "fast_gate", "slow_gate"})
    u = None
    if candidate.variant != "exact":
        u, w = uw_transform.run(_transform(alone), _part(candidate, "make", "forward"))
    values = (call.v.to(torch.float32) * call.beta.to(torch.float32)[..., None]).to(call.v.dtype)
    fast = _of(fast_core, _fast(alone, values, fast_weight), (grads[0], grads[2]), _asked(wanted, weights, needs, "fast"), _part(candidate, "fast"))
    if candidate.variant == "exact":
        rule = GatedDeltaRule(
            q, k, call.v, call.beta, call.g, gate=slow_weight, scale=call.scale, initial_state=call.initial_state,
            output_final_state=call.output_final_state, cu_seqlens=call.cu_seqlens,
        )  # fmt: skip
        slow = _of(gated_delta_rule, rule, grads[:2], _asked(wanted, weights, needs, "rule"), _part(candidate, "slow"))
    elif candidate.variant == "flat":
        flat = replace(_fast(alone, u, slow_weight), g=call.g, initial_state=None, output_final_state=False)
        slow = _of(fast_core, flat, (grads[0], None), _asked(wanted, weights, needs, "flat"), _part(candidate, "fast"))
        _through_transform(alone, slow, None, wanted, candidate)
    else:
        core = SlowCore(
            q, k, u, w, g=call.g, gate=slow_weight, chunk_size=call.chunk_size, scale=call.scale, initial_state=call.initial_state,
            output_final_state=call.output_final_state, cu_seqlens=call.cu_seqlens, delta=call.delta,
        )  # fmt: skip
        slow = _of(slow_core, core, grads[:2], _asked(wanted, weights, needs, "slow"), _part(candidate, "slow"))
        _through_transform(alone, slow, slow.pop("w", None), wanted, candidate)
    return _collected(call, alone, fast, slow, needs)


def _fast(call: DualCore, values: Tensor, weight: Tensor) -> FastCore:
    return FastCore(
        call.q, call.k, values, gate=weight, chunk_size=call.chunk_size, scale=call.scale, initial_state=call.initial_fast_state,
        chunk_offset=call.chunk_offset, output_final_state=call.output_final_state, cu_seqlens=call.cu_seqlens,
    )  # fmt: skip


def _transform(call: DualCore) -> UWTransform:
    return UWTransform(call.k, call.v, call.beta, call.g, chunk_size=call.chunk_size, transform=call.transform, cu_seqlens=call.cu_seqlens)


def _asked(wanted: frozenset[str], weights: bool, needs: frozenset[str], part: str) -> frozenset[str]:
    """What a part has to find for what the call needs."""
    inputs = wanted & {"q", "k"}
    if part == "fast":
        inputs |= {"v"} if wanted & {"v", "beta"} else frozenset()
        inputs |= {"initial_state"} if "initial_fast_state" in needs else frozenset()
    elif part == "rule":
        inputs |= wanted | (needs & {"initial_state"})
    else:
        below = wanted & {"k", "v", "beta", "g"}
        inputs |= wanted & {"g"}
        inputs |= {"v" if part == "flat" else "u"} if below else frozenset()
        if part == "slow":
            inputs |= needs & {"initial_state"}
            inputs |= {"w"} if below else frozenset()
    return inputs | ({"gate"} if weights else frozenset())


def _of(module: object, call: object, grads: tuple[Tensor | None, ...], needs: frozenset[str], candidate: Candidate) -> Found:
    """A part's gradients by name; nothing is run where nobody needs any, or nothing arrives."""
    from titans_backends.contracts import CONTRACTS

    name = str(getattr(module, "__name__", "")).rpartition(".")[2]
    if not needs or all(grad is None for grad in grads):
        return {one: torch.zeros_like(getattr(call, one), memory_format=torch.contiguous_format) for one in needs}
    found = module.run_backward(call, grads, None, needs, candidate)  # type: ignore[attr-defined]
    return {one: grad for one, grad in zip(CONTRACTS[name].differentiable, found, strict=True) if grad is not None}


def _through_transform(call: DualCore, slow: Found, d_w: Tensor | None, wanted: frozenset[str], candidate: Candidate) -> None:
    """Takes the gradients of u and w out of `slow` and adds what they make of k, v, beta and g."""
    d_u = slow.pop("u" if "u" in slow else "v", None)
    below = wanted & {"k", "v", "beta", "g"}
    if d_u is None or not below:
        return
    found = _of(uw_transform, _transform(call), (d_u, d_w), below, _part(candidate, "transform"))
    for name, grad in found.items():
        slow[name] = slow[name] + grad if name in slow else grad


def _collected(call: DualCore, alone: DualCore, fast: Found, slow: Found, needs: frozenset[str]) -> tuple[Tensor | None, ...]:
    """The parts' gradients as those of the call's arguments."""
    into: Found = {}
    for name in needs & {"q", "k"}:
        total = fast[name].to(torch.float32) + slow[name].to(torch.float32)
        given: Tensor = getattr(call, name)
        into[name] = (_through_norm(given, total) if call.qk_l2norm else total).to(given.dtype)
    d_values = fast.get("v")
    if "v" in needs and d_values is not None:
        into["v"] = (slow["v"].to(torch.float32) + d_values.to(torch.float32) * call.beta.to(torch.float32)[..., None]).to(call.v.dtype)
    if "beta" in needs and d_values is not None:
        more = (d_values.to(torch.float32) * call.v.to(torch.float32)).sum(-1)
        into["beta"] = (slow["beta"].to(torch.float32) + more).to(call.beta.dtype)
    if "g" in needs and call.g is not None:
        into["g"] = slow["g"]
    if needs & {"alpha", "fast_gate", "slow_gate"}:
        into |= _of_weights(call, fast["gate"].to(torch.float32), slow["gate"].to(torch.float32), needs)
    if "initial_state" in needs:
        into["initial_state"] = slow["initial_state"]
    if "initial_fast_state" in needs:
        into["initial_fast_state"] = fast["initial_state"]
    return tuple(into.get(name) for name in _INPUTS)


def _of_weights(call: DualCore, d_fast: Tensor, d_slow: Tensor, needs: frozenset[str]) -> Found:
    """alpha f and (1 - alpha) s, whose gradients `[B, T, H]` these are, taken apart."""
    into: Found = {}
    alpha = call.alpha.to(torch.float32) if isinstance(call.alpha, Tensor) else call.alpha
    if "fast_gate" in needs and call.fast_gate is not None:
        into["fast_gate"] = (d_fast * alpha).to(call.fast_gate.dtype)
    if "slow_gate" in needs and call.slow_gate is not None:
        into["slow_gate"] = (d_slow * (1 - alpha)).to(call.slow_gate.dtype)
    if "alpha" in needs and isinstance(call.alpha, Tensor):
        share = d_fast if call.fast_gate is None else d_fast * call.fast_gate.to(torch.float32)
        rest = d_slow if call.slow_gate is None else d_slow * call.slow_gate.to(torch.float32)
        into["alpha"] = (share - rest).sum_to_size(call.alpha.shape).to(call.alpha.dtype)
    return into


def _through_norm(x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of x `[..., K]` from that of x / |x|, in float32."""
    wide = x.to(torch.float32)
    inverse = torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)
    unit = wide * inverse
    return inverse * (grad - unit * (unit * grad).sum(-1, keepdim=True))
