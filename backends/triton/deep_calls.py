"""What the kernels of a deep_core call are handed, in both directions: tensors, strides, tiles and places for what stands between two launches."""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.deep_core import DeepCore

from .deep_parallel import CHAIN, GATHER, READ
from .deep_plans import steps_rows
from .deep_scan import BLOCKS, SWEEP
from .grid import on_device, slot_count, strides, unit_stride
from .serving import tile_width

__all__ = ["DeepCall", "matrix", "pair"]

_BLOCK_ROWS = 32


def matrix(x: Tensor | None) -> Tensor | None:
    return None if x is None else unit_stride(x)


def pair(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.stride(0), x.stride(1))


class DeepCall:
    """What the kernels of a call share."""

    def __init__(self, call: DeepCore, candidate: Candidate) -> None:
        v = call.v
        self.q, self.k, self.v, self.eta, self.g, self.gate = unit_stride(call.q), unit_stride(call.k), unit_stride(v), call.eta, call.g, call.gate
        self.state, self.error = matrix(call.initial_state), matrix(call.initial_error)
        self.mass, self.log_decay = call.initial_mass, call.initial_log_decay
        self.packed = on_device(call.cu_seqlens, v)
        self.batch, self.tokens, self.heads, self.values = v.shape
        self.groups, self.keys = call.k.shape[2:]
        self.group = self.heads // self.groups if self.groups else 1
        self.sequences = self.batch if self.packed is None else self.packed.numel() - 1
        self.offset, self.span, self.scale, self.normalize = call.block_offset, call.chunk_size * call.period, float(call.scale), call.normalize
        self.rows = min(int(candidate.param("rows")), steps_rows(self.span))
        self.tile = min(int(candidate.param("value_tile")), tile_width(self.values))
        self.warps, self.stages, self.dot = int(candidate.param("warps")), int(candidate.param("stages")), str(candidate.param("dot"))
        self.columns = min(64, tile_width(self.values))
        self.block_warps = int(candidate.param("block_warps")) if candidate.variant == "blocks" else 4
        self.programs = self.sequences * self.heads * -(-self.values // self.tile)
        self.slots = slot_count(self.batch, self.tokens, self.span, self.packed, self.offset)
        self.numbers = (self.scale, self.tokens, self.sequences, self.heads)
        self.sizes = (self.keys, self.values, tile_width(self.keys))

    def new(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.v.device)

    def carry(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Room for D, E, mass and summed g of every sequence."""
        square, line = (self.sequences, self.heads, self.keys, self.values), (self.sequences, self.heads)
        return tuple(self.new(torch.float32, *shape) for shape in (square, square, line, line))  # type: ignore[return-value]  # four

    def blocks(self) -> tuple[Tensor, Tensor]:
        """Mass and G of every block before it closes, `[slots, H]`."""
        masses, logs = (self.new(torch.float32, self.slots, self.heads) for _ in range(2))
        BLOCKS(
            self.slots * self.heads,
            (
                self.k, self.eta, self.g, self.mass, self.log_decay, self.packed, masses, logs, *self.numbers[1:], self.group, self.offset,
                *strides(self.k), *strides(self.eta), *strides(self.g), *pair(self.mass), *pair(self.log_decay),
            ),
            (self.keys, self.sizes[2], min(_BLOCK_ROWS, steps_rows(self.span)), self.span),
            4,
            2,
        )  # fmt: skip
        return masses, logs

    def sweep(
        self, o: Tensor | None, summed: tuple[Tensor | None, Tensor | None], kept: tuple[Tensor | None, ...], final: tuple[Tensor | None, ...]
    ) -> None:
        """Forward: outputs, or D and E of every block; the carry after the last."""
        SWEEP(
            self.programs,
            (
                self.q, self.k, self.v, self.eta, self.g, self.gate, self.state, self.error, self.mass, self.log_decay, *summed, self.packed, o, *kept, *final,
                *self.numbers, self.group, self.offset,
                *strides(self.q), *strides(self.k), *strides(self.v), *strides(self.eta), *strides(self.g), *strides(self.gate),
                *strides(self.state), *strides(self.error), *pair(self.mass), *pair(self.log_decay),
            ),
            (*self.sizes, self.tile, self.rows, self.span, self.normalize, self.dot),
            self.warps,
            self.stages,
        )  # fmt: skip

    def gather(self, d_o: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, tuple[Tensor, Tensor]]:
        """N, R, with `d_o` also Y, `[slots, H, K, K or V]`; mass and G of every block."""
        maps = self.new(self.v.dtype, self.slots, self.heads, self.keys, self.keys)
        inputs = self.new(torch.float32, self.slots, self.heads, self.keys, self.values)
        reads = None if d_o is None else torch.empty_like(inputs)
        masses, logs = (self.new(torch.float32, self.slots, self.heads) for _ in range(2))
        column = self.columns
        parts = -(-self.keys // column) + (2 if d_o is not None else 1) * -(-self.values // column) + 1
        GATHER(
            self.slots * self.heads * parts,
            (
                self.q, self.k, self.v, self.eta, self.g, self.gate, d_o, self.mass, self.log_decay, self.packed, maps, inputs, reads, masses, logs,
                *self.numbers, self.group, self.offset,
                *strides(self.q), *strides(self.k), *strides(self.v), *strides(self.eta), *strides(self.g), *strides(self.gate), *strides(d_o),
                *pair(self.mass), *pair(self.log_decay),
            ),
            (*self.sizes, column, self.rows, self.span, self.dot),
            self.block_warps,
            2,
        )  # fmt: skip
        return maps, inputs, reads, (masses, logs)

    def chain(
        self, maps: Tensor, inputs: Tensor, summed: tuple[Tensor, Tensor], kept: tuple[Tensor | None, ...], final: tuple[Tensor | None, ...]
    ) -> None:
        """D of every block from N and R; the carry after the last."""
        CHAIN(
            self.programs,
            (
                maps, inputs, *summed, self.state, self.error, self.mass, self.log_decay, self.packed, *kept, *final, *self.numbers[1:], self.offset,
                *strides(self.state), *strides(self.error), *pair(self.mass), *pair(self.log_decay),
            ),
            (*self.sizes, self.tile, self.span, self.normalize, self.dot),
            self.warps,
            self.stages,
        )  # fmt: skip

    def in_parallel(self, o: Tensor, final: tuple[Tensor | None, ...]) -> None:
        """Forward with all blocks side by side."""
        maps, inputs, _, summed = self.gather(None)
        starts = self.new(self.v.dtype, *inputs.shape)
        self.chain(maps, inputs, summed, (starts, None), final)
        READ(
            self.slots * -(-self.span // self.rows) * self.heads * -(-self.values // self.columns),
            (
                self.q, self.gate, starts, self.packed, o, *self.numbers, self.group, self.offset, *strides(self.q), *strides(self.gate),
            ),
            (*self.sizes, self.columns, self.rows, self.span, self.dot),
            self.block_warps,
            1,
        )  # fmt: skip
