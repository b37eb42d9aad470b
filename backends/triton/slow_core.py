"""slow_core in Triton: the state in registers for the whole sequence, or for segments side by side.

scan       one launch, everything in the serial loop (slow_scan.py)
prepared   the same after a small kernel that sums the log decay
scored     gated scores prepared in parallel, then the delta rule's scan from given u and w: chunks of 16, 32 or 64
split      the same in segments that run side by side: few heads on long sequences
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from titans_backends.backend import Candidate, Param
from titans_backends.contracts.slow_core import SlowCore
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict, refused

from . import delta_schedules
from .ahead import ahead_of
from .delta_backward import gradients
from .delta_backward_plans import backward_plans
from .delta_plans import saving
from .delta_plans import shared_bytes as delta_bytes
from .delta_schedules import Operands, Params
from .grid import on_device, unit_stride
from .program import remembering, remembering_backward
from .serving import CONSUMER_SHARED_BYTES, copies_rows, dots, least_columns, narrow_warps, serves, tile_width
from .slow_scan import Tiling, normalized, shared_bytes, slow_scan

__all__ = ["backward_candidates", "candidates", "compile_ahead", "remember", "remember_backward", "run", "run_backward", "supports"]

_SOURCES = tuple(f"titans_backends.backends.triton.{name}" for name in ("slow_scan", "decay", "grid", "launch"))
_INPUTS = ("q", "k", "u", "w", "g", "chunk_decay", "gate", "initial_state")
_LARGEST_STATE = 128 * 256
_BLOCKS = (16, 32, 64)
SCHEDULES = {"scored": delta_schedules.scan, "split": delta_schedules.split}
_LONG = 4096
"""Tokens from which few programs are split by default."""
_SHORT = 256
"""Tokens up to which the serial kernels are the default."""


def supports(signature: Signature, machine: Machine) -> Verdict:
    """Whatever the backend serves; normalize_read where one program can hold the whole state."""
    verdict = serves(signature, machine)
    if signature.option("normalize_read"):
        keys, values = signature.dim("K"), signature.dim("V")
        if tile_width(keys) * tile_width(values) > _LARGEST_STATE:
            verdict &= refused(f"normalize_read with K={keys}, V={values}: the state is too large for one program; use backend='eager'")
    return verdict if not verdict or candidates(signature, machine) else refused(_no_room(signature, machine))


def _no_room(signature: Signature, machine: Machine) -> str:
    sizes = f"K={signature.dim('K')}, V={signature.dim('V')}"
    return f"no tiles of {sizes} in {str(signature.dtype).removeprefix('torch.')} fit the shared memory of {machine.name}; use backend='eager'"


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """Value tiles, blocks, warps and stages that fit the card; the first is the default, with about as many programs as the card has processors."""
    chunk = signature.option("chunk_size")
    assert isinstance(chunk, int)
    keys, values = tile_width(signature.dim("K")), tile_width(signature.dim("V"))
    block, preferred = min(64, tile_width(chunk)), min(_value_tile(signature, machine), values)
    tiles = [tile for tile in (32, 16, 64) if tile <= values and (tile < 64 or keys <= 128)]
    ways = [(block, tile, 4, stages) for stages in (3, 2) for tile in tiles]
    ways += [(block, min(32, values), 8, 3), (block, min(64, values), 8, 2), (32, min(32, values), 4, 3), (32, 16, 4, 2), (16, 16, 4, 2)]
    if signature.option("normalize_read"):
        warps = 8 if keys * values > 64 * 128 else 4
        ways = [(block, values, warps, 3), (block, values, warps, 2), (32, values, warps, 2), (16, values, 4, 2)]
    if not copies_rows(signature):  # the loop's products read registers
        ways = [(rows, columns, narrow_warps(signature.dtype, rows, columns, warps), stages) for rows, columns, warps, stages in ways]
    room = machine.shared_memory_bytes or CONSUMER_SHARED_BYTES
    found: list[Candidate] = []
    for variant in ("prepared", "scan") if signature.has("g") else ("scan",):
        for dot in dots(signature):
            fitting = [
                way for way in ways if _serves(way, block, values) and shared_bytes(Tiling(*way, dot), keys, chunk, signature.dtype.itemsize) <= room
            ]
            kept = fitting if not found else fitting[: 2 if dot == dots(signature)[0] else 1]
            for rows, columns, warps, stages in kept:
                params = (("block", rows), ("block_v", columns), ("warps", warps), ("stages", stages), ("dot", dot))
                way = Candidate("triton", variant, params, sources=_SOURCES)
                if way not in found:
                    found.append(way)
    if found:  # streams and processors decide the order, never the set
        lead = {**dict(found[0].params), "block_v": found[0].param("block_v") if signature.option("normalize_read") else preferred}
        found.sort(key=lambda one, variant=found[0].variant: one.variant != variant or dict(one.params) != lead)  # type: ignore[misc]
    return _segmented(signature, machine, room, found)


def _is_plain(signature: Signature) -> bool:
    """Whether a chunk is one block of the delta rule's scan, and no option asks for more."""
    extra = signature.has("chunk_decay") or signature.option("normalize_read") or not signature.option("delta")
    return signature.option("chunk_size") in _BLOCKS and not extra


def _segmented(signature: Signature, machine: Machine, room: int, others: list[Candidate]) -> list[Candidate]:
    """The delta rule's schedules on given u and w beside the others: segments first where they give an idle card its programs, scores before a scan
    of wide heads."""
    if not _is_plain(signature):
        return others
    block, size = int(str(signature.option("chunk_size"))), signature.dtype.itemsize
    keys, values = tile_width(signature.dim("K")), tile_width(signature.dim("V"))
    least = least_columns(signature) if block >= 64 else 1
    tiles = sorted({max(tile, least) for tile in [tile for tile in (16, 32, 64) if tile <= max(values, 16)][-2:]})
    plans: list[tuple[str, dict[str, Param]]] = []
    for tile in tiles:
        for stages in (3, 2):
            plans.append(("scored", {"block": block, "prepare_warps": 4, "value_tile": tile, "warps": 4, "stages": stages}))
        for segment in (4, 8, 16) if keys <= 64 else (16, 32):
            cut = {"segment": segment, "map_tile": 64, "map_warps": 4, "chain_tile": 16, "chain_warps": 4 if keys > 64 else 1, "chain_stages": 3}
            plans.append(("split", {"block": block, "prepare_warps": 4, "value_tile": tile, "warps": 4, "stages": 3 if keys > 64 else 2, **cut}))
    fitting = [plan for plan in plans if _bytes(*plan, keys, values, size) <= room]
    dot = dots(signature)[0]
    made = [Candidate("triton", variant, (*params.items(), ("dot", dot)), sources=_SOURCES) for variant, params in fitting]
    first = _first(signature, machine, keys, values)
    if first == "split" and not any(one.variant == first for one in made):
        first = "scored"
    wide = max(_value_tile(signature, machine), 32) if first == "scored" else 32
    order = sorted(made, key=lambda one: (-int(one.param("stages")), one.param("value_tile") != wide))  # a third stage is worth more than the tile
    return saving(sorted([*others, *order], key=lambda one: one.variant != first), signature, block, tuple(SCHEDULES))


def _bytes(variant: str, params: dict[str, Param], keys: int, values: int, size: int) -> int:
    """As `delta_bytes`, where the scan reads w besides."""
    more = int(params["stages"]) * int(params["block"]) * keys * size
    return max(delta_bytes(variant, params, keys, values, size), delta_bytes("scan", params, keys, values, size) + more)


def _first(signature: Signature, machine: Machine, keys: int, values: int) -> str:
    """The variant of the default, "" for the serial ones."""
    streams, tokens = signature.dim("N") * signature.dim("H"), signature.dim("T")
    if not signature.batch_invariant and tokens >= _LONG and streams * -(-values // 64) <= (machine.sms or 108) // 3:
        return "split"
    return "scored" if keys > 64 and (signature.batch_invariant or tokens > _SHORT) else ""


def _value_tile(signature: Signature, machine: Machine) -> int:
    """The widest value tile, up to 64 columns (32 above K = 128), that still gives three quarters of the processors a program.

    Pinned where the batch must not matter.
    """
    if signature.batch_invariant or machine.sms is None:
        return 32
    streams = signature.dim("N") * signature.dim("H")
    tile = 64 if signature.dim("K") <= 128 else 32
    while tile > 16 and streams * -(-signature.dim("V") // tile) < 0.75 * machine.sms:
        tile //= 2
    return tile


def _serves(way: tuple[int, int, int, int], block: int, values: int) -> bool:
    """No block above the chunk's, no eight warps on small tiles."""
    rows, columns, warps, _ = way
    return rows <= block and not (warps == 8 and (rows < 64 or columns < 32))


def run(call: SlowCore, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """o and the final state."""
    chosen = dict(candidate.params)
    if candidate.variant in SCHEDULES:
        return _scheduled(call, candidate, chosen)
    tiling = Tiling(
        int(chosen["block"]), int(chosen["block_v"]), int(chosen["warps"]), int(chosen["stages"]), str(chosen["dot"]), candidate.variant == "prepared"
    )
    o, final, _ = slow_scan(
        call.q, call.k, call.u, call.w if call.delta else None, tiling,
        g=call.g, chunk_decay=call.chunk_decay, gate=call.gate, chunk_size=call.chunk_size, scale=call.scale, initial_state=call.initial_state,
        output_final_state=call.output_final_state, cu_seqlens=call.cu_seqlens,
        normalize_read=call.normalize_read, normalize_final=call.normalize_final,
    )  # fmt: skip
    return o, final


def backward_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """The delta rule's on given u and w, where a chunk is one of its blocks; none for other chunks and for normalize_read."""
    chunk = signature.option("chunk_size")
    if chunk not in _BLOCKS or signature.option("normalize_read"):
        return []
    if signature.has("chunk_decay") or signature.option("normalize_final"):
        signature = replace(signature, may_save=False)  # the state is needed as it was before
    found = backward_plans(signature, machine, int(str(chunk)), fixed=True)
    return [one for one in found if one.variant != "split"] if signature.has("chunk_decay") else found


def run_backward(
    call: SlowCore, grads: tuple[Tensor | None, ...], states: Tensor | None, needs: frozenset[str], candidate: Candidate
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, u, w, g, chunk_decay, gate and the initial state, in that order."""
    params = dict(candidate.params)
    x = _operands(call, None)
    if call.normalize_final and grads[1] is not None:
        x.final = torch.empty(grads[1].shape, dtype=torch.float32, device=call.u.device)
    if call.delta:
        return gradients(x, params, call, grads, states, needs, _INPUTS)
    x.w = call.w.new_zeros(call.w.shape[3]).expand(call.w.shape)  # no correction: w is as good as zero, and so is its gradient
    found = list(gradients(x, params, call, grads, states, needs - {"w"}, _INPUTS))
    if "w" in needs:
        found[_INPUTS.index("w")] = torch.zeros_like(call.w, memory_format=torch.contiguous_format)
    return tuple(found)


def _operands(call: SlowCore, o: Tensor | None) -> Operands:
    u, initial = unit_stride(call.u), None if call.initial_state is None else call.initial_state.contiguous()
    cu_seqlens = on_device(call.cu_seqlens, u)
    scale = float(call.scale)
    return Operands(
        unit_stride(call.q), unit_stride(call.k), u, None, call.g, call.gate, initial, None, o, cu_seqlens, scale, False,
        w=unit_stride(call.w), chunk_decay=call.chunk_decay,
    )  # fmt: skip


def _scheduled(call: SlowCore, candidate: Candidate, params: Params) -> tuple[Tensor | None, ...]:
    """The delta rule's schedule on given u and w."""
    u = call.u
    o = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    x = _operands(call, o)
    if call.output_final_state:
        x.final = torch.empty(x.sequences, x.heads, x.keys, x.values, dtype=torch.float32, device=u.device)
    kept = (x.saving(int(params["block"])),) if candidate.saves_states else ()
    if o.numel() or x.final is not None:
        SCHEDULES[candidate.variant](x, params)
    if call.normalize_final and x.final is not None:
        normalized(x.final)
    return o, x.final, *kept


compile_ahead = ahead_of(run, "slow_core", run_backward)
remember, remember_backward = remembering(run), remembering_backward(run_backward)
