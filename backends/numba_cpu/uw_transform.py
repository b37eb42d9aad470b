"""uw_transform: u and w, every chunk by itself (SPEC.md 3)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.uw_transform import UWTransform
from titans_backends.launching.remember import from_values
from titans_backends.launching.tape import Again
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict

from .launches import TRANSFORMS, Sizes, bounds_of, new, uw_launch
from .serving import refuse_chunk, serves

__all__ = ["candidates", "remember", "run", "supports"]

Outputs = tuple[Tensor | None, ...]

_GIVEN = {"k": "k", "v": "v", "beta": "beta", "g": "g"}


def supports(signature: Signature, machine: Machine) -> Verdict:
    """float32 on a CPU, chunks of up to 512 tokens."""
    return serves(signature, machine) & refuse_chunk(signature)


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """One way."""
    return [Candidate("numba_cpu", "chunks")]


def run(call: UWTransform, candidate: Candidate) -> Outputs:
    """u `[B, T, H, V]` and w `[B, T, H, K]`."""
    return _again(call)(call)


def remember(call: UWTransform, candidate: Candidate) -> tuple[Outputs, Again]:
    """`run`, and what repeats it."""
    again = _again(call)
    return again(call), from_values(UWTransform, again)


def _again(call: UWTransform) -> Callable[[UWTransform], Outputs]:
    sizes = Sizes.of(call.k, call.v, call.cu_seqlens)
    launch = uw_launch(call, sizes, _GIVEN, call.chunk_size, {"transform": TRANSFORMS[call.transform]})
    shape_u, shape_w = sizes.outputs, (*sizes.outputs[:3], sizes.keys)

    def again(call: UWTransform) -> Outputs:
        u, w = new(shape_u), new(shape_w)
        launch(call, {"u_out": u, "w_out": w}, bounds_of(call.cu_seqlens))
        return u, w

    return again
