"""A state's way through the tokens of one head, the state in the nearest cache: no product with a chunk (SPEC.md 2, 4).

    delta:  S <- e^g S + k u^T,  u = beta (v - e^g S^T k)        8 K V FLOP per token and head
    linear: S <- e^g S + k u^T,  u = beta v                      5 K V; with `reset`, S <- 0 before every chunk but a continued first one
    o = coefficient * S^T q

One pass over S per token does it all: while it writes S it reads the o of this token and the S^T k of the next one. An item is one head of one
sequence and two tiles of its value columns, so that the keys are spread over lanes once for both; the columns of a state do not meet.
"""

from __future__ import annotations

import numpy as np

from .call_row import FIELDS, TENSORS
from .chunk_grid import sequence_bounds
from .exponential import exponentials
from .jit import inlined, kernel
from .lanes import WIDTH, add, fma, integer, load, multiply, number, splat, spread, store
from .staging import ahead, coefficients, numbers, padded, read_tile, rows, rows_ahead, state_at, token_at, write_outputs, write_tile

__all__ = ["token_scan_item", "token_scan_scratch"]

_F = np.float32
_ZERO = _F(0.0)
_HEADS, _GROUP, _KEYS, _VALUES = (FIELDS[name] for name in ("heads", "group", "keys", "values"))
_ROWS, _L2NORM, _ACCUMULATE, _DELTA = (FIELDS[name] for name in ("rows", "l2norm", "accumulate", "delta"))
_RESET, _CHUNK, _OFFSET = (FIELDS[name] for name in ("reset", "chunk", "offset"))
_Q, _K, _V, _BETA, _G, _START, _FINAL, _O = (TENSORS[name] for name in ("q", "k", "v", "beta", "g", "start", "final", "o"))


def token_scan_scratch(keys: int, count: int, width: int) -> int:
    """Floats of scratch for blocks of `count` tokens."""
    pitch = -(-keys // width) * width
    return (2 * count + 1) * pitch + pitch * 2 * width + 4 * count * width + 3 * (count + width) + 8 * width


@kernel
def _first_reads(state, pitch, keys, k):
    """S^T k for one tile."""
    a = splat(_ZERO)
    for i in range(keys):
        a = fma(spread(k, i), load(state, i * pitch), a)
    return a


@kernel
def _pair(state, keys, k, q, pitch, count, v, o, beta, decay, later_k, later_q, later_v, steps):
    """Two tiles, side by side in `state`, `v` and `o` with a pitch of 2 WIDTH; `keys` is even. The row behind the last key is read and has no effect."""
    zero = splat(_ZERO)
    a0 = _first_reads(state, 2 * WIDTH, keys, k)
    a1 = _first_reads(state + 4 * WIDTH, 2 * WIDTH, keys, k)
    for t in range(count):
        ahead(later_k + 4 * t * steps[0], keys)
        ahead(later_q + 4 * t * steps[1], keys)
        ahead(later_v + 4 * t * steps[2], 2 * WIDTH)
        d, b, minus = spread(decay, t), spread(beta, t), splat(-number(decay, t))
        u0 = multiply(b, fma(minus, a0, load(v, 2 * t * WIDTH)))
        u1 = multiply(b, fma(minus, a1, load(v, 2 * t * WIDTH + WIDTH)))
        now, asked = k + 4 * t * pitch, q + 4 * t * pitch
        after = now + 4 * pitch
        a0 = a1 = b0 = b1 = o0 = o1 = p0 = p1 = zero
        for i in range(0, keys, 2):
            at = 2 * i * WIDTH
            c = spread(now, i)
            s0 = fma(d, load(state, at), multiply(c, u0))
            s1 = fma(d, load(state, at + WIDTH), multiply(c, u1))
            store(state, at, s0)
            store(state, at + WIDTH, s1)
            c = spread(asked, i)
            o0, o1 = fma(c, s0, o0), fma(c, s1, o1)
            c = spread(after, i)
            a0, a1 = fma(c, s0, a0), fma(c, s1, a1)
            c = spread(now, i + 1)
            s0 = fma(d, load(state, at + 2 * WIDTH), multiply(c, u0))
            s1 = fma(d, load(state, at + 3 * WIDTH), multiply(c, u1))
            store(state, at + 2 * WIDTH, s0)
            store(state, at + 3 * WIDTH, s1)
            c = spread(asked, i + 1)
            p0, p1 = fma(c, s0, p0), fma(c, s1, p1)
            c = spread(after, i + 1)
            b0, b1 = fma(c, s0, b0), fma(c, s1, b1)
        a0, a1 = add(a0, b0), add(a1, b1)
        store(o, 2 * t * WIDTH, add(o0, p0))
        store(o, 2 * t * WIDTH + WIDTH, add(o1, p1))


@kernel
def _single(state, keys, k, q, pitch, count, v, o, beta, decay):
    """As `_pair` for the last of an odd number of tiles; pitches stay."""
    zero = splat(_ZERO)
    a0 = _first_reads(state, 2 * WIDTH, keys, k)
    for t in range(count):
        d = spread(decay, t)
        u0 = multiply(spread(beta, t), fma(splat(-number(decay, t)), a0, load(v, 2 * t * WIDTH)))
        now, asked = k + 4 * t * pitch, q + 4 * t * pitch
        after = now + 4 * pitch
        a0 = b0 = o0 = p0 = zero
        for i in range(0, keys, 2):
            at = 2 * i * WIDTH
            s0 = fma(d, load(state, at), multiply(spread(now, i), u0))
            store(state, at, s0)
            o0, a0 = fma(spread(asked, i), s0, o0), fma(spread(after, i), s0, a0)
            s0 = fma(d, load(state, at + 2 * WIDTH), multiply(spread(now, i + 1), u0))
            store(state, at + 2 * WIDTH, s0)
            p0, b0 = fma(spread(asked, i + 1), s0, p0), fma(spread(after, i + 1), s0, b0)
        a0 = add(a0, b0)
        store(o, 2 * t * WIDTH, add(o0, p0))


@kernel
def _linear(state, keys, k, q, pitch, count, v, o, beta, decay):
    """One tile without the delta correction; pitches as in `_pair`."""
    zero = splat(_ZERO)
    for t in range(count):
        d, u = spread(decay, t), multiply(spread(beta, t), load(v, 2 * t * WIDTH))
        now, asked = k + 4 * t * pitch, q + 4 * t * pitch
        o0 = p0 = zero
        for i in range(0, keys, 2):
            at = 2 * i * WIDTH
            s = fma(d, load(state, at), multiply(spread(now, i), u))
            store(state, at, s)
            o0 = fma(spread(asked, i), s, o0)
            s = fma(d, load(state, at + 2 * WIDTH), multiply(spread(now, i + 1), u))
            store(state, at + 2 * WIDTH, s)
            p0 = fma(spread(asked, i + 1), s, p0)
        store(o, 2 * t * WIDTH, add(o0, p0))


@kernel
def _cleared(state, count):
    for i in range(count):
        store(state, 2 * i * WIDTH, splat(_ZERO))
        store(state, 2 * i * WIDTH + WIDTH, splat(_ZERO))


@inlined
def token_scan_item(row, item, scratch):
    """All tokens of one item."""
    keys, values, heads, most = integer(row, _KEYS), integer(row, _VALUES), integer(row, _HEADS), integer(row, _ROWS)
    pairs = (values + 2 * WIDTH - 1) // (2 * WIDTH)
    column, head, sequence = item % pairs * 2 * WIDTH, item // pairs % heads, item // (pairs * heads)
    valid, second = min(values - column, WIDTH), min(values - column - WIDTH, WIDTH)
    batch, begin, end = sequence_bounds(row, sequence)
    pitch, shared = padded(keys), head // integer(row, _GROUP)
    k = scratch
    q = k + 4 * (most + 1) * pitch
    state = q + 4 * most * pitch
    v = state + 4 * pitch * 2 * WIDTH
    o = v + 4 * most * 2 * WIDTH
    beta = o + 4 * most * 2 * WIDTH
    decay = beta + 4 * padded(most)
    factors = decay + 4 * padded(most)
    start, step, stride = state_at(row, _START, sequence, head), integer(row, _START + 2), integer(row, _START + 3)
    for i in range(2):
        tile = start if start == 0 else start + 4 * stride * (column + i * WIDTH)
        read_tile(state + 4 * i * WIDTH, 2 * WIDTH, tile, step, stride, keys, second if i else valid)
    _cleared(state + 8 * keys * WIDTH, pitch - keys)
    even, unit, accumulate = (keys + 1) // 2 * 2, integer(row, _L2NORM) != 0, integer(row, _ACCUMULATE) != 0
    delta, reset, chunk, offset = integer(row, _DELTA) != 0, integer(row, _RESET) != 0, integer(row, _CHUNK), integer(row, _OFFSET)
    token = begin
    while token < end:
        count = min(most, end - token)
        if reset:
            place = (token - begin + offset) % chunk
            count = min(count, chunk - place)
            if place == 0:
                _cleared(state, keys)
        rows(k, token_at(row, _K, batch, token, shared), integer(row, _K + 1), integer(row, _K + 3), count, keys, unit)
        for i in range(0, pitch, WIDTH):
            store(k, count * pitch + i, splat(_ZERO))
        rows(q, token_at(row, _Q, batch, token, shared), integer(row, _Q + 1), integer(row, _Q + 3), count, keys, unit)
        given, step, stride = token_at(row, _V, batch, token, head), integer(row, _V + 1), integer(row, _V + 3)
        read_tile(v, 2 * WIDTH, given + 4 * column * stride, step, stride, count, valid)
        read_tile(v + 4 * WIDTH, 2 * WIDTH, given + 4 * (column + WIDTH) * stride, step, stride, count, second)
        numbers(beta, token_at(row, _BETA, batch, token, head), integer(row, _BETA + 1), count, _F(1.0))
        exponentials(decay, token_at(row, _G, batch, token, head), integer(row, _G + 1), count)
        coefficients(factors, row, batch, token, head, count)
        out, step = token_at(row, _O, batch, token, head) + 4 * column, integer(row, _O + 1)
        later = token + count
        later_k, later_q = token_at(row, _K, batch, later, shared), token_at(row, _Q, batch, later, shared)
        later_v = token_at(row, _V, batch, later, head) + 4 * column
        steps = integer(row, _K + 1), integer(row, _Q + 1), integer(row, _V + 1)
        if not delta:
            rows_ahead(later_k, steps[0], min(count, end - later), keys)
            rows_ahead(later_q, steps[1], min(count, end - later), keys)
            rows_ahead(later_v, steps[2], min(count, end - later), 2 * WIDTH)
            _linear(state, even, k, q, pitch, count, v, o, beta, decay)
            if second > 0:
                _linear(state + 4 * WIDTH, even, k, q, pitch, count, v + 4 * WIDTH, o + 4 * WIDTH, beta, decay)
        elif second > 0:
            _pair(state, even, k, q, pitch, count, v, o, beta, decay, later_k, later_q, later_v, steps)
        else:
            _single(state, even, k, q, pitch, count, v, o, beta, decay)
        write_outputs(o, 2 * WIDTH, factors, out, step, count, valid, accumulate)
        if second > 0:
            write_outputs(o + 4 * WIDTH, 2 * WIDTH, factors, out + 4 * WIDTH, step, count, second, accumulate)
        token += count
    final, step = state_at(row, _FINAL, sequence, head), integer(row, _FINAL + 2)
    if final != 0:
        write_tile(state, 2 * WIDTH, final + 4 * column, step, keys, valid)
        if second > 0:
            write_tile(state + 4 * WIDTH, 2 * WIDTH, final + 4 * (column + WIDTH), step, keys, second)
