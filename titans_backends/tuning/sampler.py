"""What one run of a kernel takes, in microseconds: as a graph that is replayed from a cold cache, or called as a loop calls it (`back_to_back`).

No candidate lives on what the one before it left in a cache. Used in the child only.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Protocol

import torch

from titans_backends.signature import Launch
from titans_backends.tuning.back_to_back import CpuSampler, EagerSampler

__all__ = ["GraphSampler", "Sampler", "once", "sampler_for"]

_FLUSHES, _MOST_FLUSHES, _TRIES = 2, 16, 6

Kernel = Callable[[], object]


class Sampler(Protocol):
    """Runs a kernel and says what one run took; `key` names it, for what is prepared once."""

    def sample(self, key: Hashable, kernel: Kernel) -> float: ...

    def synchronize(self) -> None: ...


class GraphSampler:
    """Writes a buffer of twice the L2 before each run and measures between two events; replays a capture made once per key.

    The captures share one pool of memory and write over each other's results, which nobody reads: each with its own would hold gigabytes. Where a large
    call leaves no room for the next all the same, those before it are given up.
    """

    def __init__(self, device: torch.device) -> None:
        size = int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or 64 << 20
        self._flush = torch.empty(2 * size, dtype=torch.int8, device=device)
        self._device = device
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._side = torch.cuda.Stream(device)
        self._flushes = _FLUSHES

    def sample(self, key: Hashable, kernel: Kernel) -> float:
        """The time between the events. A replay is queued behind the flush, so that launch costs do not show."""
        return self._replayed(self._captured(key, kernel))

    def _replayed(self, replay: Kernel) -> float:
        """A replay that was queued whole before the device came to it. Where it was not, the run is another; from the second on behind a longer flush, for good."""
        tries = 0
        while True:
            start, stop = _events()
            for _ in range(self._flushes):
                self._flush.zero_()
            start.record()
            replay()
            stop.record()
            waited, tries = start.query(), tries + 1  # the device was there before the replay was: the time between holds some of the host's
            self.synchronize()
            if not waited or tries == _TRIES:
                return float(start.elapsed_time(stop)) * 1e3
            if tries > 1:
                self._flushes = min(2 * self._flushes, _MOST_FLUSHES)

    def synchronize(self) -> None:
        """Waits for the device; a faulting kernel shows here."""
        torch.cuda.synchronize(self._device)

    def _captured(self, key: Hashable, kernel: Kernel) -> Kernel:
        if key not in self._graphs and not self._fits(key, kernel):
            self._graphs.clear()  # what they hold is free for them alone; each is captured again when its turn comes
            self._pool = torch.cuda.graph_pool_handle()
            torch.cuda.empty_cache()
            self._graphs[key] = self._capture(kernel)
        return self._graphs[key].replay

    def _fits(self, key: Hashable, kernel: Kernel) -> bool:
        """Captures beside the others; says whether there was memory for that, which without others is an error."""
        try:
            self._graphs[key] = self._capture(kernel)
        except torch.OutOfMemoryError:
            if not self._graphs:
                raise
            return False
        return True

    def _capture(self, kernel: Kernel) -> torch.cuda.CUDAGraph:
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            kernel()
        torch.cuda.current_stream(self._device).wait_stream(self._side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            kernel()
        graph.replay()  # the first launch takes the host longer
        self.synchronize()
        return graph


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def sampler_for(device: torch.device, launch: Launch) -> Sampler:
    """The sampler of a device and a way to launch."""
    if device.type != "cuda":
        return CpuSampler()
    return GraphSampler(device) if launch == "graph" else EagerSampler(device)


def once(device: torch.device, kernel: Kernel) -> float:
    """Microseconds of a single eager call."""
    return CpuSampler().once(kernel) if device.type != "cuda" else EagerSampler(device).once(kernel)
