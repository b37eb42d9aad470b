"""What every op of this backend refuses, and what its candidates share."""

from __future__ import annotations

import torch

from titans_backends.backend import Candidate, Param
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import ACCEPTED, Verdict, refused

from .sources import source_names

__all__ = ["CONSUMER_SHARED_BYTES", "WIDEST", "candidate", "padded", "serves"]

CONSUMER_SHARED_BYTES = 99 * 1024
"""Shared memory of a block on consumer cards (sm_86, sm_89, sm_120): at least one candidate of each op stays within it."""

WIDEST = 128
"""The widest head_dim of the kernels that hold a chunk's tiles."""

_OLDEST_SM = 80
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MOST_TOKENS = 2**31 - 2**16


def serves(signature: Signature, machine: Machine, widest: int = 256) -> Verdict:
    """Dtype, head_dims up to `widest`, length and the card; every reason, each with what would do."""
    verdict = ACCEPTED
    if signature.dtype not in _DTYPES:
        verdict &= refused(f"dtype {str(signature.dtype).removeprefix('torch.')} is not in {{bfloat16, float16, float32}}; use backend='eager'")
    if torch.version.hip is not None:
        verdict &= refused("it compiles for NVIDIA's cards, and this torch is built for ROCm; use backend='triton'")
    if machine.sm is not None and machine.sm < _OLDEST_SM:
        verdict &= refused(f"it needs compute capability 8.0, and {machine.name} has {machine.sm // 10}.{machine.sm % 10}; use backend='eager'")
    sizes = dict(signature.dims)
    for letter in "KV":
        if not 1 <= sizes.get(letter, 1) <= widest:
            verdict &= refused(f"head_dim {letter}={sizes[letter]} is not in 1 to {widest}; use backend='triton' or backend='eager'")
    if sizes.get("T", 0) > _MOST_TOKENS:
        verdict &= refused(f"T={sizes['T']} is above {_MOST_TOKENS}")
    return verdict


def candidate(variant: str, sources: tuple[str, ...], **params: Param) -> Candidate:
    """A candidate of this backend that runs some files of `cuda/`."""
    return Candidate("cupy", variant, tuple(params.items()), sources=source_names(*sources))


def padded(size: int, least: int = 16) -> int:
    """The power of two, at least `least`, that holds a size."""
    return max(least, 1 << (size - 1).bit_length())
