"""The gradients of fast_core (SPEC.md 10): "chunk", a block holds a chunk; "tiles", it sweeps a tile of one as keys (dk, dv) or as queries (dq, row sums).

Nothing that the forward made is read; a gradient that nobody needs is not computed. Tiles take any chunk and state; where dg is wanted they
need a second, small launch that sums over each chunk, and the gradient of an initial state takes a launch of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.fast_core import FastCore
from titans_backends.machine import Machine
from titans_backends.signature import Signature

from .chunks import slots_of, three_strides
from .launch import DTYPES, Kernel, Macros
from .serving import CONSUMER_SHARED_BYTES, padded
from .sources import source_names
from .strides import aligned_rows, unit_stride

__all__ = ["gradients", "ways"]

SOURCE = "fast_core_gradients.cu"
_LAYOUT = "18P18q13if"
GRADIENTS, RUNNING, START = (Kernel(SOURCE, f"fast_core_{name}", _LAYOUT) for name in ("gradients", "running", "start"))
CHUNK_SOURCE = "fast_core_chunk_gradients.cu"
CHUNK = Kernel(CHUNK_SOURCE, "fast_core_chunk_gradients", _LAYOUT)
_LONGEST_CHUNK = 128
_INPUTS = ("q", "k", "v", "gate", "g", "initial_state")
_MOST = 3
"""Candidates of a call."""
_PLANS = ((64, 1), (64, 2), (128, 1), (32, 2), (32, 1), (16, 1))
"""Tokens of a tile, and tiles of what it meets that are there at once."""


def ways(signature: Signature, machine: Machine, reach: int) -> list[Candidate]:
    """Chunks and tiles that fit the card, none wider than a chunk of `reach` tokens needs; the first is the default."""
    room, keys, values = machine.shared_memory_bytes or CONSUMER_SHARED_BYTES, signature.dim("K"), signature.dim("V")
    found: dict[Candidate, None] = {}
    for side, buffers in _PLANS:
        if side > padded(reach) or side * signature.dtype.itemsize > 256:
            continue
        used = buffers if side < reach else 1
        if shared_bytes(side, used, keys, values, reach, signature.dtype) <= room:
            params = (("side", side), ("buffers", used))
            found[Candidate("cupy", "tiles", params, "backward", sources=source_names(SOURCE))] = None
    side, states = padded(reach), bool(dict(signature.options).get("output_final_state")) or signature.has("initial_state")
    if side <= _LONGEST_CHUNK and signature.dtype.itemsize == 2 and chunk_bytes(side, keys, values, signature.dtype, states) <= room:
        chunk = Candidate("cupy", "chunk", (("side", side),), "backward", sources=source_names(CHUNK_SOURCE, SOURCE))
        return [chunk, *found][:_MOST]
    return list(found)[:_MOST]


def shared_bytes(side: int, buffers: int, keys: int, values: int, reach: int, dtype: torch.dtype) -> int:
    """Dynamic shared memory of a block: its own tiles, those it meets, and a chunk's running decay and rates."""
    return (1 + buffers) * side * dtype.itemsize * (padded(keys, 32) + padded(values, 32)) + 12 * (-(-reach // side) * side)


def chunk_bytes(side: int, keys: int, values: int, dtype: torch.dtype, states: bool) -> int:
    """The same where a block holds a chunk: q, k, v, dO, a square of scores, its sums, and rows of a state where there are any."""
    return side * dtype.itemsize * (2 * padded(keys, 32) + (2 + states) * padded(values, 32) + max(side, 32)) + side * (16 + side // 4)


def gradients(call: FastCore, grads: tuple[Tensor | None, ...], needs: frozenset[str], candidate: Candidate) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, gate, g and the initial state, in that order, None for what `needs` leaves out."""
    into: dict[str, Tensor] = {}
    for name in _INPUTS:
        like: Tensor | None = getattr(call, name)
        if name in needs and like is not None:
            into[name] = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    if not call.v.numel():
        for name, grad in into.items():  # a call without tokens hands the state on
            grad.copy_(grads[1]) if name == "initial_state" and grads[1] is not None else grad.zero_()
    elif into:
        _launch(call, grads, into, candidate)
    return tuple(into.get(name) for name in _INPUTS)


def _launch(call: FastCore, grads: tuple[Tensor | None, ...], into: dict[str, Tensor], candidate: Candidate) -> None:
    q, k, v = unit_stride(call.q), unit_stride(call.k), unit_stride(call.v)
    d_o = v.new_zeros(v.shape[3]).expand(v.shape) if grads[0] is None else unit_stride(grads[0])
    d_final = None if grads[1] is None else grads[1].contiguous()
    batch, tokens, heads, values = v.shape
    groups, keys = k.shape[2:]
    whole, side = candidate.variant == "chunk", int(candidate.param("side"))
    buffers = 0 if whole else int(candidate.param("buffers"))
    slots = slots_of(v, call.chunk_size, call.cu_seqlens, call.chunk_offset)
    carried = call.initial_state is not None and call.chunk_offset > 0
    initial = call.initial_state.contiguous() if carried and call.initial_state is not None else None
    dg, d_initial = into.get("g"), into.get("initial_state")

    def scratch(wanted: bool, *shape: int) -> Tensor | None:
        return torch.empty(shape, dtype=torch.float32, device=v.device) if wanted else None

    inflow, outflow = (scratch(dg is not None and not whole, batch, heads, tokens) for _ in range(2))
    total = scratch(dg is not None and carried, slots.sequences, heads)
    as_queries = dg is not None or "q" in into or "gate" in into
    as_keys = dg is not None or "k" in into or "v" in into
    tiles = -(-min(call.chunk_size, tokens) // side)
    given: Macros = (
        ("DTYPE", DTYPES[v.dtype]), ("KEYS", keys), ("VALUES", values), ("SIDE", side), ("DECAYED", call.g is not None), ("FLOWING", dg is not None),
        ("ALIGNED", all(aligned_rows(x, whole=True) for x in (q, k, v, d_o))),
    )  # fmt: skip
    args = (
        q, k, v, call.gate, call.g, d_o, initial, d_final, into.get("q"), into.get("k"), into.get("v"), into.get("gate"), dg, inflow, outflow,
        d_initial, total, slots.cu_seqlens,
        *three_strides(q), *three_strides(k), *three_strides(v), *three_strides(call.gate), *three_strides(call.g), *three_strides(d_o),
        heads, heads // groups, call.gate is not None and call.gate.dtype == torch.float32, call.g is not None and call.g.dtype == torch.float32,
        slots.wide, slots.sequences, tokens, min(call.chunk_size, 2**30), call.chunk_offset, slots.each, tiles, as_queries, as_keys, float(call.scale),
    )  # fmt: skip
    macros = (*given, ("BUFFERS", max(buffers, 1)), ("STARTED", carried), ("ENDED", d_final is not None))
    if d_initial is not None or total is not None:
        shared = shared_bytes(side, 0, keys, values, tiles * side, v.dtype)
        START((slots.sequences * heads, 1, 1), 2 * padded(keys, 32), (*macros, ("WORK", 2)), args, shared)
    if not as_queries and not as_keys:
        return
    if whole:
        shared = chunk_bytes(side, keys, values, v.dtype, carried or d_final is not None)
        macros = (*given, ("STARTED", carried), ("ENDED", d_final is not None), ("GROUPED", heads > groups))
        CHUNK((slots.count * groups, 1, 1), 2 * side, macros, args, shared)
        return
    shared = shared_bytes(side, buffers, keys, values, tiles * side, v.dtype)
    GRADIENTS((slots.count * groups * tiles * (as_queries + as_keys), 1, 1), 4 * side, (*macros, ("WORK", 0)), args, shared)
    if dg is not None:
        RUNNING((slots.count * heads, 1, 1), 32, (*macros, ("WORK", 1)), args)
