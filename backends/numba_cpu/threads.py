"""How many threads a call gets, and its launch: as many as torch would use, one where the work is less than a launch costs.

Numba's setting belongs to the calling thread and is put back. Launches take turns: Numba's `workqueue` layer ends the process when two threads
enter it at once, and two at once would only share the same cores.
"""

from __future__ import annotations

import os
import threading

import numba
import numpy as np
import torch

from .jit import Worker, parallel, serial

__all__ = ["launch", "workers_for"]

_SMALL_FLOP = 400_000.0
_turn = threading.Lock()


def _renew_lock() -> None:
    global _turn
    _turn = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


def workers_for(flop: float, items: int) -> int:
    """Threads for so much work in so many pieces."""
    if flop < _SMALL_FLOP or items < 2:
        return 1
    return max(1, min(torch.get_num_threads(), int(numba.config.NUMBA_NUM_THREADS), items))


def launch(worker: Worker, row: np.ndarray, workers: int) -> None:
    """Runs one worker on this thread, or several on Numba's."""
    if workers == 1:
        serial(worker.address, row)
        return
    with _turn:
        before = numba.get_num_threads()
        if before == workers:
            parallel(worker.address, row, workers)
            return
        numba.set_num_threads(workers)
        try:
            parallel(worker.address, row, workers)
        finally:
            numba.set_num_threads(before)
