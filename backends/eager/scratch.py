"""How much scratch a slab may take, and how a call whose chunks are too large for that is cut into groups of heads.

The budget is what a processor's caches hold, more on a GPU, where a slab must fill the device. It changes no result.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from titans_backends.signature import Signature
from titans_backends.verdict import ACCEPTED, Verdict, refused

__all__ = ["LARGEST_CHUNK", "HeadRange", "by_heads", "chunk_bytes", "head_ranges", "refuse_huge_chunk", "slab_budget"]

LARGEST_CHUNK = 4096
"""Tokens in the largest chunk whose C x C products are formed."""

_MIB = 1 << 20
_SQUARES_BYTES = 256 * _MIB
CallT = TypeVar("CallT")
Results = tuple[Tensor | None, ...]


def slab_budget(device: torch.device, *, backward: bool = False) -> int:
    """Bytes of scratch for one slab."""
    if device.type == "cpu":
        return (24 if backward else 8) * _MIB
    return 256 * _MIB


def chunk_bytes(heads: int, chunk: int, keys: int, values: int, dtype: torch.dtype, *, states: int = 0) -> int:
    """Bytes of scratch that one chunk takes over all heads, with that many `[K, V]` matrices per head."""
    return heads * (chunk * (4 * keys + 4 * values + 4 * chunk) + states * keys * values) * dtype.itemsize


def refuse_huge_chunk(signature: Signature) -> Verdict:
    """Refuses a chunk whose C x C products would take too much."""
    asked = signature.option("chunk_size")
    chunk = min(int(asked or 0), signature.dim("T"))
    if chunk <= LARGEST_CHUNK:
        return ACCEPTED
    return refused(f"chunk_size={asked} over T={signature.dim('T')} needs {chunk} x {chunk} products; at most {LARGEST_CHUNK}")


class HeadRange:
    """The heads [start, stop) of `heads`, a whole number of the groups that share a key."""

    __slots__ = ("heads", "start", "stop")

    def __init__(self, start: int, stop: int, heads: int) -> None:
        self.start, self.stop, self.heads = start, stop, heads

    def of(self, x: Tensor | None, axis: int) -> Tensor | None:
        """The range's part of a tensor whose `axis` holds the heads, or the groups of heads."""
        if x is None or x.dim() == 0:
            return x
        share = self.heads // x.shape[axis]
        return x.narrow(axis, self.start // share, (self.stop - self.start) // share)


def head_ranges(heads: int, groups: int, chunk: int, dtype: torch.dtype) -> list[HeadRange]:
    """Ranges whose C x C scratch stays within 256 MiB where one group of heads does; a single range where all do."""
    repeat = heads // max(groups, 1)
    fitting = _SQUARES_BYTES // max(1, 6 * chunk * chunk * dtype.itemsize)
    count = max(repeat, fitting // max(repeat, 1) * repeat, 1)
    return [HeadRange(start, min(start + count, heads), heads) for start in range(0, heads, count)]


def by_heads(call: CallT, ranges: list[HeadRange], run: Callable[[CallT, HeadRange], Results], axes: tuple[int, ...]) -> Results:
    """Runs a call range by range and joins the results along `axes`, one per result; a result without heads (0-d) is summed."""
    parts = []
    for part in ranges:
        narrowed = copy.copy(call)
        for name in narrowed.__slots__:  # type: ignore[attr-defined]
            value = getattr(call, name)
            if isinstance(value, Tensor) and name != "cu_seqlens":
                setattr(narrowed, name, part.of(value, 0 if value.dim() == 1 else 1 if name.startswith("initial") else 2))
        parts.append(run(narrowed, part))
    return tuple(_joined(pieces, axis) for pieces, axis in zip(zip(*parts, strict=True), axes, strict=True))


def _joined(pieces: tuple[Tensor | None, ...], axis: int) -> Tensor | None:
    given = [piece for piece in pieces if piece is not None]
    if not given:
        return None
    if given[0].dim() == 0:
        return torch.stack(given).sum(0)
    return torch.cat(given, 0 if given[0].dim() == 1 else axis)
