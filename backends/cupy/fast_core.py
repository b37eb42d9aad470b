"""fast_core: tiles of queries go over the keys and values of their chunk; a second launch makes the final state (SPEC.md 2).

The backward: fast_core_gradients.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.fast_core import FastCore
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict, refused

from .ahead import ahead_of
from .chunks import slots_of, three_strides
from .fast_core_gradients import gradients, ways
from .launch import DTYPES, Kernel
from .program import remembering, remembering_backward
from .serving import CONSUMER_SHARED_BYTES, WIDEST, padded, serves
from .serving import candidate as _candidate
from .strides import aligned_rows, unit_stride

__all__ = ["backward_candidates", "candidates", "compile_ahead", "remember", "remember_backward", "run", "run_backward", "supports"]

SOURCE = "fast_core.cu"
_LAYOUT = "9P15q11if"
FAST, STATE = Kernel(SOURCE, "fast_core", _LAYOUT), Kernel(SOURCE, "fast_core_state", _LAYOUT)
_LONGEST = 2048
_MOST = 4
"""Candidates of a call."""
_PLANS = ((64, 1), (64, 2), (128, 1), (32, 2), (32, 1), (16, 1))
"""Tokens of a tile, and tiles of keys and values that are there at once."""


def supports(signature: Signature, machine: Machine) -> Verdict:
    """What `serving.serves` says, and chunks whose decays fit shared memory."""
    verdict = serves(signature, machine, WIDEST)
    if _reach(signature) > _LONGEST:
        verdict &= refused(f"chunk_size={signature.option('chunk_size')} is above {_LONGEST} tokens; use backend='triton'")
    return verdict


def _reach(signature: Signature) -> int:
    chunk = signature.option("chunk_size")
    assert isinstance(chunk, int)
    return chunk if signature.batch_invariant else min(chunk, max(signature.dim("T"), 1))


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """Tiles that fit the card, none wider than a chunk needs; the first is the default."""
    reach, room = _reach(signature), machine.shared_memory_bytes or CONSUMER_SHARED_BYTES
    found: dict[Candidate, None] = {}
    for side, buffers in _PLANS:
        if side > padded(reach) or side * signature.dtype.itemsize > 256:
            continue
        used = buffers if side < reach else 1
        if shared_bytes(side, used, signature.dim("K"), signature.dim("V"), reach, signature.dtype) <= room:
            found[_candidate("tiles", (SOURCE,), side=side, buffers=used)] = None
    return list(found)[:_MOST]


def shared_bytes(side: int, buffers: int, keys: int, values: int, reach: int, dtype: torch.dtype) -> int:
    """Dynamic shared memory of a block: queries, tiles of keys and values, and the running decay of a chunk."""
    keys, values = padded(keys, 32), padded(values, 32)
    return side * dtype.itemsize * (keys + buffers * (keys + values)) + 8 * (-(-reach // side) * side)


def run(call: FastCore, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """o `[B, T, H, V]` and, where asked for, the final state `[N, H, K, V]` in float32."""
    q, k, v = unit_stride(call.q), unit_stride(call.k), unit_stride(call.v)
    tokens, heads, values = v.shape[1:]
    groups, keys = k.shape[2:]
    side, buffers = int(candidate.param("side")), int(candidate.param("buffers"))
    slots = slots_of(v, call.chunk_size, call.cu_seqlens, call.chunk_offset)
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    initial = None if call.initial_state is None else call.initial_state.contiguous()
    final = torch.empty((slots.sequences, heads, keys, values), dtype=torch.float32, device=v.device) if call.output_final_state else None
    reach = min(call.chunk_size, max(tokens, 1))
    blocks = -(-reach // side)
    macros = (
        ("DTYPE", DTYPES[v.dtype]), ("KEYS", keys), ("VALUES", values), ("SIDE", side), ("BUFFERS", buffers), ("DECAYED", call.g is not None),
        ("STARTED", initial is not None), ("ALIGNED", all(aligned_rows(x, whole=True) for x in (q, k, v))),
    )  # fmt: skip
    args = (
        q, k, v, call.gate, call.g, initial, o, final, slots.cu_seqlens,
        *three_strides(q), *three_strides(k), *three_strides(v), *three_strides(call.gate), *three_strides(call.g),
        heads, heads // groups if groups else 1, call.gate is not None and call.gate.dtype == torch.float32,
        call.g is not None and call.g.dtype == torch.float32, slots.wide, slots.sequences, tokens, min(call.chunk_size, 2**30), call.chunk_offset,
        slots.each, blocks, float(call.scale),
    )  # fmt: skip
    if tokens:
        FAST((slots.count * blocks * heads, 1, 1), 2 * side, macros, args, shared_bytes(side, buffers, keys, values, reach, v.dtype))
    if final is not None:
        shared = side * v.dtype.itemsize * (padded(keys, 32) + padded(values, 32)) + 8 * blocks * side
        STATE((slots.sequences * heads, 1, 1), 2 * padded(keys, 32), macros, args, shared)
    return o, final


def backward_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """Tiles of the backward that fit the card; the first is the default."""
    return ways(signature, machine, _reach(signature))


def run_backward(
    call: FastCore, grads: tuple[Tensor | None, ...], states: Tensor | None, needs: frozenset[str], candidate: Candidate
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, gate, g and the initial state, in that order."""
    return gradients(call, grads, needs, candidate)


compile_ahead = ahead_of(run, "fast_core", run_backward)
remember, remember_backward = remembering(run), remembering_backward(run_backward)
