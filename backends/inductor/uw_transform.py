"""uw_transform: A and the sides of the transform compiled; the exact transform's inverse in plain torch, "lam" and "none" compiled whole (SPEC.md 3).

A packed call's cu_seqlens is read on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.uw_transform import UWTransform
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict

from ..eager.chunk_grid import ChunkGrid, Slab, compute_dtype
from ..eager.scratch import chunk_bytes, slab_budget
from ..eager.triangular import INVERSES, unit_lower_inverse
from .compiled import LAM_UW, SCALED_SIDES, UNIT_TRIANGLE
from .serving import EAGER_SOURCES, OWN_SOURCES, plain_modes, refuse_chunk, running_log, serves

__all__ = ["candidates", "run", "supports"]

_SOURCES = (*OWN_SOURCES, *EAGER_SOURCES, "titans_backends.backends.eager.triangular")


def supports(signature: Signature, machine: Machine) -> Verdict:
    """Chunks of 8 to 256 tokens, where torch.compile can work."""
    return serves(signature, machine) & refuse_chunk(signature)


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """For the exact transform both ways to the inverse; the others have none."""
    ways = INVERSES if signature.option("transform") == "exact" else ("",)
    return [Candidate("inductor", "chunked", (("inverse", way),) if way else (), batch_invariant=False, sources=_SOURCES) for way in ways]


def run(call: UWTransform, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """u `[B, T, H, V]` and w `[B, T, H, K]` in v's dtype."""
    with plain_modes():
        v, keys, dtype = call.v, call.k.shape[3], compute_dtype(call.v)
        u = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        w = torch.empty(*v.shape[:3], keys, dtype=v.dtype, device=v.device)
        grid = ChunkGrid(v.shape[0], v.shape[1], call.chunk_size, cu_seqlens=call.cu_seqlens, device=v.device)
        size = chunk_bytes(v.shape[2], grid.chunk, keys, v.shape[3], dtype)
        for slab in grid.slabs(size, slab_budget(v.device)):
            for chunks, out in zip(_transformed(call, grid, slab, candidate), (u, w), strict=True):
                grid.scatter(slab, chunks.unflatten(0, (slab.size, v.shape[2])), out)
        return u, w


def _transformed(call: UWTransform, grid: ChunkGrid, slab: Slab, candidate: Candidate) -> tuple[Tensor, ...]:
    """One slab's u and w, `[n * H, C, *]`."""
    heads, dtype = call.v.shape[2], compute_dtype(call.v)
    k, v, beta = (grid.gather(slab, x, heads, dtype).flatten(0, 1) for x in (call.k, call.v, call.beta))
    log = None if call.g is None else running_log(grid.gather(slab, call.g, heads, dtype))
    if call.transform == "none":
        return SCALED_SIDES(k, v, beta, log)
    if call.transform == "lam":
        return LAM_UW(k, v, beta, log)
    minus_a, x, z = UNIT_TRIANGLE(k, v, beta, log)
    t = unit_lower_inverse(minus_a, str(candidate.param("inverse")))
    return torch.bmm(t, x), torch.bmm(t, z)
