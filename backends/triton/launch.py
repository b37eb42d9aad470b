"""Launching a Triton kernel without Triton's argument processing: compiled forms are kept per device in a plain dictionary.

A form is the kernel with its constants, the dtypes and 16-byte alignment of its pointers, and its warps and stages; a call that finds its form
pays for one tuple, one lookup and the driver. Under `TRITON_INTERPRET=1` the kernel runs in Triton's interpreter.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.compiler import ASTSource
from triton.runtime.interpreter import InterpretedFunction

__all__ = ["DTYPE_NAMES", "Form", "Kernel", "capability", "source_of"]

Value = int | float | str | bool | None
Arg = Tensor | int | float | None

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
    """What a kernel is compiled for. `types` follow the kernel's run-time parameters: a type's name, with `!` where 16 divides the value; None: absent."""

    types: tuple[str | None, ...]
    constants: tuple[Value, ...]
    warps: int
    stages: int


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
        self._forms: dict[object, tuple[object, ...]] = {}
        self._lock = threading.Lock()
        self._unused = (None,) * len(self.constant_names)

    @property
    def name(self) -> str:
        """The jitted function's name."""
        return str(getattr(self.function, "__name__", self.function))

    def __call__(self, blocks: int, args: tuple[Arg, ...], constants: tuple[Value, ...], warps: int, stages: int) -> None:
        """Runs `blocks` programs on the current stream of the current device, which the tensors must lie on."""
        if not blocks:
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
        key = (device, tuple(types), constants, warps, stages)
        found = self._forms.get(key)
        if found is None:
            found = self._compiled(key, device, self._form(args, constants, warps, stages))
        run, function, packed = found
        run(blocks, 1, 1, torch._C._cuda_getCurrentRawStream(device), function, packed, None, None, None, *values, *self._unused)  # type: ignore[operator]

    def _form(self, args: tuple[Arg, ...], constants: tuple[Value, ...], warps: int, stages: int) -> Form:
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
        return Form(tuple(types), constants, warps, stages)

    def _compiled(self, key: object, device: int, form: Form) -> tuple[object, ...]:
        with self._lock:
            found = self._forms.get(key)
            if found is None:
                kernel = triton.compile(source_of(self, form), options={"num_warps": form.warps, "num_stages": form.stages})
                found = self._forms[key] = (kernel.run, kernel.function, kernel.packed_metadata)
        return found


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


def capability(device: int) -> tuple[int, int]:
    """The compute capability of a device."""
    major, minor = torch.cuda.get_device_capability(device)
    return major, minor
