"""What an eager call takes in a loop: the call made again and again in a row, as who uses it makes it, and on CUDA the device's share from a cold cache.

A single call that follows other work is timed with a host that has to find its code and data again, which costs three to twenty times the call itself where
that is short: such a figure says what ran before, not what was called. Used in the child only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable

import torch

__all__ = ["CpuSampler", "EagerSampler", "row_of"]

Kernel = Callable[[], object]

_ROW_US, _MOST_CALLS = 500.0, 16
"""A row is as many calls as take so long, so many at most."""
_LONG_US = 5_000.0
"""Such a call is timed alone: neither the host's share nor what a row brings is 2 % of it."""
_ALONE_US = 500_000.0
"""Such a call is timed alone on a CPU: what fills its caches is less than 1 % of it, and a sample must be back before a tune's `--timeout`."""
_FLUSHES, _MOST_FLUSHES, _AHEAD = 2, 16, 1.5
"""How often the cache is overwritten before a cold call, and how much longer than the host's share that is to last."""


def row_of(call_us: float) -> tuple[int, int]:
    """How many calls are made before a row begins, and how many are in it, where one takes about so long. One at least goes before: a row has no beginning."""
    timed = int(min(_MOST_CALLS, max(1.0, _ROW_US / max(call_us, 1e-3))))
    return 1 + timed // 4, timed


class CpuSampler:
    """The wall clock around a row of calls. The calls before it have put into the caches what a loop finds there, and nothing that another candidate left."""

    def __init__(self) -> None:
        self._calls: dict[Hashable, float] = {}

    def sample(self, key: Hashable, kernel: Kernel) -> float:
        """Microseconds of one call of a row; what a call returns is freed before the next one returns, as in a loop that rebinds it."""
        new = key not in self._calls
        expected = min(self.once(kernel), self.once(kernel)) if new else self._calls[key]
        if expected < _ALONE_US:
            found = self._in_a_row(kernel, *row_of(expected))
        elif new:
            found = expected
        else:
            found = self.once(kernel)
        self._calls[key] = min(expected, found)  # one interrupted call shortens no later row
        return found

    def _in_a_row(self, kernel: Kernel, before: int, timed: int) -> float:
        """A call's share of a row."""
        kept = None
        for _ in range(before):
            kept = kernel()
        start = time.perf_counter_ns()
        for _ in range(timed):
            kept = kernel()
        stop = time.perf_counter_ns()
        del kept
        return (stop - start) / 1e3 / timed

    def once(self, kernel: Kernel) -> float:
        """Microseconds of a single call, whatever ran before."""
        start = time.perf_counter_ns()
        kept = kernel()
        stop = time.perf_counter_ns()
        del kept
        return (stop - start) / 1e3

    def synchronize(self) -> None:
        """Nothing runs behind a CPU's back."""


class EagerSampler:
    """A row of calls between two events, and one call behind writes of twice the L2: a loop goes at the pace of the host or of the device, whichever is slower.

    The row says how soon the host comes round, or how soon the device does with what it finds in its cache; the call behind the writes, which the host makes
    meanwhile, what the device takes from a cold one.
    """

    def __init__(self, device: torch.device) -> None:
        size = int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or 64 << 20
        self._flush = torch.empty(2 * size, dtype=torch.int8, device=device)
        self._device = device
        self._calls: dict[Hashable, float] = {}
        self._flush_us = 0.0

    def sample(self, key: Hashable, kernel: Kernel) -> float:
        """Microseconds of one call of a loop; of a single call where it is long."""
        expected = self._calls[key] if key in self._calls else min(self._walled(kernel), self._walled(kernel))
        found = self.once(kernel) if expected >= _LONG_US else self._in_a_loop(kernel, expected)
        self._calls[key] = min(expected, found)  # one interrupted call shortens no later row
        return found

    def once(self, kernel: Kernel) -> float:
        """Microseconds of a single call from a cold cache: the device's, or the host's where that is longer."""
        cold_us, _, host_us = self._cold(kernel, 0.0)
        return max(cold_us, host_us)

    def synchronize(self) -> None:
        """Waits for the device; a faulting kernel shows here."""
        torch.cuda.synchronize(self._device)

    def _in_a_loop(self, kernel: Kernel, expected_us: float) -> float:
        """The longer of a row's share and the cold call, which counts where it was queued whole before the device came to it."""
        row_us = self._row(kernel, *row_of(expected_us))
        cold_us, waited, _ = self._cold(kernel, row_us)
        return row_us if waited else max(row_us, cold_us)

    def _walled(self, kernel: Kernel) -> float:
        """A call by the wall clock, to its end on the device."""
        self.synchronize()
        start = time.perf_counter_ns()
        kept = kernel()
        self.synchronize()
        stop = time.perf_counter_ns()
        del kept
        return (stop - start) / 1e3

    def _row(self, kernel: Kernel, before: int, timed: int) -> float:
        """A call's share of a row; nobody waits between the calls before it and its own."""
        start, stop = _recorded_events()
        kept = None
        for _ in range(before):
            kept = kernel()
        start.record()
        for _ in range(timed):
            kept = kernel()
        stop.record()
        self.synchronize()
        del kept
        return float(start.elapsed_time(stop)) * 1e3 / timed

    def _cold(self, kernel: Kernel, host_us: float) -> tuple[float, bool, float]:
        """A call behind writes that last longer than `host_us`, what a host takes to make it: its time on the device, whether the device waited for
        the host all the same, so that the time holds some of its, and what the host took."""
        begin, start, stop = (*_recorded_events(), torch.cuda.Event(enable_timing=True))
        stop.record()
        enough = _AHEAD * host_us / self._flush_us if self._flush_us else 0.0
        flushes = int(min(_MOST_FLUSHES, max(_FLUSHES, 1 + enough)))
        self.synchronize()
        begin.record()
        for _ in range(flushes):
            self._flush.zero_()
        start.record()
        began = time.perf_counter_ns()
        kept = kernel()
        made = time.perf_counter_ns()
        stop.record()
        waited = start.query()
        self.synchronize()
        del kept
        self._flush_us = float(begin.elapsed_time(start)) * 1e3 / flushes
        return float(start.elapsed_time(stop)) * 1e3, waited, (made - began) / 1e3


def _recorded_events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    """Two events that are there: one is made where it is recorded first, which would be between them."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    stop.record()
    return start, stop
