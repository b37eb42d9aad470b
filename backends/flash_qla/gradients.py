"""The backward of gated_delta_rule by FlashQLA's `chunk_gated_delta_rule_bwd`.

FlashQLA's own autograd keeps the inverse of each chunk's triangle, the running decay, q and k of unit length and, where it cuts sequences, what the segments
begin with; so does `kept`. `chunked` is handed nothing: all is computed again here, and that time counts. With an output gate the whole forward is, in both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.gated_delta_rule import GatedDeltaRule
from titans_backends.machine import Machine
from titans_backends.signature import Signature

from ..peers import as_given, dense, sources
from .inputs import Inputs, Kept, cuts, keeping, kept_of, kernels, made, plan_of
from .serving import DISTRIBUTIONS

__all__ = ["backward_candidates", "run_backward"]

_INPUTS = ("q", "k", "v", "beta", "g", "gate", "initial_state")


def backward_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """With context parallelism, and where that can cut anything without; each with the inverses from the forward, and with all computed again."""
    shared = {"direction": "backward", "batch_invariant": False, "sources": sources(*DISTRIBUTIONS)}
    plain = [Candidate("flash_qla", "chunked", (("auto_cp", auto),), **shared) for auto in cuts(signature)]
    return [*map(keeping, plain), *plain]


def run_backward(
    call: GatedDeltaRule, grads: tuple[Tensor | None, ...], kept: tuple[Tensor, ...] | None, needs: frozenset[str], candidate: Candidate
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, beta, g, gate and initial_state, in that order; `kept` is what the forward of that name handed on."""
    (d_o, d_state), auto, functions = grads, bool(candidate.param("auto_cp")), kernels()
    known = None if kept is None else kept_of(call, kept)
    x = made(call, () if known is None else known.units, decayed=known is None or call.gate is not None)
    d_y = torch.zeros_like(x.shared["v"]) if d_o is None else dense(d_o)
    if known is None:
        known = _again(x, auto)
    plan = plan_of(x, auto) if known.plan is None else known.plan
    d_gate = None
    if call.gate is not None:
        o = functions.chunk_gated_delta_rule_fwd(g=x.g, output_final_state=False, auto_cp=auto, cp_context=plan, **x.shared)[2]
        d_gate = (d_y.float() * o.float()).sum(-1)
        d_y = (d_y * call.gate.unsqueeze(-1)).to(d_y.dtype)
    q, k, v, beta, g, state = functions.chunk_gated_delta_rule_bwd(
        g=known.running, A=known.inverse, do=d_y, dht=x.of_filled(d_state), auto_cp=auto, cp_cache=known.segments, cp_context=plan, **x.shared
    )
    if call.qk_l2norm:
        q_unit, q_norm, k_unit, k_norm = x.units
        q, k = functions.l2norm_bwd(q_unit, q_norm, q), functions.l2norm_bwd(k_unit, k_norm, k)
    if "initial_state" in needs:
        state = x.of_all(state, d_state)  # an empty sequence's final state is its initial one
    found = (q, k, v, beta, g, d_gate, state)
    return tuple([as_given(gradient, getattr(call, name)) if name in needs else None for name, gradient in zip(_INPUTS, found, strict=True)])


def _again(x: Inputs, auto: bool) -> Kept:
    """The running decay and the inverses, computed again, with FlashQLA's plan of the cut."""
    functions, plan = kernels(), plan_of(x, auto)
    grid = {"cu_seqlens": plan.cu_seqlens, "chunk_size": functions.CHUNK_SIZE}  # as its forward has it, so that one kernel serves both
    return Kept(functions.chunk_local_cumsum(g=x.g, **grid), functions.kkt_solve(k=x.shared["k"], b=x.shared["beta"], **grid), x.units, None, plan)
