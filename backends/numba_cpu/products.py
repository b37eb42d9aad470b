"""The one small matrix product of the chunk kernels: eight rows of A times one tile of B's columns, eight sums in registers.

    C[r, :] = (C[r, :] +-) sum over i < depth of  A[r, i] B[i, :]        r < 8, 2 * 8 * WIDTH * depth FLOP

A is read number by number at any two steps, so it may be a transpose; B's and C's rows are WIDTH neighbours.
"""

from __future__ import annotations

import numpy as np

from .jit import kernel
from .lanes import WIDTH, add, fma, load, multiply, splat, spread, store

__all__ = ["added", "lower_panels", "panel", "panels", "scaled", "up_to_eight"]

_F = np.float32


@kernel
def up_to_eight(count):
    """The next multiple of 8."""
    return (count + 7) // 8 * 8


@kernel
def _ended(c, at, x, keep, sign):
    """Writes x, C + x or C - x."""
    if keep:
        x = fma(sign, x, load(c, at))
    store(c, at, x)


@kernel
def panel(c, c_pitch, a, a_row, a_step, b, b_pitch, depth, keep, sign):
    """Eight rows; with `keep`, C + sign * A B."""
    zero = splat(_F(0.0))
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = zero
    for i in range(depth):
        x, at = load(b, i * b_pitch), i * a_step
        s0 = fma(spread(a, at), x, s0)
        s1 = fma(spread(a, at + a_row), x, s1)
        s2 = fma(spread(a, at + 2 * a_row), x, s2)
        s3 = fma(spread(a, at + 3 * a_row), x, s3)
        s4 = fma(spread(a, at + 4 * a_row), x, s4)
        s5 = fma(spread(a, at + 5 * a_row), x, s5)
        s6 = fma(spread(a, at + 6 * a_row), x, s6)
        s7 = fma(spread(a, at + 7 * a_row), x, s7)
    factor = splat(sign)
    _ended(c, 0, s0, keep, factor)
    _ended(c, c_pitch, s1, keep, factor)
    _ended(c, 2 * c_pitch, s2, keep, factor)
    _ended(c, 3 * c_pitch, s3, keep, factor)
    _ended(c, 4 * c_pitch, s4, keep, factor)
    _ended(c, 5 * c_pitch, s5, keep, factor)
    _ended(c, 6 * c_pitch, s6, keep, factor)
    _ended(c, 7 * c_pitch, s7, keep, factor)


@kernel
def panels(c, a, a_pitch, b, b_pitch, count, depth, keep, sign):
    """`count` rows of one tile, C with a pitch of WIDTH, A by rows; `count` is a multiple of 8."""
    for r in range(0, count, 8):
        panel(c + 4 * r * WIDTH, WIDTH, a + 4 * r * a_pitch, a_pitch, 1, b, b_pitch, depth, keep, sign)


@kernel
def lower_panels(c, a, a_pitch, b, count, keep):
    """As `panels` for an A that is zero above its diagonal, and B with a pitch of WIDTH: what lies right of each eight rows' diagonal is not read."""
    for r in range(0, count, 8):
        panel(c + 4 * r * WIDTH, WIDTH, a + 4 * r * a_pitch, a_pitch, 1, b, WIDTH, r + 8, keep, _F(1.0))


@kernel
def scaled(x, factors, count, by):
    """Row t times by * factors[t], for `count` rows of a tile."""
    for t in range(count):
        store(x, t * WIDTH, multiply(spread(factors, t), multiply(splat(by), load(x, t * WIDTH))))


@kernel
def added(x, y, count):
    """x + y for `count` rows of a tile, into x."""
    for t in range(count):
        store(x, t * WIDTH, add(load(x, t * WIDTH), load(y, t * WIDTH)))
