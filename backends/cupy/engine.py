"""CuPy as the engine: cubins loaded into the current CUDA context, launched through the driver with one struct of parameters.

A launch packs the struct into a buffer of its own and makes one driver call; nothing is wrapped, copied or synchronised.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Sequence

import cupy
import torch
from cupy_backends.cuda.api import driver

from .compile import architecture, cubin
from .launch import Blocks, Form, Loaded

__all__ = ["CuPyEngine"]

_FREE_SHARED_BYTES = 48 * 1024
"""Dynamic shared memory that needs no asking."""
_NO_CONTEXT = 201


class CuPyEngine:
    """Kernels on torch's current device and stream."""

    def device(self) -> int:
        """The current device's index."""
        return int(torch._C._cuda_getDevice())

    @staticmethod
    def stream(device: int) -> int:
        """torch's current stream of a device, as the driver's handle."""
        return torch._C._cuda_getCurrentRawStream(device)

    def load(self, form: Form) -> Loaded:
        """A form on the current device. CompileError where NVRTC refuses it, CUDADriverError where the card does."""
        device = self.device()
        major, minor = torch.cuda.get_device_capability(device)
        image = cubin(form, architecture(10 * major + minor))
        cupy.cuda.runtime.free(0)  # makes the device's primary context current for this thread
        module = driver.moduleLoadData(image)
        function = driver.moduleGetFunction(module, form.kernel)
        if form.shared > _FREE_SHARED_BYTES:
            driver.funcSetAttribute(function, driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, form.shared)
        return _Function(function)


class _Function:
    """A loaded kernel with its parameter buffer; the driver has read the buffer when a launch returns. Never unloaded: a captured graph may hold it."""

    __slots__ = ("_address", "_buffer", "_function", "_lock", "_pointers")

    def __init__(self, function: int) -> None:
        self._function = function
        self._lock = threading.Lock()
        self._buffer = ctypes.create_string_buffer(4096)  # the most that a kernel takes
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self._buffer))
        self._address = ctypes.addressof(self._pointers)

    def __call__(self, blocks: Blocks, threads: int, shared: int, stream: int, layout: struct.Struct, values: Sequence[object]) -> None:
        with self._lock:
            layout.pack_into(self._buffer, 0, *values)
            try:
                driver.launchKernel(self._function, *blocks, threads, 1, 1, shared, stream, self._address, 0)
            except driver.CUDADriverError as error:
                if error.status != _NO_CONTEXT:
                    raise
                cupy.cuda.runtime.free(0)  # a thread's first use of the device
                driver.launchKernel(self._function, *blocks, threads, 1, 1, shared, stream, self._address, 0)
