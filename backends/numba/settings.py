"""Threads of a block, and the sizes of tiles in shared memory; the simulator's are small, since each of its threads is one of Python's."""

from __future__ import annotations

from .target import SIMULATED

__all__ = ["LANES", "SHARED_BYTES", "SIMULATED_TILE", "THREADS", "WIDE", "largest_rows", "power_of_two"]

THREADS = 8 if SIMULATED else 128
"""Threads of a block whose work is one row or one column each."""
WIDE = 6 if SIMULATED else 256
"""Threads of a block that multiplies tiles; the simulator's no divisor of a head_dim of 8, so that threads read what others wrote."""
LANES = 4 if SIMULATED else 32
"""Threads that take the columns of one row together: a warp."""
SIMULATED_TILE = 4 if SIMULATED else 0
"""Rows and columns of a tile in the simulator, so that a chunk of 8 has more than one; 0 leaves it to the kernel."""
SHARED_BYTES = 48 * 1024
"""Shared memory of a block that needs no opting in: all that Numba gives."""


def power_of_two(size: int, least: int = 1) -> int:
    """The least power of two that holds `size`."""
    return max(least, 1 << (size - 1).bit_length())


def largest_rows(row_bytes: int, square: bool, other_bytes: int = 0) -> int:
    """The most rows of a tile, of 64, 32, 16 and 8, whose bytes fit, with a square of scores between rows where `square`."""
    return SIMULATED_TILE or next(
        (rows for rows in (64, 32, 16) if rows * row_bytes + square * 4 * rows * (rows + 1) + other_bytes <= SHARED_BYTES),
        8,
    )
