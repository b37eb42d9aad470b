"""Compiling a kernel, with a mend for what the LLVM of Triton 3.6 gets wrong: one lane of a packed pair that reaches into the other.

Two 32-bit numbers are kept as halves of a 64-bit register. Where nobody reads the lower half, LLVM shifts it by what was the other half's amount, the
NVPTX backend makes of that shift a 64-bit product, and its upper bits fall into the upper half, where a column's index is read: a wrong place in memory.
In PTX: `mul.wide.u32 L, X, 2^n` and `shl.b64 H, Y, 32 or more` meet in `or.b64 C, L, H`, and `mov.b64 {a, b}, C` takes C apart. The mend cuts L to its
32 bits. Seen in kernels of the backward with tiles of 16 columns; Triton 3.7.1 makes none.
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
_JOIN = re.compile(r"^\s*or\.b64\s+(%rd\d+),\s*(%rd\d+),\s*(%rd\d+);", re.M)
_PRODUCT = re.compile(r"^\s*mul\.wide\.u32\s+(%rd\d+),[^;]*;", re.M)
_CUT = re.compile(r"^\s*and\.b64\s+(%rd\d+),\s*\1,\s*4294967295;", re.M)
_SHIFTED = re.compile(r"^\s*shl\.b64\s+(%rd\d+),\s*%rd\d+,\s*(\d+);", re.M)
_TAKEN_APART = re.compile(r"^\s*mov\.b64\s+\{[^}]*\},\s*(%rd\d+);", re.M)


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


def spilling(ptx: str) -> frozenset[str]:
    """The registers of lower lanes that reach into upper ones."""
    wide = {match[1] for match in _PRODUCT.finditer(ptx)} - {match[1] for match in _CUT.finditer(ptx)}
    high = {match[1] for match in _SHIFTED.finditer(ptx) if int(match[2]) >= 32}
    apart = {match[1] for match in _TAKEN_APART.finditer(ptx)}
    joins = [match.groups() for match in _JOIN.finditer(ptx)]
    pairs = [(lower, upper) for whole, one, other in joins if whole in apart for lower, upper in ((one, other), (other, one))]
    return frozenset(lower for lower, upper in pairs if lower in wide and upper in high)


def mended(ptx: str) -> str:
    """The same code with those cut to their 32 bits."""
    found = spilling(ptx)

    def cut(match: re.Match[str]) -> str:
        return f"{match[0]}\n\tand.b64 \t{match[1]}, {match[1]}, 4294967295;" if match[1] in found else match[0]

    return _PRODUCT.sub(cut, ptx) if found else ptx
