"""Launching a Triton kernel without Triton's argument processing: compiled forms are kept per device in a plain dictionary.

A form is the kernel with its constants, the dtypes and 16-byte alignment of its pointers, and its warps and stages; a call that finds its form
pays for one tuple, one lookup and the driver. Under `TRITON_INTERPRET=1` the kernel runs in Triton's interpreter.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.compiler import ASTSource
from triton.runtime.interpreter import InterpretedFunction

from titans_backends.launching.tape import Arg, Taped, Taping

from .lanes import compiled

__all__ = ["TAPING", "Form", "Kernel", "Loaded", "options_of", "source_of"]

Value = int | float | str | bool | None
Loaded = tuple[Callable[..., None], object, object]
"""A compiled form on a device: Triton's launcher, the function's handle, packed metadata."""

DTYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_STRIDE_ENDINGS = ("_b", "_t", "_h", "_n")
_WIDE = 2**31
_ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True, slots=True)
class Form:
    """What a kernel is compiled for. `types` follow the kernel's run-time parameters: a type's name, with `!` where 16 divides the value; None: absent.

    `registers`: the most that a thread may have, so that more blocks fit a processor; 0 leaves it to the compiler.
    """

    types: tuple[str | None, ...]
    constants: tuple[Value, ...]
    warps: int
    stages: int
    registers: int = 0


TAPING: Taping[tuple[Kernel, Form]] = Taping(lambda: torch._C._cuda_getCurrentRawStream)
"""This backend's tapes."""


class Kernel:
    """A jitted function whose `tl.constexpr` parameters come last.

    Integers named like strides (`q_b`, `q_t`, `q_h`: batch, token, head) are told apart by whether 16 divides them, pointers by
    their alignment; other numbers never cause a compilation. An absent tensor is None, which the kernel sees at compile time.
    """

    def __init__(self, function: object) -> None:
        self.function = function
        self.interpreted = isinstance(function, InterpretedFunction)
        names: list[str] = list(function.arg_names)  # type: ignore[attr-defined]
        self.constant_names = tuple(name for name in names if name.isupper())
        self.names = tuple(names[: len(names) - len(self.constant_names)])
        if tuple(names[len(self.names) :]) != self.constant_names:
            raise TypeError(f"{self.name}: its upper-case (constexpr) parameters must come last, got {names}")
        self._is_stride = tuple(name.endswith(_STRIDE_ENDINGS) for name in self.names)
        self._forms: dict[object, Loaded] = {}
        self._lock = threading.Lock()
        self._unused = (None,) * len(self.constant_names)

    @property
    def name(self) -> str:
        """The jitted function's name."""
        return str(getattr(self.function, "__name__", self.function))

    def __call__(self, blocks: int, args: tuple[Arg, ...], constants: tuple[Value, ...], warps: int, stages: int, registers: int = 0) -> None:
        """Runs `blocks` programs on the current stream of the current device, which the tensors must lie on."""
        if not blocks:
            return
        tape = TAPING.current
        if tape is not None and tape.forms is not None:
            tape.forms[self, self._form(args, constants, warps, stages, registers)] = None
            return
        if self.interpreted:
            self.function[(blocks,)](*args, **dict(zip(self.constant_names, constants, strict=True)))  # type: ignore[index]
            return
        values: list[object] = []
        types: list[object] = []
        for arg, is_stride in zip(args, self._is_stride, strict=True):
            if isinstance(arg, Tensor):
                pointer = arg.data_ptr()
                values.append(pointer)
                types.append((arg.dtype, pointer & 15))
            else:
                values.append(arg)
                if arg.__class__ is int:
                    types.append((not arg & 15 if is_stride else False) if -_WIDE <= arg < _WIDE else "wide")  # type: ignore[operator]
                else:
                    types.append(arg.__class__)
        device = torch._C._cuda_getDevice()
        key = (device, tuple(types), constants, warps, stages, registers)
        found = self._forms.get(key)
        if found is None:
            found = self._compiled(key, device, self._form(args, constants, warps, stages, registers))
        run, function, packed = found
        if tape is not None:
            tape.launches.append(Taped(self._repeat(found, blocks), args))
        run(blocks, 1, 1, torch._C._cuda_getCurrentRawStream(device), function, packed, None, None, None, *values, *self._unused)

    def _repeat(self, found: Loaded, blocks: int) -> Callable[[int, tuple[object, ...]], None]:
        """What makes a launch again, with other arguments; constants are passed as None, which the launcher skips."""
        run, function, packed = found
        unused = self._unused

        def again(stream: int, args: tuple[object, ...]) -> None:
            run(blocks, 1, 1, stream, function, packed, None, None, None, *args, *unused)

        return again

    def _form(self, args: tuple[Arg, ...], constants: tuple[Value, ...], warps: int, stages: int, registers: int = 0) -> Form:
        types: list[str | None] = []
        for arg, is_stride in zip(args, self._is_stride, strict=True):
            if arg is None:
                types.append(None)
            elif isinstance(arg, Tensor):
                types.append(DTYPE_NAMES[arg.dtype] + ("" if arg.data_ptr() & 15 else "!"))
            elif isinstance(arg, int):
                types.append(("i32" if -_WIDE <= arg < _WIDE else "i64") + ("!" if is_stride and -_WIDE <= arg < _WIDE and not arg & 15 else ""))
            else:
                types.append("fp32")
        return Form(tuple(types), constants, warps, stages, registers)

    def _compiled(self, key: object, device: int, form: Form) -> Loaded:
        with self._lock:
            found = self._forms.get(key)
            if found is None:
                kernel = compiled(source_of(self, form), options_of(form))
                found = self._forms[key] = (kernel.run, kernel.function, kernel.packed_metadata)
        return found


def options_of(form: Form) -> dict[str, int]:
    """The compiler's options for a form."""
    options = {"num_warps": form.warps, "num_stages": form.stages}
    return {**options, "maxnreg": form.registers} if form.registers else options


def source_of(kernel: Kernel, form: Form) -> ASTSource:
    """What `triton.compile` takes for a form; with a target of its own it compiles without a GPU."""
    signature: dict[str, str] = {}
    constants: dict[str, Value] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    for index, (name, kind) in enumerate(zip(kernel.names, form.types, strict=True)):
        if kind is None:
            signature[name], constants[name] = "constexpr", None
        else:
            signature[name] = kind.rstrip("!")
            if kind.endswith("!"):
                attributes[(index,)] = _ALIGNED  # type: ignore[assignment]
    for name, value in zip(kernel.constant_names, form.constants, strict=True):
        signature[name], constants[name] = "constexpr", value
    return ASTSource(kernel.function, signature, constants, attributes)
