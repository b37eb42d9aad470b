"""What happens inside a chunk alone: M = tril(Q K^T) ⊙ Gamma, Y = M U, and the gradients of both (SPEC.md 2, 4, 10).

Everything is `[n, H, C, *]`, every chunk and head at once; q already holds the scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .decay import Decay

__all__ = ["ScoreGradients", "attend", "product", "row_sum", "scores", "scores_backward"]


def product(a: Tensor, b: Tensor) -> Tensor:
    """The batched product of `[n, H, i, j]` and `[n, H, j, k]`."""
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])


def attend(held: Tensor, m: Tensor, u: Tensor) -> Tensor:
    """`held + M U`."""
    return torch.baddbmm(held.flatten(0, 1), m.flatten(0, 1), u.flatten(0, 1)).unflatten(0, m.shape[:2])


def row_sum(a: Tensor, b: Tensor) -> Tensor:
    """The sum of `a ⊙ b` over the last axis, which is kept."""
    return (a * b).sum(-1, keepdim=True)


def scores(q: Tensor, k: Tensor, decay: Decay | None) -> Tensor:
    """tril(Q K^T) ⊙ Gamma, `[n, H, C, C]`."""
    m = product(q, k.mT)
    return m.tril_() if decay is None else m.mul_(decay.pair)


@dataclass(slots=True)
class ScoreGradients:
    """dq, dk `[n, H, C, K]` and dG `[n, H, C, 1]`, each None where it was not wanted."""

    q: Tensor | None = None
    k: Tensor | None = None
    log: Tensor | None = None


def scores_backward(q: Tensor, k: Tensor, m: Tensor, decay: Decay | None, dm: Tensor, want: frozenset[str]) -> ScoreGradients:
    """The gradients of `scores` from dM, which may hold anything above the diagonal and is overwritten."""
    dqk = dm.tril_() if decay is None else dm.mul_(decay.pair)
    out = ScoreGradients()
    if "g" in want and decay is not None:
        h = dqk * product(q, k.mT)
        h.diagonal(dim1=-2, dim2=-1).zero_()  # it cancels, but not its rounding, which is larger than the rest where g forgets at once
        out.log = h.sum(-1, keepdim=True) - h.sum(-2, keepdim=True).mT
    if "q" in want:
        out.q = product(dqk, k)
    if "k" in want:
        out.k = product(dqk.mT, q)
    return out
