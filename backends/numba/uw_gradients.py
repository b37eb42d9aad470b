"""uw_transform backward (SPEC.md 10): T^T by substitution from the last row, then dA's products with K as two strict reads of each chunk.

[dX | dZ] = T^T [du | dw];  dA = stril(dX u^T + dZ w^T)  (exact; none: 0);  dK = (dN + dN^T) K + (b e^G) * dZ,  dN = -(b * Gamma) * dA
dV = b * dX;  db = k . (dN K) / b + dX . V + e^G dZ . K;  dG = k . (dN K) - k . (dN^T K) + dZ . Z
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.contracts.uw_transform import UWTransform

from .chunk_gradients import arrived, by_group
from .chunk_read import read_chunks
from .grid import Grid
from .log_decay import running_log
from .log_gradient import decay_gradient, row_dot
from .serving import wide
from .uw_chunks import transform_back, transform_chunks

__all__ = ["uw_gradients"]


def uw_gradients(call: UWTransform, du: Tensor | None, dw: Tensor | None) -> dict[str, Tensor]:
    """dk, dv, dbeta and dg in float32."""
    k, v, beta = wide(call.k), wide(call.v), wide(call.beta)
    keys, values = k.shape[3], v.shape[3]
    grid = Grid(v, call.chunk_size, call.cu_seqlens)
    log = running_log(call.g, grid, v)
    solved = v.new_empty(*v.shape[:3], values + keys)
    back = v.new_empty(*v.shape[:3], values + keys)
    dx, dz = back[..., :values], back[..., values:]
    transform_back(k, beta, log, grid, call.transform, arrived(du, dx), arrived(dw, dz), dx, dz)
    if call.transform == "exact":
        transform_chunks(k, v, beta, log, grid, "exact", solved[..., :values], solved[..., values:])
        below = read_chunks(back, solved, k, log, grid, torch.empty_like(dz), scale=-1.0, apart=1)
        above = read_chunks(solved, back, k, log, grid, torch.empty_like(dz), scale=-1.0, rate=beta, apart=1, backwards=True)
    else:
        below = above = v.new_zeros(dz.shape)
    reach = dz * log.exp().to(dz.dtype)[..., None]
    rate = beta[..., None]
    d_beta = row_dot(k, below + reach)
    d_log = row_dot(k, above, d_beta * beta, -1.0)
    return {
        "k": by_group(rate * (below + reach) + above, call.k.shape[2]),
        "v": rate * dx,
        "beta": row_dot(v, dx, d_beta),
        "g": decay_gradient(d_log, log, grid),
    }
