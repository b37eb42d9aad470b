"""How a kernel starts: on torch's current stream of the tensors' device, never waiting, with each tensor wrapped once for Numba.

A wrapped tensor is an address with its shape and strides; it keeps no memory alive, so remembering the last few thousand of them costs nothing.
Arrays are typed as strided, so a kernel is compiled once for its constants and device, whatever the layout of the tensors, and Numba need not look
at the arguments' types again.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .target import SIMULATED, cuda

__all__ = ["Arg", "Kernel", "numba_type"]

Arg = Tensor | int | float
Blocks = tuple[int, int]

_TYPESTR = {torch.float32: "<f4", torch.float64: "<f8", torch.int32: "<i4", torch.int64: "<i8"}


class Kernel:
    """A kernel by its factory: `make(*constants)` gives the Python function whose closure holds the constants, compiled at its first launch.

    An argument's dtype and dimensions are the same in every launch; its shape and strides are free.
    """

    def __init__(self, make: Callable[..., Callable[..., None]]) -> None:
        self.name = make.__name__
        self.make = functools.lru_cache(maxsize=None)(make)
        self._compiled: dict[tuple[int, tuple[int, ...]], Any] = {}

    def __call__(self, blocks: Blocks, threads: int, constants: tuple[int, ...], *args: Arg) -> None:
        """Starts `blocks` of `threads`; no block, no launch. The arguments are tensors of one device, and numbers."""
        if not blocks[0] or not blocks[1]:
            return
        if SIMULATED:
            cuda.jit(self.make(*constants))[blocks, threads](*[_simulated(arg) if isinstance(arg, Tensor) else arg for arg in args])
            return
        index = next(arg.device.index for arg in args if isinstance(arg, Tensor))
        with _current(index):
            kernel = self._compiled.get((index, constants))
            if kernel is None:
                signature = tuple(numba_type(arg) for arg in args)
                kernel = self._compiled[index, constants] = cuda.jit(signature)(self.make(*constants))
            start = _configured(kernel, blocks, threads, index, torch.cuda.current_stream(index).cuda_stream)
            start(*[_wrapped(arg) if isinstance(arg, Tensor) else arg for arg in args])


def numba_type(arg: Arg) -> Any:
    """The type that a kernel is compiled for: int64, float64, or an array of any strides."""
    from numba.cuda import types

    if isinstance(arg, Tensor):
        return types.Array(getattr(types, str(arg.dtype).removeprefix("torch.")), arg.dim(), "A")
    return types.float64 if isinstance(arg, float) else types.int64


def _current(index: int) -> contextlib.AbstractContextManager[Any]:
    """Numba's own notion of the current device, where there is more than one."""
    return cuda.gpus[index] if torch.cuda.device_count() > 1 else contextlib.nullcontext()


@functools.lru_cache(maxsize=1024)
def _configured(kernel: Any, blocks: Blocks, threads: int, index: int, stream: int) -> Any:
    """The kernel on its grid and stream. Numba warns of small grids, which a short call has and cannot help."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Grid size")
        return kernel[blocks, threads, _stream(index, stream)]


@functools.lru_cache(maxsize=64)
def _stream(index: int, address: int) -> Any:
    return cuda.external_stream(address)


def _wrapped(tensor: Tensor) -> Any:
    return _array(tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device.index)


class _Address:
    """What `as_cuda_array` reads, without the tensor."""

    def __init__(self, interface: dict[str, object]) -> None:
        self.__cuda_array_interface__ = interface


@functools.lru_cache(maxsize=4096)
def _array(address: int, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, index: int) -> Any:
    strides = tuple(step * dtype.itemsize for step in stride)
    interface = {"shape": shape, "strides": strides, "typestr": _TYPESTR[dtype], "data": (address, False), "version": 2}
    return cuda.as_cuda_array(_Address(interface), sync=False)


def _simulated(tensor: Tensor) -> Any:
    """The simulator's array on the tensor's own memory; a NumPy array would be copied in and out."""
    from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

    return FakeCUDAArray(tensor.detach().numpy())
