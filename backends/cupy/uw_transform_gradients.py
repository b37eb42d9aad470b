"""The gradients of uw_transform: a chunk and k head per block in one launch, its v heads in order (SPEC.md 10); chunks of up to 128 tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.uw_transform import UWTransform
from titans_backends.machine import Machine
from titans_backends.signature import Signature

from .chunks import TRANSFORMS, slots_of, three_strides
from .launch import DTYPES, Kernel
from .serving import CONSUMER_SHARED_BYTES, padded
from .sources import source_names
from .strides import aligned_rows, unit_stride

__all__ = ["transformed_gradients", "ways"]

SOURCE = "uw_transform_gradients.cu"
GRADIENTS = Kernel(SOURCE, "uw_transform_gradients", "11P18q10i")
_INPUTS = ("k", "v", "beta", "g")
_MOST = 3
"""Candidates of a call."""
_PLANS = ((128, 8), (128, 4), (64, 8), (32, 8))
"""Columns of a tile, and warps."""


def ways(signature: Signature, machine: Machine, side: int, transform: str) -> list[Candidate]:
    """Tiles that fit the card, for chunks of `side` tokens; the first is the default, and none is where even narrow ones do not fit."""
    keys, values = signature.dim("K"), signature.dim("V")
    widest, room = padded(max(keys, values), 32), machine.shared_memory_bytes or CONSUMER_SHARED_BYTES
    found: dict[Candidate, None] = {}
    solving = padded(-(-keys // 16) - (-values // 16), 1)  # warps beyond one for each 16 columns only share the squares
    for columns, most in _PLANS:
        columns = min(columns, widest)
        for warps in (max(side // 16, min(most, solving)), max(side // 16, most)):
            if columns * signature.dtype.itemsize > 512 or shared_bytes(side, columns, warps, keys, values, transform, signature.dtype) > room:
                continue
            params = (("side", side), ("slice", columns), ("warps", warps))
            found[Candidate("cupy", "block", params, "backward", sources=source_names(SOURCE))] = None
    return list(found)[:_MOST]


def shared_bytes(side: int, columns: int, warps: int, keys: int, values: int, transform: str, dtype: torch.dtype) -> int:
    """Dynamic shared memory of a block, as the kernel lays it out."""
    size, blocks = dtype.itemsize, side // 16
    square = side * max(side, 32) * size
    resident, squares = columns >= max(keys, values), 0
    if transform == "lam" and resident and side > 64:
        squares = 2 * square
    elif transform != "none":
        squares = square + max(square, side * 80) + (square if transform == "lam" else side * 64 if size == 2 else 0)
    sums = -(-values // 16) - (-keys // 16) + warps // blocks + blocks
    return (5 if resident else 3) * side * columns * size + squares + side * (20 + 4 * sums)


def transformed_gradients(
    call: UWTransform, grads: tuple[Tensor | None, ...], needs: frozenset[str], candidate: Candidate, chunk_offset: int = 0
) -> tuple[Tensor | None, ...]:
    """Gradients of k, v, beta and g, in that order; with `chunk_offset` the first chunk of every sequence is that many tokens shorter."""
    k, v = unit_stride(call.k), unit_stride(call.v)
    du, dw = (None if grad is None else unit_stride(grad) for grad in grads)
    into: dict[str, Tensor] = {}
    for name in _INPUTS:
        like: Tensor | None = getattr(call, name)
        if name in needs and like is not None:
            into[name] = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    made = tuple(into.get(name) for name in _INPUTS)
    tokens, heads, values = v.shape[1:]
    groups, keys = k.shape[2:]
    if not v.numel() or (du is None and dw is None):
        for grad in into.values():
            grad.zero_()
        return made
    dk, dv, dbeta, dg = made
    if du is None and dv is not None:
        dv.zero_()
        dv = None
    if all(grad is None for grad in (dk, dv, dbeta, dg)):
        return made
    side, columns, warps = (int(candidate.param(name)) for name in ("side", "slice", "warps"))
    slots = slots_of(v, call.chunk_size, call.cu_seqlens, chunk_offset)
    GRADIENTS(
        (slots.count * groups, 1, 1),
        32 * warps,
        (
            ("DTYPE", DTYPES[v.dtype]), ("KEYS", keys), ("VALUES", values), ("SIDE", side), ("TRANSFORM", TRANSFORMS[call.transform]),
            ("SLICE", columns), ("RESIDENT", columns >= max(keys, values)), ("WARPS", warps), ("GROUPED", heads > groups),
            ("ALIGNED", all(aligned_rows(x, whole=True) for x in (k, v, du, dw) if x is not None)),
        ),
        (
            k, v, call.beta, call.g, du, dw, dk, dv, dbeta, dg, slots.cu_seqlens,
            *three_strides(k), *three_strides(v), *three_strides(call.beta), *three_strides(call.g), *three_strides(du), *three_strides(dw),
            heads, heads // groups, call.beta.dtype == torch.float32, call.g is not None and call.g.dtype == torch.float32,
            slots.wide, slots.sequences, tokens, min(call.chunk_size, 2**30), chunk_offset, slots.each,
        ),
        shared_bytes(side, columns, warps, keys, values, call.transform, v.dtype),
    )  # fmt: skip
    return made
