"""gated_delta_rule: u and w of all chunks, the scan over chunks, what they read (SPEC.md 3 and 4); the rule is the same on every grid."""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.gated_delta_rule import GatedDeltaRule
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict

from .chunk_read import EACH_CHUNK, Mix, read_chunks
from .grid import Grid
from .log_decay import running_log
from .serving import serves, wide
from .state_scan import scan
from .unit_rows import unit
from .uw_chunks import transform_chunks

__all__ = ["CHUNKS", "candidates", "delta_rule", "run", "supports"]

CHUNKS = (64, 32)
"""Chunk sizes of the grid that is ours to choose."""


def supports(signature: Signature, machine: Machine) -> Verdict:
    """Every option."""
    return serves(signature, machine)


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """A grid each."""
    return [Candidate("numba", "chunks", (("chunk_size", size),)) for size in CHUNKS]


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    gate: Tensor | None,
    start: Tensor | None,
    grid: Grid,
    scale: float,
    o: Tensor,
    mix: Mix | None = None,
) -> Tensor:
    """Writes o and returns the final state; everything in float32."""
    log = running_log(g, grid, v)
    u = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    w = torch.empty(*v.shape[:3], k.shape[3], dtype=v.dtype, device=v.device)
    transform_chunks(k, v, beta, log, grid, "exact", u, w)
    states, updates, final = scan(k, u, w, log, None, start, grid, delta=True, normalize=False)
    read_chunks(q, k, updates, log, grid, o, scale=scale, gate=gate, states=states, which=EACH_CHUNK, mix=mix)
    return final


def run(call: GatedDeltaRule, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """o `[B, T, H, V]` and, where asked, the final state."""
    q, k, v = wide(call.q), wide(call.k), wide(call.v)
    if call.qk_l2norm:
        q, k = unit(q), unit(k)
    grid = Grid(v, int(candidate.param("chunk_size")), call.cu_seqlens)
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    scale = k.shape[3] ** -0.5 if call.scale is None else call.scale
    final = delta_rule(q, k, v, wide(call.beta), call.g, call.gate, call.initial_state, grid, scale, o)
    return o.to(call.v.dtype), final if call.output_final_state else None
