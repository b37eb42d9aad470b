"""The recurrence over chunks for the gradients (SPEC.md 10), from the last chunk to the first; a block has a few value columns of one head's dS:

    dU' = M^T dY + K~ dS';  dS~ = Q~^T dY - w^T dU' + exp(G_C) dS'          K~ = exp(G_C - G) * K,  Q~ = scale exp(G) * Q,  dY = gate * dO

M^T dY has been computed for all chunks at once (`read_chunks` backwards) and lies in `updates`, where dU' takes its place. dS' of every chunk is written
for what the other gradients read. FLOP a token and head: 6 K V. Bytes: 4 (3 K + 3 V), and 4 K V a chunk. Floor for 2048 tokens of 12 heads of 32 on
an H100: 6 us by the bytes; what binds is latency, as in `state_scan`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from .absent import given_or, nothing
from .grid import Grid, sequence_span
from .launch import Kernel
from .settings import SIMULATED_TILE, WIDE, largest_rows
from .target import ZERO, cuda, float32

__all__ = ["first_gradient", "scan_back"]

_TILE = 8


def state_reverse(keys: int, values: int, tile: int, rows: int, threads: int) -> Callable[..., None]:
    """The kernel: blocks and shared memory as in `state_scan`."""
    tiles = -(-values // tile)
    entries = keys * tile
    own = -(-entries // threads)
    pitch = keys + 1

    def kernel(bounds, packed, tokens, chunk, offset, delta, only_first, scale, q, k, w, d_o, gate, log, d_final, states, updates, start):
        state = cuda.shared.array((keys, tile), float32)
        q_rows = cuda.shared.array((rows, pitch), float32)
        k_rows = cuda.shared.array((rows, pitch), float32)
        w_rows = cuda.shared.array((rows, pitch), float32)
        y_rows = cuda.shared.array((rows, tile), float32)
        u_rows = cuda.shared.array((rows, tile), float32)
        gained = cuda.local.array(own, float32)
        thread = cuda.threadIdx.x
        head = cuda.blockIdx.y
        group = head // (d_o.shape[2] // k.shape[2])
        sequence = cuda.blockIdx.x // tiles
        left = cuda.blockIdx.x % tiles * tile
        row, begin, end, chunks, slot = sequence_span(bounds, packed, tokens, chunk, offset, sequence)

        for place in range(thread, entries, threads):
            column = left + place % tile
            state[place // tile, place % tile] = d_final[sequence, head, place // tile, column] if column < values else ZERO

        for step in range(max(0, chunks - 1) if only_first else 0, chunks):
            index = chunks - 1 - step
            first = max(begin, begin - offset + index * chunk)
            stop = min(end, begin - offset + (index + 1) * chunk)
            for n in range(own):
                gained[n] = ZERO
                place = n * threads + thread
                column = left + place % tile
                if place < entries and only_first and chunks > 1:
                    state[place // tile, place % tile] = ZERO
                if place < entries and not only_first and column < values:
                    states[slot + index, head, place // tile, column] = state[place // tile, place % tile]
            for top in range(first, stop, rows):
                cuda.syncthreads()
                for place in range(thread, rows * keys, threads):
                    i = place // keys
                    key = place % keys
                    token = top + i
                    q_rows[i, key] = ZERO
                    k_rows[i, key] = ZERO
                    w_rows[i, key] = ZERO
                    if token < stop:
                        since = log[row, token, head]
                        q_rows[i, key] = float32(scale) * math.exp(float32(since)) * q[row, token, group, key]
                        k_rows[i, key] = math.exp(float32(log[row, stop - 1, head] - since)) * k[row, token, group, key]
                        if delta:
                            w_rows[i, key] = w[row, token, head, key]
                cuda.syncthreads()
                # dY, and dU' = M^T dY + K~ dS'
                for place in range(thread, rows * tile, threads):
                    i = place // tile
                    column = left + place % tile
                    token = top + i
                    arrived = ZERO
                    update = ZERO
                    if token < stop and column < values:
                        arrived = gate[row, token, head] * d_o[row, token, head, column]
                        if not only_first:
                            update = updates[row, token, head, column]
                            for key in range(keys):
                                update += k_rows[i, key] * state[key, place % tile]
                            updates[row, token, head, column] = update
                    y_rows[i, place % tile] = arrived
                    u_rows[i, place % tile] = update
                cuda.syncthreads()
                # Q~^T dY - w^T dU'
                for n in range(own):
                    place = n * threads + thread
                    if place < entries:
                        total = ZERO
                        for i in range(rows):
                            total += q_rows[i, place // tile] * y_rows[i, place % tile] - w_rows[i, place // tile] * u_rows[i, place % tile]
                        gained[n] += total
            fade = math.exp(float32(log[row, stop - 1, head]))
            cuda.syncthreads()
            for n in range(own):
                place = n * threads + thread
                if place < entries:
                    state[place // tile, place % tile] = fade * state[place // tile, place % tile] + gained[n]

        for place in range(thread, entries, threads):
            column = left + place % tile
            if column < values:
                start[sequence, head, place // tile, column] = (
                    ZERO if only_first and chunks > 0 and offset == 0 else state[place // tile, place % tile]
                )

    return kernel


_REVERSE = Kernel(state_reverse)


def _launch(grid: Grid, options: tuple[int, int, float], q: Tensor, k: Tensor, w: Tensor, d_o: Tensor, *others: Tensor) -> None:
    keys, values = k.shape[3], d_o.shape[3]
    tile = min(values, SIMULATED_TILE or _TILE)
    rows = largest_rows(4 * (3 * (keys + 1) + 2 * tile), False, 4 * keys * tile)
    blocks = (grid.sequences * -(-values // tile), d_o.shape[2])
    _REVERSE(blocks, WIDE, (keys, values, tile, rows, WIDE), *grid.args, *options, q, k, w, d_o, *others)


def scan_back(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    d_o: Tensor,
    gate: Tensor,
    log: Tensor,
    d_final: Tensor | None,
    grid: Grid,
    updates: Tensor,
    *,
    delta: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """dS' of every chunk `[slots, H, K, V]` and that of the initial state `[N, H, K, V]`; `updates` holds M^T dY before and dU' after."""
    heads, keys, values = d_o.shape[2], k.shape[3], d_o.shape[3]
    states = d_o.new_empty(grid.slots, heads, keys, values)
    start = d_o.new_empty(grid.sequences, heads, keys, values)
    _launch(
        grid, (int(delta), 0, float(scale)), q, k, w, d_o, gate, log, given_or(d_final, nothing(d_o, *start.shape)), states, updates, start
    )  # fmt: skip
    return states, start


def first_gradient(q: Tensor, k: Tensor, d_o: Tensor, gate: Tensor, log: Tensor, d_final: Tensor | None, grid: Grid, scale: float) -> Tensor:
    """SPEC.md 2's dW `[N, H, K, V]` of the initial state: that of the first chunk alone, where the chunk goes on from an earlier call."""
    start = d_o.new_empty(grid.sequences, d_o.shape[2], k.shape[3], d_o.shape[3])
    _launch(grid, (0, 1, float(scale)), q, k, d_o, d_o, gate, log, given_or(d_final, nothing(d_o, *start.shape)), start, d_o, start)
    return start
