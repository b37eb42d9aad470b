"""Where the chunks of a call lie: the grid that restarts at every packed sequence and may start in the middle of a chunk.

For references and shape checks only; a kernel has its own way of walking the grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

__all__ = ["Span", "chunk_count", "chunk_rows", "chunk_spans", "sequence_bounds"]


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens start to stop of one sequence; `index` counts all chunks of the call, `first` says that it opens its sequence."""

    sequence: int
    start: int
    stop: int
    index: int
    first: bool


def sequence_bounds(seq_len: int, cu_seqlens: Tensor | None) -> list[tuple[int, int]]:
    """Start and stop of each packed sequence; one pair for a dense call."""
    if cu_seqlens is None:
        return [(0, seq_len)]
    ends = [int(end) for end in cu_seqlens.tolist()]
    return list(pairwise(ends))


def chunk_spans(seq_len: int, chunk_size: int, cu_seqlens: Tensor | None = None, offset: int = 0) -> list[Span]:
    """The chunks in order, sequence after sequence; an empty sequence has none. The first chunk is `offset` tokens shorter."""
    spans: list[Span] = []
    for sequence, (begin, end) in enumerate(sequence_bounds(seq_len, cu_seqlens)):
        start = begin
        while start < end:
            stop = min(end, begin - offset + ((start - begin + offset) // chunk_size + 1) * chunk_size)
            spans.append(Span(sequence, start, stop, len(spans), start == begin))
            start = stop
    return spans


def chunk_count(seq_len: int, chunk_size: int, cu_seqlens: Tensor | None = None) -> int:
    """M: the number of chunks of a call whose grid starts at each sequence's first token."""
    return sum(-(-(end - begin) // chunk_size) for begin, end in sequence_bounds(seq_len, cu_seqlens))


def chunk_rows(seq_len: int, chunk_size: int, sequences: int | None) -> int:
    """Z: the rows of a result with one for each chunk; packed (`sequences` is N) as many as there can be, whatever the lengths are."""
    return -(-seq_len // chunk_size) if sequences is None else seq_len // chunk_size + sequences
