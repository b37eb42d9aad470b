"""The gradients of slow_core (SPEC.md 10): what needs no state in parallel over chunks, the states forward, their gradients in reverse, then the rest in parallel.

A frozen input launches nothing of its own: q and the gate need the walk forward alone, u and the initial state the walk in reverse alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.slow_core import SlowCore
from titans_backends.machine import Machine
from titans_backends.signature import Signature

from .bounds import bounds_on
from .chunks import slots_of, three_strides
from .launch import DTYPES, Kernel, Macros
from .serving import CONSUMER_SHARED_BYTES, WIDEST, padded
from .sources import source_names
from .strides import aligned_rows, unit_stride

__all__ = ["backward_candidates", "run_backward"]

SOURCE, WALKS = "slow_core_gradients.cu", "slow_core_walks.cu"
_LAYOUT = "4P3P4P4P4P3P21qP11if"
PREPARE, GRADIENTS, VECTORS = (Kernel(SOURCE, f"slow_core_{name}", _LAYOUT) for name in ("prepare", "gradients", "vectors"))
UNNORMED = Kernel(SOURCE, "slow_core_unnormed", "3Pi")
FORWARD, REVERSE = (Kernel(WALKS, f"slow_core_{name}", "5P2P2P1P1P15q6i") for name in ("forward", "reverse"))
_LONGEST = 128
_WALKS = ((64, 3, 2), (32, 4, 2), (32, 3, 2), (64, 3, 1), (32, 3, 1), (32, 2, 2), (16, 3, 2), (16, 2, 1))
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
    wide = padded(keys, 32) if dtype.itemsize == 2 and side <= 64 and not grouped else 32
    longest = 128 if dtype.itemsize == 2 else 32 if keys <= 64 else 16  # what registers hold of a piece beside the state
    found: dict[Candidate, None] = {}
    for key_slice in dict.fromkeys((min(wide, 64), 32)):
        for piece, stages, warps in _WALKS:
            piece, warps = min(piece, side, longest), min(warps, padded(values) // 16)
            if max(walk_bytes(piece, stages, warps, keys, dtype), gradient_bytes(side, key_slice, 32, dtype)) <= room:
                params = (("side", side), ("piece", piece), ("stages", stages), ("warps", warps), ("key_slice", key_slice), ("value_slice", 32))
                found[Candidate("cupy", "walks", params, "backward", sources=source_names(SOURCE, WALKS))] = None
    return list(found)


def walk_bytes(piece: int, stages: int, warps: int, keys: int, dtype: torch.dtype, *, reverse: bool = True, delta: bool = True) -> int:
    """Dynamic shared memory of a block of a walk: pieces of k, w and, in reverse, q, of value columns, and their lines."""
    tiles, columns = 1 + reverse + delta, max(32, 16 * warps)
    return stages * (piece * (tiles * padded(keys, 32) + (1 + reverse) * columns) * dtype.itemsize + 4 * (2 * piece + 4))


def gradient_bytes(side: int, key_slice: int, value_slice: int, dtype: torch.dtype) -> int:
    """Dynamic shared memory of a block of the parallel launches: q and k, and over the same place slices of values and states or the scores."""
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
    q, k, u, w = unit_stride(call.q), unit_stride(call.k), unit_stride(call.u), unit_stride(call.w)
    d_o = torch.zeros_like(u) if grads[0] is None else unit_stride(grads[0])
    d_final = None if grads[1] is None else grads[1].contiguous()
    batch, tokens, heads, values = u.shape
    groups, keys, device, dtype = k.shape[2], k.shape[3], u.device, u.dtype
    bounds = bounds_on(call.cu_seqlens, u)
    chunk_size, wanted = min(call.chunk_size, 2**30), set(into)
    slots = slots_of(u, chunk_size, bounds)
    initial = None if call.initial_state is None else call.initial_state.contiguous()
    side, piece, stages, warps = (int(candidate.param(name)) for name in ("side", "piece", "stages", "warps"))
    key_slice, value_slice = int(candidate.param("key_slice")), int(candidate.param("value_slice"))
    places, key_blocks, value_blocks = slots.count * heads, -(-keys // 16), -(-values // 16)
    g, decay, gate = call.g, call.chunk_decay, call.gate

    parallel = wanted & {"q", "k", "w", "g", "chunk_decay", "gate"} - ({"w"} if not call.delta else set())
    back = bool(wanted & {"k", "u", "w", "g", "chunk_decay", "initial_state"} - ({"w"} if not call.delta else set()))
    ended = bool(call.normalize_final) and d_final is not None and back
    kept = wanted & {"q", "k", "w", "g", "chunk_decay", "gate"}
    fragments = places * key_blocks * value_blocks * 256

    def room(count: int, kind: torch.dtype, *, when: bool = True) -> Tensor | None:
        return torch.empty(count, dtype=kind, device=device) if when else None

    starts, updates = room(fragments, dtype, when=bool(parallel)), room(u.numel(), dtype, when=bool(parallel))
    leaving = room(fragments, dtype, when=back and bool(parallel))
    errors = into["u"] if "u" in into else room(u.numel(), dtype, when=back)
    slices = -(-keys // key_slice)
    lines = room(places * (2 * side + 4), torch.float32)
    told = room(slices * places * side, torch.float32, when="gate" in wanted)
    bent = room(slices * places * side, torch.float32, when="g" in wanted)
    pulled = room(slices * places, torch.float32, when="chunk_decay" in wanted)
    wide = [x is not None and x.dtype == torch.float32 for x in (g, decay, gate)]
    aligned = all(aligned_rows(x, whole=True) for x in (q, k, u, w, d_o))
    shared: Macros = (
        ("DTYPE", DTYPES[dtype]), ("KEYS", keys), ("VALUES", values), ("SIDE", side), ("FACTORED", decay is not None), ("DELTA", bool(call.delta)),
        ("ALIGNED", aligned),
    )  # fmt: skip
    vectors = wanted & {"g", "gate", "chunk_decay"}
    parts: Macros = (
        *shared, ("KEY_SLICE", key_slice), ("VALUE_SLICE", value_slice), ("DECAYED", g is not None), ("GROUPED", heads != groups),
        ("READ", bool(wanted & {"q", "g", "gate", "chunk_decay"})), ("ERASE", bool(wanted & {"w", "chunk_decay"})), ("WRITE", bool(wanted & {"k", "g"})),
    )  # fmt: skip
    walked: Macros = (*shared, ("PIECE", piece), ("STAGES", stages), ("WARPS", warps))
    args = (
        q, k, w, d_o, g, decay, gate, starts, leaving, updates, errors, lines, told, bent, pulled,
        errors if back else None, into.get("q"), into.get("k"), into.get("w"), into.get("g"), into.get("gate"), into.get("chunk_decay"),
        *three_strides(q), *three_strides(k), *three_strides(w), *three_strides(d_o), *three_strides(g), *three_strides(decay), *three_strides(gate),
        bounds, slots.wide, slots.sequences, tokens, chunk_size, slots.each, heads, heads // groups if groups else 1, places, *wide, float(call.scale),
    )  # fmt: skip
    memory = gradient_bytes(side, key_slice, value_slice, dtype)
    rows = (heads * values * tokens, heads * values, values)
    strides = (*three_strides(q), *three_strides(k), *three_strides(w))
    sizes = (heads, heads // groups if groups else 1, slots.wide, tokens, chunk_size, slots.each)
    blocks = slots.sequences * heads * -(-value_blocks // warps)

    PREPARE((places, 1, 1), 2 * side, parts, args, memory)
    if parallel or ended:
        final = room(slots.sequences * heads * keys * values, torch.float32, when=ended)
        FORWARD(
            (blocks, 1, 1), 32 * warps + 64, walked,
            (q, k, w, u, None, lines, initial, starts, updates, final, bounds, *strides, *three_strides(u), 0, 0, 0, *sizes),
            walk_bytes(piece, stages, warps, keys, dtype, reverse=False, delta=bool(call.delta)),
        )  # fmt: skip
        if final is not None:
            assert d_final is not None
            behind = torch.empty_like(final)
            UNNORMED((slots.sequences * heads, 1, 1), 256, parts, (final, d_final, behind, keys * values), 64)
            d_final = behind
    if back:
        REVERSE(
            (blocks, 1, 1), 32 * warps + 64, walked,
            (q, k, w, None, d_o, lines, d_final, leaving, errors, into.get("initial_state"), bounds, *strides, *rows, *three_strides(d_o), *sizes),
            walk_bytes(piece, stages, warps, keys, dtype, delta=bool(call.delta)),
        )  # fmt: skip
    if kept:
        GRADIENTS((slots.count * groups * slices, 1, 1), 2 * side, parts, args, memory)
    if vectors:
        VECTORS((places, 1, 1), 32, parts, args)
