"""dual_core's flat mode by prefix sums: a thread block per chunk, head and slice of values, a warp per 16 tokens (kernel in cuda/dual_prefix.cu).

lam and none, heads of up to 32 keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.dual_core import DualCore
from titans_backends.machine import Machine
from titans_backends.precision import float32_precision
from titans_backends.signature import Signature

from .chunks import slots_of, three_strides
from .dual_fast import alpha_strides
from .launch import DTYPES, Kernel
from .serving import CONSUMER_SHARED_BYTES, padded
from .serving import candidate as _candidate
from .strides import aligned_rows, unit_stride

__all__ = ["prefix", "prefix_candidates"]

SOURCE = "dual_prefix.cu"
PREFIX = Kernel(SOURCE, "dual_prefix", "10P24q13iI2f")
_TRANSFORMS = {"none": 0, "lam": 2}
_MOST = 128
"""Tokens of a chunk."""
_WIDEST = 32
"""Keys of a head."""
_LINE, _GRAM = 36, 1024
"""Numbers from row to row of what the blocks hand on, and of a matrix of keys by keys."""


def blocks_of(chunk: int, tokens: int) -> int:
    """Blocks of 16 tokens in the longest chunk, as a power of two."""
    return padded(-(-min(chunk, max(tokens, 1)) // 16), 1)


def shared_bytes(blocks: int, width: int, transform: str) -> int:
    """Dynamic shared memory: what the blocks hand on, rows to be turned, and the blocks' decays."""
    state = width * _LINE
    each = 2 * state + max(state, _GRAM) if transform == "lam" else 2 * state
    return 4 * blocks * (each + 16 * _LINE + 1)


def prefix_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """Slices of values: narrow ones first where chunks are few, wide ones where they fill the card; none where the kernel does not serve."""
    chunk, transform = signature.option("chunk_size"), str(signature.option("transform"))
    assert isinstance(chunk, int)
    tokens, values = signature.dim("T"), signature.dim("V")
    if transform not in _TRANSFORMS or signature.dim("K") > _WIDEST or min(chunk, tokens) > _MOST:
        return []
    room, blocks = machine.shared_memory_bytes or CONSUMER_SHARED_BYTES, blocks_of(chunk, tokens)
    widths = [width for width in (8, 16, 32) if width < 2 * values and shared_bytes(blocks, width, transform) <= room]
    chunks = signature.dim("B") * signature.dim("H") * -(-tokens // chunk)
    if signature.batch_invariant or chunks * 2 > (machine.sms or 108):
        widths.reverse()
    return [_candidate("prefix", (SOURCE,), width=width) for width in widths]


def prefix(call: DualCore, candidate: Candidate) -> Tensor:
    """o `[B, T, H, V]` in v's dtype."""
    q, k, v = unit_stride(call.q), unit_stride(call.k), unit_stride(call.v)
    tokens, heads, values = v.shape[1:]
    groups, keys = k.shape[2:]
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    alpha = call.alpha if isinstance(call.alpha, Tensor) else None
    slots = slots_of(v, call.chunk_size, call.cu_seqlens, call.chunk_offset)
    width, blocks, size = int(candidate.param("width")), blocks_of(call.chunk_size, tokens), v.element_size()
    aligned = all(aligned_rows(x) for x in (q, k, v)) and keys % 4 == 0 and values % 2 == 0
    once = (("TF32_ONCE", True),) if size == 2 or float32_precision(on_cuda=True) != "highest" else ()
    wide = [x is not None and x.dtype == torch.float32 for x in (call.beta, call.g, call.fast_gate, call.slow_gate, alpha)]
    if not o.numel():
        return o
    PREFIX(
        (slots.count * heads * -(-values // width), 1, 1),
        32 * blocks,
        (
            ("DTYPE", DTYPES[v.dtype]), ("KEYS", keys), ("VALUES", values), ("CHUNK_BLOCKS", blocks), ("TRANSFORM", _TRANSFORMS[call.transform]), ("SLICE", width),
            ("DECAYED", call.g is not None), ("NORMED", bool(call.qk_l2norm)), ("ALIGNED", aligned), *once,
        ),
        (
            q, k, v, call.beta, call.g, call.fast_gate, call.slow_gate, alpha, slots.cu_seqlens, o,
            *three_strides(q), *three_strides(k), *three_strides(v), *three_strides(call.beta), *three_strides(call.g), *three_strides(call.fast_gate),
            *three_strides(call.slow_gate), *alpha_strides(call.alpha), tokens, heads, heads // groups if groups else 1, slots.sequences,
            min(call.chunk_size, 2**30), call.chunk_offset, slots.each, *wide, slots.wide, 0, 0.0 if alpha is not None else float(call.alpha),
            float(call.scale),
        ),
        shared_bytes(blocks, width, call.transform),
    )  # fmt: skip
    return o
