"""dual_core where S_slow is the exact delta rule: gated_delta_rule's schedules with S_fast carried in the scan's own pass (delta_schedules.py).

S_fast is cleared where a chunk begins, so a chunk must be whole blocks; the slow core does not mind. "split" cuts at chunks' starts, where there
is no S_fast to hand over.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate, Param
from titans_backends.contracts.dual_core import DualCore
from titans_backends.machine import Machine
from titans_backends.signature import Signature

from .delta_schedules import SCHEDULES, Fast, Operands
from .grid import on_device, unit_stride
from .serving import CONSUMER_SHARED_BYTES, dots, least_columns, tile_width
from .slow_scan import NORMALIZE

__all__ = ["exact", "exact_candidates"]

_SOURCES = tuple(
    f"titans_backends.backends.triton.{name}"
    for name in (
        "dual_recurrent", "dual_exact", "delta_schedules", "delta_prepare", "delta_scan", "slow_scan", "decay", "inverse", "grid", "launch", "serving",
    )
)  # fmt: skip
_ONE_CHUNK = 2**30
_SERIAL_TOKENS = 1024
"""Shorter sequences are not worth cutting."""
_SMALL = 32
"""Head sizes whose state is one tile or two."""
_MAP_TILE = 32
_LONGEST_SEGMENT = 64
"""In blocks."""
_FARTHEST = 4096
"""Tokens of chunk_offset up to which absent blocks are prepared like others: their scratch grows with it."""


def is_exact(signature: Signature) -> bool:
    """Whether S_slow is the exact delta rule on any grid."""
    options = dict(signature.options)
    return (
        options["memory"] == "recurrent"
        and options["transform"] == "exact"
        and bool(options["delta"])
        and not options["normalize_read"]
        and not signature.has("chunk_decay")
    )


def exact_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """Blocks that divide the chunk: scans of several tiles, and segments of three lengths, which come first where a long sequence has few heads."""
    chunk = signature.option("chunk_size")
    assert isinstance(chunk, int)
    if not is_exact(signature) or int(str(signature.option("chunk_offset"))) > _FARTHEST:
        return []
    keys, values = tile_width(signature.dim("K")), tile_width(signature.dim("V"))
    small = max(keys, values) <= _SMALL
    room = machine.shared_memory_bytes or CONSUMER_SHARED_BYTES
    dot, least = dots(signature)[0], least_columns(signature)
    scans: list[Candidate] = []
    splits: list[Candidate] = []
    for block, tile, prepare_warps, warps, stages in _shapes(signature, small):
        tile = max(min(tile, values), least if block >= 64 else 1)
        map_tile = max(_MAP_TILE, least if block >= 64 else 1)
        if chunk % block or _scan_bytes(signature, block, tile, stages, dot) > room:
            continue
        shape = (block, tile, prepare_warps, warps, stages, dot)
        scans.append(_candidate("scan", *shape))
        if _scan_bytes(signature, block, max(tile, map_tile), stages, dot) > room:
            continue
        for length in (16,) if splits and small else (16, 8, 32) if small else (16, 32):
            per = chunk // block
            segment = -(-length // per) * per
            if segment <= _LONGEST_SEGMENT:
                chain = (16, 1, 3) if small else (32, 4, 2)
                names = ("segment", "map_tile", "map_warps", "chain_tile", "chain_warps", "chain_stages")
                cut = zip(names, (segment, map_tile, 2 if small and block <= 32 else 4, *chain), strict=True)
                splits.append(_candidate("split", *shape, *cut))
    scans, splits = list(dict.fromkeys(scans))[: 8 if small else 3], list(dict.fromkeys(splits))[: 6 if small else 3]
    return [*splits, *scans] if _is_cut(signature, machine, values) else [*scans, *splits]


def _shapes(signature: Signature, small: bool) -> list[tuple[int, int, int, int, int]]:
    """(block, value tile, warps of the preparation, warps, stages), the first as the default, the last for cards with little memory.

    In float32 by what spills least: three products of tf32 for one leave registers for blocks of 32 rows and tiles of 16 columns. Small heads in
    16 bits take blocks of 32 too: where all of a block's keys are the same, the rounding of A' adds up over its rows.
    """
    float32 = signature.dtype == torch.float32
    blocks_of_64 = [(64, 32, 4, 4, 3), (64, 16, 4, 4, 3), (64, 16, 4, 4, 2), (64, 32, 4, 4, 2)]
    blocks_of_32 = [(32, 16, 2, 2, 3), (32, 16, 2, 4, 2), (32, 32, 2, 2, 3), (32, 32, 2, 4, 3)]
    least = [(16, 16, 4, 4, 2)]
    if small:
        return blocks_of_32 + (blocks_of_64 if float32 else []) + least
    if float32:
        return [(32, 32, 4, 4, 3), (32, 32, 4, 4, 2), (64, 32, 4, 4, 2), (32, 16, 4, 4, 2), *least]
    return [(64, 32, 4, 4, 3), (64, 64, 4, 4, 3), (64, 32, 4, 4, 2), (32, 16, 4, 4, 2), *least]


def _is_cut(signature: Signature, machine: Machine, values: int) -> bool:
    """Whether segments are the default: few programs, each long; never where batches must not matter."""
    if signature.batch_invariant or signature.dim("T") < _SERIAL_TOKENS:
        return False
    programs = signature.dim("N" if signature.packed else "B") * signature.dim("H") * -(-values // 32)
    return programs * 2 <= (machine.sms or 64)


def _candidate(variant: str, block: int, tile: int, prepare_warps: int, warps: int, stages: int, dot: str, *more: tuple[str, int]) -> Candidate:
    shape: dict[str, Param] = {"block": block, "value_tile": tile, "prepare_warps": prepare_warps, "warps": warps, "stages": stages, "dot": dot}
    return Candidate("triton", variant, (*shape.items(), *more), sources=_SOURCES)


def _scan_bytes(signature: Signature, block: int, tile: int, stages: int, dot: str) -> int:
    """An upper bound of the scan's shared memory, from what the compiler was seen to take: what is loaded ahead, and a state or U as an operand."""
    keys = tile_width(signature.dim("K"))
    ahead = block * (2 * keys + tile) + (3 if signature.has("g") else 2) * block * block
    if dot == "tf32x3":  # operands are split on their way, so they are no copies of what was loaded
        return (ahead * (stages - 1) + 2 * max(block, keys) * tile) * signature.dtype.itemsize + 4096
    return (ahead * stages + max(block, keys) * tile) * signature.dtype.itemsize + 4096


def exact(call: DualCore, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """o `[B, T, H, V]` and both final states `[N, H, K, V]` in float32, None unless asked."""
    k, v, alpha = unit_stride(call.k), unit_stride(call.v), call.alpha
    cu_seqlens = on_device(call.cu_seqlens, v)
    if isinstance(alpha, Tensor) and alpha.dim() < 3:
        alpha = alpha.expand(v.shape[:3])
    fast = Fast(min(call.chunk_size, _ONE_CHUNK), alpha, call.fast_gate, _contiguous(call.initial_fast_state), None)
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    x = Operands(
        unit_stride(call.q), k, v, call.beta, call.g, call.slow_gate, _contiguous(call.initial_state), None, o, cu_seqlens, float(call.scale),
        call.qk_l2norm, call.chunk_offset, fast,
    )  # fmt: skip
    schedule = candidate.variant
    if call.output_final_state:
        shape = (x.sequences, x.heads, x.keys, x.values)
        whole = v.shape[1] > 0 and (schedule == "scan" or cu_seqlens is None)  # segments write nothing for a packed sequence without tokens
        x.final = _state(shape, x.initial, v, written=v.shape[1] > 0)
        fast.final = _state(shape, fast.initial, v, written=whole)
    if o.numel():
        SCHEDULES[schedule](x, dict(candidate.params))
    if x.final is not None and call.normalize_final:
        NORMALIZE(x.sequences * x.heads, (x.final,), (x.keys * x.values, 1024), 4, 2)
    return o, x.final, fast.final


def _state(shape: tuple[int, ...], initial: Tensor | None, like: Tensor, *, written: bool) -> Tensor:
    """Memory for a final state in float32; what the sequences began with where a kernel does not write all of it."""
    if written:
        return torch.empty(shape, dtype=torch.float32, device=like.device)
    return torch.zeros(shape, dtype=torch.float32, device=like.device) if initial is None else initial.to(torch.float32, copy=True)


def _contiguous(state: Tensor | None) -> Tensor | None:
    return None if state is None else state.contiguous()
