"""Compiling a kernel, with a mend for what the LLVM of Triton 3.6 gets wrong: one lane of a packed pair that reaches into the other.

Two 32-bit numbers are kept as halves of a 64-bit register. Where nobody reads the lower half, LLVM shifts it by what was the other half's amount, the
NVPTX backend makes of that shift a 64-bit product, and its upper bits fall into the upper half, where a column's index is read: a wrong place in memory.
In PTX: `mul.wide.u32 L, X, 2^n` and `shl.b64 H, Y, 32 or more` meet in `or.b64 C, L, H`, and `mov.b64 {a, b}, C` takes C apart. The mend joins
the lower 32 bits of L alone, by way of C: whatever else reads L keeps it whole. Seen in kernels of the backward with tiles of 16 columns; Triton 3.7.1 makes none.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable

import triton
from triton import knobs
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

__all__ = ["compiled", "mended", "spilling"]

_LOCK = threading.RLock()
_JOIN = re.compile(r"^(\s*)or\.b64\s+(%rd\d+),\s*(%rd\d+),\s*(%rd\d+);", re.M)
_PRODUCT = re.compile(r"^\s*mul\.wide\.u32\s+(%rd\d+),", re.M)
_SHIFTED = re.compile(r"^\s*shl\.b64\s+(%rd\d+),\s*%rd\d+,\s*(\d+);", re.M)
_TAKEN_APART = re.compile(r"^\s*mov\.b64\s+\{[^}]*\},\s*(%rd\d+);", re.M)
_FUNCTION = re.compile(r"(?=^\s*(?:\.visible\s+)?(?:\.entry|\.func)\b)", re.M)


def compiled(source: ASTSource, options: dict[str, int], target: GPUTarget | None = None) -> CompiledKernel:
    """`triton.compile`; with Triton 3.6 its PTX is mended, under an entry of its own in Triton's cache."""
    if not triton.__version__.startswith("3.6."):
        return triton.compile(source, target=target, options=options)
    with _LOCK:  # the hook is the process's: whoever else compiles meanwhile is mended too, which changes only what was wrong
        before = knobs.runtime.add_stages_inspection_hook

        def hook(backend: object, stages: dict[str, Callable[[object, object], object]], *rest: object) -> None:
            if before is not None:
                before(backend, stages, *rest)
            made = stages["ptx"]
            stages["ptx"] = lambda module, metadata: mended(str(made(module, metadata)))

        knobs.runtime.add_stages_inspection_hook = hook
        try:
            return triton.compile(source, target=target, options=options, _env_vars={**get_cache_invalidating_env_vars(), "titans_backends": "lanes"})
        finally:
            knobs.runtime.add_stages_inspection_hook = before


def spilling(ptx: str) -> list[str]:
    """The joins of a lower lane that reaches into the upper one, as they stand in the code."""
    return [join[0].strip() for function in _FUNCTION.split(ptx) for join, _, _ in _wrong(function)]


def _wrong(function: str) -> list[tuple[re.Match[str], str, str]]:
    """Those joins of one function, each with its lower and its upper lane."""
    wide = {match[1] for match in _PRODUCT.finditer(function)}
    high = {match[1] for match in _SHIFTED.finditer(function) if int(match[2]) >= 32}
    apart = {match[1] for match in _TAKEN_APART.finditer(function)}
    found = []
    for join in _JOIN.finditer(function):
        _, whole, one, other = join.groups()
        lower, upper = (one, other) if one in wide else (other, one)
        if whole in apart and lower in wide and upper in high and whole not in (one, other):
            found.append((join, lower, upper))
    return found


def mended(ptx: str) -> str:
    """The same code with the lower 32 bits of those lanes alone."""
    return "".join(map(_mended, _FUNCTION.split(ptx)))


def _mended(function: str) -> str:
    for join, lower, upper in reversed(_wrong(function)):
        space, whole = join[1], join[2]
        better = f"{space}and.b64 \t{whole}, {lower}, 4294967295;\n\tor.b64 \t{whole}, {whole}, {upper};"
        function = function[: join.start()] + better + function[join.end() :]
    return function
