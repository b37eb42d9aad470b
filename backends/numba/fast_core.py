"""fast_core: every chunk reads its own tokens alone; the state that is handed on is that of the last chunk (SPEC.md 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.fast_core import FastCore
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict

from .absent import unity
from .chunk_read import FIRST_CHUNK, read_chunks
from .grid import Grid
from .log_decay import running_log
from .serving import serves, wide
from .state_scan import last_state

__all__ = ["candidates", "run", "supports"]


def supports(signature: Signature, machine: Machine) -> Verdict:
    """Every option."""
    return serves(signature, machine)


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """One way."""
    return [Candidate("numba", "chunks")]


def run(call: FastCore, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """o `[B, T, H, V]` and, where asked, W `[N, H, K, V]`."""
    q, k, v = wide(call.q), wide(call.k), wide(call.v)
    grid = Grid(v, call.chunk_size, call.cu_seqlens, call.chunk_offset)
    log = running_log(call.g, grid, v)
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    carried = call.initial_state if call.chunk_offset else None
    read_chunks(q, k, v, unity(v, *v.shape[:3]), log, call.gate, carried, FIRST_CHUNK, grid, call.scale, o)
    final = last_state(k, v, unity(v, *v.shape[:3]), log, call.initial_state, grid) if call.output_final_state else None
    return o.to(call.v.dtype), final
