"""How kernels are compiled: no bounds checks, no interpreter lock, division as in C; lazily, one compilation for all calls, kept on disk.

`kernel` is a function that other kernels call. `Worker` is what a thread runs: worker number w of a call's row. It is reached by its address, so
that Numba's parallel loop is compiled once for all of them, and none of them again inside it. No fastmath: `fma` and the order of the sums are explicit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core.ccallback import CFunc
from numba.extending import intrinsic

from .disk_cache import kernel_cache

__all__ = ["Worker", "inlined", "kernel", "parallel", "serial"]

_SETTINGS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": False}
_compiling = threading.Lock()


def kernel(function: Callable[..., Any]) -> Any:
    """A function on one thread, called from kernels only."""
    return numba.njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **_SETTINGS)(function)


def inlined(function: Callable[..., Any]) -> Any:
    """A kernel that one worker alone calls: it becomes part of that one, and is not compiled by itself first."""
    return numba.njit(inline="always", **_SETTINGS)(function)


class Worker:
    """A function of (address of the row, worker's number), compiled at its first use."""

    def __init__(self, function: Callable[[Any, Any], None]) -> None:
        self.function = function
        self._address = 0
        self._compiled: CFunc | None = None

    @property
    def address(self) -> int:
        """Where its code starts."""
        if not self._address:
            with _compiling:
                self._compile()
        return self._address

    def _compile(self) -> None:
        if self._compiled is None:
            compiled = CFunc(self.function, ((types.int64, types.int64), types.void), {}, {**_SETTINGS, "nopython": True})
            cache = kernel_cache(self.function)
            if cache is not None:
                compiled._cache = cache
            compiled.compile()
            self._compiled, self._address = compiled, compiled.address


@intrinsic
def _call(typingctx: Any, function: Any, row: Any, worker: Any) -> Any:
    """Calls a `Worker` by its address."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        word = ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [word, word])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


def _dispatched(function: Callable[..., Any], **settings: Any) -> Any:
    found = numba.njit(**_SETTINGS, **settings)(function)
    cache = kernel_cache(function)
    if cache is not None:
        found._cache = cache
    return found


def _serial(function, row, worker):
    _call(function, row.ctypes.data, worker)


def _parallel(function, row, workers):
    address = row.ctypes.data
    for worker in numba.prange(workers):
        _call(function, address, worker)


serial = _dispatched(_serial)
"""serial(address, row, worker): one worker on this thread."""

parallel = _dispatched(_parallel, parallel=True)
"""parallel(address, row, workers): all workers on Numba's threads."""
