"""From a call's sizes to a launch: which worker, its items and threads, its scratch and its row.

A scan's items are sequences x heads, cut into parts of the value columns (or, where chunks do not depend on each other, into segments of chunks)
as far as the threads need it. No cut changes a bit of any result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .call_row import Prepared, contiguous_strides
from .chunk_scan import chunk_scan_scratch
from .jit import Worker
from .lanes import WIDTH
from .threads import launch, workers_for, workers_now
from .token_scan import token_scan_scratch
from .uw_chunks import uw_scratch
from .workers import CHUNK_SCAN, TOKEN_SCAN, UW

__all__ = ["TRANSFORMS", "Launch", "Sizes", "bounds_of", "chunk_launch", "maker", "new", "token_launch", "uw_launch"]

TRANSFORMS = {"given": 0, "exact": 1, "lam": 2, "none": 3}
"""How a scan turns its values into U': as they are given, or by a transform of them."""

_BLOCK_FLOATS = 4096
_LEAST_BLOCK, _LARGEST_BLOCK = 16, 64
_ITEMS_PER_WORKER = 4


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of a call; `sequences` are the batch's, or the packed ones."""

    sequences: int
    batch: int
    tokens: int
    heads: int
    group: int
    keys: int
    values: int

    @classmethod
    def of(cls, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Sizes:
        """From k `[B, T, G, K]` and v `[B, T, H, V]`."""
        batch, tokens, heads, values = v.shape
        sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        return cls(sequences, batch, tokens, heads, heads // max(k.shape[2], 1), k.shape[3], values)

    @property
    def outputs(self) -> tuple[int, int, int, int]:
        """The shape of o."""
        return (self.batch, self.tokens, self.heads, self.values)

    @property
    def states(self) -> tuple[int, int, int, int]:
        """The shape of the final states."""
        return (self.sequences, self.heads, self.keys, self.values)

    @property
    def work(self) -> float:
        """About the FLOP of a scan, for the number of threads."""
        return 8.0 * self.batch * self.tokens * self.heads * self.keys * self.values

    def options(self) -> dict[str, int | float]:
        """As a row holds them."""
        return {
            "sequences": self.sequences, "tokens": self.tokens, "heads": self.heads, "group": self.group, "keys": self.keys, "values": self.values,
            "parts": 1, "segments": 1,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Launch:
    """A prepared kernel for at most so many workers: calling it runs it on a call's tensors, with as many as torch has threads then."""

    worker: Worker
    prepared: Prepared
    most: int

    def __call__(self, call: object, outputs: Mapping[str, Tensor | None], bounds: Tensor | None = None) -> None:
        workers = workers_now(self.most)
        row, scratch = self.prepared.row(call, outputs, bounds, workers)
        launch(self.worker, row, workers)
        del scratch  # not before


def new(shape: tuple[int, ...]) -> Tensor:
    """A contiguous float32 tensor on the CPU, whatever torch's defaults are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def maker(like: Tensor) -> Callable[[Tensor], Tensor]:
    """What makes a contiguous tensor of the shape of tensors like this one, as fast as torch can."""
    if like.is_contiguous():
        return torch.empty_like
    shape = tuple(like.shape)
    return lambda _: new(shape)


def bounds_of(indices: Tensor | None) -> Tensor | None:
    """Packed sequences' bounds, or the slots of a pool, as contiguous int64 on the CPU."""
    return None if indices is None else indices.to(device="cpu", dtype=torch.int64).contiguous()


def _made(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    return {"o": contiguous_strides(sizes.outputs), "final": contiguous_strides(sizes.states)}


def token_launch(call: object, sizes: Sizes, given: Mapping[str, str], options: Mapping[str, int | float]) -> Launch:
    """The token scan: blocks of as many tokens as fit the nearest cache beside the state."""
    block = max(_LEAST_BLOCK, min(_LARGEST_BLOCK, _BLOCK_FLOATS // (2 * max(sizes.keys, 1))))
    items = sizes.sequences * sizes.heads * -(-sizes.values // (2 * WIDTH))
    row = {**sizes.options(), "delta": 1, "rows": block, "items": items, **options}
    workers = workers_for(sizes.work, items)
    return Launch(TOKEN_SCAN, Prepared(call, given, _made(sizes), token_scan_scratch(sizes.keys, block, WIDTH), row, workers), workers)


def chunk_launch(call: object, sizes: Sizes, given: Mapping[str, str], chunk: int, options: Mapping[str, int | float]) -> Launch:
    """The chunk scan."""
    rows = max(1, min(chunk, sizes.tokens))
    heads, tiles = sizes.sequences * sizes.heads, -(-sizes.values // WIDTH)
    wanted = workers_for(sizes.work, 1 << 30)
    row = {**sizes.options(), "chunk": chunk, "rows": rows, **options}
    missing = -(-wanted * _ITEMS_PER_WORKER // max(heads, 1))
    if options.get("reset"):
        row["segments"] = max(1, min(missing, -(-sizes.tokens // chunk))) if wanted > 1 else 1
    elif heads < 2 * wanted and wanted > 1 and not (options.get("normalize_read") or options.get("normalize_final")):
        row["parts"] = max(1, min(missing, tiles))
    row["items"] = items = heads * int(row["segments"]) * int(row["parts"])
    workers = max(1, min(wanted, items))
    return Launch(CHUNK_SCAN, Prepared(call, given, _made(sizes), chunk_scan_scratch(sizes.keys, sizes.values, rows, WIDTH), row, workers), workers)


def uw_launch(call: object, sizes: Sizes, given: Mapping[str, str], chunk: int, options: Mapping[str, int | float]) -> Launch:
    """u and w, `made` like u `[B, T, H, V]` and w `[B, T, H, K]`."""
    rows = max(1, min(chunk, sizes.tokens))
    work = float(sizes.batch * sizes.tokens * sizes.heads * rows * (3 * sizes.keys + sizes.values))
    wanted, heads = workers_for(work, 1 << 30), sizes.sequences * sizes.heads
    segments = max(1, min(-(-wanted * _ITEMS_PER_WORKER // max(heads, 1)), -(-sizes.tokens // chunk))) if wanted > 1 else 1
    items = heads * segments
    row = {**sizes.options(), "chunk": chunk, "rows": rows, "segments": segments, "items": items, **options}
    made = {"u_out": contiguous_strides(sizes.outputs), "w_out": contiguous_strides((*sizes.outputs[:3], sizes.keys))}
    workers = max(1, min(wanted, items))
    return Launch(UW, Prepared(call, given, made, uw_scratch(sizes.keys, rows, WIDTH), row, workers), workers)
