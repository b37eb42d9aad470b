"""Memory whose every access is checked: the tensors of a launch, and the shared memory of a block."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["SHARED_BASE", "Fault", "Memory", "Shared"]

Bytes = NDArray[np.uint8]
Indices = NDArray[np.int64]

SHARED_BASE = 0x400
"""Where a block's own shared memory begins: what lies below is the system's."""
_BASE = 1 << 20
_APART = 1 << 13


class Fault(Exception):
    """An access that a card would answer with an error, or with somebody else's numbers."""


class Memory:
    """The tensors that a launch was given, each storage once, with addresses that are aligned as on the host and far apart."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[int, Bytes, str]] = {}
        self._end = _BASE
        self._bytes: Bytes = np.zeros(0, np.uint8)
        self._is_ours: NDArray[np.bool_] = np.zeros(0, np.bool_)

    def place(self, tensor: Tensor, name: str) -> int:
        """The address that the kernel is given for a tensor."""
        storage = tensor.untyped_storage()
        start = storage.data_ptr()
        if start not in self._held:
            held = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()  # type: ignore[call-overload]
            self._held[start] = (self._end + start % 256, held, name)
            self._end += -(-(held.size + 256) // _APART) * _APART + _APART
        return self._held[start][0] + tensor.data_ptr() - start

    def fill(self) -> None:
        """Copies the tensors; what lies between them is nobody's."""
        self._bytes = np.full(self._end - _BASE, 0xA5, np.uint8)
        self._is_ours = np.zeros(self._end - _BASE, np.bool_)
        for address, held, _ in self._held.values():
            self._bytes[address - _BASE : address - _BASE + held.size] = held
            self._is_ours[address - _BASE : address - _BASE + held.size] = True

    def write_back(self) -> None:
        """Copies what was written into the tensors."""
        for address, held, _ in self._held.values():
            held[:] = self._bytes[address - _BASE : address - _BASE + held.size]

    def read(self, addresses: Indices, size: int) -> Bytes:
        """`[lanes, size]` bytes."""
        at = self._places(addresses, size, "read")
        return self._bytes[at[:, None] + np.arange(size)]

    def write(self, addresses: Indices, data: Bytes) -> None:
        """`data [lanes, size]`."""
        at = self._places(addresses, data.shape[1], "write")
        for byte in range(data.shape[1]):
            self._bytes[at + byte] = data[:, byte]

    def _places(self, addresses: Indices, size: int, what: str) -> Indices:
        if (addresses % size).any():
            raise Fault(f"a {what} of {size} bytes is not aligned")
        at = addresses - _BASE
        outside = (at < 0) | (at + size > self._bytes.size)
        if not outside.any():
            outside = ~(self._is_ours[at] & self._is_ours[at + size - 1])
        if outside.any():
            first = int(addresses[outside][0])
            near, held, name = min(self._held.values(), key=lambda one: min(abs(first - one[0]), abs(first - one[0] - one[1].size)))
            raise Fault(f"a {what} of {size} bytes at byte {first - near} of {name}, which has {held.size}, in {int(outside.sum())} threads")
        return at


class Shared:
    """A block's shared memory."""

    def __init__(self, size: int) -> None:
        self.end = SHARED_BASE + size
        self.bytes: Bytes = np.full(self.end, 0x7F, np.uint8)

    def read(self, addresses: Indices, size: int, aligned: bool = True) -> Bytes:
        """`[lanes, size]` bytes."""
        self._check(addresses, size, "read", aligned)
        return self.bytes[addresses[:, None] + np.arange(size)]

    def write(self, addresses: Indices, data: Bytes) -> None:
        """`data [lanes, size]`."""
        self._check(addresses, data.shape[1], "write", True)
        for byte in range(data.shape[1]):
            self.bytes[addresses + byte] = data[:, byte]

    def _check(self, addresses: Indices, size: int, what: str, aligned: bool) -> None:
        if aligned and (addresses % size).any():
            raise Fault(f"a {what} of {size} bytes of shared memory is not aligned")
        if addresses.size and (addresses.min() < SHARED_BASE or addresses.max() + size > self.end):
            raise Fault(
                f"a {what} of {size} bytes of shared memory at {int(addresses.min()):#x} to {int(addresses.max()):#x}, which ends at {self.end:#x}"
            )
