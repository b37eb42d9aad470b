"""Which schedules and tiles of the exact gated delta rule are worth racing, and which is the default.

Pure: a card whose shared memory is too small for a plan does not see it. Every list has a plan that fits a consumer card.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from titans_backends.backend import Candidate, Param
from titans_backends.machine import Machine
from titans_backends.signature import Signature

from .serving import CONSUMER_SHARED_BYTES, dots, least_columns, tile_width

__all__ = ["LONG", "SMS", "delta_plans", "saving", "shared_bytes"]

_SHORT = 256
"""Tokens up to which one launch is the default."""
LONG = 4096
"""Tokens from which few heads are split."""
SMS = 108
"""Multiprocessors assumed where the machine does not say."""

Plan = tuple[str, dict[str, Param]]


def delta_plans(signature: Signature, machine: Machine) -> list[Candidate]:
    """The plans that fit, the default first."""
    keys, values = (tile_width(signature.dim(letter)) for letter in "KV")
    size = signature.dtype.itemsize
    room = machine.shared_memory_bytes or CONSUMER_SHARED_BYTES
    fitting = [plan for plan in _plans(signature, keys, values) if shared_bytes(*plan, keys, values, size) <= room]
    first = _default(signature, machine, fitting, values)
    ordered = [first, *(plan for plan in fitting if plan is not first)]
    first_dot, *others = dots(signature)
    found = [Candidate("triton", variant, (*params.items(), ("dot", first_dot))) for variant, params in ordered]
    slowest = [plan for plan in fitting if plan[0] == "scan"][-1]
    return found + [Candidate("triton", slowest[0], (*slowest[1].items(), ("dot", dot))) for dot in others]


def saving(found: list[Candidate], signature: Signature, grid: int, variants: tuple[str, ...]) -> list[Candidate]:
    """The plans, in training with those that also save the states of a dense call behind them: one of each of the `variants`, on blocks of the grid."""
    if signature.regime != "training" or not signature.may_save or signature.packed:
        return found
    saved: dict[str, Candidate] = {}
    for one in found:
        if one.variant in variants and one.param("block") == grid:
            saved.setdefault(one.variant, replace(one, saves_states=True))
    return [*found, *saved.values()]


def _plans(signature: Signature, keys: int, values: int) -> list[Plan]:
    """By the width of the heads. float32 takes smaller blocks: its products are three, and spill."""
    wide = max(keys, values)
    float32 = signature.dtype == torch.float32
    lone = 4 if float32 else 1
    if wide <= 32:
        tile = min(values, 32)
        found = [
            _scan(32, 4, tile, 4, 3) if float32 else _scan(64, 4, tile, 4, 3),
            _scan(32, lone, 16, 2, 3) if float32 else _scan(64, 4, 16, 4, 3),
            _scan(32, lone, tile, 2, 3),
            _whole(32, tile, 4 if float32 else 2),
            _whole(16, 16, 2),
            _split(32, lone, tile, 64, 2, 8, 2),
            _split(32, lone, tile, 64, 2, 16, 2),
            _split(32, lone, 16, 32, 2, 32, 2) if float32 else _split(64, 4, tile, 64, 4, 4, 2),
            _split(32, lone, 16, 32, 1, 8, 2),
        ]
    elif wide <= 64:
        tile = min(values, 64)
        found = [
            _scan(32, 4, 32, 4, 3) if float32 else _scan(64, 4, 32, 4, 3),
            _scan(32, 4, 32, 4, 2) if float32 else _scan(64, 4, tile, 4, 3),
            _scan(32, 2 * lone, 32, 4, 2),
            _whole(32, 32, 4),
            _whole(16, 32, 4),
            *(_split(32, 4, 32, 32, 4, segment) if float32 else _split(64, 4, tile, 64, 4, segment) for segment in (8, 16)),
        ]
    else:
        block, tile = (32, 32) if float32 else (64, 64)
        found = [
            _scan(block, 4, 32, 4, 3),
            _scan(block, 4, min(values, tile), 4, 2 if wide > 128 else 3),
            _scan(32, 4 if float32 else 2, 32, 4, 2),
            _scan(16, 2, 16, 4, 2),
            _whole(32, 32, 4),
            _whole(16, 32, 4),
            *(_split(block, 4, min(values, tile), tile, 4, segment) for segment in (16, 32, 64)),
            _states(block, 4, 32, 4, 3),
            *([] if float32 else [_crowded(_scan(block, 4, 32, 4, 3)), _crowded(_scan(block, 4, min(values, tile), 4, 3))]),
        ]
    least = least_columns(signature)
    distinct: list[Plan] = []
    for plan in found:
        plan = _widened(plan, least)
        if plan not in distinct:
            distinct.append(plan)
    return distinct


def _widened(plan: Plan, least: int) -> Plan:
    """The same with that many columns at least where a scan's blocks have 64 rows."""
    variant, params = plan
    if variant == "whole" or int(params["block"]) < 64:
        return plan
    return variant, {**params, "value_tile": max(int(params["value_tile"]), least)}


def _scan(block: int, prepare_warps: int, tile: int, warps: int, stages: int) -> Plan:
    return "scan", {"block": block, "prepare_warps": prepare_warps, "value_tile": tile, "warps": warps, "stages": stages}


def _crowded(plan: Plan) -> Plan:
    """The same with fewer registers for the preparation, so that four of its blocks fit a processor and not three."""
    return plan[0], {**plan[1], "prepare_registers": 128}


def _whole(block: int, tile: int, warps: int) -> Plan:
    return "whole", {"block": block, "value_tile": tile, "warps": warps, "stages": 2}


def _states(block: int, prepare_warps: int, tile: int, warps: int, stages: int) -> Plan:
    return "states", {**_scan(block, prepare_warps, tile, warps, stages)[1], "output_tile": 64, "output_warps": 4}


def _split(block: int, prepare_warps: int, tile: int, map_tile: int, warps: int, segment: int, stages: int = 3) -> Plan:
    lone = 1 if warps <= 2 else 4
    shape = {"segment": segment, "map_tile": map_tile, "map_warps": warps, "chain_tile": 16, "chain_warps": lone, "chain_stages": 3}
    return "split", {**_scan(block, prepare_warps, tile, warps, stages)[1], **shape}


def shared_bytes(variant: str, params: dict[str, Param], keys: int, values: int, size: int) -> int:
    """An upper bound of the shared memory of a plan's largest kernel, for tiles `keys` and `values` wide and operands of `size` bytes."""
    block, stages = int(params["block"]), int(params["stages"])
    tile = min(int(params.get("value_tile", values)), values)
    lines = 4 * 4 * block * stages + 64
    if variant == "whole":
        return (stages * (2 * block * keys + block * tile) + keys * tile + block * (keys + 3 * block)) * size + lines
    prepare = (2 * block * keys + 3 * block * block) * size + 1024
    scan = (stages * 2 * block * (keys + block) + (stages - 1) * block * tile + (keys + block) * tile) * size
    if variant == "split":
        chain = int(params["chain_stages"]) * keys * (keys + 16) * 4 + keys * 16 * 4
        return max(prepare, scan + lines, chain)
    if variant == "states":
        output = int(params["output_tile"])
        return max(prepare, scan + lines, (2 * block * keys + keys * output + 2 * block * block + 2 * block * output) * size)
    return max(prepare, scan + lines)


def _default(signature: Signature, machine: Machine, plans: list[Plan], values: int) -> Plan:
    """Few programs on a long sequence are split, one launch serves a short one; else the scan, with tiles that give the card enough programs."""
    scans = [plan for plan in plans if plan[0] == "scan"]
    if signature.batch_invariant:
        return scans[0]
    sms = machine.sms or SMS
    tokens, packed = signature.dim("T"), signature.packed
    sequences = signature.dim("N") if packed else signature.dim("B")
    tokens = tokens // max(sequences, 1) if packed else tokens
    streams = max(sequences, 1) * signature.dim("H")
    if tokens <= _SHORT and signature.launch == "eager":
        return next((plan for plan in plans if plan[0] == "whole"), scans[0])
    if tokens >= LONG and streams * -(-values // 64) <= sms // 3:
        return next((plan for plan in plans if plan[0] == "split"), scans[0])
    if streams * -(-values // 32) > sms and len(scans) > 1 and int(scans[1][1]["value_tile"]) > int(scans[0][1]["value_tile"]):
        return scans[1]
    return scans[0]
