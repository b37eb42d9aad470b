"""The gradients of what a chunk reads (SPEC.md 10) are three more reads, with the roles of q, k and U exchanged; shared by fast_core and slow_core.

o = gate * scale * ( (exp(G) * Q) S + (tril(Q K^T) * Gamma) U )
dq = gate * scale * ( (exp(G) * dO) S^T + (tril(dO U^T) * Gamma) K )              dgate = q . (dq without its gate)
dU = (exp(G_C - G) * K) dS' + (triu(K Q^T) * Gamma^T) (scale * gate * dO)
dk = (exp(G_C - G) * U) dS'^T + (triu(U dO^T) * Gamma^T) (scale * gate * Q)

dG is q . dq - k . dk, in which the diagonal of dO U^T cancels, but not its rounding, and that is larger than all the rest where gates forget within a few
tokens. So dq and dk are read without it, said to G, and get it afterwards; what dk has of dS' is said apart, for `log_gradient`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .chunk_read import read_chunks
from .grid import Grid
from .log_gradient import row_dot

__all__ = ["arrived", "by_group", "key_gradient", "own_scores", "query_gradient", "update_gradient"]


def arrived(grad: Tensor | None, like: Tensor) -> Tensor:
    """A gradient in float32, zeros where none arrives."""
    return like.new_zeros(like.shape, dtype=torch.float32) if grad is None else grad.float()


def own_scores(u: Tensor, d_o: Tensor, scale: float) -> Tensor:
    """The diagonal of scale * dO U^T, without the gate, `[B, T, H]`."""
    return row_dot(u, d_o, scale=scale)


def query_gradient(
    q: Tensor, k: Tensor, u: Tensor, d_o: Tensor, gate: Tensor, log: Tensor, own: Tensor, grid: Grid, scale: float, states: Tensor | None, which: int
) -> tuple[Tensor, Tensor, Tensor]:
    """dq by value head `[B, T, H, K]`, dgate `[B, T, H]`, and q . dq without the diagonal; `states` is what o read."""
    read = torch.empty(*u.shape[:3], k.shape[3], dtype=u.dtype, device=u.device)
    read_chunks(d_o, u, k, log, grid, read, scale=scale, states=None if states is None else states.mT, which=which, apart=1)
    dq = read + _scaled(own, k)
    return dq * gate[..., None], row_dot(q, dq), gate * row_dot(q, read)


def update_gradient(
    q: Tensor, k: Tensor, u: Tensor, d_o: Tensor, rate: Tensor, log: Tensor, grid: Grid, d_states: Tensor | None, which: int
) -> Tensor:
    """dU `[B, T, H, V]`; `rate` is scale * gate, `d_states` the gradient of the state that leaves the chunk."""
    du = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    return read_chunks(k, q, d_o, log, grid, du, rate=rate, states=d_states, which=which, backwards=True)


def key_gradient(
    q: Tensor,
    k: Tensor,
    u: Tensor,
    d_o: Tensor,
    gate: Tensor,
    log: Tensor,
    own: Tensor,
    grid: Grid,
    scale: float,
    d_states: Tensor | None,
    which: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dk by value head `[B, T, H, K]`; k . dk `[B, T, H]` without the diagonal and without dS'; and what dS' adds to it."""
    dk = torch.empty(*u.shape[:3], k.shape[3], dtype=u.dtype, device=u.device)
    read_chunks(u, d_o, q, log, grid, dk, scale=scale, rate=gate, backwards=True, apart=1)
    inside = row_dot(k, dk)
    dk = dk + _scaled(gate * own, q)
    if d_states is None:
        return dk, inside, None
    leaving = read_chunks(u, d_o, q, log, grid, torch.empty_like(dk), states=d_states.mT, which=which, backwards=True, apart=grid.chunk)
    return dk + leaving, inside, row_dot(k, leaving)


def by_group(grad: Tensor, groups: int) -> Tensor:
    """The sum over the value heads of each group: `[B, T, G, K]` from `[B, T, H, K]`."""
    heads = grad.shape[2]
    return grad if heads == groups else grad.unflatten(2, (groups, heads // groups)).sum(3)


def _scaled(weights: Tensor, rows: Tensor) -> Tensor:
    """Rows `[B, T, G, K]` for every value head, each times its weight `[B, T, H]`."""
    groups = rows.shape[2]
    return (weights.unflatten(2, (groups, weights.shape[2] // groups))[..., None] * rows.unsqueeze(3)).flatten(2, 3)
