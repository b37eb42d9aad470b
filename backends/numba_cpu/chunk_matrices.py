"""The square matrices of one chunk, and the transform that they make (SPEC.md 3).

    Gamma_tj = e^(g_(j+1) + ... + g_t) for j <= t, else 0       M = (Q K^T) * Gamma       N = diag(beta) (K K^T) * Gamma below the diagonal
    exact: X <- (I + N)^-1 X by substitution      lam: X <- X + (stril(N N^T) - N) X      none: X

Gamma's row t is row t - 1 times e^g_t: no exponential of a difference, so nothing overflows and nothing cancels. Matrices have `pitch` columns, a
multiple of WIDTH, and are right up to each eight rows' diagonal tile; beyond it they are not written.
"""

from __future__ import annotations

import numpy as np

from .jit import kernel
from .lanes import WIDTH, fma, load, multiply, negative, number, put, splat, spread, store
from .products import added, lower_panels, panel, up_to_eight

__all__ = ["decays", "lam_mixing", "scores", "transformed", "transposed"]

_F = np.float32
_ZERO, _ONE, _MINUS = _F(0.0), _F(1.0), _F(-1.0)


@kernel
def transposed(to, to_pitch, source, pitch, count, width):
    """to[i, t] = source[t, i]; columns from `count` up to `to_pitch` are 0."""
    for i in range(width):
        for t in range(count):
            put(to, i * to_pitch + t, number(source, t * pitch + i))
        for t in range(count, to_pitch):
            put(to, i * to_pitch + t, _ZERO)


@kernel
def decays(gamma, pitch, heads, decay, count):
    """Gamma for `count` tokens, from their e^g; heads[t] = e^(g_0 + ... + g_t)."""
    total = _ONE
    for t in range(count):
        total *= number(decay, t)
        put(heads, t, total)
    for column in range(0, count, WIDTH):
        last = splat(_ZERO)
        for t in range(column, count):
            last = multiply(spread(decay, t), last)
            store(gamma, t * pitch + column, last)
            if t < column + WIDTH:
                put(gamma, t * pitch + t, _ONE)
                last = load(gamma, t * pitch + column)


@kernel
def scores(m, pitch, a, keys_t, gamma, a_pitch, keys, count, factors, diagonal):
    """M from a = Q, or N from a = K with `factors` beta and no diagonal; rows are made in eights, those from `count` on are 0 times what they hold."""
    for r in range(0, up_to_eight(count), 8):
        for column in range(0, r + 8, WIDTH):
            panel(m + 4 * (r * pitch + column), pitch, a + 4 * r * a_pitch, a_pitch, 1, keys_t + 4 * column, pitch, keys, False, _ONE)
            for t in range(r, min(r + 8, count)):
                x = multiply(load(m, t * pitch + column), load(gamma, t * pitch + column))
                if factors != 0:
                    x = multiply(spread(factors, t), x)
                if column > t:
                    x = splat(_ZERO)
                store(m, t * pitch + column, x)
        if not diagonal:
            for t in range(r, r + 8):
                put(m, t * pitch + t, _ZERO)


@kernel
def lam_mixing(mixing, n, n_t, pitch, count):
    """stril(N N^T) - N, lower; `n_t` is scratch for N^T."""
    rows = up_to_eight(count)
    for j in range(rows):
        for i in range(pitch):
            put(n_t, j * pitch + i, number(n, i * pitch + j) if j < i < rows else _ZERO)
    for r in range(0, rows, 8):
        for column in range(0, r + 8, WIDTH):
            panel(mixing + 4 * (r * pitch + column), pitch, n + 4 * r * pitch, pitch, 1, n_t + 4 * column, pitch, r + 8, False, _ONE)
            for t in range(r, r + 8):
                store(mixing, t * pitch + column, fma(splat(_MINUS), load(n, t * pitch + column), load(mixing, t * pitch + column)))
                for j in range(max(t, column), column + WIDTH):
                    put(mixing, t * pitch + j, _ZERO)


@kernel
def _eight_substituted(x, n, pitch):
    """X <- (I + N)^-1 X for eight rows in registers: as soon as a row is known it leaves all those below."""
    x0 = load(x, 0)
    x1 = load(x, WIDTH)
    x2 = load(x, 2 * WIDTH)
    x3 = load(x, 3 * WIDTH)
    x4 = load(x, 4 * WIDTH)
    x5 = load(x, 5 * WIDTH)
    x6 = load(x, 6 * WIDTH)
    x7 = load(x, 7 * WIDTH)
    m = negative(x0)
    x1 = fma(spread(n, pitch), m, x1)
    x2 = fma(spread(n, 2 * pitch), m, x2)
    x3 = fma(spread(n, 3 * pitch), m, x3)
    x4 = fma(spread(n, 4 * pitch), m, x4)
    x5 = fma(spread(n, 5 * pitch), m, x5)
    x6 = fma(spread(n, 6 * pitch), m, x6)
    x7 = fma(spread(n, 7 * pitch), m, x7)
    m = negative(x1)
    x2 = fma(spread(n, 2 * pitch + 1), m, x2)
    x3 = fma(spread(n, 3 * pitch + 1), m, x3)
    x4 = fma(spread(n, 4 * pitch + 1), m, x4)
    x5 = fma(spread(n, 5 * pitch + 1), m, x5)
    x6 = fma(spread(n, 6 * pitch + 1), m, x6)
    x7 = fma(spread(n, 7 * pitch + 1), m, x7)
    m = negative(x2)
    x3 = fma(spread(n, 3 * pitch + 2), m, x3)
    x4 = fma(spread(n, 4 * pitch + 2), m, x4)
    x5 = fma(spread(n, 5 * pitch + 2), m, x5)
    x6 = fma(spread(n, 6 * pitch + 2), m, x6)
    x7 = fma(spread(n, 7 * pitch + 2), m, x7)
    m = negative(x3)
    x4 = fma(spread(n, 4 * pitch + 3), m, x4)
    x5 = fma(spread(n, 5 * pitch + 3), m, x5)
    x6 = fma(spread(n, 6 * pitch + 3), m, x6)
    x7 = fma(spread(n, 7 * pitch + 3), m, x7)
    m = negative(x4)
    x5 = fma(spread(n, 5 * pitch + 4), m, x5)
    x6 = fma(spread(n, 6 * pitch + 4), m, x6)
    x7 = fma(spread(n, 7 * pitch + 4), m, x7)
    m = negative(x5)
    x6 = fma(spread(n, 6 * pitch + 5), m, x6)
    x7 = fma(spread(n, 7 * pitch + 5), m, x7)
    m = negative(x6)
    x7 = fma(spread(n, 7 * pitch + 6), m, x7)
    store(x, WIDTH, x1)
    store(x, 2 * WIDTH, x2)
    store(x, 3 * WIDTH, x3)
    store(x, 4 * WIDTH, x4)
    store(x, 5 * WIDTH, x5)
    store(x, 6 * WIDTH, x6)
    store(x, 7 * WIDTH, x7)


@kernel
def _substituted(x, n, pitch, count):
    """X <- (I + N)^-1 X: what the rows above an eight give at once, then the eight."""
    for r in range(0, count, 8):
        rows, left = x + 4 * r * WIDTH, n + 4 * r * pitch
        if r > 0:
            panel(rows, WIDTH, left, pitch, 1, x, WIDTH, r, True, _MINUS)
        _eight_substituted(rows, left + 4 * r, pitch)


@kernel
def transformed(x, spare, kind, n, mixing, pitch, count):
    """T X on one tile in place, `count` a multiple of 8; kind 1 exact, 2 lam, 3 none."""
    if kind == 1:
        _substituted(x, n, pitch, count)
    elif kind == 2:
        lower_panels(spare, mixing, pitch, x, count, False)
        added(x, spare, count)
