"""The recurrence over chunks (SPEC.md 4), a block for a few value columns of one head's state, which stays in shared memory from first to last:

    S~ = d_n S;  U' = u - w S~;  S' = exp(G_C) S~ + (exp(G_C - G) * K)^T U'

Nothing else is in this loop, the only serial one: what a chunk reads, `chunk_read` computes for all chunks at once from the S~ and U' written here.
`normalize` puts S~ / (||S~||_F + 1e-8) into U' and into what is written for reading; one block then holds all columns, for the norm.
SPEC.md 2's W is the same with U' = u, begun anew in every chunk: its last value is that of the last chunk alone.

FLOP a token and head: 4 K V. Bytes: 4 (2 K + V) read, 4 V written, 4 K V written a chunk. Floor for 2048 tokens of 12 heads of 32 on an H100: 5 us
by the bytes; what binds is latency, T / C steps that wait for each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .absent import given_or, nothing, unity
from .grid import Grid, chunks_before, sequence_span
from .launch import Kernel
from .settings import SHARED_BYTES, SIMULATED_TILE, WIDE, largest_rows
from .target import ONE, ZERO, cuda, float32

__all__ = ["fits_one_block", "last_state", "scan"]

_EPS = float32(1e-8)
_TILE = 8
"""Value columns of a block: few, so that few heads still fill the card."""


def state_scan(keys: int, values: int, tile: int, rows: int, threads: int) -> Callable[..., None]:
    """The kernel: block x is the sequence and the tile of `tile` value columns, y the head; `rows` tokens are in shared memory at once."""
    tiles = -(-values // tile)
    entries = keys * tile
    own = -(-entries // threads)
    pitch = keys + 1

    def kernel(
        bounds, packed, tokens, chunk, offset, delta, normalize, only_last, keep, k, u, w, rate, log, chunk_decay, start, states, updates, final
    ):
        state = cuda.shared.array((keys, tile), float32)
        k_rows = cuda.shared.array((rows, pitch), float32)
        w_rows = cuda.shared.array((rows, pitch), float32)
        u_rows = cuda.shared.array((rows, tile), float32)
        squares = cuda.shared.array(threads, float32)
        gained = cuda.local.array(own, float32)
        thread = cuda.threadIdx.x
        head = cuda.blockIdx.y
        group = head // (u.shape[2] // k.shape[2])
        sequence = cuda.blockIdx.x // tiles
        left = cuda.blockIdx.x % tiles * tile
        row, begin, end, chunks, slot = sequence_span(bounds, packed, tokens, chunk, offset, sequence)
        before = chunks_before(bounds, packed, chunk, sequence)

        for place in range(thread, entries, threads):
            key = place // tile
            column = left + place % tile
            state[key, place % tile] = start[sequence, head, key, column] if column < values else ZERO

        for index in range(max(0, chunks - 1) if only_last else 0, chunks):
            first = max(begin, begin - offset + index * chunk)
            stop = min(end, begin - offset + (index + 1) * chunk)

            # S~, and what of it is read
            factor = chunk_decay[row, before + index, head]
            if only_last and (index > 0 or offset == 0):
                factor = ZERO
            square = ZERO
            for place in range(thread, entries, threads):
                held = state[place // tile, place % tile]
                held = factor * held if factor != ZERO else ZERO
                state[place // tile, place % tile] = held
                square += held * held
            read = ONE
            if normalize:
                squares[thread] = square
                cuda.syncthreads()
                total = ZERO
                for other in range(threads):
                    total += squares[other]
                read = ONE / (math.sqrt(total) + _EPS) if total > ZERO else ZERO
            if keep:
                for place in range(thread, entries, threads):
                    column = left + place % tile
                    if column < values:
                        states[slot + index, head, place // tile, column] = state[place // tile, place % tile] * read

            for n in range(own):
                gained[n] = ZERO
            for top in range(first, stop, rows):
                cuda.syncthreads()
                for place in range(thread, rows * keys, threads):
                    i = place // keys
                    key = place % keys
                    token = top + i
                    if token < stop:
                        fade = math.exp(float32(log[row, stop - 1, head] - log[row, token, head]))
                        k_rows[i, key] = fade * k[row, token, group, key]
                        if delta:
                            w_rows[i, key] = w[row, token, head, key]
                    else:
                        k_rows[i, key] = ZERO
                        w_rows[i, key] = ZERO
                cuda.syncthreads()
                # U' = u - w S~
                for place in range(thread, rows * tile, threads):
                    i = place // tile
                    column = left + place % tile
                    token = top + i
                    update = ZERO
                    if token < stop and column < values:
                        update = rate[row, token, head] * u[row, token, head, column]
                        if delta:
                            seen = ZERO
                            for key in range(keys):
                                seen += w_rows[i, key] * state[key, place % tile]
                            update -= read * seen
                        if keep:
                            updates[row, token, head, column] = update
                    u_rows[i, place % tile] = update
                cuda.syncthreads()
                # (exp(G_C - G) * K)^T U'
                for n in range(own):
                    place = n * threads + thread
                    if place < entries:
                        total = ZERO
                        for i in range(rows):
                            total += k_rows[i, place // tile] * u_rows[i, place % tile]
                        gained[n] += total
            # S'
            fade = math.exp(float32(log[row, stop - 1, head]))
            for n in range(own):
                place = n * threads + thread
                if place < entries:
                    state[place // tile, place % tile] = fade * state[place // tile, place % tile] + gained[n]
            cuda.syncthreads()

        for place in range(thread, entries, threads):
            column = left + place % tile
            if column < values:
                final[sequence, head, place // tile, column] = state[place // tile, place % tile]

    return kernel


_SCAN = Kernel(state_scan)


def _shape(keys: int, values: int, whole: bool) -> tuple[int, int]:
    """Value columns and rows of a block."""
    tile = values if whole else min(values, SIMULATED_TILE or _TILE)
    return tile, largest_rows(4 * (2 * (keys + 1) + tile), False, 4 * (keys * tile + WIDE))


def fits_one_block(keys: int, values: int) -> bool:
    """Whether a whole state leaves room for the tokens beside it."""
    return 4 * (keys * values + WIDE + 8 * (2 * (keys + 1) + values)) <= SHARED_BYTES


def _launch(grid: Grid, k: Tensor, u: Tensor, w: Tensor, options: tuple[int, ...], tensors: tuple[Tensor, ...], whole: bool) -> None:
    keys, values = k.shape[3], u.shape[3]
    tile, rows = _shape(keys, values, whole)
    _SCAN((grid.sequences * -(-values // tile), u.shape[2]), WIDE, (keys, values, tile, rows, WIDE), *grid.args, *options, k, u, w, *tensors)


def scan(
    k: Tensor,
    u: Tensor,
    w: Tensor,
    log: Tensor,
    chunk_decay: Tensor | None,
    start: Tensor | None,
    grid: Grid,
    *,
    delta: bool,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """What every chunk reads `[slots, H, K, V]`, U' `[B, T, H, V]` and the final state `[N, H, K, V]`."""
    heads, keys, values = u.shape[2], k.shape[3], u.shape[3]
    states = u.new_empty(grid.slots, heads, keys, values)
    updates = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    final = u.new_empty(grid.sequences, heads, keys, values)
    tensors = (
        unity(u, *u.shape[:3]),
        log,
        given_or(chunk_decay, unity(u, u.shape[0], grid.slots, heads)),
        given_or(start, nothing(u, *final.shape)),
        states,
        updates,
        final,
    )
    _launch(grid, k, u, w, (int(delta), int(normalize), 0, 1), tensors, normalize)
    return states, updates, final


def last_state(k: Tensor, v: Tensor, rate: Tensor, log: Tensor, start: Tensor | None, grid: Grid) -> Tensor:
    """SPEC.md 2's W `[N, H, K, V]` after the last token: the sum over the last chunk of `rate * v`; a chunk that goes on has `start` in it."""
    final = v.new_empty(grid.sequences, v.shape[2], k.shape[3], v.shape[3])
    tensors = (rate, log, unity(v, v.shape[0], grid.slots, v.shape[2]), given_or(start, nothing(v, *final.shape)), final, v, final)
    _launch(grid, k, v, v, (0, 0, 1, 0), tensors, False)
    return final
