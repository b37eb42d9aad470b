"""dual_core's last launch in its recurrent mode: S_fast, added to what the slow core left in o, and its final state (kernel in cuda/dual_fast.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.contracts.dual_core import DualCore
from titans_backends.machine import Machine
from titans_backends.signature import Signature

from .chunks import slots_of, three_strides
from .launch import DTYPES, Kernel
from .serving import CONSUMER_SHARED_BYTES, padded
from .strides import aligned_rows, unit_stride

__all__ = ["SOURCE", "alpha_strides", "fast_plans", "merge_fast"]

SOURCE = "dual_fast.cu"
FAST = Kernel(SOURCE, "dual_fast", "10P18q13i2f")
_PLANS = ((64, 1), (32, 1), (64, 2), (128, 1), (32, 2), (16, 1))
"""Tokens of a tile, and tiles of keys and values that are there at once."""


def fast_plans(signature: Signature, machine: Machine) -> list[tuple[int, int]]:
    """Tiles and buffers that fit the card, none wider than a chunk needs; the first is the default."""
    chunk = signature.option("chunk_size")
    assert isinstance(chunk, int)
    reach = chunk if signature.batch_invariant else min(chunk, max(signature.dim("T"), 1))
    room, size = machine.shared_memory_bytes or CONSUMER_SHARED_BYTES, signature.dtype.itemsize
    found: dict[tuple[int, int], None] = {}
    for side, buffers in _PLANS:
        if side > padded(reach) or side * size > 256:
            continue
        used = buffers if side < reach else 1
        if shared_bytes(side, used, signature.dim("K"), signature.dim("V"), size) <= room:
            found[side, used] = None
    return list(found)


def shared_bytes(side: int, buffers: int, keys: int, values: int, size: int) -> int:
    """Dynamic shared memory of a block: queries, tiles of keys and values, and a tile's weights."""
    keys, values = padded(keys, 32), padded(values, 32)
    return side * size * (keys + buffers * (keys + values)) + 4 * side


def alpha_strides(alpha: float | Tensor) -> tuple[int, int, int]:
    """Batch, token and head strides of alpha in any of its shapes; zeros for a number."""
    if not isinstance(alpha, Tensor) or not alpha.dim():
        return (0, 0, 0)
    return three_strides(alpha) if alpha.dim() == 3 else (0, 0, alpha.stride(0))


def merge_fast(call: DualCore, o: Tensor, side: int, buffers: int) -> Tensor | None:
    """Adds the fast core to `o`, the gated slow core's `[B, T, H, V]`, contiguous, in place: alpha fast + (1 - alpha) slow. The final fast state, if asked."""
    q, k, v = unit_stride(call.q), unit_stride(call.k), unit_stride(call.v)
    tokens, heads, values = v.shape[1:]
    groups, keys = k.shape[2:]
    alpha = call.alpha if isinstance(call.alpha, Tensor) else None
    slots = slots_of(v, call.chunk_size, call.cu_seqlens, call.chunk_offset)
    initial = None if call.initial_fast_state is None else call.initial_fast_state.contiguous()
    final = torch.empty((slots.sequences, heads, keys, values), dtype=torch.float32, device=v.device) if call.output_final_state else None
    blocks = -(-min(call.chunk_size, tokens) // side)
    states = 0 if final is None else slots.sequences * heads * -(-keys // side)
    wide = [x is not None and x.dtype == torch.float32 for x in (call.beta, call.fast_gate, alpha)]
    FAST(
        (states + slots.count * blocks * heads, 1, 1),
        2 * side,
        (
            ("DTYPE", DTYPES[v.dtype]), ("KEYS", keys), ("VALUES", values), ("SIDE", side), ("BUFFERS", buffers), ("STARTED", initial is not None),
            ("ALIGNED", all(aligned_rows(x, whole=True) for x in (q, k, v))),
        ),
        (
            q, k, v, call.beta, call.fast_gate, alpha, initial, o, final, slots.cu_seqlens,
            *three_strides(q), *three_strides(k), *three_strides(v), *three_strides(call.beta), *three_strides(call.fast_gate), *alpha_strides(call.alpha),
            heads, heads // groups if groups else 1, *wide, slots.wide, slots.sequences, tokens, min(call.chunk_size, 2**30), call.chunk_offset,
            slots.each, blocks, bool(call.qk_l2norm), float(call.scale), 0.0 if alpha is not None else float(call.alpha),
        ),
        shared_bytes(side, buffers, keys, values, v.element_size()),
    )  # fmt: skip
    return final
