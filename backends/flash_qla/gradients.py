"""The backward of gated_delta_rule by FlashQLA's `chunk_gated_delta_rule_bwd`.

FlashQLA's own autograd keeps the inverse of each chunk's triangle, the running decay and, where it cuts sequences, what the segments begin with. `kept` is handed
the inverses by our forward of that name; what else it wants, and all of it in `chunked`, is computed again here, and that time counts; with an output gate the
whole forward is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.gated_delta_rule import GatedDeltaRule
from titans_backends.machine import Machine
from titans_backends.signature import Signature

from ..peers import dense, sources
from .inputs import Inputs, cuts, keeping, kernels, made
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
    """Gradients of q, k, v, beta, g, gate and initial_state, in that order; `kept` are the inverses of the forward of that name."""
    (d_o, d_state), x, auto = grads, made(call), bool(candidate.param("auto_cp"))
    d_y = torch.zeros_like(x.shared["v"]) if d_o is None else dense(d_o)
    found: dict[str, Tensor | None] = {}
    running, inverse = _again(x, auto, kept)
    if call.gate is not None:
        o = kernels().chunk_gated_delta_rule_fwd(g=x.g, output_final_state=False, auto_cp=auto, **x.shared)[2]
        found["gate"] = (d_y.float() * o.float()).sum(-1)
        d_y = (d_y * call.gate.unsqueeze(-1)).to(d_y.dtype)
    q, k, v, beta, g, state = kernels().chunk_gated_delta_rule_bwd(
        g=running, A=inverse, do=d_y, dht=x.of_filled(d_state), auto_cp=auto, cp_cache=None, **x.shared
    )
    if call.qk_l2norm:
        q, k = kernels().l2norm_bwd(x.shared["q"], x.q_norm, q), kernels().l2norm_bwd(x.shared["k"], x.k_norm, k)
    if "initial_state" in needs:
        state = x.of_all(state, d_state)  # an empty sequence's final state is its initial one
    found |= {"q": q, "k": k, "v": v, "beta": beta, "g": g, "initial_state": state}
    return tuple(_as(found.get(name), getattr(call, name)) if name in needs else None for name in _INPUTS)


def _again(x: Inputs, auto: bool, kept: tuple[Tensor, ...] | None) -> tuple[Tensor, Tensor]:
    """The running decay and the inverses, computed again but for what was kept."""
    functions, k = kernels(), x.shared["k"]
    grid = {"cu_seqlens": x.shared["cu_seqlens"], "chunk_size": functions.CHUNK_SIZE}
    if auto and grid["cu_seqlens"] is None:  # as its forward has it, so that one kernel serves both
        grid["cu_seqlens"] = functions._auto_intra_cp_context(k, x.shared["v"], None, functions.CHUNK_SIZE, True, True).cu_seqlens
    return functions.chunk_local_cumsum(g=x.g, **grid), functions.kkt_solve(k=k, b=x.shared["beta"], **grid) if kept is None else kept[0]


def _as(gradient: Tensor | None, given: Tensor) -> Tensor | None:
    return None if gradient is None else gradient.to(given.dtype)
