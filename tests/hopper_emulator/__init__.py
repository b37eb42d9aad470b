"""Runs the Triton backend's kernels on CPU tensors as the machine code that ptxas made of them for Hopper (sm_90a), without a card.

`with emulating(): module.run(call, candidate)` compiles each form that is launched, takes its cubin apart with the `nvdisasm` that comes with Triton, and executes the
instructions one after the other, a block's threads as the lanes of numpy arrays. Reads and writes outside of the tensors and of the block's shared memory, and
operands of wgmma that lie elsewhere, are faults. What takes time on a card is done at once here: a missing wait is not seen, a wrong address is.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import triton
from titans_backends.backends.triton import lanes, launch
from torch import Tensor
from triton.backends.compiler import GPUTarget

from tests.hopper_emulator.block import Block
from tests.hopper_emulator.listing import Listing, listing
from tests.hopper_emulator.memory import Fault, Memory

__all__ = ["Fault", "assembled", "assembler", "emulating", "run"]

_FORMS: dict[object, tuple[Listing, int]] = {}


@contextmanager
def emulating() -> Iterator[list[str]]:
    """Launches inside are emulated; gives the names of the kernels in their order. Fault where one reads or writes what it may not."""
    launched: list[str] = []
    before = launch.Kernel.__call__

    def call(kernel: launch.Kernel, blocks: int, args: Any, constants: Any, warps: int, stages: int, registers: int = 0) -> None:
        tape = launch.TAPING.current
        if tape is not None and tape.forms is not None:
            before(kernel, blocks, args, constants, warps, stages, registers)
        elif blocks:
            launched.append(kernel.name)
            try:
                run(kernel, blocks, args, kernel._form(args, constants, warps, stages, registers))
            except Fault as fault:
                raise Fault(f"{kernel.name}{constants}, {warps} warps: {fault}") from None

    launch.Kernel.__call__ = call  # type: ignore[method-assign]
    try:
        yield launched
    finally:
        launch.Kernel.__call__ = before  # type: ignore[method-assign]


def run(kernel: launch.Kernel, blocks: int, args: tuple[Tensor | int | float | None, ...], form: launch.Form) -> None:
    """One launch: the tensors' memory is read, and written at the end."""
    code, shared = assembled(kernel, form)
    memory = Memory()
    given = b""
    for name, arg in zip(kernel.names, args, strict=True):
        if isinstance(arg, Tensor):
            given = _padded(given, 8) + struct.pack("<Q", memory.place(arg, name))
        elif arg is not None:
            kind = "<f" if isinstance(arg, float) else "<q" if abs(arg) >= 2**31 else "<i"
            given = _padded(given, struct.calcsize(kind)) + struct.pack(kind, arg)
    memory.fill()
    for block in range(blocks):
        Block(code, form.warps, shared, memory, _padded(given, 8) + bytes(16), block).run()
    memory.write_back()


def assembled(kernel: launch.Kernel, form: launch.Form) -> tuple[Listing, int]:
    """A form's instructions, and the bytes of shared memory that a block of it takes; compiled once a process."""
    key = (kernel, form)
    if key not in _FORMS:
        made = lanes.compiled(launch.source_of(kernel, form), launch.options_of(form), GPUTarget("cuda", 90, 32))
        _FORMS[key] = listing(cast(bytes, made.asm["cubin"])), int(made.metadata.shared)
    return _FORMS[key]


def assembler() -> str:
    """The version of the ptxas that Triton compiles for Hopper with, such as "12.8.93"."""
    from triton import knobs

    return str(knobs.nvidia.ptxas.version) if hasattr(knobs, "nvidia") else triton.__version__


def _padded(data: bytes, size: int) -> bytes:
    return data + bytes(-len(data) % size)


FOLDER = Path(__file__).parent
torch.set_num_threads(1)
