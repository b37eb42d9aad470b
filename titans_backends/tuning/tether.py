"""What a process of the tuner's does before anything else, so that it can be no trouble: it ends with its parent, and first of all processes.

Ctrl-C is the parent's to handle. Never called in a person's own process.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

__all__ = ["tether"]

_PDEATHSIG = 1


def tether(parent: int) -> None:
    """A killed tuner leaves no child behind, not even one that hangs; and exhausted memory ends with this process before it reaches anybody else."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
