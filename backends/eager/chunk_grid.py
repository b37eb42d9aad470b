"""Tokens to chunks and back: which token sits in which row of which chunk, for dense and for packed inputs.

Chunks are numbered level by level: first every sequence's first chunk, then every second one, and so on, longest sequence first, so that the
sequences still alive at a level are a prefix, and a level is one batched product. A slab is a run of chunks whose scratch fits a budget.
Rows outside a sequence (a ragged tail, or the tokens before `chunk_offset`) are zeros, which every formula here leaves without effect.
A packed call's `cu_seqlens` is read on the host: on a GPU that copy waits for the stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ChunkGrid", "Slab", "Step", "compute_dtype"]


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of all arithmetic: float64 for float64 inputs, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@dataclass(frozen=True, slots=True)
class Step:
    """The chunks [first, last) of a slab that advance the states of the sequences [row, row + last - first) at one level."""

    first: int
    last: int
    row: int
    level: int

    @property
    def rows(self) -> slice:
        """The sequences, in the grid's order."""
        return slice(self.row, self.row + self.last - self.first)

    @property
    def chunks(self) -> slice:
        """The chunks, within the slab."""
        return slice(self.first, self.last)


@dataclass(frozen=True, slots=True)
class Slab:
    """The chunks [first, last) of a grid and the steps that they make up."""

    first: int
    last: int
    steps: tuple[Step, ...]

    @property
    def size(self) -> int:
        """How many chunks it holds."""
        return self.last - self.first

    @property
    def widest(self) -> int:
        """How many chunks its largest step advances."""
        return max(step.last - step.first for step in self.steps)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Levels of a dense slab that copy as one block: `length` tokens from `token` on go to rows `at` and after, per level."""

    first: int
    levels: int
    rows: slice
    token: int
    at: int
    length: int


_ALWAYS_WHOLE = 128


def _cut(chunk: int, offset: int, longest: int) -> tuple[int, int]:
    """The same boundaries with no more rows than there are tokens: the chunk, and how much shorter the first one is."""
    if not longest:
        return 1, 0
    head = min(chunk - offset, longest)
    chunk = max(head, min(chunk, longest - head))
    return chunk, chunk - head


class ChunkGrid:
    """The chunk grid of one call.

    `chunk` tokens per chunk, cut to the longest sequence (not in small chunks of a packed call, so that a sequence's own grid does not depend on
    what it is packed with), the first chunk of every sequence `offset` tokens shorter. `sequences` is B, or N when
    packed. `order` sorts packed sequences longest first (None: as they are).
    """

    def __init__(self, batch: int, tokens: int, chunk: int, *, offset: int = 0, cu_seqlens: Tensor | None = None, device: torch.device) -> None:
        self.batch, self.tokens = batch, tokens
        bounds = None if cu_seqlens is None else cu_seqlens.to(device="cpu", dtype=torch.int64)
        lengths = torch.full((batch,), tokens) if bounds is None else bounds.diff()
        longest = int(lengths.max()) if lengths.numel() else 0
        self.chunk, self.offset = _cut(chunk, offset, longest) if bounds is None or chunk > _ALWAYS_WHOLE else (chunk, offset)
        self.sequences = lengths.numel()
        counts = torch.where(lengths > 0, (lengths + self.offset + self.chunk - 1) // self.chunk, 0)
        levels = int(counts.max()) if self.sequences else 0
        self.order: Tensor | None = None
        self._index: Tensor | None = None
        if bounds is None:
            self.alive = [batch] * levels
        else:
            counts, order = torch.sort(counts, descending=True, stable=True)
            self.alive = torch.bincount(counts, minlength=levels + 1).flip(0).cumsum(0).flip(0)[1:].tolist() if levels else []
            self._pack(bounds, order, device)
        self.chunks = sum(self.alive)

    def _pack(self, bounds: Tensor, order: Tensor, device: torch.device) -> None:
        alive = torch.tensor(self.alive, dtype=torch.int64)
        level = torch.repeat_interleave(torch.arange(len(self.alive)), alive)
        sequence = order[torch.arange(level.numel()) - torch.repeat_interleave(alive.cumsum(0) - alive, alive)]
        start, end = bounds[:-1][sequence], bounds[1:][sequence]
        token = (start + level * self.chunk - self.offset)[:, None] + torch.arange(self.chunk)
        inside = (token >= start[:, None]) & (token < end[:, None])
        per_sequence = torch.bincount(sequence, minlength=self.sequences)
        self.order = order.to(device)
        self._index = token.where(inside, 0).to(device)
        self._outside = (~inside).to(device)
        self._ragged = bool((~inside).any())
        self._number = ((per_sequence.cumsum(0) - per_sequence)[sequence] + level).to(device)

    def slabs(self, bytes_per_chunk: int, budget: int) -> Iterator[Slab]:
        """Consecutive runs of chunks, each of about `budget` bytes of scratch, of whole levels where a level fits."""
        limit = max(1, budget // max(1, bytes_per_chunk))
        steps: list[Step] = []
        first = at = 0
        for level, alive in enumerate(self.alive):
            for row in range(0, alive, limit):
                count = min(limit, alive - row)
                if steps and at - first + count > limit:
                    yield Slab(first, at, tuple(steps))
                    steps, first = [], at
                steps.append(Step(at - first, at - first + count, row, level))
                at += count
        if steps:
            yield Slab(first, at, tuple(steps))

    def ending(self, step: Step) -> Step | None:
        """The part of a step whose sequences have no later chunk, or None."""
        later = self.alive[step.level + 1] if step.level + 1 < len(self.alive) else 0
        skip = max(0, later - step.row)
        if step.first + skip >= step.last:
            return None
        return Step(step.first + skip, step.last, step.row + skip, step.level)

    def _pieces(self, slab: Slab) -> list[_Piece]:
        pieces: list[_Piece] = []
        for step in slab.steps:
            low = step.level * self.chunk - self.offset
            start, end = max(low, 0), min(low + self.chunk, self.tokens)
            full = end - start == self.chunk
            last = pieces[-1] if pieces else None
            if full and last is not None and last.length == self.chunk and last.rows == step.rows and step.rows == slice(0, self.batch):
                pieces[-1] = _Piece(last.first, last.levels + 1, last.rows, last.token, 0, self.chunk)
            else:
                pieces.append(_Piece(step.first, 1, step.rows, start, start - low, end - start))
        return pieces

    def gather(self, slab: Slab, x: Tensor, heads: int, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """`x [B, T, G, D]` (or `[B, T, H]`, then D is 1) as `[chunks, heads, C, D]` in `dtype`, each of the G heads repeated heads / G times.

        `out`, where given, is filled and returned; its last three axes may be strided.
        """
        if x.dim() == 3:
            x = x.unsqueeze(-1)
        groups, width = x.shape[2:]
        repeat = heads // max(groups, 1)
        if out is None:
            out = torch.empty(slab.size, heads, self.chunk, width, dtype=dtype, device=x.device)
        if self._index is not None:
            rows = x[0].index_select(0, self._index[slab.first : slab.last].flatten())
            rows = rows.view(slab.size, self.chunk, groups, 1, width).permute(0, 2, 3, 1, 4)
            out.unflatten(1, (groups, repeat)).copy_(rows)
            if self._ragged:
                out.masked_fill_(self._outside[slab.first : slab.last, None, :, None], 0)
            return out
        for piece in self._pieces(slab):
            target, source = self._blocks(piece, out, x)
            if piece.length < self.chunk:
                target.zero_()
            rows = source.permute(1, 0, 3, 2, 4).unsqueeze(3)  # [levels, B, G, 1, length, D]
            target.unflatten(2, (groups, repeat))[..., piece.at : piece.at + piece.length, :].copy_(rows)
        return out

    def scatter(self, slab: Slab, chunks: Tensor, out: Tensor) -> None:
        """Writes `chunks [chunks, H, C, D]` to the tokens of `out [B, T, G, D]` (or `[B, T, G]`), summed over the heads that share one of the G."""
        if out.dim() == 3:
            out = out.unsqueeze(-1)
        groups = out.shape[2]
        if groups != chunks.shape[1]:
            chunks = chunks.unflatten(1, (groups, -1)).sum(2)
        if self._index is not None:
            rows = chunks.transpose(1, 2).flatten(0, 1).to(out.dtype)
            index = self._index[slab.first : slab.last].flatten()
            if self._ragged:
                inside = ~self._outside[slab.first : slab.last].flatten()
                rows, index = rows[inside], index[inside]
            out[0].index_copy_(0, index, rows)
            return
        for piece in self._pieces(slab):
            source, target = self._blocks(piece, chunks, out)
            target.permute(1, 0, 3, 2, 4).copy_(source[..., piece.at : piece.at + piece.length, :])

    def _blocks(self, piece: _Piece, chunks: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The piece as views of both sides: `[levels, B, H, C, D]` of the chunks and `[B, levels, length, H, D]` of the tokens."""
        rows = piece.rows.stop - piece.rows.start
        block = chunks[piece.first : piece.first + piece.levels * rows].unflatten(0, (piece.levels, rows))
        span = tokens[piece.rows, piece.token : piece.token + piece.levels * piece.length]
        return block, span.unflatten(1, (piece.levels, piece.length))

    def gather_per_chunk(self, slab: Slab, x: Tensor, dtype: torch.dtype) -> Tensor:
        """One entry per chunk, `x [B, M, ...]` (packed `[1, M, ...]`, sequence after sequence), as `[chunks, ...]` in `dtype`."""
        if self._index is not None:
            return x[0].index_select(0, self._number[slab.first : slab.last]).to(dtype)
        out = torch.empty(slab.size, *x.shape[2:], dtype=dtype, device=x.device)
        for step in slab.steps:
            out[step.chunks].copy_(x[step.rows, step.level])
        return out

    def scatter_per_chunk(self, slab: Slab, chunks: Tensor, out: Tensor) -> None:
        """Writes one entry per chunk, `chunks [chunks, ...]`, to `out [B, M, ...]`."""
        if self._index is not None:
            out[0].index_copy_(0, self._number[slab.first : slab.last], chunks.to(out.dtype))
            return
        for step in slab.steps:
            out[step.rows, step.level].copy_(chunks[step.chunks])

    @property
    def per_chunk_shape(self) -> tuple[int, int]:
        """B and M of a tensor with one entry per chunk."""
        return (1, self.chunks) if self._index is not None else (self.batch, len(self.alive))

    def states(self, given: Tensor | None, like: Tensor, heads: int, widths: tuple[int, int]) -> Tensor:
        """A fresh `[sequences, H, K, V]` in the grid's order: a copy of `given`, or zeros."""
        dtype = compute_dtype(like)
        if given is None:
            return torch.zeros(self.sequences, heads, *widths, dtype=dtype, device=like.device)
        if self.order is not None:
            return given.index_select(0, self.order).to(dtype)
        return given.to(dtype=dtype, copy=True, memory_format=torch.contiguous_format)

    def in_call_order(self, states: Tensor) -> Tensor:
        """States in the order in which the call names its sequences."""
        return states if self.order is None else torch.empty_like(states).index_copy_(0, self.order, states)
