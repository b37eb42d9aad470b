"""What every op of this backend refuses, and what they share around the compiled part: the modes in which it runs, its decay and its mask."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import ACCEPTED, Verdict, refused

from ..eager.packing import refuse_packed_graph
from .toolchain import toolchain

__all__ = ["EAGER_SOURCES", "LARGEST_CHUNK", "OWN_SOURCES", "causal_mask", "plain_modes", "refuse_chunk", "running_log", "serves"]

LARGEST_CHUNK = 256
"""Tokens of the largest chunk whose C x C products are formed for all heads at once."""

_FEWEST_TOKENS = 16
_SMALLEST_HEAD_DIM = 8
_SMALLEST_CHUNK = 8
_HERE = "titans_backends.backends.inductor"
_EAGER = "titans_backends.backends.eager"
OWN_SOURCES = tuple(f"{_HERE}.{name}" for name in ("compiled", "kernels", "serving"))
EAGER_SOURCES = tuple(f"{_EAGER}.{name}" for name in ("chunk_grid", "scratch"))


def serves(signature: Signature, machine: Machine) -> Verdict:
    """The toolchain's verdict, and the sizes for which there is nothing to compile."""
    return toolchain(machine) & _refuse_sizes(signature) & refuse_packed_graph(signature)


def _refuse_sizes(signature: Signature) -> Verdict:
    verdict = ACCEPTED
    batch, tokens, heads, keys, values = (signature.dim(letter) for letter in "BTHKV")
    if tokens < _FEWEST_TOKENS:
        verdict &= refused(f"T={tokens} is below {_FEWEST_TOKENS}: too few tokens for a product over chunks")
    if batch * heads == 0:
        verdict &= refused(f"B={batch} and H={heads}: an empty call")
    if min(keys, values) < _SMALLEST_HEAD_DIM:
        verdict &= refused(f"head_dim K={keys}, V={values}: both must be at least {_SMALLEST_HEAD_DIM}")
    return verdict


def refuse_chunk(signature: Signature) -> Verdict:
    """Refuses a chunk that is too long, or too short, for products over whole chunks."""
    asked = int(signature.option("chunk_size") or 0)
    if min(asked, signature.dim("T")) > LARGEST_CHUNK:
        return refused(f"chunk_size={asked} over T={signature.dim('T')}: at most {LARGEST_CHUNK} tokens make one product here")
    if asked < _SMALLEST_CHUNK:
        return refused(f"chunk_size={asked} is below {_SMALLEST_CHUNK}")
    return ACCEPTED


@contextlib.contextmanager
def plain_modes() -> Iterator[None]:
    """Autograd and inference mode off: torch.compile guards both, and would compile again where they differ."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def running_log(g: Tensor) -> Tensor:
    """G, the running sum inside the chunk in float64, from `g [N, C, 1]`."""
    return g.to(torch.float64).cumsum(1)


def causal_mask(size: int, like: Tensor, *, decayed: bool, diagonal: int = 0) -> Tensor:
    """`[size, size]`: on and below a diagonal 1, above it 0; with a decay their logarithms, 0 and -inf."""
    if decayed:
        return torch.full((size, size), float("-inf"), dtype=like.dtype, device=like.device).triu_(diagonal + 1)
    return torch.ones(size, size, dtype=like.dtype, device=like.device).tril_(diagonal)
