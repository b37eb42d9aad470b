"""slow_core: the scores of a slab compiled, with their decay mask; the state step by step in plain torch (SPEC.md 4).

A packed call's cu_seqlens is read on the host.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.slow_core import SlowCore
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict

from ..eager.chunk_grid import ChunkGrid
from ..eager.frobenius import normalized
from ..eager.recurrence import advance, read
from ..eager.slow_core import Recurrence
from ..eager.workspace import Workspace
from .scored import SCORED_SOURCES, load
from .serving import plain_modes, refuse_chunk, serves

__all__ = ["candidates", "run", "supports"]


def supports(signature: Signature, machine: Machine) -> Verdict:
    """Chunks of 8 to 256 tokens, where torch.compile can work."""
    return serves(signature, machine) & refuse_chunk(signature)


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """One way to compute; in training with or without the chunk-start states kept."""
    plain = Candidate("inductor", "chunked", batch_invariant=False, sources=SCORED_SOURCES)
    saving = signature.regime == "training" and signature.may_save and not signature.option("normalize_final")
    return [replace(plain, saves_states=True), plain] if saving else [plain]


def run(call: SlowCore, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """o, the final state, and the chunk-start states where the candidate keeps them."""
    with plain_modes():
        u = call.u
        grid = ChunkGrid(u.shape[0], u.shape[1], call.chunk_size, cu_seqlens=call.cu_seqlens, device=u.device)
        w = call.w if call.delta else None
        source = Recurrence(grid, call.q, call.k, u, w, call.g, call.chunk_decay, call.gate, call.scale, call.initial_state)
        state = source.states(call.initial_state)
        o = torch.empty(u.shape, dtype=u.dtype, device=u.device)
        saved = torch.empty(*grid.per_chunk_shape, *state.shape[1:], dtype=state.dtype, device=u.device) if candidate.saves_states else None
        workspace = Workspace(state.dtype, u.device)
        for slab in source.slabs():
            operands, m = load(source, slab, workspace)
            starts = None if saved is None else torch.empty(slab.size, *state.shape[1:], dtype=state.dtype, device=u.device)
            y = read(operands, advance(state, slab, operands, normalize_read=call.normalize_read, outputs=True, starts=starts), m)
            if call.gate is not None:
                y.mul_(source.gather(slab, call.gate))
            grid.scatter(slab, y, o)
            if saved is not None and starts is not None:
                grid.scatter_per_chunk(slab, starts, saved)
        final = grid.in_call_order(normalized(state) if call.normalize_final else state) if call.output_final_state else None
        return (o, final) if saved is None else (o, final, saved)
