"""What every op of this backend refuses, and what its candidates share: tile widths, and how float32 products are rounded."""

from __future__ import annotations

import functools
import importlib.metadata

import torch

from titans_backends.backend import Param
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import ACCEPTED, Verdict, refused

__all__ = ["CONSUMER_SHARED_BYTES", "Params", "copies_rows", "dots", "least_columns", "narrow_warps", "serves", "tile_width"]

Params = tuple[tuple[str, Param], ...]

CONSUMER_SHARED_BYTES = 99 * 1024
"""Shared memory of a block on consumer cards (sm_86, sm_89, sm_120): the least that the kernels count on."""

_ROW = 16
"""Numbers: what rows must be multiples of, and begin at multiples of, for asynchronous copies to take them."""
_OLDEST_SM = 80
_OLDEST_TRITON = (3, 6)
_WIDEST = 256
_MOST_TOKENS = 2**31 - 2**16
_OPERANDS = ("q", "k", "v", "u", "w")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def serves(signature: Signature, machine: Machine) -> Verdict:
    """Dtype, head_dim, length, the card and Triton's version; every reason, each with what would do."""
    verdict = _version()
    if signature.dtype not in _DTYPES:
        verdict &= refused(f"dtype {str(signature.dtype).removeprefix('torch.')} is not in {{bfloat16, float16, float32}}; use backend='eager'")
    if machine.sm is not None and machine.sm < _OLDEST_SM:
        verdict &= refused(f"it needs compute capability 8.0, and {machine.name} has {machine.sm // 10}.{machine.sm % 10}")
    sizes = dict(signature.dims)
    for letter in "KV":
        if sizes.get(letter, 1) > _WIDEST:
            verdict &= refused(f"head_dim {letter}={sizes[letter]} is above {_WIDEST}; use backend='eager'")
        if sizes.get(letter, 1) < 1:
            verdict &= refused(f"head_dim {letter}=0; use backend='eager'")
    if sizes.get("T", 0) > _MOST_TOKENS:
        verdict &= refused(f"T={sizes['T']} is above {_MOST_TOKENS}")
    return verdict


def dots(signature: Signature) -> tuple[str, ...]:
    """How products of float32 operands may be rounded, fastest first; 16-bit operands have one way."""
    if signature.dtype != torch.float32:
        return ("tf32",)
    return ("tf32x3", "ieee") if signature.float32 == "highest" else ("tf32",)


def narrow_warps(dtype: torch.dtype, rows: int, columns: int, warps: int) -> int:
    """The warps for a kernel whose narrowest product outside of a pipelined loop has that many columns: 2 at most where wgmma would be too narrow.

    Seen on an H100 with Triton 3.6: products of 16-bit operands with 64 rows or more and 16 or 32 columns gave wrong values or an illegal address with 4
    and 8 warps, and right values with 2 (mma.sync), with 32 rows or fewer, with 64 columns or more, in float32, and in pipelined loops whose operands
    come by asynchronous copies (delta_scan). In delta_scan without such copies it is ptxas 12.8 that is wrong: of a descriptor, the address of an operand
    in shared memory, it adds the constant part to a register that holds something else by then.
    """
    return min(warps, 2) if dtype.itemsize == 2 and rows >= 64 and columns < 64 else warps


def copies_rows(signature: Signature) -> bool:
    """Whether asynchronous copies take the rows of the operands: 16 divides the head_dims and what heads and tokens start at, and all are aligned.

    Where they do not, a loop's products are compiled as those outside of one (`narrow_warps`, `least_columns`).
    """
    return (signature.dim("K") | signature.dim("V")) % _ROW == 0 and signature.aligned and not _loose_operands(signature)


def least_columns(signature: Signature) -> int:
    """The columns that a loop's products of 64 rows have at least: where no asynchronous copy takes 16-bit rows, fewer than 64 are compiled wrongly."""
    return 64 if signature.dtype.itemsize == 2 and not copies_rows(signature) else 1


def _loose_operands(signature: Signature) -> list[str]:
    """Operands that are not aligned, or whose heads or tokens begin where an aligned row cannot; rows of an odd number of columns are told by their head_dim."""
    found = []
    for name in _OPERANDS:
        given = signature.tensor(name)
        if given is None or given.shape[-1] % _ROW or given.stride[-1] != 1:  # the last are copied
            continue
        if not given.aligned or any(step % _ROW for step in given.stride[:-1]):
            found.append(name)
    return found


def tile_width(size: int) -> int:
    """The power of two, at least 16, that holds a head_dim: the width of a tile."""
    return max(16, 1 << (size - 1).bit_length())


@functools.cache
def _version() -> Verdict:
    found = importlib.metadata.version("triton")
    if tuple(int(part) for part in found.split(".")[:2]) < _OLDEST_TRITON:
        return refused(f"it needs Triton 3.6 or later, and {found} is installed: pip install 'triton>=3.6'")
    return ACCEPTED
