"""The CuPy backend's kernels likewise: what NVRTC makes of a form for sm_90a, executed on CPU tensors. Kernels that are launched in clusters are not for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from titans_backends.backends.cupy import launch, sources
from torch import Tensor

from tests.hopper_emulator.block import Block
from tests.hopper_emulator.listing import Listing, listing
from tests.hopper_emulator.memory import Fault, Memory

__all__ = ["emulating"]

_FORMS: dict[launch.Form, Listing] = {}


@contextmanager
def emulating(races: Counter[tuple[str, str, str]] | None = None, without: str = "", only: tuple[str, ...] = ()) -> Iterator[list[str]]:
    """Launches inside are emulated; gives the names of the kernels in their order. Fault where one reads or writes what it may not, or waits for ever.

    `races`: takes the races in shared memory: what they are, the earlier instruction, the later one; the first block alone runs. `without`: instructions
    of this name do nothing. `only`: the kernels of these names alone, the others are launched as they would be outside.
    """
    launched: list[str] = []
    before = launch.Kernel.__call__

    def call(
        kernel: launch.Kernel, blocks: launch.Blocks, threads: int, macros: launch.Macros, values: tuple[launch.Arg, ...], shared: int = 0
    ) -> None:
        launched.append(kernel.name)
        if only and kernel.name not in only:
            before(kernel, blocks, threads, macros, values, shared)
            return
        form = launch.Form(kernel.source, kernel.name, macros, shared)
        if form not in _FORMS:
            _FORMS[form] = listing(_compiled(form))
        memory = Memory()
        given = [0 if one is None else memory.place(one, f"pointer {index}") if isinstance(one, Tensor) else one for index, one in enumerate(values)]
        memory.fill()
        for block in range(blocks[0] if races is None else 1):
            try:
                given_bytes = kernel.layout.pack(*given) + bytes(16)
                code = _FORMS[form] if not without else _silent(_FORMS[form], without)
                one = Block(code, threads // 32, shared, memory, given_bytes, block, blocks[0], races is not None)
                one.run()
                if races is not None and one.races is not None:
                    texts = {each.address: each.text for each in _FORMS[form].instructions}
                    for (what, first, second), count in one.races.found.items():
                        races[what, f"{first:#x} {texts[first]}", f"{second:#x} {texts[second]}"] += count
            except Fault as fault:
                raise Fault(f"{kernel.name}{dict(macros)}, block {block}: {fault}") from None
        memory.write_back()

    launch.Kernel.__call__ = call  # type: ignore[method-assign]
    try:
        yield launched
    finally:
        launch.Kernel.__call__ = before  # type: ignore[method-assign]


def _silent(code: Listing, name: str) -> Listing:
    return replace(code, instructions=tuple(replace(one, opcode=("NOP",)) if one.name == name else one for one in code.instructions))


def _compiled(form: launch.Form) -> bytes:
    from cuda.core import Program, ProgramOptions

    macros = [(name, str(int(value)) if isinstance(value, bool) else str(value)) for name, value in form.macros]
    options = ProgramOptions(arch="sm_90a", std="c++17", include_path=[str(sources.FOLDER)], define_macro=macros, name=form.source)
    return bytes(Program(sources.closure(form.source)[form.source], "c++", options).compile("cubin").code)


torch.set_num_threads(1)
