"""numba.cuda, imported once for this backend, and the decorator of the functions that kernels call.

numba-cuda up to 0.30.4 names `numpy.row_stack` while its CUDA target is imported, and numpy 2.5 has it no more: for the time of that import alone
it is `numpy.vstack`, which it always was. `SIMULATED`: NUMBA_ENABLE_CUDASIM was set when Numba was imported, so kernels run in Python on the CPU.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy

__all__ = ["ONE", "SIMULATED", "ZERO", "cuda", "device", "float32", "float64", "int64"]


@contextmanager
def _row_stack() -> Iterator[None]:
    """`numpy.row_stack` where numpy has none, and gone again afterwards."""
    absent = not hasattr(numpy, "row_stack")
    if absent:
        numpy.row_stack = numpy.vstack
    try:
        yield
    finally:
        if absent:
            del numpy.row_stack


def _imported() -> tuple[Any, bool]:
    try:
        with _row_stack():
            from numba import config, cuda

            simulated = bool(config.ENABLE_CUDASIM)
            if not simulated:
                importlib.import_module("numba.cuda.np.arrayobj")
    except Exception as error:
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("numba", "numba-cuda", "numpy"))
        raise ImportError(
            f"numba.cuda cannot be imported ({versions}): {type(error).__name__}: {error}. These versions work: pip install numba==0.68.1 "
            f"numba-cuda==0.30.4 'numpy<2.5'"
        ) from error
    return cuda, simulated


cuda, SIMULATED = _imported()


float32, float64, int64 = numpy.float32, numpy.float64, numpy.int64
"""What a kernel writes to convert a number; `0.0` in a kernel is a float64, and would make its sums float64."""
ZERO, ONE = float32(0), float32(1)


def device(function: Callable[..., Any]) -> Any:
    """A function that kernels call. It may not name `cuda`: the simulator takes it as it is."""
    return function if SIMULATED else cuda.jit(device=True)(function)
