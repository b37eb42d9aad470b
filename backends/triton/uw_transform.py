"""uw_transform in Triton: one launch, the triangle and its inverse on chip; kernels in uw_blocks.py.

"block": a chunk of at most 64 tokens at once. "joined": the same of small heads, u and w by one product. "walk": a longer chunk block after
block, in column tiles. "scaled": transform="none".
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.uw_transform import UWTransform
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict, refused

from .ahead import ahead_of
from .grid import on_device, slot_count, unit_stride
from .program import remembering, remembering_backward
from .serving import CONSUMER_SHARED_BYTES, dots, narrow_warps, serves, tile_width
from .uw_blocks import JOINED_WIDTH, UW_BLOCK, UW_SCALED, UW_WALK
from .uw_gradients import backward_candidates, run_backward

__all__ = ["backward_candidates", "candidates", "compile_ahead", "remember", "remember_backward", "run", "run_backward", "supports", "transformed"]

_SOURCES = tuple(f"titans_backends.backends.triton.{name}" for name in ("uw_blocks", "decay", "inverse", "grid", "launch"))
_WIDEST_BLOCK = 64
_WIDEST_GRAM = 128
_LONGEST = 2**30
"""A chunk beyond any sequence: the kernels count tokens in 32 bits, and add a chunk to them."""


def supports(signature: Signature, machine: Machine) -> Verdict:
    """Whatever the backend serves, where some tiles fit the card."""
    verdict = serves(signature, machine)
    if verdict and not candidates(signature, machine):
        sizes = f"K={signature.dim('K')}, V={signature.dim('V')} with chunk_size={signature.option('chunk_size')}"
        verdict = refused(f"no tiles of {sizes} fit the shared memory of {machine.name}; use backend='eager'")
    return verdict


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """Blocks and tiles that fit the card; the first is the default."""
    chunk = signature.option("chunk_size")
    assert isinstance(chunk, int)
    if not signature.batch_invariant:
        chunk = min(chunk, max(signature.dim("T"), 1))
    if signature.option("transform") == "none":
        ways = [_candidate("scaled", block=block, warps=4, stages=1) for block in (16, 32, 64) if block < 2 * max(chunk, 16)]
        return ways[::-1]
    ways = _blocks(signature, chunk) if chunk <= _WIDEST_BLOCK else [*_wide_blocks(signature, chunk), *_walks(signature)]
    if 32 < chunk <= _WIDEST_BLOCK and max(signature.dim("K"), signature.dim("V")) <= 32:
        ways = [*ways, *(_candidate("walk", block=32, columns=32, pairs=False, warps=warps, stages=2, dot=dots(signature)[0]) for warps in (2, 1))]
    room = machine.shared_memory_bytes or CONSUMER_SHARED_BYTES
    return [way for way in ways if shared_bytes(signature, way) <= room]


def _candidate(variant: str, **params: int | str | bool) -> Candidate:
    return Candidate("triton", variant, tuple(params.items()), sources=_SOURCES)


def _blocks(signature: Signature, chunk: int) -> list[Candidate]:
    group = max(signature.dim("H") // max(signature.dim("G"), 1), 1)
    block = tile_width(chunk)
    widest = tile_width(max(signature.dim("K"), signature.dim("V")))
    narrowest = tile_width(min(signature.dim("K"), signature.dim("V")))
    usual = 4 if block == 64 else 2
    found: list[Candidate] = []
    for dot in dots(signature):
        ways = [
            (128, 1, usual, 168),
            (64, 1, usual, 0),
            (32, 1, usual, 0),
            (64, group, usual, 0),
            (128, 1, usual, 160),
        ]
        for columns, heads, warps, registers in ways:
            few = narrow_warps(signature.dtype, block, min(columns, narrowest), warps)
            cap = registers if block == 64 and signature.dtype != torch.float32 and few == 4 else 0
            way = _candidate("block", block=block, columns=min(columns, widest), heads=heads, warps=few, stages=1, dot=dot, registers=cap)
            if way not in found and not (dot == "ieee" and heads > 1):
                found.append(way)
    if widest <= JOINED_WIDTH and block == 64 and signature.dtype.itemsize == 2:
        joined = [_candidate("joined", block=block, heads=1, warps=warps, stages=1, dot="tf32") for warps in (4, 8)]
        found = [*found, *joined] if signature.option("transform") == "lam" else [*joined, *found]  # lam's one product gains nothing from more warps
    return found


def _wide_blocks(signature: Signature, chunk: int) -> list[Candidate]:
    """A chunk of at most 128 tokens as one block: lam's triangle is a product, and in 16 bits it fits; the walk's running matrices spill at wide heads."""
    narrowest, widest = (tile_width(of(signature.dim("K"), signature.dim("V"))) for of in (min, max))
    if signature.option("transform") != "lam" or chunk > 2 * _WIDEST_BLOCK or signature.dtype.itemsize != 2 or narrowest < 64:
        return []
    tiles = dict.fromkeys(min(columns, widest) for columns in (128, 64))
    return [_candidate("block", block=2 * _WIDEST_BLOCK, columns=columns, heads=1, warps=8, stages=1, dot="tf32", registers=0) for columns in tiles]


def _walks(signature: Signature) -> list[Candidate]:
    lam = signature.option("transform") == "lam"
    keys, widest = tile_width(signature.dim("K")), tile_width(max(signature.dim("K"), signature.dim("V")))
    found: list[Candidate] = []
    for dot in dots(signature):
        for block, columns, again in ((32, 64, False), (32, 32, False), (64, 32, False), (32, 32, True), (16, 16, True)):
            pairs = lam and again
            if lam and not pairs and keys > _WIDEST_GRAM:
                continue
            way = _candidate("walk", block=block, columns=min(columns, widest), pairs=pairs, warps=4, stages=2, dot=dot)
            if way not in found:
                found.append(way)
    return found


def shared_bytes(signature: Signature, candidate: Candidate) -> int:
    """An upper bound of a program's shared memory: operand tiles (twice for the split products of float32) and the conversions of the triangle."""
    chosen = dict(candidate.params)
    block, columns, width = int(chosen["block"]), int(chosen.get("columns", 2 * JOINED_WIDTH)), signature.dtype.itemsize
    square = block * block * 4
    if candidate.variant in ("block", "joined"):
        triangle = 5 * square if width == 4 else square + block * 64
        return max((4 if width == 4 else 2) * block * columns * width, triangle) + 4096
    keys, split = tile_width(signature.dim("K")), 2 if width == 4 else 1
    gram = keys * keys if signature.option("transform") == "lam" and not chosen["pairs"] else 0
    ahead = block * keys * width + 2048 if block == 64 or chosen["pairs"] else 0
    return split * (2 * block * keys + keys * columns + block * columns + square // 4) * width + gram * width + ahead + block * 64


def run(call: UWTransform, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """u `[B, T, H, V]` and w `[B, T, H, K]` in v's dtype."""
    return transformed(call, candidate)


def transformed(call: UWTransform, candidate: Candidate, chunk_offset: int = 0) -> tuple[Tensor, Tensor]:
    """u and w; with `chunk_offset` the first chunk of every sequence is that many tokens shorter (transform exact or lam)."""
    k, v = unit_stride(call.k), unit_stride(call.v)
    batch, tokens, heads, values = v.shape
    keys = k.shape[3]
    u = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    w = torch.empty((batch, tokens, heads, keys), dtype=v.dtype, device=v.device)
    cu_seqlens = on_device(call.cu_seqlens, v)
    slots = slot_count(batch, tokens, call.chunk_size, cu_seqlens, chunk_offset)
    beta, g = call.beta, call.g
    args = (
        k, v, beta, g, u, w, cu_seqlens, tokens, 0 if cu_seqlens is None else cu_seqlens.numel() - 1, chunk_offset,
        *k.stride()[:3], *v.stride()[:3], *beta.stride(), *((0, 0, 0) if g is None else g.stride()),
    )  # fmt: skip
    chosen = dict(candidate.params)
    block, chunk = chosen["block"], min(call.chunk_size, _LONGEST)
    shape = (heads, heads // max(k.shape[2], 1), keys, values, chunk, block)
    if candidate.variant == "scaled":
        tiles = (min(tile_width(keys), 128), min(tile_width(values), 128))
        UW_SCALED(slots * heads, args, (*shape, *tiles), int(chosen["warps"]), int(chosen["stages"]))
        return u, w
    lam, columns = call.transform == "lam", int(chosen.get("columns", 2 * JOINED_WIDTH))
    rounding = (lam, chosen["dot"])
    if candidate.variant != "walk":
        per, joined = int(chosen["heads"]), JOINED_WIDTH if candidate.variant == "joined" else 0
        constants = (*shape, min(tile_width(keys), columns), min(tile_width(values), columns), per, *rounding, joined)
        UW_BLOCK(slots * (heads // per), args, constants, int(chosen["warps"]), int(chosen["stages"]), int(chosen.get("registers", 0)))
    else:
        constants = (*shape, tile_width(keys), columns, chosen["pairs"], *rounding)
        tiles = -(-keys // columns) - (-values // columns)
        UW_WALK(slots * heads * tiles, args, constants, int(chosen["warps"]), int(chosen["stages"]))
    return u, w


compile_ahead = ahead_of(run, "uw_transform", run_backward)
remember, remember_backward = remembering(run), remembering_backward(run_backward)
