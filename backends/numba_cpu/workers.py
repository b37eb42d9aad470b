"""What a thread runs for each kind of call: worker w takes the items w, w + workers, ...; which worker runs an item changes no bit of it."""

from __future__ import annotations

from .call_row import FIELDS, LENGTH
from .chunk_scan import chunk_scan_item
from .jit import Worker, kernel
from .lanes import integer
from .step_tokens import step_item
from .token_scan import token_scan_item
from .uw_chunks import uw_item

__all__ = ["CHUNK_SCAN", "STEP", "TOKEN_SCAN", "UW"]

_ITEMS, _WORKERS, _SCRATCH, _SCRATCH_SIZE = (FIELDS[name] for name in ("items", "workers", "scratch", "scratch_size"))


@kernel
def _scratch(row, worker):
    """A worker's scratch; behind the row where there is no other."""
    scratch = integer(row, _SCRATCH)
    return row + 8 * LENGTH if scratch == 0 else scratch + 4 * worker * integer(row, _SCRATCH_SIZE)


def _token_scan(row, worker):
    scratch = _scratch(row, worker)
    for item in range(worker, integer(row, _ITEMS), integer(row, _WORKERS)):
        token_scan_item(row, item, scratch)


def _chunk_scan(row, worker):
    scratch = _scratch(row, worker)
    for item in range(worker, integer(row, _ITEMS), integer(row, _WORKERS)):
        chunk_scan_item(row, item, scratch)


def _uw(row, worker):
    scratch = _scratch(row, worker)
    for item in range(worker, integer(row, _ITEMS), integer(row, _WORKERS)):
        uw_item(row, item, scratch)


def _step(row, worker):
    scratch = _scratch(row, worker)
    for item in range(worker, integer(row, _ITEMS), integer(row, _WORKERS)):
        step_item(row, item, scratch)


TOKEN_SCAN, CHUNK_SCAN, UW, STEP = Worker(_token_scan), Worker(_chunk_scan), Worker(_uw), Worker(_step)
