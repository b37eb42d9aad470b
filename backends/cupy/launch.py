"""Launching a CUDA kernel: one struct of parameters by value, raw pointers, the current stream of the current device.

A kernel is compiled per form, its macros; an engine compiles and loads forms, CuPy's on a GPU, an emulator in the tests. Launches can be taped,
so that `program` repeats them, or collected, so that `ahead` compiles them.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from titans_backends.launching.tape import Arg, Taped, Taping

__all__ = ["DTYPES", "TAPING", "Blocks", "Engine", "Form", "Kernel", "Loaded", "Macros", "current", "using"]

Blocks = tuple[int, int, int]
Macros = tuple[tuple[str, int | str | bool], ...]

DTYPES = {torch.bfloat16: "Bfloat", torch.float16: "Half", torch.float32: "float"}
"""What warp.cuh calls the dtypes."""


@dataclass(frozen=True, slots=True)
class Form:
    """What is compiled: the `.cu` file, its kernel, the macros, and the dynamic shared memory in bytes that launches may ask for."""

    source: str
    kernel: str
    macros: Macros
    shared: int = 0


class Loaded(Protocol):
    """A form on a device: launches `blocks` of `threads` with the packed values, pointers as integers."""

    def __call__(self, blocks: Blocks, threads: int, shared: int, stream: int, layout: struct.Struct, values: Sequence[object], /) -> None: ...


class Engine(Protocol):
    """What compiles and loads: on the current device of this thread."""

    def device(self) -> int: ...

    def stream(self, device: int, /) -> int: ...

    def load(self, form: Form, /) -> Loaded: ...


_ENGINES: list[Engine] = []


@contextmanager
def using(engine: Engine) -> Iterator[None]:
    """Another engine in place of CuPy's inside, for every thread: for tests."""
    _ENGINES.append(engine)
    try:
        yield
    finally:
        _ENGINES.remove(engine)


def current() -> Engine:
    """The engine that launches go to: CuPy's, made at the first need."""
    if not _ENGINES:
        from .engine import CuPyEngine

        _ENGINES.append(CuPyEngine())
    return _ENGINES[-1]


TAPING: Taping[Form] = Taping(lambda: current().stream)
"""This backend's tapes."""


class Kernel:
    """A `__global__` function of a file in `cuda/` that takes one struct, `Params`.

    `layout` names the struct's fields in order as the module `struct` does: P pointers, q int64, i int32, f float32.
    """

    def __init__(self, source: str, name: str, layout: str) -> None:
        self.source, self.name = source, name
        self.layout = struct.Struct(f"{layout}0q")
        self._loaded: dict[object, Loaded] = {}
        self._lock = threading.Lock()

    def __call__(self, blocks: Blocks, threads: int, macros: Macros, values: tuple[Arg, ...], shared: int = 0) -> None:
        """Runs the kernel on the current stream of the current device, which the tensors must lie on; `shared`: dynamic shared memory in bytes."""
        if not blocks[0] * blocks[1] * blocks[2]:
            return
        tape = TAPING.current
        form = Form(self.source, self.name, macros, shared)
        if tape is not None and tape.forms is not None:
            tape.forms[form] = None
            return
        engine = current()
        device = engine.device()
        key = (engine, device, form)
        loaded = self._loaded.get(key)
        if loaded is None:
            with self._lock:
                loaded = self._loaded.get(key)
                if loaded is None:
                    loaded = self._loaded[key] = engine.load(form)
        given = tuple([0 if value is None else value for value in values])
        if tape is not None:
            tape.launches.append(Taped(_repeat(loaded, blocks, threads, shared, self.layout), given))
        packed = [value.data_ptr() if isinstance(value, Tensor) else value for value in given]
        loaded(blocks, threads, shared, engine.stream(device), self.layout, packed)


def _repeat(loaded: Loaded, blocks: Blocks, threads: int, shared: int, layout: struct.Struct) -> Callable[[int, tuple[object, ...]], None]:
    """What makes a launch again, on a stream, with other values."""

    def again(stream: int, values: tuple[object, ...]) -> None:
        loaded(blocks, threads, shared, stream, layout, values)

    return again
