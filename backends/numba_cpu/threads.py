"""How many threads a call gets, and its launch: as many as torch would use, one where the work is less than a launch costs.

Numba's setting belongs to the calling thread and is put back. Launches take turns: Numba's `workqueue` layer ends the process when two threads
enter it at once, and two at once would only share the same cores. After a fork the workers run one after the other where the parent had threads
already: GNU OpenMP does not survive that, and Numba ends the process.
"""

from __future__ import annotations

import os
import threading

import numba
import numpy as np
import torch

from .jit import Worker, parallel, serial

__all__ = ["launch", "workers_for", "workers_now"]

_SMALL_FLOP = 1e6
_turn = threading.Lock()
_started = False
_lost = False


def _after_fork() -> None:
    global _turn, _lost
    _turn, _lost = threading.Lock(), _lost or _started


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def workers_for(flop: float, items: int) -> int:
    """The most threads for so much work in so many pieces."""
    if flop < _SMALL_FLOP or items < 2:
        return 1
    return max(1, min(int(numba.config.NUMBA_NUM_THREADS), items))


def workers_now(most: int) -> int:
    """As many of them as torch would use now."""
    return 1 if most == 1 else min(most, torch.get_num_threads())


def launch(worker: Worker, row: np.ndarray, workers: int) -> None:
    """Runs one worker on this thread, or several on Numba's."""
    address = worker.address
    if workers == 1:
        serial(address, row, 0)
    elif _lost:
        for number in range(workers):
            serial(address, row, number)
    else:
        _beside_each_other(address, row, workers)


def _beside_each_other(address: int, row: np.ndarray, workers: int) -> None:
    global _started
    with _turn:
        _started = True
        before = numba.get_num_threads()
        if before == workers:
            parallel(address, row, workers)
            return
        numba.set_num_threads(workers)
        try:
            parallel(address, row, workers)
        finally:
            numba.set_num_threads(before)
