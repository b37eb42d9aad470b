"""The delta rule token by token (SPEC.md 4 and 9), for one to eight tokens of decode:

    S <- exp(g) S;  u = beta (v - S^T k);  S <- S + k u^T;  o = scale * S^T q

A block has a few value columns of one head's state; a column's keys are divided among `parts` threads, which hold them in registers from the first
token to the last and add up S^T k and S^T q through shared memory. A slot of -1 leaves everything alone and its o is 0.
FLOP: 7 K V a token and head. Bytes: 8 K V a sequence and head. Floor for one sequence of 32 heads of 128 on an H100: 1.3 us by the bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from .absent import given_or, nothing
from .launch import Kernel
from .settings import SIMULATED_TILE
from .target import ZERO, cuda, float32

__all__ = ["step_tokens"]

_TILE = 16
_PARTS = 8


def token_step(keys: int, values: int, tile: int, parts: int) -> Callable[..., None]:
    """The kernel: block x is the sequence and the tile of `tile` value columns, y the head."""
    tiles = -(-values // tile)
    own = -(-keys // parts)
    threads = tile * parts

    def kernel(scale, q, k, v, beta, g, slots, state, o, after):
        k_row = cuda.shared.array(keys, float32)
        q_row = cuda.shared.array(keys, float32)
        sums = cuda.shared.array((parts, tile), float32)
        held = cuda.local.array(own, float32)
        thread = cuda.threadIdx.x
        part = thread // tile
        head = cuda.blockIdx.y
        group = head // (v.shape[2] // k.shape[2])
        row = cuda.blockIdx.x // tiles
        column = cuda.blockIdx.x % tiles * tile + thread % tile
        slot = slots[row]
        if slot < 0:
            if part == 0 and column < values:
                for token in range(v.shape[1]):
                    o[row, token, head, column] = ZERO
            return

        for n in range(own):
            key = n * parts + part
            held[n] = state[slot, head, key, column] if key < keys and column < values else ZERO
        for token in range(v.shape[1]):
            cuda.syncthreads()
            for key in range(thread, keys, threads):
                k_row[key] = k[row, token, group, key]
                q_row[key] = float32(scale) * q[row, token, group, key]
            cuda.syncthreads()
            decay = math.exp(g[row, token, head])
            seen = ZERO
            for n in range(own):
                key = n * parts + part
                if key < keys:
                    held[n] *= decay
                    seen += held[n] * k_row[key]
            sums[part, thread % tile] = seen
            cuda.syncthreads()
            update = v[row, token, head, column] if column < values else ZERO
            for other in range(parts):
                update -= sums[other, thread % tile]
            update *= beta[row, token, head]
            cuda.syncthreads()
            found = ZERO
            for n in range(own):
                key = n * parts + part
                if key < keys:
                    held[n] += k_row[key] * update
                    found += held[n] * q_row[key]
            sums[part, thread % tile] = found
            cuda.syncthreads()
            if part == 0 and column < values:
                total = ZERO
                for other in range(parts):
                    total += sums[other, thread % tile]
                o[row, token, head, column] = total
        for n in range(own):
            key = n * parts + part
            if key < keys and column < values:
                after[slot, head, key, column] = held[n]

    return kernel


_STEP = Kernel(token_step)


def step_tokens(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, slots: Tensor, state: Tensor, scale: float, o: Tensor, after: Tensor
) -> None:
    """Writes `o [B, T, H, V]` and the used slots of `after [P, H, K, V]`, which may be `state`."""
    keys, values = k.shape[3], v.shape[3]
    tile, parts = (SIMULATED_TILE, 2) if SIMULATED_TILE else (_TILE, _PARTS)
    blocks = (v.shape[0] * -(-values // tile), v.shape[2])
    _STEP(
        blocks, tile * parts, (keys, values, tile, parts), float(scale), q, k, v, beta, given_or(g, nothing(v, *v.shape[:3])), slots, state, o, after
    )
