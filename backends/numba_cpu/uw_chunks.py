"""u and w of every chunk of one head: the square matrices once, then tile after tile of [V | K] through the transform (SPEC.md 3).

u = T (beta V)      w = T (beta e^G K)        2 C K + C (K + V) FLOP per token; nothing crosses a chunk, so a segment of chunks is an item
"""

from __future__ import annotations

import numpy as np

from .call_row import FIELDS, TENSORS
from .chunk_grid import chunk_bounds, chunk_count, sequence_bounds
from .chunk_matrices import decays, lam_mixing, scores, transformed, transposed
from .exponential import exponentials
from .jit import inlined, kernel
from .lanes import WIDTH, integer, load, number, put, splat, store
from .products import scaled, up_to_eight
from .staging import numbers, padded, read_tile, rows, rows_ahead, token_at, write_tile

__all__ = ["uw_item", "uw_scratch"]

_F = np.float32
_ZERO, _ONE = _F(0.0), _F(1.0)
_HEADS, _GROUP, _KEYS, _VALUES = (FIELDS[name] for name in ("heads", "group", "keys", "values"))
_ROWS, _SEGMENTS, _TRANSFORM = (FIELDS[name] for name in ("rows", "segments", "transform"))
_K, _V, _BETA, _G, _U_OUT, _W_OUT = (TENSORS[name] for name in ("k", "v", "beta", "g", "u_out", "w_out"))


def uw_scratch(keys: int, count: int, width: int) -> int:
    """Floats of scratch for chunks of `count` tokens."""
    high, wide = -(-count // width) * width, -(-keys // width) * width
    return high * (2 * wide + 4 * high + 2 * width + 4)


@kernel
def _finished(x, spare, transform, n, mixing, pitch, factors, count, to, step, valid):
    """One tile: its rows times their factors, transformed, and out."""
    scaled(x, factors, count, _ONE)
    for t in range(count, up_to_eight(count)):
        store(x, t * WIDTH, splat(_ZERO))
    transformed(x, spare, transform, n, mixing, pitch, up_to_eight(count))
    write_tile(x, WIDTH, to, step, count, valid)


@inlined
def uw_item(row, item, scratch):
    """A segment of one head's chunks."""
    keys, values, most, segments = integer(row, _KEYS), integer(row, _VALUES), integer(row, _ROWS), integer(row, _SEGMENTS)
    segment, item = item % segments, item // segments
    head, sequence = item % integer(row, _HEADS), item // integer(row, _HEADS)
    shared, transform = head // integer(row, _GROUP), integer(row, _TRANSFORM)
    batch, begin, end = sequence_bounds(row, sequence)
    chunks = chunk_count(row, end - begin)
    wide, high = padded(keys), padded(most)
    k = scratch
    keys_t = k + 4 * high * wide
    gamma = keys_t + 4 * wide * high
    n = gamma + 4 * high * high
    n_t = n + 4 * high * high
    mixing = n_t + 4 * high * high
    x = mixing + 4 * high * high
    spare = x + 4 * high * WIDTH
    decay = spare + 4 * high * WIDTH
    grown = decay + 4 * high
    beta = grown + 4 * high
    for chunk in range(chunks * segment // segments, chunks * (segment + 1) // segments):
        token, stop = chunk_bounds(row, chunk, begin, end)
        count, pitch = stop - token, padded(stop - token)
        rows(k, token_at(row, _K, batch, token, shared), integer(row, _K + 1), integer(row, _K + 3), count, keys, False)
        for i in range(count * wide, up_to_eight(count) * wide, WIDTH):
            store(k, i, splat(_ZERO))
        exponentials(decay, token_at(row, _G, batch, token, head), integer(row, _G + 1), count)
        decays(gamma, pitch, grown, decay, count)
        numbers(beta, token_at(row, _BETA, batch, token, head), integer(row, _BETA + 1), count, _ONE)
        rows_ahead(token_at(row, _K, batch, stop, shared), integer(row, _K + 1), min(most, end - stop), keys)
        rows_ahead(token_at(row, _V, batch, stop, head), integer(row, _V + 1), min(most, end - stop), values)
        if transform != 3:
            transposed(keys_t, pitch, k, wide, count, keys)
            scores(n, pitch, k, keys_t, gamma, wide, keys, count, beta, False)
        if transform == 2:
            lam_mixing(mixing, n, n_t, pitch, count)
        given, step, stride = token_at(row, _V, batch, token, head), integer(row, _V + 1), integer(row, _V + 3)
        to, to_step = token_at(row, _U_OUT, batch, token, head), integer(row, _U_OUT + 1)
        for column in range(0, values, WIDTH):
            read_tile(x, WIDTH, given + 4 * column * stride, step, stride, count, values - column)
            _finished(x, spare, transform, n, mixing, pitch, beta, count, to + 4 * column, to_step, values - column)
        for t in range(count):
            put(beta, t, number(beta, t) * number(grown, t))
        to, to_step = token_at(row, _W_OUT, batch, token, head), integer(row, _W_OUT + 1)
        for column in range(0, keys, WIDTH):
            for t in range(count):
                store(x, t * WIDTH, load(k, t * wide + column))
            _finished(x, spare, transform, n, mixing, pitch, beta, count, to + 4 * column, to_step, keys - column)
