"""e^x for a run of float32: x = n ln 2 + r, e^r by its Taylor polynomial of degree 7 on |r| <= ln 2 / 2, within 2 units in the last place.

Below -87.3 the result is 0, above 88 that of 88; log-decays are not positive.
"""

from __future__ import annotations

import numpy as np

from .jit import kernel
from .lanes import WIDTH, add, clamped, fma, load, multiply, number, put, splat, store, two_to, zero_below

__all__ = ["exponentials"]

_F = np.float32
_LOG2_E = _F(1.4426950408889634)
_SHIFT = _F(12582912.0)  # 1.5 * 2^23: adding it rounds to an integer
_LN2_HIGH = _F(-0.693359375)  # exact in few bits, so that n times it is exact too
_LN2_LOW = _F(2.1219444005469058e-4)
_LOW, _HIGH = _F(-87.3), _F(88.0)
_C7, _C6, _C5, _C4, _C3, _C2, _C1 = (_F(1 / n) for n in (5040, 720, 120, 24, 6, 2, 1))


@kernel
def _exponential(x):
    inside = clamped(x, splat(_LOW), splat(_HIGH))
    shifted = fma(inside, splat(_LOG2_E), splat(_SHIFT))
    n = add(shifted, splat(-_SHIFT))
    r = fma(n, splat(_LN2_LOW), fma(n, splat(_LN2_HIGH), inside))
    y = fma(splat(_C7), r, splat(_C6))
    y = fma(y, r, splat(_C5))
    y = fma(y, r, splat(_C4))
    y = fma(y, r, splat(_C3))
    y = fma(y, r, splat(_C2))
    y = fma(y, r, splat(_C1))
    y = fma(y, r, splat(_C1))
    return zero_below(x, splat(_LOW), multiply(y, two_to(shifted)))


@kernel
def exponentials(to, source, step, count):
    """to[t] = e^(source[t step]) for t < count, 1 where `source` is no address; what lies behind, up to a multiple of WIDTH, is overwritten with 1."""
    padded = (count + WIDTH - 1) // WIDTH * WIDTH
    for t in range(padded):
        put(to, t, number(source, t * step) if source != 0 and t < count else _F(0.0))
    for t in range(0, padded, WIDTH):
        store(to, t, _exponential(load(to, t)))
