"""Sums of what the programs of a kernel left behind, in a fixed order: the same bits twice, without atomics.

A row holds one program's part of up to six results, one after the other; a program here adds 32 columns of all rows, 128 rows at a time. It reads 4 bytes
a number: for the kernels before it a few hundredths of what they read themselves.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import Kernel

__all__ = ["SUMS", "add_up"]

_ROWS, _COLUMNS, _MOST = 128, 32, 6


@triton.jit
def _segment(partial, out, rows, total, first, size, tile, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A tile of columns of one result."""
    column = tile * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    line = tl.arange(0, ROWS)
    found = tl.zeros([ROWS, BLOCK], tl.float32)
    for low in range(0, rows, ROWS):
        row = low + line
        at = partial + row.to(tl.int64)[:, None] * total + first + column[None, :]
        found += tl.load(at, mask=(row < rows)[:, None] & inside[None, :], other=0.0)
    tl.store(out + column, tl.sum(found, 0).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sums(
    partial, a, b, c, d, e, f, rows, total, a_size, b_size, c_size, d_size, e_size, f_size,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One after the other the tiles of a, b, c, d, e and f; an absent one has columns and no tiles."""
    tile = tl.program_id(0)
    first = total * 0
    if a is not None:
        if tile < tl.cdiv(a_size, BLOCK):
            _segment(partial, a, rows, total, first, a_size, tile, ROWS, BLOCK)
        tile -= tl.cdiv(a_size, BLOCK)
    first += a_size
    if b is not None:
        if (tile >= 0) & (tile < tl.cdiv(b_size, BLOCK)):
            _segment(partial, b, rows, total, first, b_size, tile, ROWS, BLOCK)
        tile -= tl.cdiv(b_size, BLOCK)
    first += b_size
    if c is not None:
        if (tile >= 0) & (tile < tl.cdiv(c_size, BLOCK)):
            _segment(partial, c, rows, total, first, c_size, tile, ROWS, BLOCK)
        tile -= tl.cdiv(c_size, BLOCK)
    first += c_size
    if d is not None:
        if (tile >= 0) & (tile < tl.cdiv(d_size, BLOCK)):
            _segment(partial, d, rows, total, first, d_size, tile, ROWS, BLOCK)
        tile -= tl.cdiv(d_size, BLOCK)
    first += d_size
    if e is not None:
        if (tile >= 0) & (tile < tl.cdiv(e_size, BLOCK)):
            _segment(partial, e, rows, total, first, e_size, tile, ROWS, BLOCK)
        tile -= tl.cdiv(e_size, BLOCK)
    first += e_size
    if f is not None:
        if (tile >= 0) & (tile < tl.cdiv(f_size, BLOCK)):
            _segment(partial, f, rows, total, first, f_size, tile, ROWS, BLOCK)


SUMS = Kernel(_sums)


def add_up(partial: Tensor, rows: int, total: int, results: list[tuple[Tensor | None, int]]) -> None:
    """Adds `rows` rows of `total` numbers into the results, each with its number of columns; at most six, None for what nobody needs."""
    results = [*results, *[(None, 0)] * (_MOST - len(results))]
    tiles = sum(-(-size // _COLUMNS) for out, size in results if out is not None)
    outs, sizes = [out for out, _ in results], [size for _, size in results]
    SUMS(tiles, (partial, *outs, rows, total, *sizes), (_ROWS, _COLUMNS), 4, 2)
