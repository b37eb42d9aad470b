"""slow_core in Triton: one launch, the state in registers for the whole sequence; the kernel is in slow_scan.py."""

from __future__ import annotations

from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.slow_core import SlowCore
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict, refused

from .ahead import ahead_of
from .program import remembering
from .serving import CONSUMER_SHARED_BYTES, dots, narrow_warps, serves, tile_width
from .slow_scan import Tiling, shared_bytes, slow_scan

__all__ = ["candidates", "compile_ahead", "remember", "run", "supports"]

_SOURCES = tuple(f"titans_backends.backends.triton.{name}" for name in ("slow_scan", "decay", "grid", "launch"))
_LARGEST_STATE = 128 * 256


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
    tiles = [tile for tile in (16, 32, 64) if tile <= values and (tile < 64 or keys <= 128)]
    ways = [(block, tile, 4, stages) for stages in (3, 2) for tile in tiles]
    ways += [(block, min(32, values), 8, 3), (block, min(64, values), 8, 2), (32, min(32, values), 4, 3), (32, 16, 4, 2), (16, 16, 4, 2)]
    ways.sort(key=lambda way: way[:3] != (block, preferred, 4))  # streams and processors decide the order, never the set
    if signature.option("normalize_read"):
        warps = 8 if keys * values > 64 * 128 else 4
        ways = [(block, values, warps, 3), (block, values, warps, 2), (32, values, warps, 2), (16, values, 4, 2)]
    if (signature.dim("K") | signature.dim("V")) % 8:  # rows that no asynchronous copy takes: the loop's products read registers
        ways = [(rows, columns, narrow_warps(signature.dtype, rows, columns, warps), stages) for rows, columns, warps, stages in ways]
    room = machine.shared_memory_bytes or CONSUMER_SHARED_BYTES
    found: list[Candidate] = []
    for variant in ("prepared", "scan") if signature.has("g") else ("scan",):
        for dot in dots(signature):
            fitting = [
                way for way in ways if _serves(way, block, values) and shared_bytes(Tiling(*way, dot), keys, chunk, signature.dtype.itemsize) <= room
            ]
            kept = fitting if not found else fitting[:1]
            for rows, columns, warps, stages in kept:
                params = (("block", rows), ("block_v", columns), ("warps", warps), ("stages", stages), ("dot", dot))
                way = Candidate("triton", variant, params, sources=_SOURCES)
                if way not in found:
                    found.append(way)
    return found


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


compile_ahead = ahead_of(run)
remember = remembering(run)
