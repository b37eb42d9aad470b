"""The gradients of what a chunk reads (SPEC.md 10) are three more reads, with the roles of q, k and U exchanged; shared by fast_core and slow_core.

o = gate * scale * ( (exp(G) * Q) S + (tril(Q K^T) * Gamma) U )
dq = gate * scale * ( (exp(G) * dO) S^T + (tril(dO U^T) * Gamma) K )              dgate = q . (dq without its gate)
dU = (exp(G_C - G) * K) dS' + (triu(K Q^T) * Gamma^T) (scale * gate * dO)
dk = (exp(G_C - G) * U) dS'^T + (triu(U dO^T) * Gamma^T) (scale * gate * Q)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .chunk_read import read_chunks
from .grid import Grid
from .log_gradient import row_dot

__all__ = ["arrived", "by_group", "key_gradient", "query_gradient", "update_gradient"]


def arrived(grad: Tensor | None, like: Tensor) -> Tensor:
    """A gradient in float32, zeros where none arrives."""
    return like.new_zeros(like.shape, dtype=torch.float32) if grad is None else grad.float()


def query_gradient(
    q: Tensor, k: Tensor, u: Tensor, d_o: Tensor, gate: Tensor, log: Tensor, grid: Grid, scale: float, states: Tensor | None, which: int
) -> tuple[Tensor, Tensor]:
    """dq by value head `[B, T, H, K]`, and dgate `[B, T, H]`; `states` is what o read."""
    dq = torch.empty(*u.shape[:3], k.shape[3], dtype=u.dtype, device=u.device)
    read_chunks(d_o, u, k, log, grid, dq, scale=scale, states=None if states is None else states.mT, which=which)
    return dq * gate[..., None], row_dot(q, dq)


def update_gradient(
    q: Tensor, k: Tensor, u: Tensor, d_o: Tensor, rate: Tensor, log: Tensor, grid: Grid, d_states: Tensor | None, which: int
) -> Tensor:
    """dU `[B, T, H, V]`; `rate` is scale * gate, `d_states` the gradient of the state that leaves the chunk."""
    du = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    return read_chunks(k, q, d_o, log, grid, du, rate=rate, states=d_states, which=which, backwards=True)


def key_gradient(q: Tensor, k: Tensor, u: Tensor, d_o: Tensor, rate: Tensor, log: Tensor, grid: Grid, d_states: Tensor | None, which: int) -> Tensor:
    """dk by value head `[B, T, H, K]`."""
    dk = torch.empty(*u.shape[:3], k.shape[3], dtype=u.dtype, device=u.device)
    states = None if d_states is None else d_states.mT
    return read_chunks(u, d_o, q, log, grid, dk, rate=rate, states=states, which=which, backwards=True)


def by_group(grad: Tensor, groups: int) -> Tensor:
    """The sum over the value heads of each group: `[B, T, G, K]` from `[B, T, H, K]`."""
    heads = grad.shape[2]
    return grad if heads == groups else grad.unflatten(2, (groups, heads // groups)).sum(3)
