"""A slab's operands with their scores from the compiled kernel, for fast_core and slow_core."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..eager.chunk_grid import Slab, compute_dtype
from ..eager.decay import Decay
from ..eager.recurrence import Operands
from ..eager.slow_core import Recurrence
from ..eager.workspace import Workspace
from .compiled import SCORES
from .serving import EAGER_SOURCES, OWN_SOURCES, causal_mask, running_log

__all__ = ["SCORED_SOURCES", "load"]

SCORED_SOURCES = (
    *OWN_SOURCES,
    "titans_backends.backends.inductor.scored",
    *EAGER_SOURCES,
    *(f"titans_backends.backends.eager.{name}" for name in ("causal", "frobenius", "recurrence", "slow_core", "workspace")),
)


def load(source: Recurrence, slab: Slab, workspace: Workspace) -> tuple[Operands, Tensor]:
    """One slab's operands, q with its scale, and M `[n, H, C, C]`, in the workspace; Gamma, which nobody reads once M is there, is M's memory."""
    q, k, u = (source.gather(slab, x) for x in (source.q, source.k, source.u))
    w = None if source.w is None else source.gather(slab, source.w)
    if source.scale != 1.0:
        q.mul_(source.scale)
    factor = None
    if source.chunk_decay is not None:
        factor = source.grid.gather_per_chunk(slab, source.chunk_decay, compute_dtype(source.u))[..., None, None]
    log = None if source.g is None else running_log(source.gather(slab, source.g).flatten(0, 1))
    left, right, size = q.flatten(0, 1), k.flatten(0, 1), q.shape[2]
    m = torch.bmm(left, right.mT, out=workspace.take("m", left.shape[0], size, size))
    parts: Sequence[Tensor] = SCORES(m, log, causal_mask(size, q, decayed=log is not None))
    m, *parts = (x.unflatten(0, q.shape[:2]) for x in (m, *parts))
    decay = None
    if log is not None:
        head, tail, total = parts
        decay = Decay(head, tail, total, pair=m)
    return Operands(q, k, u, w, decay, factor), m
