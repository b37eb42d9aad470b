"""uw_transform: a chunk and head per block in one launch, the triangle and its inverse on chip (SPEC.md 3); chunks of up to 128 tokens.

The backward: uw_transform_gradients.py.
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
from .chunks import TRANSFORMS, side_of, slots_of, three_strides
from .launch import DTYPES, Kernel
from .program import remembering, remembering_backward
from .serving import CONSUMER_SHARED_BYTES, WIDEST, padded, serves
from .serving import candidate as _candidate
from .strides import aligned_rows, unit_stride
from .uw_transform_gradients import transformed_gradients, ways

__all__ = ["backward_candidates", "candidates", "compile_ahead", "remember", "remember_backward", "run", "run_backward", "supports"]

SOURCE = "uw_transform.cu"
UW = Kernel(SOURCE, "uw_transform", "7P12q9i")
_LONGEST = 128
_MOST = 4
"""Candidates of a call."""
_PLANS = ((64, 1), (128, 1), (64, 2), (32, 1), (128, 2), (32, 2))
"""Columns of a slice, and warps for each 16 tokens of a chunk; the first was the fastest on an H100 for heads of 128."""


def supports(signature: Signature, machine: Machine) -> Verdict:
    """What `serving.serves` says, and chunks that one tile holds."""
    verdict = serves(signature, machine, WIDEST)
    if side_of(signature) > _LONGEST:
        verdict &= refused(f"chunk_size={signature.option('chunk_size')} is above {_LONGEST} tokens; use backend='triton'")
    return verdict


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """Slices of columns and warps whose tiles fit the card; the first is the default."""
    side, transform = side_of(signature), str(signature.option("transform"))
    widest, room = padded(max(signature.dim("K"), signature.dim("V")), 32), machine.shared_memory_bytes or CONSUMER_SHARED_BYTES
    found: dict[Candidate, None] = {}
    for columns, each in _PLANS:
        columns, warps = min(columns, widest), max(1, side // 16) * each
        if warps <= 8 and shared_bytes(side, columns, transform, signature.dtype) <= room:
            found[_candidate("block", (SOURCE,), side=side, slice=columns, warps=warps)] = None
    return list(found)[:_MOST]


def shared_bytes(side: int, columns: int, transform: str, dtype: torch.dtype) -> int:
    """Dynamic shared memory of a block, as the kernel lays it out."""
    size = dtype.itemsize
    triangle = 0 if transform == "none" else side * max(side, 32) * size
    exact = (side * 32 * size if size == 2 else 0) + side * 20 * 4 if transform == "exact" else 0
    return 2 * side * columns * size + triangle + exact + side * 16


def run(call: UWTransform, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """u `[B, T, H, V]` and w `[B, T, H, K]` in v's dtype."""
    k, v = unit_stride(call.k), unit_stride(call.v)
    batch, tokens, heads, values = v.shape
    groups, keys = k.shape[2:]
    u, w = torch.empty(v.shape, dtype=v.dtype, device=v.device), torch.empty((batch, tokens, heads, keys), dtype=v.dtype, device=v.device)
    slots = slots_of(v, call.chunk_size, call.cu_seqlens)
    if not tokens:
        return u, w
    side, columns, warps = (int(candidate.param(name)) for name in ("side", "slice", "warps"))
    UW(
        (slots.count * heads, 1, 1),
        32 * warps,
        (
            ("DTYPE", DTYPES[v.dtype]), ("KEYS", keys), ("VALUES", values), ("SIDE", side), ("TRANSFORM", TRANSFORMS[call.transform]),
            ("SLICE", columns), ("WARPS", warps), ("ALIGNED", aligned_rows(k, whole=True) and aligned_rows(v, whole=True)),
        ),
        (
            k, v, call.beta, call.g, u, w, slots.cu_seqlens,
            *three_strides(k), *three_strides(v), *three_strides(call.beta), *three_strides(call.g),
            heads, heads // groups if groups else 1, call.beta.dtype == torch.float32, call.g is not None and call.g.dtype == torch.float32,
            slots.wide, slots.sequences, tokens, min(call.chunk_size, 2**30), slots.each,
        ),
        shared_bytes(side, columns, call.transform, v.dtype),
    )  # fmt: skip
    return u, w


def backward_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """Tiles of the backward that fit the card; the first is the default."""
    return ways(signature, machine, side_of(signature), str(signature.option("transform")))


def run_backward(
    call: UWTransform, grads: tuple[Tensor | None, ...], states: Tensor | None, needs: frozenset[str], candidate: Candidate
) -> tuple[Tensor | None, ...]:
    """Gradients of k, v, beta and g, in that order."""
    return transformed_gradients(call, grads, needs, candidate)


compile_ahead = ahead_of(run, "uw_transform", run_backward)
remember, remember_backward = remembering(run), remembering_backward(run_backward)
