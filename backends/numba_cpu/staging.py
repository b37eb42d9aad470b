"""From strided tensors to dense rows in a worker's scratch, and back: a block of tokens at a time, so that it stays in the nearest cache.

Rows are padded with zeros to a multiple of the lanes' width. Only the last, partly filled tile of columns goes element by element.
"""

from __future__ import annotations

import math

import numpy as np

from .call_row import ADDRESSES, FIELDS, STRIDES, TENSORS
from .jit import kernel
from .lanes import WIDTH, add, fma, integer, lane_sum, load, multiply, number, prefetch, put, real, splat, spread, store

__all__ = ["ahead", "coefficients", "numbers", "padded", "read_tile", "rows", "rows_ahead", "state_at", "token_at", "write_outputs", "write_tile"]

_F = np.float32
_ZERO = _F(0.0)
_EPS = _F(1e-6)
_SCALE, _ALPHA, _MIXING = FIELDS["scale"], FIELDS["alpha"], FIELDS["mixing"]
_GATE, _MIX = TENSORS["gate"], TENSORS["mix"]


@kernel
def padded(size):
    """The next multiple of the lanes' width."""
    return (size + WIDTH - 1) // WIDTH * WIDTH


@kernel
def _address(row, tensor):
    return integer(row, ADDRESSES + (tensor - STRIDES) // 4)


@kernel
def token_at(row, tensor, batch, token, head):
    """The address of one token's row, or 0 for a tensor that was not given."""
    address = _address(row, tensor)
    if address == 0:
        return address
    return address + 4 * (batch * integer(row, tensor) + token * integer(row, tensor + 1) + head * integer(row, tensor + 2))


@kernel
def state_at(row, tensor, sequence, head):
    """The address of one head's state, or 0."""
    address = _address(row, tensor)
    if address == 0:
        return address
    return address + 4 * (sequence * integer(row, tensor) + head * integer(row, tensor + 1))


@kernel
def ahead(row, size):
    """Asks for `size` numbers of a row that is wanted later; the strides are too long for the processor to guess."""
    for at in range(0, 4 * size, 64):
        prefetch(row + at)


@kernel
def rows_ahead(source, step, count, width):
    """The same for `count` rows."""
    for t in range(count):
        ahead(source + 4 * t * step, width)


@kernel
def rows(to, source, step, stride, count, width, unit):
    """`count` rows of `width` elements, dense with a pitch of padded(width); each times rsqrt(sum of squares + 1e-6) where `unit`."""
    pitch = padded(width)
    whole = width // WIDTH * WIDTH if stride == 1 else 0
    for t in range(count):
        row, given = to + 4 * t * pitch, source + 4 * t * step
        for i in range(0, whole, WIDTH):
            store(row, i, load(given, i))
        for i in range(whole, width):
            put(row, i, number(given, i * stride))
        for i in range(width, pitch):
            put(row, i, _ZERO)
        if unit:
            square = splat(_ZERO)
            for i in range(0, pitch, WIDTH):
                x = load(row, i)
                square = fma(x, x, square)
            rate = splat(_F(1.0) / math.sqrt(lane_sum(square) + _EPS))
            for i in range(0, pitch, WIDTH):
                store(row, i, multiply(load(row, i), rate))


@kernel
def numbers(to, source, step, count, absent):
    """`count` numbers, all `absent` where there is no source."""
    for t in range(count):
        put(to, t, number(source, t * step) if source != 0 else absent)


@kernel
def coefficients(to, row, batch, token, head, count):
    """What o is multiplied by: scale, the gate, and alpha (mixing 1) or 1 - alpha (mixing 2)."""
    scale, mixing = _F(real(row, _SCALE)), integer(row, _MIXING)
    gate, gate_step = token_at(row, _GATE, batch, token, head), integer(row, _GATE + 1)
    mix, mix_step = token_at(row, _MIX, batch, token, head), integer(row, _MIX + 1)
    alpha = _F(real(row, _ALPHA))
    for t in range(count):
        c = scale
        if gate != 0:
            c *= number(gate, t * gate_step)
        if mixing != 0:
            a = number(mix, t * mix_step) if mix != 0 else alpha
            c *= a if mixing == 1 else _F(1.0) - a
        put(to, t, c)


@kernel
def read_tile(to, pitch, source, step, stride, count, valid):
    """A tile of columns: `count` rows of `valid` elements, the rest of the lanes 0. `source` 0: all zeros."""
    zero = splat(_ZERO)
    if source == 0 or valid <= 0:
        for i in range(count):
            store(to, i * pitch, zero)
    elif stride == 1 and valid >= WIDTH:
        for i in range(count):
            store(to, i * pitch, load(source, i * step))
    else:
        for i in range(count):
            store(to, i * pitch, zero)
            for j in range(min(valid, WIDTH)):
                put(to, i * pitch + j, number(source, i * step + j * stride))


@kernel
def write_tile(source, pitch, to, step, count, valid):
    """A tile of columns back to rows whose elements are neighbours."""
    if valid >= WIDTH:
        for i in range(count):
            store(to, i * step, load(source, i * pitch))
    else:
        for i in range(count):
            for j in range(valid):
                put(to, i * step + j, number(source, i * pitch + j))


@kernel
def write_outputs(source, pitch, factors, to, step, count, valid, accumulate):
    """The tile times each row's factor, into o or onto it."""
    if valid >= WIDTH:
        for t in range(count):
            x = multiply(spread(factors, t), load(source, t * pitch))
            store(to, t * step, add(load(to, t * step), x) if accumulate else x)
    else:
        for t in range(count):
            for j in range(valid):
                x = number(factors, t) * number(source, t * pitch + j)
                put(to, t * step + j, number(to, t * step + j) + x if accumulate else x)
