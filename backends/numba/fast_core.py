"""fast_core: every chunk reads its own tokens alone; the state that is handed on is that of the last chunk (SPEC.md 2, 10)."""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.fast_core import FastCore
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict

from .absent import given_or, unity
from .chunk_gradients import arrived, by_group, key_gradient, own_scores, query_gradient, update_gradient
from .chunk_read import FIRST_CHUNK, LAST_CHUNK, read_chunks
from .grid import Grid
from .log_decay import running_log
from .log_gradient import decay_gradient
from .serving import gradients, serves, wide
from .state_reverse import first_gradient
from .state_scan import last_state

__all__ = ["backward_candidates", "candidates", "run", "run_backward", "supports"]


def supports(signature: Signature, machine: Machine) -> Verdict:
    """Every option."""
    return serves(signature, machine)


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """One way."""
    return [Candidate("numba", "chunks")]


def backward_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """One way."""
    return [Candidate("numba", "chunks", direction="backward")]


def run(call: FastCore, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """o `[B, T, H, V]` and, where asked, W `[N, H, K, V]`."""
    q, k, v = wide(call.q), wide(call.k), wide(call.v)
    grid = Grid(v, call.chunk_size, call.cu_seqlens, call.chunk_offset)
    log = running_log(call.g, grid, v)
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    carried = call.initial_state if call.chunk_offset else None
    read_chunks(q, k, v, log, grid, o, scale=call.scale, gate=call.gate, states=carried, which=FIRST_CHUNK)
    final = last_state(k, v, unity(v, *v.shape[:3]), log, call.initial_state, grid) if call.output_final_state else None
    return o.to(call.v.dtype), final


def run_backward(
    call: FastCore, grads: tuple[Tensor | None, ...], states: Tensor | None, needs: frozenset[str], candidate: Candidate
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, gate, g and initial_state, in that order."""
    q, k, v = wide(call.q), wide(call.k), wide(call.v)
    grid = Grid(v, call.chunk_size, call.cu_seqlens, call.chunk_offset)
    log = running_log(call.g, grid, v)
    gate = given_or(call.gate, unity(v, *v.shape[:3]))
    d_o, d_final = arrived(grads[0], v), None if grads[1] is None else grads[1].float()
    carried, own = call.initial_state if call.chunk_offset else None, own_scores(v, d_o, call.scale)
    dq, d_gate, asked = query_gradient(q, k, v, d_o, gate, log, own, grid, call.scale, carried, FIRST_CHUNK)
    dk, inside, left = key_gradient(q, k, v, d_o, gate, log, own, grid, call.scale, d_final, LAST_CHUNK)
    found = {"q": by_group(dq, q.shape[2]), "k": by_group(dk, k.shape[2]), "gate": d_gate}
    if "v" in needs:
        found["v"] = update_gradient(q, k, v, d_o, gate * call.scale, log, grid, d_final, LAST_CHUNK)
    if "initial_state" in needs:
        found["initial_state"] = first_gradient(q, k, d_o, gate, log, d_final, grid, call.scale)
    if "g" in needs:
        found["g"] = decay_gradient(asked - inside, log, grid, left, carried, d_final)
    return gradients(call, ("q", "k", "v", "gate", "g", "initial_state"), found, needs)
