"""How much memory one run takes beyond what was there before it: the allocator's figure on CUDA, the resident high-water mark on a CPU.

The mark is the kernel's own (`VmHWM`, reset through `clear_refs`), so that workspaces of libraries count and nothing is sampled.
"""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Callable
from pathlib import Path

import torch

__all__ = ["peak_mib"]

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_MIB = 1 << 20


def peak_mib(kernel: Callable[[], object], device: torch.device) -> float:
    """MiB at the peak of one run, outputs included, over those before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kept = kernel()
        torch.cuda.synchronize(device)
        del kept
        return (torch.cuda.max_memory_allocated(device) - before) / _MIB
    _return_free_memory()
    try:
        _CLEAR.write_text("5", encoding="ascii")
        before = _status_bytes("VmRSS:")
        high = _status_bytes
    except OSError:  # not Linux, or a sandbox without /proc: the process's mark so far, which an earlier peak may hide
        before, high = _lifetime_peak_bytes(""), _lifetime_peak_bytes
    kept = kernel()
    peak = high("VmHWM:")
    del kept
    return max(0.0, (peak - before) / _MIB)


def _status_bytes(field: str) -> int:
    with _STATUS.open(encoding="ascii") as lines:
        for line in lines:
            if line.startswith(field):
                return int(line.split()[1]) << 10
    raise OSError(f"{_STATUS} has no {field}")


def _lifetime_peak_bytes(field: str) -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _return_free_memory() -> None:
    """What was freed earlier leaves the process, so that using it again counts."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
