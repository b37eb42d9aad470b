"""The backward of gated_delta_rule by FLA: `chunk_gated_delta_rule_bwd`, or `chunk_delta_rule_bwd` where there is no decay.

FLA's own autograd keeps the inverse of each chunk's triangle and the running decay from the forward to the backward. A contract hands on inputs and, by
choice, chunk-start states, so both are computed again here, and their time counts; with an output gate the whole forward is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.gated_delta_rule import GatedDeltaRule
from titans_backends.machine import Machine
from titans_backends.signature import Signature

from ..peers import dense, sources
from .dispatching import fla_alone
from .inputs import CHUNK, Inputs, delta, made, rule
from .serving import DISTRIBUTION, gradient_kernels, without_gate

__all__ = ["backward_candidates", "run_backward"]

_INPUTS = ("q", "k", "v", "beta", "g", "gate", "initial_state")


def backward_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """One for each kernel that may give the gradients of q, k and g; the plain rule's are FLA's own."""
    if without_gate(signature):
        return [_candidate("delta_rule", (), DISTRIBUTION)]
    beside = {"triton": (), "tilelang": ("tilelang",)}
    return [_candidate("gated_delta_rule", (("gradients", kernel),), DISTRIBUTION, *beside[kernel]) for kernel in gradient_kernels(machine)]


def _candidate(variant: str, params: tuple[tuple[str, str], ...], *distributions: str) -> Candidate:
    return Candidate("fla", variant, params, direction="backward", batch_invariant=False, sources=sources(*distributions))


def run_backward(
    call: GatedDeltaRule, grads: tuple[Tensor | None, ...], states: Tensor | None, needs: frozenset[str], candidate: Candidate
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, beta, g, gate and initial_state, in that order."""
    d_o, d_state = grads
    x = made(call, zero_decay=candidate.variant == "gated_delta_rule")
    d_y = torch.zeros_like(x.shared["v"]) if d_o is None else dense(d_o)
    found: dict[str, Tensor | None] = {}
    with fla_alone(tilelang=("gradients", "tilelang") in candidate.params):
        o, kept = _again(x, call.gate is not None, candidate)
        if call.gate is not None:
            found["gate"] = (d_y.float() * o.float()).sum(-1)
            d_y = (d_y * call.gate.unsqueeze(-1)).to(d_y.dtype)
        arriving = {"do": d_y, "dht": None if d_state is None else dense(d_state)}
        if candidate.variant == "delta_rule":
            q, k, v, beta, state = delta().chunk_delta_rule_bwd(beta=x.beta, **kept, **arriving, **x.shared)
            g = None
        else:
            q, k, v, beta, g, state, *_ = rule().chunk_gated_delta_rule_bwd(beta=x.beta, **kept, **arriving, **x.shared)
        if call.qk_l2norm:
            q = rule().l2norm_bwd(x.shared["q"], x.q_norm, q)
            k = rule().l2norm_bwd(x.shared["k"], x.k_norm, k)
    found |= {"q": q, "k": k, "v": v, "beta": beta, "g": g, "initial_state": state}
    return tuple(_as(found.get(name), getattr(call, name)) if name in needs else None for name in _INPUTS)


def _again(x: Inputs, outputs: bool, candidate: Candidate) -> tuple[Tensor, dict[str, Tensor]]:
    """What FLA's autograd would have kept, computed again: the inverses and the running decay; and o where it is wanted, else nothing of use."""
    k, v = x.shared["k"], x.shared["v"]
    if candidate.variant == "delta_rule":
        if outputs:
            o, inverse, _ = delta().chunk_delta_rule_fwd(beta=x.beta, output_final_state=False, **x.shared)
        else:
            o, (_, _, inverse) = v, delta().prepare_wy_repr_fwd(k=k, v=v, beta=x.beta, chunk_size=CHUNK, **x.packing)
        return o, {"A": inverse}
    functions = rule()
    if outputs:
        running, o, inverse, *_ = functions.chunk_gated_delta_rule_fwd(g=x.g, beta=x.beta, output_final_state=False, **x.shared)
    else:
        running = functions.chunk_local_cumsum(x.g, chunk_size=CHUNK, scale=functions.RCP_LN2, **x.packing)
        o, (_, _, inverse) = v, functions.chunk_gated_delta_rule_fwd_intra(k=k, v=v, g=running, beta=x.beta, chunk_size=CHUNK, **x.packing)
    return o, {"g": running, "A": inverse}


def _as(gradient: Tensor | None, given: Tensor) -> Tensor | None:
    return None if gradient is None else gradient.to(given.dtype)
