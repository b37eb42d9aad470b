"""Which schedules and tiles of the delta rule's backward are worth racing, and which is the default.

Pure, as `delta_plans`: a card whose shared memory is too small for a plan does not see it, and every list has one that fits a consumer card.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from titans_backends.backend import Candidate, Param
from titans_backends.machine import Machine
from titans_backends.signature import Signature

from .delta_plans import LONG, SMS, shared_bytes
from .serving import CONSUMER_SHARED_BYTES, copies_rows, dots, narrow_warps, tile_width

__all__ = ["backward_plans", "reverse_bytes", "together_bytes"]


class _Way(NamedTuple):
    """Tiles of a backward: of the two scans, and of the kernels that run in parallel over blocks after them."""

    block: int
    value_tile: int
    warps: int
    stages: int
    gradient_keys: int
    gradient_tile: int
    gradient_warps: int
    gradient_stages: int
    one: bool = False
    """Whether a single kernel makes the gradients of q, k and w, with all key columns in a program (`delta_together`)."""


_MOST_SAVED = 5
_LAST_RESORTS = (_Way(32, 32, 4, 2, 64, 32, 4, 1), _Way(16, 16, 4, 2, 64, 16, 4, 1))
"""For cards with little shared memory."""


def backward_plans(signature: Signature, machine: Machine, grid: int, *, fixed: bool = False) -> list[Candidate]:
    """The plans of the backward that fit, the default first. `grid`: the blocks on which states may be saved; `fixed`: no others will do."""
    keys, values = (tile_width(signature.dim(letter)) for letter in "KV")
    size, wide = signature.dtype.itemsize, max(keys, values)
    room = machine.shared_memory_bytes or CONSUMER_SHARED_BYTES
    ways = [*_ways(signature.dtype, wide, values), *_LAST_RESORTS]
    if size == 4 or copies_rows(signature):
        ways += _later(signature.dtype, wide, values)
    if fixed:
        ways = [way for way in ways if way.block == grid] or [ways[0]._replace(block=grid)]
    least = 16
    if size == 2 and not copies_rows(signature):
        least = 64  # columns of products that are right without copies; 32 rows first, since the addresses take registers
        wider = {way if way.warps <= 2 else way._replace(value_tile=least, warps=8 if way.block < 64 and keys > 64 else 4, stages=2) for way in ways}
        ways = sorted(wider, key=lambda way: (way.block != 32, way))
    found: list[Candidate] = []
    for index, way in enumerate(ways):
        rows, columns = way.block, keys if way.one else min(keys, way.gradient_keys)
        plan: dict[str, Param] = {
            "block": rows,
            "prepare_warps": 1 if wide <= 32 and rows == 32 and size == 2 else 4,
            "value_tile": min(way.value_tile, max(values, least)),
            "warps": way.warps,
            "stages": way.stages,
        }
        rest: dict[str, Param] = {
            "update_warps": narrow_warps(signature.dtype, rows, min(values, 64), min(way.gradient_warps, 4)),
            "gradient_keys": columns,
            "gradient_tile": way.gradient_tile,
            "gradient_warps": narrow_warps(signature.dtype, rows, columns, way.gradient_warps),
            "gradient_stages": way.gradient_stages,
            "dot": dots(signature)[0],
            **({"gradients": "one"} if way.one else {}),
        }
        chain: dict[str, Param] = {"chain_tile": 16, "chain_warps": 1 if wide <= 32 else 4, "chain_stages": 3}
        maps: dict[str, Param] = {"map_tile": 64 if size == 2 else 32, "map_warps": 2 if wide <= 32 and rows < 64 else 4}
        cuts: list[dict[str, Param]] = [{"segment": tokens // rows, **maps, **chain} for tokens in ((256, 512) if wide <= 64 else (1024, 2048))]
        last = (way.gradient_stages * (columns + 2 * rows) * way.gradient_tile + 2 * rows * columns + 3 * rows * rows) * size
        if way.one:
            last = together_bytes(way.gradient_stages, way.gradient_tile, rows, columns, size)
        back = (
            reverse_bytes(plan, keys, values, products=3 if signature.has("w") else 2) if size == 2 else 0
        )  # float32 takes less than its scan forward
        sides = cuts if index == 0 else cuts[1:] if index == 1 and rows >= ways[0].block else cuts[:1] if way.one and not ways[index - 1].one else ()
        for cut in ({}, *sides):
            if max(shared_bytes("split" if cut else "scan", {**plan, **cut}, keys, values, size), back, last) <= room:
                params = {**plan, **cut, **rest}
                found.append(Candidate("triton", "split" if cut else "again", tuple(params.items()), direction="backward"))
    if signature.may_save and not signature.packed:
        dense = [one for one in found if one.param("block") == grid]
        found += [replace(one, variant="saved", saves_states=True) for one in dense[:_MOST_SAVED]]
    few = _is_few(signature, machine, values)
    return sorted(found, key=lambda one: (one.variant == "split") != few)


def _ways(dtype: torch.dtype, wide: int, values: int) -> list[_Way]:
    """By the width of the heads; float32 takes smaller tiles, since its products are three."""
    if dtype == torch.float32:
        return [_Way(32, 16, 2, 3, 32, 32, 4, 2)] if wide <= 32 else [_Way(32, 16, 4, 3 if wide <= 64 else 2, 64, 32, 4, 1)]
    if wide <= 32:
        return [_Way(32, min(values, 32), 2, 3, 32, 32, 2, 1), _Way(64, min(values, 32), 4, 3, 32, 32, 2, 1)]
    if wide <= 64:
        return [_Way(64, 32, 4, 3, 64, 64, 4, 1), _Way(64, 32, 4, 3, 64, 32, 4, 2)]
    if wide <= 128:
        return [_Way(64, 32, 4, 3, 64, 32, 4, 3), _Way(64, 64, 4, 2, 64, 32, 4, 3), _Way(64, 32, 4, 3, 64, 64, 4, 2)]
    return []


def _later(dtype: torch.dtype, wide: int, values: int) -> list[_Way]:
    """What is seldom the fastest and compiles long: one kernel for all inputs of narrow heads, faster on long sequences; more bytes on their way for wide ones."""
    if wide <= 32:
        first = _ways(dtype, wide, values)[0]
        return [first._replace(gradient_stages=1 if dtype.itemsize == 2 else 2, one=True)]
    return [_Way(64, 32, 4, 3, 64, 64, 4, 3)] if 64 < wide <= 128 and dtype.itemsize == 2 else []


def together_bytes(stages: int, tile: int, rows: int, keys: int, size: int) -> int:
    """Shared memory of the one kernel: its loads, or what stands behind its last loop; k of the block beside either."""
    return (max(stages * (keys + 3 * rows) * tile, 4 * rows * keys + 2 * rows * rows) + rows * keys) * size


def _is_few(signature: Signature, machine: Machine, values: int) -> bool:
    """Whether a call has too few programs for the card and enough tokens to be cut."""
    if signature.batch_invariant:
        return False
    sequences = signature.dim("N") if signature.packed else signature.dim("B")
    tokens = signature.dim("T") // max(sequences, 1) if signature.packed else signature.dim("T")
    return tokens >= LONG and max(sequences, 1) * signature.dim("H") * -(-values // 64) <= (machine.sms or SMS) // 3


def reverse_bytes(params: dict[str, Param], keys: int, values: int, products: int) -> int:
    """The same of the scan back in 16 bits. `products`: tiles of keys a block, q, k and with slow_core w, which takes the place of A' and v."""
    block, stages = int(params["block"]), int(params["stages"])
    tile = min(int(params["value_tile"]), values)
    stage = products * block * keys + (4 - products) * block * block + (4 - products) * block * tile
    return (stages * stage + stages * keys * tile) * 2 + 4 * 4 * block * stages + 64
