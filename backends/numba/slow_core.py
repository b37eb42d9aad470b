"""slow_core: the scan over chunks, then what they read, all at once (SPEC.md 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.slow_core import SlowCore
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import ACCEPTED, Verdict, refused

from .chunk_read import EACH_CHUNK, read_chunks
from .frobenius import normalize
from .grid import Grid
from .log_decay import running_log
from .serving import gradients, refuse_training, serves, wide
from .slow_gradients import slow_gradients
from .state_scan import fits_one_block, scan

__all__ = ["backward_candidates", "candidates", "refuse_normalized", "run", "run_backward", "supports"]


def refuse_normalized(signature: Signature) -> Verdict:
    """A normalised read needs the norm of the whole state, so the state in one block."""
    keys, values = signature.dim("K"), signature.dim("V")
    if signature.option("normalize_read") and not fits_one_block(keys, values):
        return refused(
            f"normalize_read=True with K={keys}, V={values}: the whole state has to fit a block's 48 KiB of shared memory, as 64 x 64 does; "
            "use backend='eager'"
        )
    return ACCEPTED


def supports(signature: Signature, machine: Machine) -> Verdict:
    """Every option; a normalised read where the state fits one block. The backward has neither norm nor chunk_decay."""
    absent = {name: bool(signature.option(name)) for name in ("normalize_read", "normalize_final")} | {"chunk_decay": signature.has("chunk_decay")}
    return serves(signature, machine) & refuse_normalized(signature) & refuse_training(signature, **absent)


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """One way."""
    return [Candidate("numba", "chunks")]


def backward_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """One way."""
    return [Candidate("numba", "chunks", direction="backward")]


def run(call: SlowCore, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """o `[B, T, H, V]` and, where asked, the final state."""
    q, k, u, w = wide(call.q), wide(call.k), wide(call.u), wide(call.w)
    grid = Grid(u, call.chunk_size, call.cu_seqlens)
    log = running_log(call.g, grid, u)
    states, updates, final = scan(k, u, w, log, call.chunk_decay, call.initial_state, grid, delta=call.delta, normalize=call.normalize_read)
    o = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    read_chunks(q, k, updates, log, grid, o, scale=call.scale, gate=call.gate, states=states, which=EACH_CHUNK)
    if not call.output_final_state:
        return o.to(call.u.dtype), None
    return o.to(call.u.dtype), normalize(final) if call.normalize_final else final


def run_backward(
    call: SlowCore, grads: tuple[Tensor | None, ...], states: Tensor | None, needs: frozenset[str], candidate: Candidate
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, u, w, g, chunk_decay, gate and initial_state, in that order."""
    found = slow_gradients(call, grads[0], grads[1], needs)
    return gradients(call, ("q", "k", "u", "w", "g", "chunk_decay", "gate", "initial_state"), found, needs)
