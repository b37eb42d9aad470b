"""The gradients of slow_core (SPEC.md 10): what needs no state, the states forward, their gradients in reverse, then the rest in parallel over chunks.

A frozen input launches nothing of its own: q and the gate need the walk forward alone, u and the initial state the walk in reverse alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.slow_core import SlowCore
from titans_backends.machine import Machine
from titans_backends.signature import Signature

from .chunks import three_strides
from .launch import DTYPES, Kernel, Macros
from .serving import CONSUMER_SHARED_BYTES, WIDEST, padded
from .slow_core_walks import NORMS, SOURCES, Walks, longest_piece, through_norm, walk_bytes
from .sources import source_names
from .strides import unit_stride

__all__ = ["backward_candidates", "run_backward"]

SOURCE, VECTORS_SOURCE = "slow_core_gradients.cu", "slow_core_vectors.cu"
GRADIENTS, VECTORS = Kernel(SOURCE, "slow_core_gradients", "4P3P4P4P3P21qP11if"), Kernel(VECTORS_SOURCE, "slow_core_vectors", "4P3PP10i")
_LONGEST = 128
_WALKS = ((64, 3, 2), (32, 3, 4), (32, 4, 2), (32, 3, 2), (64, 3, 1), (32, 3, 1), (32, 2, 2), (16, 3, 2), (16, 2, 1))
"""Tokens of a piece, pieces in shared memory, warps."""


def backward_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """Pieces and slices that fit the card; the first is the default. None for normalize_read and for chunks above 128 tokens."""
    chunk, dtype = signature.option("chunk_size"), signature.dtype
    assert isinstance(chunk, int)
    side = padded(chunk if signature.batch_invariant else min(chunk, max(signature.dim("T"), 1)))
    keys, values = signature.dim("K"), signature.dim("V")
    if signature.option("normalize_read") or side > _LONGEST or not (1 <= keys <= WIDEST and 1 <= values <= WIDEST):
        return []
    room = machine.shared_memory_bytes or CONSUMER_SHARED_BYTES
    grouped = signature.dim("H") > signature.dim("G")
    half = dtype.itemsize == 2
    wide = min(padded(keys, 32), 64) if half and side <= 64 else 32
    value_slice = min(padded(values, 32), 64) if half and side <= 64 else 32
    found: dict[Candidate, None] = {}
    for key_slice in dict.fromkeys((32, wide) if grouped else (wide, 32)):  # v heads to sum over take registers
        for piece, stages, warps in _WALKS if not found else _WALKS[:2]:
            piece, warps = min(piece, side, longest_piece(keys, dtype)), min(warps, padded(values) // 16)
            if max(walk_bytes(piece, stages, warps, keys, dtype, reverse=True), gradient_bytes(side, key_slice, value_slice, dtype)) <= room:
                params = (
                    ("side", side),
                    ("piece", piece),
                    ("stages", stages),
                    ("warps", warps),
                    ("key_slice", key_slice),
                    ("value_slice", value_slice),
                )
                found[Candidate("cupy", "walks", params, "backward", sources=source_names(SOURCE, VECTORS_SOURCE, NORMS, *SOURCES[:2]))] = None
    return list(found)


def gradient_bytes(side: int, key_slice: int, value_slice: int, dtype: torch.dtype) -> int:
    """Dynamic shared memory of a block of the last parallel launch: q and k, and over the same place slices of values and states or the scores."""
    work = 3 * side * value_slice + 2 * value_slice * key_slice
    return (2 * side * key_slice + max(work, side * max(side, 32))) * dtype.itemsize + 8 * side + 4 * (side // 16)


def run_backward(
    call: SlowCore, grads: tuple[Tensor | None, ...], states: Tensor | None, needs: frozenset[str], candidate: Candidate
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, u, w, g, chunk_decay, gate and the initial state, in that order; None for those not in `needs`.

    `grads`: of o `[B, T, H, V]` and of the final state `[N, H, K, V]`, either may be None. `states` is not read: the states are computed again.
    """
    inputs = (call.q, call.k, call.u, call.w, call.g, call.chunk_decay, call.gate, call.initial_state)
    names = ("q", "k", "u", "w", "g", "chunk_decay", "gate", "initial_state")
    into = {
        name: torch.empty(like.shape, dtype=like.dtype, device=like.device)
        for name, like in zip(names, inputs, strict=True)
        if name in needs and like is not None
    }
    if into:
        _fill(call, grads, into, candidate)
    return tuple(into.get(name) for name in names)


def _fill(call: SlowCore, grads: tuple[Tensor | None, ...], into: dict[str, Tensor], candidate: Candidate) -> None:
    """Runs the launches that the wanted gradients ask for."""
    x, wanted = Walks.of(call, candidate), set(into)
    d_o = torch.zeros_like(x.u) if grads[0] is None else unit_stride(grads[0])
    d_final = None if grads[1] is None else grads[1].contiguous()
    heads, keys, device = x.u.shape[2], x.k.shape[3], x.u.device
    used = wanted if call.delta else wanted - {"w"}  # without the correction w's gradient is zero
    inner = bool(used & {"q", "k", "w", "g", "chunk_decay", "gate"})  # these need the states
    back = bool(used & {"k", "u", "w", "g", "chunk_decay", "initial_state"})  # these the gradients of the states
    starts, updates = (x.room(fragments=True), x.room(fragments=False)) if inner else (None, None)
    leaving = x.room(fragments=True) if inner and back else None
    errors = into["u"] if "u" in into else x.room(fragments=False) if back else None
    macros = x.macros(d_o)
    lines = x.prepare(macros, d_o if back else None, errors)
    ended = d_final is not None and bool(call.normalize_final) and back
    final = torch.empty((x.slots.sequences, heads, keys, x.u.shape[3]), dtype=torch.float32, device=device) if ended else None
    if inner or ended:
        x.forward(macros, lines, starts, updates, final)
    if final is not None and d_final is not None:
        d_final = through_norm(final, d_final)
    if errors is not None and back:
        x.reverse(macros, lines, d_o, d_final, leaving, errors, into.get("initial_state"))
    if wanted - {"u", "initial_state"}:
        _run_parallel(x, macros, d_o, (starts, leaving, updates, errors), into, candidate)


def _run_parallel(x: Walks, macros: Macros, d_o: Tensor, left: tuple[Tensor | None, ...], into: dict[str, Tensor], candidate: Candidate) -> None:
    """dq, dk and dw from what the walks left, and the vectors from what that launch sums over slices of keys."""
    call, heads = x.call, x.u.shape[2]
    key_slice, value_slice = int(candidate.param("key_slice")), int(candidate.param("value_slice"))
    slices = -(-x.k.shape[3] // key_slice)

    def sums(name: str, each: int) -> Tensor | None:
        return torch.empty(slices * x.places * each, dtype=torch.float32, device=x.u.device) if name in into else None

    told, bent, left_behind, pulled = sums("gate", x.side), sums("g", x.side), sums("g", x.side), sums("chunk_decay", 1)
    tiles = (("KEY_SLICE", key_slice), ("VALUE_SLICE", value_slice), ("DECAYED", call.g is not None), ("GROUPED", x.group > 1))
    GRADIENTS(
        (x.slots.count * (heads // x.group) * slices, 1, 1), 2 * x.side, (*macros, *tiles),
        (
            x.q, x.k, x.w, d_o, call.g, call.chunk_decay, call.gate, *left, told, bent, left_behind, pulled, into.get("q"), into.get("k"), into.get("w"),
            *three_strides(x.q), *three_strides(x.k), *three_strides(x.w), *three_strides(d_o), *x.strides,
            x.bounds, *x.grid, x.places, *x.wide, float(call.scale),
        ),
        gradient_bytes(x.side, key_slice, value_slice, x.u.dtype),
    )  # fmt: skip
    if into.keys() & {"g", "gate", "chunk_decay"}:
        VECTORS(
            (x.places, 1, 1), 32, (("DTYPE", DTYPES[x.u.dtype]), ("SIDE", x.side), ("KEY_SLICES", slices)),
            (told, bent, left_behind, pulled, into.get("g"), into.get("gate"), into.get("chunk_decay"), x.bounds, *x.grid[:-1], x.places, *x.wide),
        )  # fmt: skip
