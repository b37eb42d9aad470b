"""dual_core's flat mode from Python: which tiles a card is offered, and the one launch (kernel in flat_chunks.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.dual_core import DualCore
from titans_backends.machine import Machine
from titans_backends.signature import Signature

from .flat_chunks import FLAT
from .grid import on_device, slot_count, strides, unit_stride
from .serving import CONSUMER_SHARED_BYTES, dots, narrow_warps, tile_width

__all__ = ["HOPPER", "flat", "flat_candidates"]

_SOURCES = tuple(f"titans_backends.backends.triton.{name}" for name in ("flat_chunks", "dual_flat", "decay", "inverse", "grid", "launch", "serving"))
_NONE = (0, 0, 0)
_LONGEST = 2**30
"""A chunk beyond any sequence: the kernels count tokens in 32 bits."""


_SMALL = 32
"""Head sizes at which float32 is offered tiles of 16 rows, which hardly spill."""
_SMALL_GRAM = 64
"""Keys up to which a running K K^T costs less than the chunk's earlier blocks once more."""
_WIDEST_GRAM = 128
HOPPER = range(90, 120)
"""Cards whose warps multiply from shared memory: rows of 64, and more shared memory a program."""


def flat_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """Tiles that fit the card, the first as the default; only the chunk, the head sizes, the dtype and the card decide."""
    chunk = signature.option("chunk_size")
    assert isinstance(chunk, int)
    lam = signature.option("transform") == "lam"
    hopper = machine.sm is not None and machine.sm in HOPPER
    keys, values = tile_width(signature.dim("K")), tile_width(signature.dim("V"))
    small = tile_width(min(chunk, 64))
    wgmma = hopper and signature.dtype.itemsize == 2
    tile = min(values, 64 if keys <= 128 or wgmma else 32)
    shapes = [(small, tile, 4)]  # block, value tile, warps
    if chunk > 64 or not hopper:
        spills = lam and wgmma and keys <= _SMALL  # tiles of 64 rows there: 2.3 times slower on an H100
        first = hopper and not spills and (chunk <= 128 or (wgmma and keys >= 64))
        shapes.insert(1 if first else 0, (min(small, 32), min(tile, 32), 2 if keys <= 64 else 4))
    shapes.append((small, min(values, 128), 4))
    if 64 < chunk <= 128 and signature.option("transform") != "exact":
        shapes.append((128, min(tile, 32), 8))
    if small == 64:
        shapes.append((small, tile, 8))
    shapes += [(min(small, 32), min(tile, 32), 4), (min(small, 32), tile, 4), (min(small, 32), 16, 4), (16, 16, 4)]
    lean = signature.dtype.itemsize == 4 and max(keys, values) <= _SMALL
    if lean:  # what spills least first
        tripled = dots(signature)[0] == "tf32x3"
        shapes = [(16, 16, 2), (small, 16, 4), (16, tile, 2), *shapes] if tripled else [shapes[0], (16, tile, 2), (16, 16, 2), *shapes[1:]]
    room = machine.shared_memory_bytes or CONSUMER_SHARED_BYTES
    found: list[Candidate] = []
    for block, width, warps in shapes:
        loops = chunk > 2 * block
        if wgmma:  # in a loop the keys are rows too, and lam's blocks are columns
            few = narrow_warps(signature.dtype, max(block, keys) if loops else block, min(width, block) if loops and lam else width, warps)
            if few < warps and block > 64:
                continue
            warps = few
        pairs = loops and lam and keys > _SMALL_GRAM and (chunk <= 8 * block or keys > _WIDEST_GRAM)
        way = _candidate(block, width, pairs, warps, dots(signature)[0])
        if way not in found and _shared_bytes(signature, way, hopper, loops, lam) <= room:
            found.append(way)
    wide = [way for way in found if way.param("value_tile") != 16 or values == 16 or lean][:6] or found  # the narrowest: where nothing else fits
    exact_dots = [_candidate(16, 16, lam and chunk > 32, 4, dot) for dot in dots(signature)[1:] if keys <= 64]
    return [*wide, *exact_dots]


def _candidate(block: int, value_tile: int, pairs: bool, warps: int, dot: str) -> Candidate:
    params = (("block", block), ("value_tile", value_tile), ("pairs", pairs), ("warps", warps), ("stages", 2), ("dot", dot))
    return Candidate("triton", "flat", params, sources=_SOURCES)


def _shared_bytes(signature: Signature, candidate: Candidate, hopper: bool, loops: bool, lam: bool) -> int:
    """An upper bound of a program's shared memory, from what the compiler was seen to take."""
    block, tile, pairs, _, _, dot = (value for _, value in candidate.params)
    assert isinstance(block, int)
    assert isinstance(tile, int)
    keys = tile_width(signature.dim("K"))
    if not hopper:
        elements = block * (2 * keys + tile) + keys * tile
    elif loops:
        elements = block * (3 * keys + 3 * tile + 2 * block) + 2 * keys * tile + (keys * keys if lam and not pairs else 0)
    else:
        elements = block * (2 * keys + 4 * tile + 2 * block)
    return elements * signature.dtype.itemsize * (2 if hopper and dot == "tf32x3" else 1) + 8192


def flat(call: DualCore, candidate: Candidate) -> Tensor:
    """o `[B, T, H, V]` in v's dtype."""
    chosen = dict(candidate.params)
    block, block_v, pairs, dot = int(chosen["block"]), int(chosen["value_tile"]), bool(chosen["pairs"]), chosen["dot"]
    q, k, v, beta, g, alpha = unit_stride(call.q), unit_stride(call.k), unit_stride(call.v), call.beta, call.g, call.alpha
    fast, slow, offset = call.fast_gate, call.slow_gate, call.chunk_offset
    batch, tokens, heads, values = v.shape
    keys = k.shape[3]
    o = torch.empty((batch, tokens, heads, values), dtype=v.dtype, device=v.device)
    chunk = min(call.chunk_size, _LONGEST)
    cu_seqlens = on_device(call.cu_seqlens, v)
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    number, steps, weight = 0.0, _NONE, None
    if not isinstance(alpha, Tensor):
        number = float(alpha)
    else:
        weight = alpha
        if alpha.dim():
            steps = strides(alpha) if alpha.dim() == 3 else (0, 0, alpha.stride(0))
    args = (
        q, k, v, beta, g, fast, slow, weight, cu_seqlens, o,
        number, float(call.scale), tokens, sequences, offset, heads, heads // max(k.shape[2], 1),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *beta.stride(), *(_NONE if g is None else g.stride()),
        *(_NONE if fast is None else fast.stride()), *(_NONE if slow is None else slow.stride()), *steps, tokens * heads * values, heads * values,
    )  # fmt: skip
    constants = (keys, values, chunk, call.transform, call.qk_l2norm, tile_width(keys), block_v, block, pairs, dot)
    programs = slot_count(batch, tokens, chunk, cu_seqlens, offset) * heads * -(-values // block_v)
    FLAT(programs, args, constants, int(chosen["warps"]), int(chosen["stages"]))
    return o
