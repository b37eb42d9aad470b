"""slow_core's walks over the chunks, forward and in reverse, and what is prepared for them; the forward made of one: lines, walk, then all outputs at once.

The walks need little shared memory, whatever the dtype and the head_dims. The backward's launches are in slow_core_gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.slow_core import SlowCore

from .bounds import bounds_on
from .chunks import Slots, slots_of, three_strides
from .launch import DTYPES, Kernel, Macros
from .serving import padded
from .strides import aligned_rows, unit_stride

__all__ = ["NORMS", "SOURCES", "Walks", "divide_by_norm", "longest_piece", "output_bytes", "run_walks", "through_norm", "walk_bytes"]

SOURCES = ("slow_core_prepare.cu", "slow_core_walks.cu", "slow_core_outputs.cu")
NORMS = "slow_core_norms.cu"
PREPARE = Kernel(SOURCES[0], "slow_core_prepare", "3P3P2P18qP10if")
FORWARD, REVERSE = (Kernel(SOURCES[1], f"slow_core_{name}", "5P2P2P1P1P15q6i") for name in ("forward", "reverse"))
OUTPUTS = Kernel(SOURCES[2], "slow_core_outputs", "2P2P1P2P1P12qP9if")
_THREADS = 256
"""Of a block that takes a norm."""
NORMED, UNNORMED = Kernel(NORMS, "slow_core_normed", "Pi"), Kernel(NORMS, "slow_core_unnormed", "3Pi")


def longest_piece(keys: int, dtype: torch.dtype) -> int:
    """Tokens of a piece that registers hold beside the state."""
    return 64 if dtype.itemsize == 2 else 32 if keys <= 64 else 16


def walk_bytes(piece: int, stages: int, warps: int, keys: int, dtype: torch.dtype, *, reverse: bool, delta: bool = True) -> int:
    """Dynamic shared memory of a block of a walk: pieces of k, w and, in reverse, q, of value columns, and their lines."""
    tiles, columns = 1 + reverse + delta, max(32, 16 * warps)
    return stages * (piece * (tiles * padded(keys, 32) + (1 + reverse) * columns) * dtype.itemsize + 4 * (2 * piece + 4))


def prepare_bytes(side: int, key_slice: int, dtype: torch.dtype) -> int:
    """Dynamic shared memory of a block that prepares: slices of q and k, scores, and the running decay."""
    return side * (2 * key_slice + max(side, 32)) * dtype.itemsize + 8 * side


def output_bytes(side: int, keys: int, value_slice: int, dtype: torch.dtype) -> int:
    """Dynamic shared memory of a block that writes outputs: q, k, a slice of the state and of the updates, and the running decay."""
    rows = padded(keys, 32)
    return (2 * side * rows + value_slice * (rows + side)) * dtype.itemsize + 8 * side


@dataclass(frozen=True, slots=True)
class Walks:
    """A call as the launches take it: operands whose rows are contiguous, its slots of chunks, and a candidate's tiles."""

    call: SlowCore
    q: Tensor
    k: Tensor
    u: Tensor
    w: Tensor
    bounds: Tensor | None
    slots: Slots
    chunk_size: int
    side: int
    piece: int
    stages: int
    warps: int

    @classmethod
    def of(cls, call: SlowCore, candidate: Candidate) -> Walks:
        """From a call and a candidate that has side, piece, stages and warps."""
        q, k, u, w = unit_stride(call.q), unit_stride(call.k), unit_stride(call.u), unit_stride(call.w)
        bounds, chunk_size = bounds_on(call.cu_seqlens, u), min(call.chunk_size, 2**30)
        sizes = (int(candidate.param(name)) for name in ("side", "piece", "stages", "warps"))
        return cls(call, q, k, u, w, bounds, slots_of(u, chunk_size, bounds), chunk_size, *sizes)

    @property
    def places(self) -> int:
        """Slots times v heads."""
        return self.slots.count * self.u.shape[2]

    @property
    def group(self) -> int:
        """v heads to a q/k head."""
        return self.u.shape[2] // self.k.shape[2] if self.k.shape[2] else 1

    @property
    def wide(self) -> tuple[bool, bool, bool]:
        """Which of g, chunk_decay and gate are float32."""
        g, decay, gate = (x is not None and x.dtype == torch.float32 for x in (self.call.g, self.call.chunk_decay, self.call.gate))
        return g, decay, gate

    @property
    def strides(self) -> tuple[int, ...]:
        """Those of g, chunk_decay and gate."""
        return (*three_strides(self.call.g), *three_strides(self.call.chunk_decay), *three_strides(self.call.gate))

    @property
    def grid(self) -> tuple[int, ...]:
        """Sequences, tokens, chunk size, slots of a dense sequence, v heads and their group, as kernels over slots take them."""
        return (self.slots.wide, self.slots.sequences, self.u.shape[1], self.chunk_size, self.slots.each, self.u.shape[2], self.group)

    def macros(self, *more: Tensor) -> Macros:
        """What all launches are compiled for; `more`: tensors whose rows are loaded beside the operands."""
        aligned = all(aligned_rows(x, whole=True) for x in (self.q, self.k, self.u, self.w, *more))
        return (
            ("DTYPE", DTYPES[self.u.dtype]), ("KEYS", self.k.shape[3]), ("VALUES", self.u.shape[3]), ("SIDE", self.side),
            ("FACTORED", self.call.chunk_decay is not None), ("DELTA", bool(self.call.delta)), ("ALIGNED", aligned),
        )  # fmt: skip

    def room(self, *, fragments: bool) -> Tensor:
        """Scratch in the call's dtype: a state for every chunk, or rows of values."""
        blocks = -(-self.k.shape[3] // 16) * -(-self.u.shape[3] // 16)
        return torch.empty(self.places * blocks * 256 if fragments else self.u.numel(), dtype=self.u.dtype, device=self.u.device)

    def prepare(self, macros: Macros, d_o: Tensor | None = None, direct: Tensor | None = None) -> Tensor:
        """The lines of every chunk and head; with `d_o` also the part of dU' that needs no state, to `direct`."""
        lines = torch.empty(self.places * (2 * self.side + 4), dtype=torch.float32, device=self.u.device)
        slice_ = min(padded(max(self.k.shape[3], self.u.shape[3]), 32), 128 // self.u.element_size())
        PREPARE(
            (self.places, 1, 1), 2 * self.side, (*macros, ("KEY_SLICE", slice_), ("VALUE_SLICE", slice_), ("DECAYED", self.call.g is not None)),
            (
                self.q, self.k, d_o, self.call.g, self.call.chunk_decay, self.call.gate, lines, direct,
                *three_strides(self.q), *three_strides(self.k), *three_strides(d_o), *self.strides, self.bounds, *self.grid, *self.wide,
                float(self.call.scale),
            ),
            prepare_bytes(self.side, slice_, self.u.dtype),
        )  # fmt: skip
        return lines

    def forward(self, macros: Macros, lines: Tensor, starts: Tensor | None, updates: Tensor | None, final: Tensor | None) -> None:
        """Every chunk's first state and the updates, and the last states, where there is room for them."""
        initial = None if self.call.initial_state is None else self.call.initial_state.contiguous()
        rows = (*three_strides(self.u), 0, 0, 0)
        self._walk(FORWARD, macros, (self.u, None, lines, initial, starts, updates, final), rows, reverse=False)

    def reverse(
        self, macros: Macros, lines: Tensor, d_o: Tensor, d_final: Tensor | None, leaving: Tensor | None, errors: Tensor, d_initial: Tensor | None
    ) -> None:
        """The gradient of the state that leaves every chunk, and dU' over what was prepared in `errors`."""
        tokens, heads, values = self.u.shape[1:]
        rows = (tokens * heads * values, heads * values, values, *three_strides(d_o))
        self._walk(REVERSE, macros, (None, d_o, lines, d_final, leaving, errors, d_initial), rows, reverse=True)

    def _walk(self, kernel: Kernel, macros: Macros, given: tuple[Tensor | None, ...], rows: tuple[int, ...], *, reverse: bool) -> None:
        blocks = self.slots.sequences * self.u.shape[2] * -(-self.u.shape[3] // (16 * self.warps))
        kernel(
            (blocks, 1, 1), 32 * self.warps + 64, (*macros, ("PIECE", self.piece), ("STAGES", self.stages), ("WARPS", self.warps), ("REVERSE", reverse)),
            (
                self.q, self.k, self.w, *given, self.bounds, *three_strides(self.q), *three_strides(self.k), *three_strides(self.w), *rows,
                self.u.shape[2], self.group, self.slots.wide, self.u.shape[1], self.chunk_size, self.slots.each,
            ),
            walk_bytes(self.piece, self.stages, self.warps, self.k.shape[3], self.u.dtype, reverse=reverse, delta=bool(self.call.delta)),
        )  # fmt: skip


def run_walks(call: SlowCore, candidate: Candidate, o: Tensor, final: Tensor | None) -> None:
    """The forward into `o` and `final`: lines, the walk, the outputs, and the final states' norm."""
    x, value_slice = Walks.of(call, candidate), int(candidate.param("value_slice"))
    macros, keys = x.macros(), x.k.shape[3]
    starts, updates = x.room(fragments=True), x.room(fragments=False)
    lines = x.prepare(macros)
    x.forward(macros, lines, starts, updates, final)
    tiles = (("KEY_SLICE", padded(keys, 32)), ("VALUE_SLICE", value_slice), ("DECAYED", call.g is not None))
    OUTPUTS(
        (x.places, 1, 1), 2 * x.side, (*macros, *tiles),
        (
            x.q, x.k, call.g, call.gate, lines, starts, updates, o, *three_strides(x.q), *three_strides(x.k), *three_strides(call.g),
            *three_strides(call.gate), x.bounds, *x.grid, x.wide[0], x.wide[2], float(call.scale),
        ),
        output_bytes(x.side, keys, value_slice, x.u.dtype),
    )  # fmt: skip
    if final is not None and call.normalize_final:
        divide_by_norm(final)


def divide_by_norm(final: Tensor) -> None:
    """States `[N, H, K, V]` in float32 by their Frobenius norm + 1e-8, in place."""
    NORMED((final.shape[0] * final.shape[1], 1, 1), _THREADS, (("THREADS", _THREADS),), (final, final.shape[2] * final.shape[3]), _THREADS // 4)


def through_norm(final: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of states `[N, H, K, V]` from that of what `divide_by_norm` makes of them."""
    found = torch.empty_like(final)
    values = (final, gradient, found, final.shape[2] * final.shape[3])
    UNNORMED((final.shape[0] * final.shape[1], 1, 1), _THREADS, (("THREADS", _THREADS),), values, _THREADS // 4)
    return found
