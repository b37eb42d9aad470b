"""What is compiled: the part of a slab that no state enters (SPEC.md 2 to 4), as functions of `[N, C, *]` tensors, N chunks times heads.

They are written for the compiler, with every elementwise step after a product in one expression, so that a C x C matrix is read and written once.
`log` is G, the running sum of g inside the chunk, in float64; None stands for no decay. Nothing here is called uncompiled.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["lam_uw", "scaled_sides", "scores", "triangles", "unit_triangle"]


def scores(q: Tensor, k: Tensor, log: Tensor | None) -> tuple[Tensor, ...]:
    """tril(Q K^T) ⊙ Gamma, and with a decay e^G, e^(G_C - G) and e^(G_C)."""
    m = torch.bmm(q, k.mT)
    if log is None:
        return (_tril(m),)
    last = log[:, -1:]
    return m * _gamma(log, m), log.to(q.dtype).exp(), (last - log).to(q.dtype).exp(), last.to(q.dtype).exp()


def unit_triangle(k: Tensor, v: Tensor, beta: Tensor, log: Tensor | None) -> tuple[Tensor, ...]:
    """-A below its diagonal (what stands on it means nothing), b ⊙ V and b ⊙ e^G ⊙ K."""
    minus_a = torch.bmm(k, k.mT) * beta
    return _tril(minus_a) if log is None else minus_a * _gamma(log, minus_a), *scaled_sides(k, v, beta, log)


def lam_uw(k: Tensor, v: Tensor, beta: Tensor, log: Tensor | None) -> tuple[Tensor, ...]:
    """u and w of the lam transform, T = I + A + stril(A A^T)."""
    n, x, z = unit_triangle(k, v, beta, log)
    n = _tril(n, -1)
    t = _tril(torch.bmm(n, n.mT), -1) - n + torch.eye(n.shape[1], dtype=n.dtype, device=n.device)
    return torch.bmm(t, x), torch.bmm(t, z)


def scaled_sides(k: Tensor, v: Tensor, beta: Tensor, log: Tensor | None) -> tuple[Tensor, ...]:
    """b ⊙ V and b ⊙ e^G ⊙ K."""
    return v * beta, k * (beta if log is None else beta * log.to(k.dtype).exp())


def triangles(both: Tensor, v: Tensor, beta: Tensor, log: Tensor | None) -> tuple[Tensor, ...]:
    """From K above Q in `both [N, 2C, K]`: -A as in `unit_triangle`, the scores, b ⊙ V, -b ⊙ e^G, and with a decay e^(G_C - G) ⊙ K, e^G, e^(G_C)."""
    size = v.shape[1]
    k, q = both[:, :size], both[:, size:]
    n, m = torch.bmm(k, k.mT) * beta, torch.bmm(q, k.mT)
    if log is None:
        return n, _tril(m), v * beta, -beta
    last, gamma, head = log[:, -1:], _gamma(log, m), log.to(v.dtype).exp()
    return n * gamma, m * gamma, v * beta, -beta * head, k * (last - log).to(v.dtype).exp(), head, last.to(v.dtype).exp()


def _below(square: Tensor, diagonal: int) -> Tensor:
    at = torch.arange(square.shape[-1], device=square.device)
    return at[:, None] + diagonal >= at[None, :]


def _tril(square: Tensor, diagonal: int = 0) -> Tensor:
    """What lies on and below a diagonal, zeros above."""
    return torch.where(_below(square, diagonal), square, 0.0)


def _gamma(log: Tensor, square: Tensor) -> Tensor:
    """e^(G_i - G_j) on and below the diagonal, 0 above: the mask comes before the exp."""
    return torch.where(_below(square, 0), (log - log.mT).to(square.dtype), float("-inf")).exp()
