"""What is compiled: everything elementwise that no state enters (SPEC.md 2 to 4), on `[N, C, *]` tensors, N chunks times heads, changed in place.

The products themselves are torch's own. Each C x C matrix is then read and written once, where plain torch makes a pass per step.
`log` is G, the running sum of g inside the chunk, in float64. Without a decay it is None, and `mask [C, C]` holds 1 where a matrix is kept and 0
elsewhere; with one it holds 0 and -inf, and is added before the exp, so that no exp sees a sum that it should not.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["lam_triangle", "scores", "sides", "triangles", "unit_triangle"]


def scores(m: Tensor, log: Tensor | None, mask: Tensor) -> tuple[Tensor, ...]:
    """M from Q K^T; with a decay it returns e^G, e^(G_C - G) and e^(G_C)."""
    m.mul_(_gamma(log, mask))
    if log is None:
        return ()
    last = log[:, -1:]
    return log.to(m.dtype).exp(), (last - log).to(m.dtype).exp(), last.to(m.dtype).exp()


def unit_triangle(n: Tensor, k: Tensor, v: Tensor, beta: Tensor, log: Tensor | None, mask: Tensor) -> tuple[Tensor, ...]:
    """-A from K K^T, b ⊙ V from V and b ⊙ e^G ⊙ K from K."""
    n.mul_(_gamma(log, mask) * beta)
    return sides(k, v, beta, log)


def sides(k: Tensor, v: Tensor, beta: Tensor, log: Tensor | None) -> tuple[Tensor, ...]:
    """b ⊙ V from V and b ⊙ e^G ⊙ K from K."""
    v.mul_(beta)
    k.mul_(beta if log is None else beta * log.to(k.dtype).exp())
    return ()


def lam_triangle(square: Tensor, n: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """I + A + stril(A A^T) from A A^T and -A; `mask` holds 1 below the diagonal."""
    at = torch.arange(n.shape[-1], device=n.device)
    square.copy_(square * mask - n + (at[:, None] == at[None, :]).to(n.dtype))
    return ()


def triangles(n: Tensor, m: Tensor, k: Tensor | None, v: Tensor, beta: Tensor, log: Tensor | None, mask: Tensor) -> tuple[Tensor, ...]:
    """-A from K K^T, M from Q K^T, b ⊙ V from V, -b ⊙ e^G from b; with a decay also e^(G_C - G) ⊙ K from K, and it returns e^G and e^(G_C)."""
    gamma = _gamma(log, mask)
    n.mul_(gamma * beta)
    m.mul_(gamma)
    v.mul_(beta)
    if log is None or k is None:
        beta.neg_()
        return ()
    last, head = log[:, -1:], log.to(m.dtype).exp()
    k.mul_((last - log).to(m.dtype).exp())
    beta.mul_(-head)
    return head, last.to(m.dtype).exp()


def _gamma(log: Tensor | None, mask: Tensor) -> Tensor:
    """e^(G_i - G_j) where the mask allows it, else 0; without a decay the mask itself."""
    return mask if log is None else ((log - log.mT).to(mask.dtype) + mask).exp()
