"""The UT transform of a slab of chunks (SPEC.md 3, 10): A, T and [u | w] = T [b⊙V | b⊙e^G⊙K], and its gradients.

`exact` takes T = (I - A)^-1, `lam` T = I + A + stril(A A^T), `none` T = I. Everything is `[n, H, C, *]`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .causal import product, row_sum
from .decay import Decay
from .triangular import unit_lower_inverse

__all__ = ["Transform", "TransformGradients"]


@dataclass(frozen=True, slots=True)
class Transform:
    """T (None: the identity), `minus_a` -A (below the diagonal), and the sides x = b⊙V, z = b⊙e^G⊙K that T acts on."""

    kind: str
    t: Tensor | None
    minus_a: Tensor | None
    x: Tensor
    z: Tensor

    @classmethod
    def of(cls, k: Tensor, v: Tensor, beta: Tensor, decay: Decay | None, kind: str, inverse: str) -> Transform:
        """From one slab's `k`, `v` and `beta [n, H, C, 1]`; `inverse` names the way to the exact T."""
        z = k * (beta if decay is None else beta * decay.head)
        if kind == "none":
            return cls(kind, None, None, v * beta, z)
        minus_a = product(k, k.mT).mul_(beta)
        if decay is not None:
            minus_a.mul_(decay.pair)
        if kind == "exact":
            t = unit_lower_inverse(minus_a.flatten(0, 1), inverse).unflatten(0, k.shape[:2])
        else:
            minus_a.tril_(-1)
            t = product(minus_a, minus_a.mT).tril_(-1).sub_(minus_a)
            t.diagonal(dim1=-2, dim2=-1).fill_(1)
        return cls(kind, t, minus_a, v * beta, z)

    def u(self) -> Tensor:
        """T x."""
        return self.x if self.t is None else product(self.t, self.x)

    def w(self) -> Tensor:
        """T z."""
        return self.z if self.t is None else product(self.t, self.z)


@dataclass(slots=True)
class TransformGradients:
    """dk, dv, dbeta and dG of one slab; dG is None without g."""

    k: Tensor
    v: Tensor
    beta: Tensor
    log: Tensor | None

    @classmethod
    def of(
        cls,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        decay: Decay | None,
        transform: Transform,
        u: Tensor,
        w: Tensor | None,
        du: Tensor | None,
        dw: Tensor | None,
        *,
        frozen_keys: bool,
    ) -> TransformGradients:
        """From du and dw (None: zero). `frozen_keys` leaves out what only dk, dbeta and dG need and returns their own parts incomplete."""
        back = transform.t
        dx = torch.zeros_like(v) if du is None else du if back is None else product(back.mT, du)
        dz = None if dw is None else dw if back is None else product(back.mT, dw)
        out = cls(torch.zeros_like(k), dx * beta, row_sum(dx, v), None)
        if frozen_keys:
            return out
        if dz is not None:
            reach = dz if decay is None else dz * decay.head
            out.k = reach * beta
            out.beta = out.beta + row_sum(reach, k)
            out.log = row_sum(dz, transform.z)
        if transform.minus_a is not None:
            out._add_through_a(k, beta, decay, transform, _d_minus_a(transform, u, w, du, dw, dx, dz))
        if decay is None:
            out.log = None
        elif out.log is None:
            out.log = torch.zeros_like(beta)
        return out

    def _add_through_a(self, k: Tensor, beta: Tensor, decay: Decay | None, transform: Transform, d_minus_a: Tensor) -> None:
        """Adds what -A = diag(b) K K^T ⊙ Gamma passes on."""
        assert transform.minus_a is not None
        if decay is not None:
            h = d_minus_a * transform.minus_a
            added = h.sum(-1, keepdim=True) - h.sum(-2, keepdim=True).mT
            self.log = added if self.log is None else self.log + added
        grams = d_minus_a if decay is None else d_minus_a.mul_(decay.pair)
        self.beta = self.beta + row_sum(grams, product(k, k.mT))
        d_gram = grams * beta
        self.k = self.k + product(d_gram, k) + product(d_gram.mT, k)


def _d_minus_a(t: Transform, u: Tensor, w: Tensor | None, du: Tensor | None, dw: Tensor | None, dx: Tensor, dz: Tensor | None) -> Tensor:
    """The gradient of -A below the diagonal; zeros elsewhere."""
    if t.kind == "exact":
        d_a = product(dx, u.mT)
        if dz is not None and w is not None:
            d_a += product(dz, w.mT)
        return d_a.tril_(-1).neg_()
    assert t.minus_a is not None
    d_t = torch.zeros_like(t.minus_a) if du is None else product(du, t.x.mT)
    if dw is not None:
        d_t += product(dw, t.z.mT)
    d_t.tril_(-1)
    return (product(d_t + d_t.mT, t.minus_a).tril_(-1)).sub_(d_t)
