"""The backward of fast_core: which way through a chunk, with which tiles, and the launches (SPEC.md 10; the kernels: fast_gradients, fast_edges).

Nothing is read that the forward made. The dearest chunks are long ones: their triangle is computed whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.fast_core import FastCore
from titans_backends.machine import Machine
from titans_backends.signature import Signature

from .fast_edges import HELD, LEFT, START
from .fast_gradients import BLOCKS, RUNNING, WHOLE
from .grid import on_device, slot_count, strides, unit_stride
from .serving import CONSUMER_SHARED_BYTES, Params, dots, narrow_warps, tile_width

__all__ = ["gradients", "ways"]

_INPUTS = ("q", "k", "v", "gate", "g", "initial_state")
_WHOLE_UP_TO = 128
"""Tokens of the longest chunk that is two blocks."""
_WIDE = 64
"""Columns that a product of 64 rows has at least with four warps and 16-bit operands (serving.narrow_warps): narrower heads are padded."""
_SCRATCH = 1024
_HOPPER = 9
_EDGE_BLOCK, _WIDE_EDGE_BLOCK = 32, 16
_RUNNING_ROWS, _RUNNING_HEADS = 64, 16


def ways(signature: Signature, machine: Machine, unit: int) -> list[Candidate]:
    """The ways and tiles that suit chunks of `unit` tokens, the expected best first."""
    itemsize = signature.dtype.itemsize
    keys, values = tile_width(signature.dim("K")), tile_width(signature.dim("V"))
    widest, block, group = max(keys, values), min(64, tile_width(unit)), signature.dim("H") // max(1, signature.dim("G"))
    limit = machine.shared_memory_bytes or CONSUMER_SHARED_BYTES
    found: dict[Candidate, None] = {}

    def offer(variant: str, block: int, piece: int, warps: int, stages: int, dot: str = dots(signature)[0]) -> None:
        key_tile, value_tile = (_width(tile, itemsize, block, warps) for tile in (keys, values))
        if _shared_bytes(variant, block, key_tile, value_tile, stages, itemsize) > limit:
            return
        tiles = (("block", block),) if variant == "whole" else (("block", block), ("piece", min(piece, max(key_tile, value_tile))))
        params: Params = (*tiles, ("warps", warps), ("stages", stages), ("dot", dot))
        found[Candidate("triton", variant, params, direction="backward")] = None

    if unit <= _WHOLE_UP_TO and widest <= (128 if itemsize == 2 else 64):
        offer("whole", block, 0, max(1, block // 16), 1)
        if group > 1:
            offer("whole", block, 0, max(1, block // 16), 2)  # the next head on its way
        if widest <= 64 and block == 64 == unit:
            offer("whole", 32, 0, 2, 1)
    small = min(32, block)
    if itemsize == 2:
        if block == 64:
            for piece, stages in ((64, 1), (128, 2), (64, 2)) if widest <= 128 else ((128, 1), (64, 1)):
                offer("blocks", 64, piece, 4, stages)
        offer("blocks", small, 64, small // 16, 2)
        offer("blocks", small, 64, small // 16, 1)
    else:
        if widest <= 64:
            offer("blocks", small, 64, small // 16, 2)
        for stages in (2, 1):
            offer("blocks", 16, 64, 1, stages)
        for dot in dots(signature)[1:]:  # products without tensor cores
            offer("blocks", small, 64, 4, 2, dot)
            offer("blocks", 16, 64, 4, 1, dot)
    turned = machine.sm is not None and machine.sm // 10 != _HOPPER  # elsewhere blocks of 64 rows spill
    return sorted(found, key=lambda one: turned and int(one.param("block")) > 32)


def _width(tile: int, itemsize: int, block: int, warps: int) -> int:
    """The columns of a tile of a head."""
    return max(tile, _WIDE) if itemsize == 2 and block >= 64 and warps >= 4 else tile


def _shared_bytes(variant: str, block: int, key_tile: int, value_tile: int, stages: int, itemsize: int) -> int:
    """Shared memory of a program at most: so many pairs of a tile of keys and one of values."""
    pairs = 1 + stages if itemsize == 2 else 1 + 2 * stages if variant == "whole" else 2 + stages  # float32 is laid out anew for its products
    return pairs * block * (key_tile + value_tile) * itemsize + _SCRATCH


def gradients(call: FastCore, grads: tuple[Tensor | None, ...], needs: frozenset[str], candidate: Candidate, unit: int) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, gate, g and the initial W, in that order; `unit` is the chunk size."""
    wanted = {name: getattr(call, name) for name in _INPUTS if name in needs}
    into = {name: torch.empty(like.shape, dtype=like.dtype, device=like.device) for name, like in wanted.items() if like is not None}
    if call.v.numel():
        _Launches(call, grads, into, unit, str(candidate.param("dot"))).run(candidate)
    else:
        for name, grad in into.items():  # a call without tokens hands W on
            grad.copy_(grads[1]) if name == "initial_state" and grads[1] is not None else grad.zero_()
    return tuple(into.get(name) for name in _INPUTS)


class _Launches:
    """What a call's kernels are handed."""

    def __init__(self, call: FastCore, grads: tuple[Tensor | None, ...], into: dict[str, Tensor], unit: int, dot: str) -> None:
        v = call.v
        self.q, self.k, self.v, self.gate, self.g = unit_stride(call.q), unit_stride(call.k), unit_stride(v), call.gate, call.g
        self.d_o = v.new_zeros(v.shape[3]).expand(v.shape) if grads[0] is None else unit_stride(grads[0])
        self.d_final = None if grads[1] is None else unit_stride(grads[1])
        self.packed, self.into, self.unit, self.dot = on_device(call.cu_seqlens, v), into, unit, dot
        self.batch, self.tokens, self.heads, self.values = v.shape
        self.groups, self.keys = call.k.shape[2:]
        self.group, self.offset, self.scale = self.heads // self.groups, call.chunk_offset, float(call.scale)
        self.sequences = self.batch if self.packed is None else self.packed.numel() - 1
        self.initial = unit_stride(call.initial_state) if self.offset and call.initial_state is not None else None
        self.head_strides = (*strides(self.gate), *strides(self.g), *self.d_o.stride()[:3])
        self.edge_tile = _EDGE_BLOCK if tile_width(self.keys) * v.dtype.itemsize <= 256 else _WIDE_EDGE_BLOCK
        self.dg = into.get("g")
        self.logs = self.dg is not None
        self.sums = self.logs or "gate" in into

    def scratch(self, wanted: bool, *shape: int) -> Tensor | None:
        """float32 memory, where it is wanted."""
        return torch.empty(shape, dtype=torch.float32, device=self.v.device) if wanted else None

    def run(self, candidate: Candidate) -> None:
        """Launches all: the edges first, where there are states."""
        held_q, held_log = self._held()
        left_k, left_v, left_log = self._left()
        total, tiles = self._start()
        edges, into = (held_q, held_log, left_k, left_v, left_log), self.into
        dq, dk, dv, dgate = (into.get(name) for name in ("q", "k", "v", "gate"))
        block, warps, stages = (int(candidate.param(name)) for name in ("block", "warps", "stages"))
        key_tile, value_tile = (_width(tile_width(size), self.v.dtype.itemsize, block, warps) for size in (self.keys, self.values))
        slots = slot_count(self.batch, self.tokens, self.unit, self.packed, self.offset)
        given = (self.q, self.k, self.v, self.gate, self.g, self.d_o, self.packed)
        numbers = (self.scale, self.tokens, self.sequences, self.offset, self.heads)
        steps = (*self.q.stride()[:3], *self.k.stride()[:3], *self.v.stride()[:3], *self.head_strides)
        sizes = (self.keys, self.values, self.unit, block, key_tile, value_tile)
        if candidate.variant == "whole":
            shared = (2 if self.unit > block else 1) if dq is not None or dk is not None else 0
            parts = shared + self.group * ((dv is not None) + self.sums)
            args = (*given, *edges, total, dq, dk, dv, dgate, self.dg, *numbers, 0, *steps)
            WHOLE(slots * self.groups * parts, args, (*sizes, self.group, tiles, self.dot), warps, stages)
            return
        piece = int(candidate.param("piece"))
        inflow, outflow = (self.scratch(self.logs, self.batch, self.tokens, self.heads) for _ in range(2))
        key_parts = ((dq is not None) + (dk is not None)) * -(-self.keys // piece)
        parts = key_parts + self.group * ((dv is not None) * -(-self.values // piece) + self.sums + self.logs)
        args = (*given, *edges, dq, dk, dv, dgate, inflow, outflow, *numbers, self.group, *steps)
        BLOCKS(slots * self.groups * -(-self.unit // block) * parts, args, (*sizes, piece, self.dot), warps, stages)
        if self.dg is not None:
            rows, heads = min(_RUNNING_ROWS, tile_width(self.unit)), min(_RUNNING_HEADS, tile_width(self.heads))
            args = (inflow, outflow, total, self.packed, self.dg, self.tokens, self.sequences, self.offset, self.heads)
            RUNNING(slots * -(-self.heads // heads), args, (self.unit, rows, heads, tiles), 4, 1)

    def _rows(self) -> int:
        """Rows of one chunk of every sequence, as `edge_row` places them."""
        if self.packed is None:
            return self.batch * min(self.tokens, self.unit)
        return min(self.tokens, self.sequences * self.unit)

    def _edge(self) -> tuple[int, tuple[int, int]]:
        """The blocks of an edge's launch, and the tile of keys with the slab of values."""
        return self.sequences * self.groups * -(-self.unit // self.edge_tile), (tile_width(self.keys), 32 if self.values > 16 else 16)

    def _held(self) -> tuple[Tensor | None, Tensor | None]:
        """What a carried W adds to dq and to the row sums."""
        if self.initial is None or not (self.sums or "q" in self.into):
            return None, None
        held_q = self.scratch("q" in self.into, self._rows(), self.groups, self.keys)
        held_log = self.scratch(self.sums, self._rows(), self.heads)
        blocks, tile = self._edge()
        args = (
            self.q, self.gate, self.g, self.d_o, self.initial, self.packed, held_q, held_log, self.scale, self.tokens, self.offset, self.heads, self.group,
            *self.q.stride()[:3], *self.head_strides, *self.initial.stride()[:3],
        )  # fmt: skip
        HELD(blocks, args, (self.keys, self.values, self.unit, self.edge_tile, *tile, self.dot), 4, 1)
        return held_q, held_log

    def _left(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """What the gradient of the final W adds to dk, dv and the column sums."""
        if self.d_final is None or not (self.logs or "k" in self.into or "v" in self.into):
            return None, None, None
        rows = self._rows()
        left_k = self.scratch("k" in self.into, rows, self.groups, self.keys)
        left_v = self.scratch("v" in self.into, rows, self.heads, self.values)
        left_log = self.scratch(self.logs, rows, self.heads)
        blocks, tile = self._edge()
        args = (
            self.k, self.v, self.g, self.d_final, self.packed, left_k, left_v, left_log, self.tokens, self.offset, self.heads, self.group,
            *self.k.stride()[:3], *self.v.stride()[:3], *strides(self.g), *self.d_final.stride()[:3],
        )  # fmt: skip
        LEFT(blocks, args, (self.keys, self.values, self.unit, self.edge_tile, *tile, self.dot), 4, 1)
        return left_k, left_v, left_log

    def _start(self) -> tuple[Tensor | None, int]:
        """Fills the gradient of the initial W; <W, dW>, and in how many parts it comes."""
        d_initial, carried = self.into.get("initial_state"), self.initial is not None and self.logs
        itemsize, key_tile = self.v.dtype.itemsize, tile_width(self.keys)
        value_tile = min(64 if key_tile <= 128 else 32, tile_width(self.values))
        tiles = -(-self.values // value_tile)
        if d_initial is None and not carried:
            return None, 1
        total = self.scratch(carried, self.sequences, self.heads, tiles)
        block = 64 if key_tile * itemsize <= 256 else 32 if key_tile * itemsize <= 512 else 16
        args = (
            self.q, self.gate, self.g, self.d_o, self.initial, self.d_final, self.packed, d_initial, total,
            self.scale, self.tokens, self.offset, self.heads, self.group,
            *self.q.stride()[:3], *self.head_strides, *strides(self.initial), *strides(self.d_final),
        )  # fmt: skip
        sizes = (self.keys, self.values, self.unit, block, key_tile, value_tile, self.dot)
        START(self.sequences * self.heads * tiles, args, sizes, narrow_warps(self.v.dtype, key_tile, value_tile, 4), 2)
        return total, tiles
