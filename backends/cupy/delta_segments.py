"""The exact gated delta rule with every sequence cut into segments that run side by side, in one launch (kernel in cuda/delta_segments.cu).

Which clusters, warps and lengths of segments a card is offered, and the launch. Heads of up to 64 keys; values in tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.gated_delta_rule import GatedDeltaRule
from titans_backends.machine import Machine
from titans_backends.signature import Signature

from .bounds import bounds_on
from .launch import DTYPES, Kernel
from .serving import CONSUMER_SHARED_BYTES
from .serving import candidate as _candidate
from .strides import aligned_rows, unit_stride

__all__ = ["segments", "segments_candidates", "widest_keys"]

SOURCE = "delta_segments.cu"
SEGMENTS = Kernel(SOURCE, "delta_segments", "10P18q13if")

_CHUNK = 16
_LONGEST = 128
"""Most tokens of a segment: beyond, all warps' segments would not fit a block."""
_PAIR_SCRATCH = 4 * (2 * (_CHUNK * 20 + 16) + 9 * 32)
_CLUSTERS = 90
"""The compute capability from which blocks form clusters."""
widest_keys = 64


def _group(tile: int, dtype: torch.dtype) -> int:
    """Fewest warps whose registers hold a segment's rows."""
    return (2 if dtype == torch.float32 else 1) if tile == 32 else 4


def _tile(keys: int) -> int:
    return 32 if keys <= 32 else 64


def _shared_bytes(tile: int, size: int, cluster: int, warps: int, group: int, longest: int) -> int:
    """Of a block, as the kernel lays it out."""
    row, count = tile * size, warps // group
    published, start = tile * tile * size, tile * tile * 4
    if (
        cluster > 1 and size == 2 and tile == 32
    ):  # gathered from the cluster: 16 rows of an offset in each segment's place, the others beside the maps
        start = (cluster - 1) * published + max(0, (cluster - 1) * (tile // 16) - count) * 16 * tile * 4
    place = max(longest * row, 2 * tile * tile * 4) + longest * 2 * row
    return count * place + max(count * _PAIR_SCRATCH, published + start) + tile * tile * 4 + 4 * count + 12 & ~15


def _fits(tile: int, size: int, cluster: int, warps: int, group: int, room: int) -> int:
    """The longest segments whose block fits, 0 if none does."""
    for longest in range(_LONGEST, 0, -_CHUNK):
        if _shared_bytes(tile, size, cluster, warps, group, longest) <= room:
            return longest
    return 0


def segments_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """Clusters and warps, the likeliest first; one without clusters is always among them and fits a consumer card."""
    keys = signature.dim("K")
    if keys > widest_keys:
        return []
    tile, size = _tile(keys), signature.dtype.itemsize
    group = _group(tile, signature.dtype)
    room = machine.shared_memory_bytes or CONSUMER_SHARED_BYTES
    clusters = machine.sm is not None and machine.sm >= _CLUSTERS
    tokens = max(1, signature.dim("T") // (signature.dim("N") if signature.packed else 1))
    streams = signature.dim("N") * signature.dim("H") * -(-signature.dim("V") // tile)
    shapes = [(1, 4, group), (8, 8, group), (4, 4, 1) if group == 1 else (4, 8, group)] if clusters else [(1, 8, group), (1, 4, group)]
    if not clusters and group < 4:
        shapes.append((1, 2, group))
    plans = []
    for cluster, warps, group in shapes:
        longest = _fits(tile, size, cluster, warps, group, room)
        if longest:
            segments_of_all = warps // group * cluster
            rounds = -(-tokens // (segments_of_all * longest))
            waves = -(-streams * cluster // (machine.sms or 108))
            chunks = max(1, min(longest // _CHUNK, -(-tokens // (segments_of_all * _CHUNK))))
            steps = (warps // group).bit_length() - 1
            # cycles, from an H100's: pairs of chunks and their chunks, the joins in a block, the cluster's barrier and the maps fetched
            work = 1500 * (-(-chunks // 2)) + (1200 + 30 * warps) * chunks + (500 + 100 * warps) * steps
            cost = rounds * waves * (work + (1500 + 350 * cluster if cluster > 1 else 0))
            plans.append((cost, cluster, warps, group, longest))
    if not signature.batch_invariant:
        plans.sort()
    return [
        _candidate("segments", (SOURCE,), cluster=cluster, warps=warps, group=group, longest=longest) for _, cluster, warps, group, longest in plans
    ]


def segments(call: GatedDeltaRule, candidate: Candidate) -> tuple[Tensor, Tensor | None]:
    """o `[B, T, H, V]` and the final state."""
    q, k, v, beta, g, gate = unit_stride(call.q), unit_stride(call.k), unit_stride(call.v), call.beta, call.g, call.gate
    bounds = bounds_on(call.cu_seqlens, v)
    initial = None if call.initial_state is None else call.initial_state.contiguous()
    batch, tokens, heads, values = v.shape
    groups, keys = k.shape[2:]
    sequences = batch if bounds is None else bounds.numel() - 1
    o = torch.empty((batch, tokens, heads, values), dtype=v.dtype, device=v.device)
    final = torch.empty((sequences, heads, keys, values), dtype=torch.float32, device=v.device) if call.output_final_state else None
    tile, size = _tile(keys), v.element_size()
    cluster, warps, group = (int(candidate.param(name)) for name in ("cluster", "warps", "group"))
    share = -(-tokens // (warps // group * cluster * _CHUNK)) * _CHUNK
    longest = max(_CHUNK, min(int(candidate.param("longest")), share))
    none = (0, 0, 0)
    SEGMENTS(
        (sequences * heads * -(-values // tile) * cluster, 1, 1),
        32 * warps,
        (("DTYPE", DTYPES[v.dtype]), ("KEYS", tile), ("VALUES", tile), ("WARPS", warps), ("GROUP", group), ("CLUSTER", cluster)),
        (
            q, k, v, beta, g, gate, initial, bounds, o, final,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *beta.stride(), *(none if g is None else g.stride()),
            *(none if gate is None else gate.stride()),
            tokens, heads, heads // groups if groups else 1, keys, values, longest,
            beta.dtype == torch.float32, g is not None and g.dtype == torch.float32, gate is not None and gate.dtype == torch.float32,
            bounds is not None and bounds.dtype == torch.int64, bool(call.qk_l2norm),
            keys * size % 16 == 0 and values * size % 16 == 0 and aligned_rows(q) and aligned_rows(k) and aligned_rows(v), values * size % 16 == 0,
            keys**-0.5 if call.scale is None else float(call.scale),
        ),
        _shared_bytes(tile, size, cluster, warps, group, longest),
    )  # fmt: skip
    return o, final
