"""What a chunk reads (SPEC.md 2, and the o of SPEC.md 4), all chunks at once:

    o = gate * scale * ( (exp(G) * Q) S + (tril(Q K^T) * Gamma) (rate * U) )

S_fast: U = v, and S is there only in a chunk that goes on from an earlier call. S_slow: U = U' and S = S~ of `state_scan`. The flat memory: U = u
without S. A block takes a few rows of a chunk and walks the tiles to their left, as a causal attention without softmax; the scores live in
shared memory only. The gradients (SPEC.md 10) are such reads too, some of them `backwards` in time, from the chunk's end:

    o = gate * scale * ( (exp(G_C - G) * Q) S + (triu(Q K^T) * Gamma^T) (rate * U) )

`apart`: only tokens that many or more from each other meet; 1 leaves the diagonal out, a whole chunk reads S alone. With SPEC.md 5's alpha, o is
multiplied by `mix_offset + mix_scale * alpha`, and with `add` added to what is there.

FLOP a token and head: C (K + V) for scores and their product, 2 K V for the read. Bytes: 4 (2 K + 2 V), and 4 K V a chunk. Floor for 2048 tokens of 12
heads of 32 on an H100: 5 us by the bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .absent import given_or, nothing, unity
from .grid import Grid, locate
from .launch import Kernel
from .settings import WIDE, largest_rows
from .target import ZERO, cuda, float32

__all__ = ["EACH_CHUNK", "FIRST_CHUNK", "LAST_CHUNK", "NO_STATE", "Mix", "read_chunks"]

NO_STATE, EACH_CHUNK, FIRST_CHUNK, LAST_CHUNK = 0, 1, 2, 3
"""Which state a chunk reads: none; that of its slot; its sequence's, in the first or in the last chunk."""


@dataclass(frozen=True, slots=True)
class Mix:
    """A core's part in o: `offset + scale * alpha`; `add` to what o holds."""

    alpha: Tensor | None = None
    offset: float = 1.0
    scale: float = 0.0
    add: bool = False


def chunk_read(keys: int, values: int, rows: int, threads: int) -> Callable[..., None]:
    """The kernel: block x is the chunk and the tile of `rows` tokens in it, y the head. q, k and u may each have fewer heads than o."""
    own = -(-rows * values // threads)
    pitch = keys + 1
    rows_pitch = rows + 1

    def kernel(
        bounds, packed, tokens, chunk, offset, tiles, which, backwards, apart, add, scale, mix_offset, mix_scale,
        q, k, u, rate, log, gate, alpha, states, o,
    ):  # fmt: skip
        q_rows = cuda.shared.array((rows, pitch), float32)
        k_rows = cuda.shared.array((rows, pitch), float32)
        u_rows = cuda.shared.array((rows, values), float32)
        scores = cuda.shared.array((rows, rows_pitch), float32)
        out = cuda.local.array(own, float32)
        thread = cuda.threadIdx.x
        head = cuda.blockIdx.y
        q_head = head // (o.shape[2] // q.shape[2])
        k_head = head // (o.shape[2] // k.shape[2])
        u_head = head // (o.shape[2] // u.shape[2])
        slot = cuda.blockIdx.x // tiles
        row, sequence, index, first, stop, end = locate(bounds, packed, tokens, chunk, offset, slot)
        top = first + cuda.blockIdx.x % tiles * rows
        if top >= stop:
            return

        for place in range(thread, rows * keys, threads):
            i = place // keys
            q_rows[i, place % keys] = float32(scale) * q[row, top + i, q_head, place % keys] if top + i < stop else ZERO
        for n in range(own):
            out[n] = ZERO

        # (tril(Q K^T) * Gamma) U, tile by tile: up to the diagonal, or from it on
        for left in range(top + apart if backwards else first, stop if backwards else min(stop, top + rows - apart), rows):
            cuda.syncthreads()
            for place in range(thread, rows * keys, threads):
                j = place // keys
                k_rows[j, place % keys] = k[row, left + j, k_head, place % keys] if left + j < stop else ZERO
            for place in range(thread, rows * values, threads):
                j = place // values
                value = ZERO
                if left + j < stop:
                    value = rate[row, left + j, head] * u[row, left + j, u_head, place % values]
                u_rows[j, place % values] = value
            cuda.syncthreads()
            for place in range(thread, rows * rows, threads):
                i = place // rows
                j = place % rows
                ahead = left + j - top - i if backwards else top + i - left - j
                score = ZERO
                if ahead >= apart and top + i < stop and left + j < stop:
                    for key in range(keys):
                        score += q_rows[i, key] * k_rows[j, key]
                    since = log[row, top + i, head] - log[row, left + j, head]
                    score *= math.exp(float32(-since if backwards else since))
                scores[i, j] = score
            cuda.syncthreads()
            for n in range(own):
                place = n * threads + thread
                if place < rows * values:
                    total = ZERO
                    for j in range(rows):
                        total += scores[place // values, j] * u_rows[j, place % values]
                    out[n] += total

        # (exp(G) * Q) S, a few of its rows at a time
        if which == EACH_CHUNK or (which == FIRST_CHUNK and index == 0) or (which == LAST_CHUNK and stop == end):
            for start in range(0, keys, rows):
                cuda.syncthreads()
                for place in range(thread, rows * values, threads):
                    key = start + place // values
                    held = ZERO
                    if key < keys:
                        held = states[slot if which == EACH_CHUNK else sequence, head, key, place % values]
                    u_rows[place // values, place % values] = held
                cuda.syncthreads()
                for n in range(own):
                    place = n * threads + thread
                    i = place // values
                    if place < rows * values and top + i < stop:
                        total = ZERO
                        for key in range(min(rows, keys - start)):
                            total += q_rows[i, start + key] * u_rows[key, place % values]
                        since = log[row, top + i, head]
                        out[n] += math.exp(float32(log[row, stop - 1, head] - since if backwards else since)) * total

        for n in range(own):
            place = n * threads + thread
            token = top + place // values
            column = place % values
            if place < rows * values and token < stop:
                mixed = float32(mix_offset) + float32(mix_scale) * alpha[row, token, head]
                result = mixed * gate[row, token, head] * out[n]
                o[row, token, head, column] = o[row, token, head, column] + result if add else result

    return kernel


_READ = Kernel(chunk_read)


def read_chunks(
    q: Tensor,
    k: Tensor,
    u: Tensor,
    log: Tensor,
    grid: Grid,
    o: Tensor,
    *,
    scale: float = 1.0,
    rate: Tensor | None = None,
    gate: Tensor | None = None,
    states: Tensor | None = None,
    which: int = NO_STATE,
    backwards: bool = False,
    apart: int = 0,
    mix: Mix | None = None,
) -> Tensor:
    """Writes or adds to `o [B, T, H, V]`; everything in float32 but `log`. `states` as `which` says; an absent rate or gate is 1."""
    mix = mix or Mix()
    keys, values, one = k.shape[3], u.shape[3], unity(o, *o.shape[:3])
    rows = min(32, largest_rows(4 * (2 * (keys + 1) + values), True))
    tiles = -(-grid.chunk // rows)
    _READ(
        (grid.slots * tiles, o.shape[2]), WIDE, (keys, values, rows, WIDE), *grid.args, tiles, NO_STATE if states is None else which,
        int(backwards), apart, int(mix.add), float(scale), float(mix.offset), float(mix.scale),
        q, k, u, given_or(rate, one), log, given_or(gate, one), given_or(mix.alpha, one), nothing(o, 0, 0, 0, 0) if states is None else states, o,
    )  # fmt: skip
    return o
