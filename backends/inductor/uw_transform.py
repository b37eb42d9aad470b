"""uw_transform: A's decay and mask, the sides of the transform and lam's T compiled; products and the exact inverse in plain torch (SPEC.md 3).

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
from ..eager.workspace import Workspace
from .compiled import LAM_TRIANGLE, SIDES, UNIT_TRIANGLE
from .serving import EAGER_SOURCES, OWN_SOURCES, causal_mask, plain_modes, refuse_chunk, running_log, serves

__all__ = ["candidates", "run", "supports"]

_SOURCES = (*OWN_SOURCES, *EAGER_SOURCES, *(f"titans_backends.backends.eager.{name}" for name in ("triangular", "workspace")))


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
        workspace = Workspace(dtype, v.device)
        for slab in grid.slabs(size, slab_budget(v.device)):
            for chunks, out in zip(_transformed(call, grid, slab, candidate, workspace), (u, w), strict=True):
                grid.scatter(slab, chunks.unflatten(0, (slab.size, v.shape[2])), out)
        return u, w


def _transformed(call: UWTransform, grid: ChunkGrid, slab: Slab, candidate: Candidate, workspace: Workspace) -> tuple[Tensor, Tensor]:
    """One slab's u and w, `[n * H, C, *]`."""
    heads, dtype, take = call.v.shape[2], compute_dtype(call.v), workspace.take

    def gather(name: str, x: Tensor) -> Tensor:
        width = x.shape[3] if x.dim() == 4 else 1
        return grid.gather(slab, x, heads, dtype, take(name, slab.size, heads, grid.chunk, width)).flatten(0, 1)

    k, v, beta = gather("k", call.k), gather("v", call.v), gather("beta", call.beta)
    log = None if call.g is None else running_log(gather("g", call.g))
    if call.transform == "none":
        SIDES(k, v, beta, log)
        return v, k
    shape = (k.shape[0], grid.chunk, grid.chunk)
    n = torch.bmm(k, k.mT, out=take("n", *shape))
    UNIT_TRIANGLE(n, k, v, beta, log, causal_mask(grid.chunk, k, decayed=log is not None, diagonal=-1))
    if call.transform == "lam":
        t = torch.bmm(n, n.mT, out=take("t", *shape))
        LAM_TRIANGLE(t, n, causal_mask(grid.chunk, k, decayed=False, diagonal=-1))
    else:
        t = unit_lower_inverse(n, str(candidate.param("inverse")), take("t", *shape))
    return torch.bmm(t, v, out=take("u", *v.shape)), torch.bmm(t, k, out=take("w", *k.shape))
