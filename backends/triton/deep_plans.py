"""Which tiles, warps and stages of deep_core's kernels are worth racing, and which are the default. Pure.

A card whose shared memory is too small for a plan does not see it; every list has one that fits a consumer card.
"""

from __future__ import annotations

from titans_backends.backend import Candidate
from titans_backends.machine import Machine
from titans_backends.signature import Signature

from .serving import CONSUMER_SHARED_BYTES, copies_rows, dots, narrow_warps, tile_width

__all__ = ["backward_ways", "forward_ways", "steps_rows"]

_SMS = 108
"""Multiprocessors assumed where the machine does not say."""
_MOST = 3
_SHORT = 256
"""Tokens up to which one launch is the default."""


def steps_rows(span: int) -> int:
    """The most tokens of a step of blocks of `span`: a power of two from 16 to 64."""
    return min(64, tile_width(span))


def _ways(signature: Signature, machine: Machine) -> list[tuple[int, int, int, int]]:
    """(rows, value columns, warps, stages), the expected best first."""
    size, keys, values = signature.dtype.itemsize, tile_width(signature.dim("K")), tile_width(signature.dim("V"))
    copied = copies_rows(signature)
    sequences = signature.dim("N") if signature.packed else signature.dim("B")
    streams = max(1, sequences) * signature.dim("H")
    wide, narrow = min(64, values), min(32, values)
    if keys > 128 or (size == 4 and keys > 64):  # a step's q and k are in registers
        found = [(16, narrow, 8, 2), (32, min(16, values), 8, 2), (16, min(16, values), 4, 2), (16, min(16, values), 4, 1)]
    elif size == 4:
        found = [(32, min(16, values), 4, 2), (16, narrow, 4, 2), (32, narrow, 4, 2), (16, min(16, values), 4, 1)]
    else:
        found = [(64, wide, 4, 3), (64, narrow, 4, 3), (32, narrow, 4, 3), (64, narrow, 4, 2), (32, narrow, 4, 2)]
        if not signature.batch_invariant and streams * -(-values // wide) < (machine.sms or _SMS):
            found = [found[1], found[0], *found[2:]]
    room = machine.shared_memory_bytes or CONSUMER_SHARED_BYTES
    span = int(signature.option("chunk_size") or 1) * int(signature.option("period") or 1)
    kept: dict[tuple[int, int, int, int], None] = {}
    for rows, columns, warps, stages in found:
        rows = min(rows, steps_rows(span))
        if stages < 2 or not copied:  # the loop's products read registers
            warps = narrow_warps(signature.dtype, max(rows, keys), columns, warps)
        if shared_bytes(rows, columns, keys, stages, size) <= room:
            kept[rows, columns, warps, stages] = None
    return list(kept)[:_MOST] or [(16, min(16, values), 4, 1)]


def shared_bytes(rows: int, columns: int, keys: int, stages: int, size: int) -> int:
    """Shared memory of a scan's program at most."""
    turned = rows * (2 * keys + 2 * columns) * size if size == 4 else 0  # float32 is laid out anew for its products
    return (stages * rows * (2 * keys + columns) + keys * columns + rows * columns) * size + turned + 2048


def forward_ways(signature: Signature, machine: Machine) -> list[Candidate]:
    """Of the forward."""
    first, *others = dots(signature)
    ways = [(way, first) for way in _ways(signature, machine)]
    ways += [(ways[-1][0], dot) for dot in others]
    found = [Candidate("triton", "prepared", _params(way, dot)) for way, dot in ways]
    small = next((way for way in _ways(signature, machine)[::-1] if way[0] <= 32), None)
    lone = [Candidate("triton", "scan", _params(small, first))] if small else []
    side = [Candidate("triton", "blocks", _side(way, first)) for way in _chains(signature, machine)]
    if signature.dim("T") <= _SHORT and not signature.batch_invariant:
        return [*lone, *found]
    return [*side, *found, *lone] if _lonely(signature, machine) else [*found, *lone, *side]


def backward_ways(signature: Signature, machine: Machine) -> list[Candidate]:
    """Of the backward: the same for its scans, and tiles for its tokens."""
    size, keys, values = signature.dtype.itemsize, tile_width(signature.dim("K")), tile_width(signature.dim("V"))
    rows = 32 if size == 4 or keys > 128 else 64
    if size == 4 and keys > 128:
        rows = 16
    warps = narrow_warps(signature.dtype, max(rows, keys), min(keys, values, 64), 4)
    first, *others = dots(signature)
    slim = [way for way in _ways(signature, machine) if way[1] <= 32]  # wider tiles spill where every block's D is written
    ways = [(way, first) for way in slim]
    ways += [(ways[-1][0], dot) for dot in others]
    tokens = (("token_rows", rows), ("token_warps", warps))
    found = [Candidate("triton", "scan", (*_params(way, dot), *tokens), direction="backward") for way, dot in ways]
    side = [Candidate("triton", "blocks", (*_side(way, first), *tokens), direction="backward") for way in _chains(signature, machine)]
    return [*side, *found] if _lonely(signature, machine) else [*found, *side]


def _lonely(signature: Signature, machine: Machine) -> bool:
    """Whether a scan would leave most of the card idle, and for long."""
    sequences = max(1, signature.dim("N") if signature.packed else signature.dim("B"))
    tiles = -(-signature.dim("V") // 32)
    return not signature.batch_invariant and signature.dim("T") > _SHORT and sequences * signature.dim("H") * tiles * 4 <= (machine.sms or _SMS)


def _chains(signature: Signature, machine: Machine) -> list[tuple[int, int, int, int, int]]:
    """(rows, value columns, warps and stages of the chain, warps of the parallel parts) of the way by blocks, where it is worth its memory: at most two."""
    span, sequences = int(signature.option("chunk_size") or 1) * int(signature.option("period") or 1), max(1, signature.dim("N"))
    size, keys, values = signature.dtype.itemsize, tile_width(signature.dim("K")), tile_width(signature.dim("V"))
    tokens = signature.dim("T") // (sequences if signature.packed else 1)
    if signature.batch_invariant or 2 * span < keys or tokens < 2 * span or keys > 128:
        return []
    columns = min(values, 64)
    rows = min(32 if size == 4 else 64, steps_rows(span))
    wide = narrow_warps(signature.dtype, max(rows, keys), min(columns, keys), 4)
    room, found = machine.shared_memory_bytes or CONSUMER_SHARED_BYTES, []
    for tile, warps, stages in ((32, 4, 3), (16, 4, 3), (16, 4, 2), (16, 4, 1)) if keys > 32 else ((16, 1, 4), (32, 4, 3)):
        tile = min(tile, values)
        if signature.dim("K") % 16 or stages < 2:  # N does not come by asynchronous copies
            warps = narrow_warps(signature.dtype, keys, tile, warps)
        if (stages * keys * keys + keys * tile) * size + 2048 <= room:
            found.append((rows, tile, warps, stages, wide))
    return found[: 1 if keys > 64 else 2]


def _side(way: tuple[int, int, int, int, int], dot: str) -> tuple[tuple[str, int | str], ...]:
    return *_params(way[:4], dot), ("block_warps", way[4])


def _params(way: tuple[int, int, int, int], dot: str) -> tuple[tuple[str, int | str], ...]:
    rows, columns, warps, stages = way
    return ("rows", rows), ("value_tile", columns), ("warps", warps), ("stages", stages), ("dot", dot)
