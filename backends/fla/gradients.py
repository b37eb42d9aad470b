"""The backward of gated_delta_rule by FLA: `chunk_gated_delta_rule_bwd`, or `chunk_delta_rule_bwd` where there is no decay.

FLA's own autograd keeps the inverse of each chunk's triangle, the running decay and q and k of unit length; so do the candidates that keep. The others are
handed nothing: all is computed again here, and that time counts. With an output gate the whole forward is, in both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.gated_delta_rule import GatedDeltaRule
from titans_backends.machine import Machine
from titans_backends.signature import Signature

from ..peers import as_given, dense, sources
from .dispatching import fla_alone
from .inputs import CHUNK, Inputs, delta, is_gated, keeping, made, rule
from .serving import DISTRIBUTION, gradient_kernels, without_gate

__all__ = ["backward_candidates", "run_backward"]

_INPUTS = ("q", "k", "v", "beta", "g", "gate", "initial_state")


def backward_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """One for each kernel that may give the gradients of q, k and g; the plain rule's are FLA's own. Each with the inverses from the forward, and with all
    computed again."""
    if without_gate(signature):
        plain = [_candidate("delta_rule", (), DISTRIBUTION)]
    else:
        beside = {"triton": (), "tilelang": ("tilelang",)}
        plain = [_candidate("gated_delta_rule", (("gradients", kernel),), DISTRIBUTION, *beside[kernel]) for kernel in gradient_kernels(machine)]
    return [*map(keeping, plain), *plain]


def _candidate(variant: str, params: tuple[tuple[str, str], ...], *distributions: str) -> Candidate:
    return Candidate("fla", variant, params, direction="backward", batch_invariant=False, sources=sources(*distributions))


def run_backward(
    call: GatedDeltaRule, grads: tuple[Tensor | None, ...], kept: tuple[Tensor, ...] | None, needs: frozenset[str], candidate: Candidate
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, beta, g, gate and initial_state, in that order; `kept` is what the forward of that rule handed on."""
    (d_o, d_state), with_decay = grads, is_gated(candidate)
    kernel, units = _kept(kept, with_decay)
    again = not kernel or call.gate is not None
    x = made(call, units, decayed=again, zero_decay=with_decay)
    d_y = torch.zeros_like(x.shared["v"]) if d_o is None else dense(d_o)
    d_gate = None
    with fla_alone(tilelang=("gradients", "tilelang") in candidate.params):
        if again:
            o, made_again = _again(x, call.gate is not None, candidate)
            kernel = kernel or made_again
        if call.gate is not None:
            d_gate = (d_y.float() * o.float()).sum(-1)
            d_y = (d_y * call.gate.unsqueeze(-1)).to(d_y.dtype)
        arriving = {"do": d_y, "dht": None if d_state is None else dense(d_state)}
        if with_decay:
            q, k, v, beta, g, state, *_ = rule().chunk_gated_delta_rule_bwd(beta=x.beta, **kernel, **arriving, **x.shared)
        else:
            g, (q, k, v, beta, state) = None, delta().chunk_delta_rule_bwd(beta=x.beta, **kernel, **arriving, **x.shared)
        if call.qk_l2norm:
            q_unit, q_norm, k_unit, k_norm = x.units
            q, k = rule().l2norm_bwd(q_unit, q_norm, q), rule().l2norm_bwd(k_unit, k_norm, k)
    found = (q, k, v, beta, g, d_gate, state)
    return tuple([as_given(gradient, getattr(call, name)) if name in needs else None for name, gradient in zip(_INPUTS, found, strict=True)])


def _kept(tensors: tuple[Tensor, ...] | None, with_decay: bool) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """What FLA's autograd keeps, as arguments, and q and k of unit length with their norms; nothing of nothing."""
    if tensors is None:
        return {}, ()
    if with_decay:
        return {"A": tensors[0], "g": tensors[1]}, tensors[2:]
    return {"A": tensors[0]}, tensors[1:]


def _again(x: Inputs, outputs: bool, candidate: Candidate) -> tuple[Tensor, dict[str, Tensor]]:
    """What FLA's autograd would have kept, computed again: the inverses and the running decay; and o where it is wanted, else nothing of use."""
    k, v = x.shared["k"], x.shared["v"]
    if not is_gated(candidate):
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
