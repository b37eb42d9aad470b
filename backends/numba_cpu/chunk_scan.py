"""A state's way through the chunks of one head, everything inside a chunk as small products (SPEC.md 2, 4, 5).

    S~ = d S            U' = T b (V - e^G K S~), or u - w S~, or b V         o = coefficient * (e^G Q S~ + M U')        S <- e^G_C S~ + (e^(G_C - G) K)^T U'

Q, K and the square matrices are made once a chunk, then tile after tile of the value columns goes the whole way while it is near. 6 K V + 2 C (K + V)
FLOP per token. T needs no w: it is linear. `reset` empties the state before every chunk but a continued first one; then chunks are items of their own.
"""

from __future__ import annotations

import math

import numpy as np

from .call_row import FIELDS, TENSORS
from .chunk_grid import chunk_bounds, chunk_count, chunks_before, sequence_bounds
from .chunk_matrices import decays, lam_mixing, scores, transformed, transposed
from .exponential import exponentials
from .jit import inlined, kernel
from .lanes import WIDTH, add, fma, integer, lane_sum, load, multiply, number, splat, spread, store
from .products import lower_panels, panel, panels, scaled, up_to_eight
from .staging import coefficients, numbers, padded, read_tile, rows, rows_ahead, state_at, token_at, write_outputs, write_tile

__all__ = ["chunk_scan_item", "chunk_scan_scratch"]

_F = np.float32
_ZERO, _ONE, _MINUS, _TINY = _F(0.0), _F(1.0), _F(-1.0), _F(1e-8)
_HEADS, _GROUP, _KEYS, _VALUES = (FIELDS[name] for name in ("heads", "group", "keys", "values"))
_ROWS, _PARTS, _SEGMENTS, _L2NORM, _ACCUMULATE = (FIELDS[name] for name in ("rows", "parts", "segments", "l2norm", "accumulate"))
_DELTA, _TRANSFORM, _RESET, _OFFSET = (FIELDS[name] for name in ("delta", "transform", "reset", "offset"))
_NORMALIZE_READ, _NORMALIZE_FINAL = FIELDS["normalize_read"], FIELDS["normalize_final"]
_Q, _K, _V, _W, _BETA, _G = (TENSORS[name] for name in ("q", "k", "v", "w", "beta", "g"))
_CHUNK_DECAY, _START, _FINAL, _O = (TENSORS[name] for name in ("chunk_decay", "start", "final", "o"))


def chunk_scan_scratch(keys: int, values: int, count: int, width: int) -> int:
    """Floats of scratch for chunks of `count` tokens."""

    def up(size: int) -> int:
        return -(-size // width) * width

    high = up(count)
    return high * (3 * up(keys) + 5 * high + 3 * width + 5) + up(keys) * (high + up(values))


@kernel
def _rows_to(to, row, tensor, batch, token, head, count, keys, unit):
    """One operand's rows of a chunk, with zeros up to a multiple of 8."""
    rows(to, token_at(row, tensor, batch, token, head), integer(row, tensor + 1), integer(row, tensor + 3), count, keys, unit)
    pitch = padded(keys)
    for i in range(count * pitch, up_to_eight(count) * pitch, WIDTH):
        store(to, i, splat(_ZERO))


@kernel
def _norm(state, size):
    """The Frobenius norm of `size` floats."""
    square = splat(_ZERO)
    for i in range(0, size, WIDTH):
        square = fma(load(state, i), load(state, i), square)
    return math.sqrt(lane_sum(square))


@kernel
def _times(state, size, factor):
    for i in range(0, size, WIDTH):
        store(state, i, multiply(splat(factor), load(state, i)))


@kernel
def _corrected(x, reads, beta, heads, count, by):
    """x <- beta (x - by e^G reads), row by row."""
    for t in range(count):
        seen = multiply(splat(-by * number(heads, t)), load(reads, t * WIDTH))
        store(x, t * WIDTH, multiply(spread(beta, t), add(load(x, t * WIDTH), seen)))


@kernel
def _written(state, k, k_pitch, x, tails, count, padded_count, keys):
    """S <- e^G_C S + (e^(G_C - G) K)^T X on one tile; where S holds e^G_C S~; X is spent. `tails` is Gamma's last row."""
    for t in range(count):
        store(x, t * WIDTH, multiply(spread(tails, t), load(x, t * WIDTH)))
    for i in range(0, keys, 8):
        panel(state + 4 * i * WIDTH, WIDTH, k + 4 * i, 1, k_pitch, x, WIDTH, padded_count, True, _ONE)


@inlined
def chunk_scan_item(row, item, scratch):
    """One head's columns, or a part of them, through all chunks of a sequence, or a segment of them."""
    keys, values, most, parts, segments = (
        integer(row, _KEYS),
        integer(row, _VALUES),
        integer(row, _ROWS),
        integer(row, _PARTS),
        integer(row, _SEGMENTS),
    )
    part, item = item % parts, item // parts
    segment, item = item % segments, item // segments
    head, sequence = item % integer(row, _HEADS), item // integer(row, _HEADS)
    shared = head // integer(row, _GROUP)
    tiles = (values + WIDTH - 1) // WIDTH
    first_tile, end_tile = tiles * part // parts, tiles * (part + 1) // parts
    batch, begin, end = sequence_bounds(row, sequence)
    chunks = chunk_count(row, end - begin)
    first_chunk, end_chunk = chunks * segment // segments, chunks * (segment + 1) // segments

    wide, high = padded(keys), padded(most)
    tile_size = wide * WIDTH
    q = scratch
    k = q + 4 * high * wide
    w = k + 4 * high * wide
    keys_t = w + 4 * high * wide
    gamma = keys_t + 4 * wide * high
    m = gamma + 4 * high * high
    n = m + 4 * high * high
    n_t = n + 4 * high * high
    mixing = n_t + 4 * high * high
    x = mixing + 4 * high * high
    reads = x + 4 * high * WIDTH
    out = reads + 4 * high * WIDTH
    decay = out + 4 * high * WIDTH
    grown = decay + 4 * high
    beta = grown + 4 * high
    factors = beta + 4 * high
    state = factors + 4 * high

    unit, accumulate, reset = integer(row, _L2NORM) != 0, integer(row, _ACCUMULATE) != 0, integer(row, _RESET) != 0
    delta, transform, offset = integer(row, _DELTA) != 0, integer(row, _TRANSFORM), integer(row, _OFFSET)
    normalize_read = integer(row, _NORMALIZE_READ) != 0
    chunk_decay = token_at(row, _CHUNK_DECAY, batch, chunks_before(row, sequence), head)
    final, final_step = state_at(row, _FINAL, sequence, head), integer(row, _FINAL + 2)
    keeps = final != 0 and segment == segments - 1
    size = (end_tile - first_tile) * tile_size

    start, step, stride = state_at(row, _START, sequence, head), integer(row, _START + 2), integer(row, _START + 3)
    for tile in range(first_tile, end_tile):
        here, given = state + 4 * (tile - first_tile) * tile_size, start
        if start != 0:
            given = start + 4 * tile * WIDTH * stride
        read_tile(here, WIDTH, given, step, stride, keys, values - tile * WIDTH)
        for i in range(keys * WIDTH, tile_size, WIDTH):
            store(here, i, splat(_ZERO))
    empty = start == 0

    for chunk in range(first_chunk, end_chunk):
        token, stop = chunk_bounds(row, chunk, begin, end)
        count = stop - token
        eights = up_to_eight(count)
        if reset and not (chunk == 0 and offset > 0):
            for i in range(0, size, WIDTH):
                store(state, i, splat(_ZERO))
            empty = True
        _rows_to(q, row, _Q, batch, token, shared, count, keys, unit)
        _rows_to(k, row, _K, batch, token, shared, count, keys, unit)
        pitch = padded(count)
        transposed(keys_t, pitch, k, wide, count, keys)
        exponentials(decay, token_at(row, _G, batch, token, head), integer(row, _G + 1), count)
        decays(gamma, pitch, grown, decay, count)
        numbers(beta, token_at(row, _BETA, batch, token, head), integer(row, _BETA + 1), count, _ONE)
        coefficients(factors, row, batch, token, head, count)
        later = min(most, end - stop)
        rows_ahead(token_at(row, _Q, batch, stop, shared), integer(row, _Q + 1), later, keys)
        rows_ahead(token_at(row, _K, batch, stop, shared), integer(row, _K + 1), later, keys)
        scores(m, pitch, q, keys_t, gamma, wide, keys, count, 0, True)
        if transform == 1 or transform == 2:
            scores(n, pitch, k, keys_t, gamma, wide, keys, count, beta, False)
        if transform == 2:
            lam_mixing(mixing, n, n_t, pitch, count)
        if transform == 0 and delta:
            _rows_to(w, row, _W, batch, token, head, count, keys, False)
        if chunk_decay != 0:
            _times(state, size, number(chunk_decay, chunk * integer(row, _CHUNK_DECAY + 1)))
        by = _ONE
        if normalize_read and not empty:
            norm = _norm(state, size)
            by = _ONE / (norm + _TINY) if norm > _ZERO else _ZERO
        carries = not reset or (keeps and chunk == chunks - 1)
        given, step, stride = token_at(row, _V, batch, token, head), integer(row, _V + 1), integer(row, _V + 3)
        to, to_step = token_at(row, _O, batch, token, head), integer(row, _O + 1)
        for tile in range(first_tile, end_tile):
            here, valid = state + 4 * (tile - first_tile) * tile_size, values - tile * WIDTH
            read_tile(x, WIDTH, given + 4 * tile * WIDTH * stride, step, stride, count, valid)
            for t in range(count, eights):
                store(x, t * WIDTH, splat(_ZERO))
            if transform == 0:
                if delta and not empty:
                    panels(x, w, wide, here, WIDTH, eights, keys, True, -by)
                else:
                    scaled(x, beta, count, _ONE)
            elif delta and not empty:
                panels(reads, k, wide, here, WIDTH, eights, keys, False, _ONE)
                _corrected(x, reads, beta, grown, count, by)
            else:
                scaled(x, beta, count, _ONE)
            rows_ahead(given + 4 * (count * step + tile * WIDTH * stride), step, later, min(valid, WIDTH))
            transformed(x, reads, transform, n, mixing, pitch, eights)
            if not empty:
                panels(out, q, wide, here, WIDTH, eights, keys, False, _ONE)
                scaled(out, grown, count, by)
            lower_panels(out, m, pitch, x, eights, not empty)
            write_outputs(out, WIDTH, factors, to + 4 * tile * WIDTH, to_step, count, valid, accumulate)
            if carries:
                if not empty:
                    _times(here, tile_size, number(grown, count - 1))
                _written(here, k, wide, x, gamma + 4 * (count - 1) * pitch, count, eights, keys)
        empty = False

    if keeps:
        if integer(row, _NORMALIZE_FINAL) != 0:
            norm = _norm(state, size)
            _times(state, size, _ONE / (norm + _TINY) if norm > _ZERO else _ZERO)
        for tile in range(first_tile, end_tile):
            here = state + 4 * (tile - first_tile) * tile_size
            write_tile(here, WIDTH, final + 4 * tile * WIDTH, final_step, keys, values - tile * WIDTH)
