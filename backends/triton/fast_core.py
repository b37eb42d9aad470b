"""fast_core: which way through a chunk, with which tiles, and the launches (SPEC.md 2; the kernels: fast_chunks).

A chunk that is longer than the call is taken as one that just holds it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.fast_core import FastCore
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict

from .ahead import ahead_of
from .fast_backward import gradients, ways
from .fast_chunks import BLOCKS, FINAL, WALK, WHOLE
from .grid import on_device, slot_count, unit_stride
from .program import remembering, remembering_backward
from .serving import CONSUMER_SHARED_BYTES, dots, serves, tile_width

__all__ = ["backward_candidates", "candidates", "compile_ahead", "remember", "remember_backward", "run", "run_backward", "supports"]

_WALK_FROM = 512
"""Tokens of a chunk from which walking it, linear, is expected to beat its triangle."""
_BLOCKS_UP_TO = 4096
_WHOLE_UP_TO = 128
_LARGEST_IEEE = 32
_MOST = 8
_BLOCKS = ((64, 128, 4, 2), (64, 64, 4, 2), (32, 128, 4, 2), (32, 64, 2, 2))
"""Block, value columns, warps and stages of ways by blocks."""
_HEAVY_BLOCKS = ((32, 64, 4, 2), (32, 32, 4, 2), (16, 64, 4, 2), (16, 32, 4, 2))
"""The same for float32 with K above 64: its products want registers."""
_HEAVIEST = 32 * 128
"""Elements of the largest float32 block of k then."""
_SCAN = 1024
"""Bytes that the running sum of g takes at most."""
_SLAB = 32
"""Keys of a slab of a carried W, float32, two of which are on their way."""


def supports(signature: Signature, machine: Machine) -> Verdict:
    """What `serving.serves` says; every option."""
    return serves(signature, machine)


def _unit(chunk_size: int, tokens: int, offset: int) -> int:
    """The chunk size, or less where a chunk holds the whole call: a power of two, so that few lengths mean few compilations."""
    return min(chunk_size, tile_width(max(tokens + offset, 1)))


def _shared_bytes(variant: str, block: int, key_tile: int, value_tile: int, stages: int, itemsize: int, share: int, carried: bool) -> int:
    """Shared memory of a program at most."""
    query = key = block * key_tile * itemsize
    value, scores, memory = block * value_tile * itemsize, block * block * itemsize, key_tile * value_tile * itemsize
    carry = _SLAB * (value_tile * 8 + block * 2 * itemsize) if carried else 0
    if variant == "whole":
        return max(query + key, query + scores + value * (stages if share > 1 else 1) + carry)
    if variant == "blocks":
        turned = key if itemsize == 4 else 0  # K^T of float32 goes through shared memory once more
        return max(query + (key + value) * stages + scores + turned + _SCAN, query + carry)
    buffers = stages if block >= 64 else stages - 1  # products of fewer rows read registers, not shared memory
    return (query + key + value) * buffers + memory + max(scores, key) + _SCAN


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """The ways and tiles that suit the chunk, the expected best first."""
    tokens, keys, values = (signature.dim(letter) for letter in "TKV")
    chunk, offset = int(signature.option("chunk_size") or 1), int(signature.option("chunk_offset") or 0)
    unit = _unit(chunk, chunk if signature.batch_invariant else tokens, offset)
    group = signature.dim("H") // max(1, signature.dim("G"))
    key_tile, itemsize = tile_width(keys), signature.dtype.itemsize
    carried = offset > 0 and signature.has("initial_state")
    limit = machine.shared_memory_bytes or CONSUMER_SHARED_BYTES
    found: dict[Candidate, None] = {}

    def offer(variant: str, block: int, value_tile: int, warps: int, stages: int, share: int = 1, dot: str = dots(signature)[0]) -> None:
        value_tile = min(value_tile, tile_width(values))
        if _shared_bytes(variant, block, key_tile, value_tile, stages, itemsize, share, carried) <= limit:
            params = (("block", block), ("value_tile", value_tile), ("share", share), ("warps", warps), ("stages", stages), ("dot", dot))
            found[Candidate("triton", variant, params if variant == "whole" else (*params[:2], *params[3:]))] = None

    kept = 32 if key_tile * itemsize > 256 else 64  # value columns of a W that a walk keeps in registers
    small = key_tile <= 64
    heavy = itemsize == 4 and not small  # products of float32 want registers
    walked = ("walk", min(32, tile_width(unit)), kept, 4 if unit > 16 else 1, 2)
    first = unit > _WALK_FROM or (signature.option("output_final_state") and unit <= 64)  # it writes the final W in the same launch
    if unit > _WALK_FROM and not heavy:
        offer("walk", 64, kept, 4, 2)
        offer("walk", 64, 32, 4, 3)
    if first and not heavy:
        offer(*walked)
    if itemsize == 2 and not small and 64 < unit <= _BLOCKS_UP_TO:
        offer("blocks", 64, 128, 4, 2)
    if unit <= _WHOLE_UP_TO:
        block = tile_width(unit)
        warps = max(1, min(8, block * block // 1024 if small else max(4 if block > 16 else 1, block // (8 if heavy else 16))))
        offer("whole", block, 128 if itemsize == 2 else 64, warps, 2)
        if group > 1 and itemsize == 2:
            offer("whole", block, 128, warps, 2, group)
        if small and itemsize == 2 and warps > 1:
            offer("whole", block, 128, warps // 2, 2)
        offer("whole", block, 64, warps, 2)
    if unit <= _BLOCKS_UP_TO:
        for block, value_tile, warps, stages in _HEAVY_BLOCKS if heavy else _BLOCKS:
            if unit > block and not (heavy and key_tile * block > _HEAVIEST):
                offer("blocks", block, value_tile, warps, stages)
    if not first and not heavy:
        offer(*walked)
    if unit > _BLOCKS_UP_TO and heavy:
        offer("walk", 16, 32, 4, 2)
    if not found:
        offer("walk" if unit > _BLOCKS_UP_TO else "blocks", 16, 32, 4, 2)
    offered = list(found)[:_MOST]
    if machine.sms and not signature.batch_invariant:
        enough = machine.sms
        offered.sort(key=lambda candidate: min(_programs(signature, unit, candidate), enough), reverse=True)
    small_blocks = [candidate for candidate in offered if int(candidate.param("block")) <= _LARGEST_IEEE and candidate.variant != "walk"]
    for dot in dots(signature)[1:]:  # products without tensor cores
        offered += [replace(candidate, params=tuple((dict(candidate.params) | {"warps": 4, "dot": dot}).items())) for candidate in small_blocks[:1]]
    return offered


def _programs(signature: Signature, unit: int, candidate: Candidate) -> int:
    """How many programs a candidate is for a call."""
    params = dict(candidate.params)
    chunks = signature.dim("B") * -(-signature.dim("T") // unit)
    if candidate.variant == "blocks":
        chunks *= -(-unit // int(params["block"]))
    return chunks * -(-signature.dim("V") // int(params["value_tile"])) * signature.dim("H") // int(params.get("share", 1))


def _final_tiles(keys: int, values: int, itemsize: int) -> tuple[int, int]:
    """Tokens and value columns of a step of the final W: K rows of both fit 40 KB twice."""
    row = tile_width(keys) * itemsize
    return 64 if row <= 256 else 32 if row <= 512 else 16, min(64 if tile_width(keys) <= 128 else 32, tile_width(values))


def _empty(call: FastCore) -> tuple[Tensor | None, ...]:
    """A call without tokens: W stays."""
    o = torch.empty(call.v.shape, dtype=call.v.dtype, device=call.v.device)
    if not call.output_final_state:
        return o, None
    if call.initial_state is not None:
        return o, call.initial_state.clone(memory_format=torch.contiguous_format)
    sequences = call.v.shape[0] if call.cu_seqlens is None else call.cu_seqlens.numel() - 1
    return o, torch.zeros(sequences, call.v.shape[2], call.k.shape[3], call.v.shape[3], dtype=torch.float32, device=call.v.device)


def run(call: FastCore, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """o and the final W."""
    q, k, v, g, gate = unit_stride(call.q), unit_stride(call.k), unit_stride(call.v), call.g, call.gate
    batch, tokens, heads, values = v.shape
    groups, keys = k.shape[2:]
    offset, packed = call.chunk_offset, on_device(call.cu_seqlens, v)
    sequences = batch if packed is None else packed.numel() - 1
    if not (tokens and batch and heads):
        return _empty(call)
    unit = _unit(call.chunk_size, tokens, offset)
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    final = torch.empty(sequences, heads, keys, values, dtype=torch.float32, device=v.device) if call.output_final_state else None
    initial = None if call.initial_state is None else unit_stride(call.initial_state)
    carried = initial if offset or (final is not None and candidate.variant == "walk") else None
    slots = slot_count(batch, tokens, unit, packed, offset)
    group, dot = heads // groups, str(candidate.param("dot"))
    block, value_tile, warps, stages = (int(candidate.param(name)) for name in ("block", "value_tile", "warps", "stages"))
    tiles, key_tile = -(-values // value_tile), tile_width(keys)
    numbers = (float(call.scale), tokens, sequences, offset, heads, group)
    operand_strides = (*k.stride()[:3], *v.stride()[:3])
    g_strides = (0, 0, 0) if g is None else g.stride()
    strides = (
        *q.stride()[:3], *operand_strides, *((0, 0, 0) if gate is None else gate.stride()), *g_strides,
        *((0, 0, 0) if carried is None else carried.stride()[:3]), *o.stride()[:2],
    )  # fmt: skip
    constants = (keys, values, unit, block, key_tile, value_tile)
    if candidate.variant == "walk":
        WALK(slots * tiles * heads, (q, k, v, gate, g, carried, packed, o, final, *numbers, *strides), (*constants, dot), warps, stages)
        return o, final
    args = (q, k, v, gate, g, carried, packed, o, *numbers, *strides)
    if candidate.variant == "whole":
        share = int(candidate.param("share"))
        WHOLE(slots * tiles * (heads // share), args, (*constants, share, dot), warps, stages)
    else:
        BLOCKS(slots * -(-unit // block) * tiles * heads, args, (*constants, dot), warps, stages)
    if final is not None:
        block, value_tile = _final_tiles(keys, values, k.dtype.itemsize)
        FINAL(
            sequences * heads * -(-values // value_tile),
            (k, v, g, initial, packed, final, tokens, offset, heads, group, *operand_strides, *g_strides, *((0, 0, 0) if initial is None else initial.stride()[:3])),
            (keys, values, unit, block, key_tile, value_tile, dot),
            4,
            2,
        )  # fmt: skip
    return o, final


def backward_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """The ways and tiles of `fast_backward` that suit the chunk, the expected best first."""
    chunk = int(signature.option("chunk_size") or 1)
    tokens = chunk if signature.batch_invariant else signature.dim("T")
    return ways(signature, machine, _unit(chunk, tokens, int(signature.option("chunk_offset") or 0)))


def run_backward(
    call: FastCore, grads: tuple[Tensor | None, ...], states: Tensor | None, needs: frozenset[str], candidate: Candidate
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, gate, g and initial_state, in that order."""
    return gradients(call, grads, needs, candidate, _unit(call.chunk_size, call.v.shape[1], call.chunk_offset))


compile_ahead = ahead_of(run, "fast_core", run_backward)
remember, remember_backward = remembering(run), remembering_backward(run_backward)
