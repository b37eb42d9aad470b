"""fast_core: the scores of whole chunks compiled, with their decay mask; a carried W and the final one in plain torch (SPEC.md 2).

A packed call's cu_seqlens is read on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.fast_core import FastCore
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict

from ..eager.chunk_grid import ChunkGrid, compute_dtype
from ..eager.fast_chunks import fast_forward
from ..eager.scratch import chunk_bytes, slab_budget
from ..eager.slow_core import Recurrence
from ..eager.workspace import Workspace
from .scored import SCORED_SOURCES, load
from .serving import plain_modes, refuse_chunk, serves

__all__ = ["candidates", "run", "supports"]

_SOURCES = (*SCORED_SOURCES, "titans_backends.backends.eager.fast_chunks")


def supports(signature: Signature, machine: Machine) -> Verdict:
    """Chunks of 8 to 256 tokens, where torch.compile can work."""
    return serves(signature, machine) & refuse_chunk(signature)


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """Whole chunks."""
    return [Candidate("inductor", "chunked", batch_invariant=False, sources=_SOURCES)]


def run(call: FastCore, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """o and the final W."""
    with plain_modes():
        v, dtype = call.v, compute_dtype(call.v)
        grid = ChunkGrid(v.shape[0], v.shape[1], call.chunk_size, offset=call.chunk_offset, cu_seqlens=call.cu_seqlens, device=v.device)
        source = Recurrence(grid, call.q, call.k, v, None, call.g, None, call.gate, call.scale, call.initial_state)
        carry = source.states(call.initial_state) if call.chunk_offset and call.initial_state is not None else None
        final = source.states(call.initial_state) if call.output_final_state else None
        o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        size = chunk_bytes(v.shape[2], grid.chunk, call.k.shape[3], v.shape[3], dtype)
        workspace = Workspace(dtype, v.device)
        for slab in grid.slabs(size, slab_budget(v.device)):
            operands, m = load(source, slab, workspace)
            y = fast_forward(grid, slab, operands, m, carry, final)
            if call.gate is not None:
                y.mul_(source.gather(slab, call.gate))
            grid.scatter(slab, y, o)
        return o, None if final is None else grid.in_call_order(final)
