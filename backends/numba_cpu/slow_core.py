"""slow_core: the state's way through chunks of given u and w (SPEC.md 4). The chunk size is part of the function."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.slow_core import SlowCore
from titans_backends.launching.remember import from_values
from titans_backends.launching.tape import Again
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict

from .launches import TRANSFORMS, Sizes, bounds_of, chunk_launch, maker, new
from .serving import refuse_chunk, serves

__all__ = ["candidates", "remember", "run", "supports"]

Outputs = tuple[Tensor | None, ...]

_GIVEN = {"q": "q", "k": "k", "v": "u", "w": "w", "g": "g", "gate": "gate", "chunk_decay": "chunk_decay", "start": "initial_state"}


def supports(signature: Signature, machine: Machine) -> Verdict:
    """float32 on a CPU, chunks of up to 512 tokens."""
    return serves(signature, machine) & refuse_chunk(signature)


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """One way."""
    return [Candidate("numba_cpu", "chunks")]


def run(call: SlowCore, candidate: Candidate) -> Outputs:
    """o and the final state."""
    return _again(call)(call)


def remember(call: SlowCore, candidate: Candidate) -> tuple[Outputs, Again]:
    """`run`, and what repeats it."""
    again = _again(call)
    return again(call), from_values(SlowCore, again)


def _again(call: SlowCore) -> Callable[[SlowCore], Outputs]:
    sizes = Sizes.of(call.k, call.u, call.cu_seqlens)
    options = {
        "scale": call.scale, "delta": call.delta, "transform": TRANSFORMS["given"],
        "normalize_read": call.normalize_read, "normalize_final": call.normalize_final,
    }  # fmt: skip
    launch = chunk_launch(call, sizes, _GIVEN, call.chunk_size, options)
    new_o, states, final = maker(call.u), sizes.states, call.output_final_state

    def again(call: SlowCore) -> Outputs:
        made = {"o": new_o(call.u), "final": new(states) if final else None}
        launch(call, made, bounds_of(call.cu_seqlens))
        return made["o"], made["final"]

    return again
