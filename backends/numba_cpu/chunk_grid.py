"""Which tokens an item of a chunk kernel walks: sequence, head, a part of the columns or a segment of the chunks, and the chunks' bounds."""

from __future__ import annotations

from .call_row import FIELDS
from .jit import kernel
from .lanes import integer

__all__ = ["chunk_bounds", "chunk_count", "chunks_before", "sequence_bounds"]

_TOKENS, _BOUNDS, _CHUNK, _OFFSET = (FIELDS[name] for name in ("tokens", "bounds", "chunk", "offset"))


@kernel
def sequence_bounds(row, sequence):
    """The batch row, first token and end of one sequence."""
    bounds = integer(row, _BOUNDS)
    if bounds != 0:
        return 0, integer(bounds, sequence), integer(bounds, sequence + 1)
    return sequence, 0, integer(row, _TOKENS)


@kernel
def chunk_count(row, length):
    """Chunks of a sequence, whose first one is `offset` tokens shorter."""
    chunk = integer(row, _CHUNK)
    return (length + integer(row, _OFFSET) + chunk - 1) // chunk if length > 0 else 0


@kernel
def chunks_before(row, sequence):
    """Chunks of the packed sequences ahead of one: where its factors start in chunk_decay."""
    before, bounds = 0, integer(row, _BOUNDS)
    if bounds != 0:
        for i in range(sequence):
            before += chunk_count(row, integer(bounds, i + 1) - integer(bounds, i))
    return before


@kernel
def chunk_bounds(row, chunk, begin, end):
    """First token and end of one chunk."""
    size, offset = integer(row, _CHUNK), integer(row, _OFFSET)
    return max(begin, begin + chunk * size - offset), min(end, begin + (chunk + 1) * size - offset)
