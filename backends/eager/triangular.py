"""The inverse of I + N for strictly lower triangular N, batched: by exact blocks merged with products, or by a triangular solve.

Only what lies strictly below N's diagonal is read. Neither way sums powers of N: for similar keys they grow like binomials.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["DEPENDS_ON_PLACE", "INVERSES", "unit_lower_inverse"]

INVERSES = ("blocks", "solve")
DEPENDS_ON_PLACE = frozenset({"solve"})
"""The ways whose last bits depend on where in memory a matrix lies, and so on what shares the batch (seen with MKL's trsm at odd sizes)."""

_BASE = 8


def unit_lower_inverse(n: Tensor, method: str, out: Tensor | None = None) -> Tensor:
    """(I + stril(N))^-1 for a contiguous `N [b, C, C]`, by one of `INVERSES`, with zeros above its diagonal; `out` is memory that may hold it."""
    if method == "solve":
        eye = torch.eye(n.shape[-1], dtype=n.dtype, device=n.device).expand_as(n)
        return torch.linalg.solve_triangular(n, eye, upper=False, unitriangular=True)
    if method != "blocks":
        raise ValueError(f"inverse={method!r} is not in {INVERSES}")
    size = n.shape[-1]
    padded = _BASE
    while padded < size:
        padded *= 2
    if padded == size:
        return _merged(n, out)
    wide = n.new_zeros(n.shape[0], padded, padded)
    wide[:, :size, :size] = n
    return _merged(wide, None)[:, :size, :size].contiguous()


def _diagonal(x: Tensor, size: int) -> Tensor:
    """The diagonal blocks of that size as a view `[b, blocks, size, size]`."""
    count = x.shape[-1] // size
    return x.view(x.shape[0], count, size, count, size).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


def _substituted(blocks: Tensor) -> Tensor:
    """The inverses of small blocks `[b, m, s, s]` row by row, all blocks at once (the batch is the fastest axis)."""
    size = blocks.shape[-1]
    n = blocks.permute(2, 3, 0, 1).contiguous()
    inverse = torch.zeros_like(n)
    for row in range(size):
        inverse[row, row] = 1
        if row:
            inverse[row, :row] = (n[row, :row, None] * inverse[:row, :row]).sum(0).neg_()
    return inverse.permute(2, 3, 0, 1)


def _merged(n: Tensor, out: Tensor | None) -> Tensor:
    """Inverses of neighbouring diagonal blocks, joined pair by pair: [[T1, 0], [-T2 X T1, T2]]."""
    inverse = torch.zeros_like(n) if out is None else out.zero_()
    _diagonal(inverse, _BASE).copy_(_substituted(_diagonal(n, _BASE)))
    half = _BASE
    while half < n.shape[-1]:
        pairs, source = _diagonal(inverse, 2 * half), _diagonal(n, 2 * half)
        upper = pairs[..., :half, :half].reshape(-1, half, half)
        lower = pairs[..., half:, half:].reshape(-1, half, half)
        cross = source[..., half:, :half].reshape(-1, half, half)
        pairs[..., half:, :half] = torch.bmm(lower, torch.bmm(cross, upper)).neg_().view(*pairs.shape[:2], half, half)
        half *= 2
    return inverse
