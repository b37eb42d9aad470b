"""How fast this device multiplies and copies at best, measured in a moment: what a floor is computed from. A yardstick, not a benchmark."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["Ceilings", "measure"]

_REPEATS = 5
_CPU_SIZE, _GPU_SIZE = 1024, 8192
_COPY_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The best of a few runs each. FLOP: multiply-adds counted as two; bytes: read and written."""

    flop_per_s: float
    bytes_per_s: float

    def __str__(self) -> str:
        return f"{self.flop_per_s / 1e9:.3g} GFLOP/s multiplying, {self.bytes_per_s / 1e9:.3g} GB/s copying"


def measure(device: str, dtype: torch.dtype) -> Ceilings:
    """The ceilings of a device for a dtype, under torch's present matmul precision and threads."""
    place = torch.device(device)
    size = _CPU_SIZE if place.type == "cpu" else _GPU_SIZE
    a = torch.ones(size, size, dtype=dtype, device=place)
    source = torch.ones(_COPY_BYTES.get(place.type, _COPY_BYTES["cpu"]), dtype=torch.int8, device=place)
    target = torch.empty_like(source)
    return Ceilings(2.0 * size**3 / _best_s(lambda: a @ a, place), 2.0 * source.numel() / _best_s(lambda: target.copy_(source), place))


def _best_s(work: Callable[[], object], place: torch.device) -> float:
    def once() -> float:
        start = time.perf_counter()
        work()
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        return time.perf_counter() - start

    once()
    return min(once() for _ in range(_REPEATS))
