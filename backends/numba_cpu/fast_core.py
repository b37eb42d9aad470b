"""fast_core: token by token, or in chunks, which do not depend on each other (SPEC.md 2)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.fast_core import FastCore
from titans_backends.launching.remember import from_values
from titans_backends.launching.tape import Again
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict

from .launches import Launch, Sizes, bounds_of, chunk_launch, maker, new, token_launch
from .serving import refuse_chunk, serves, tokens_are_less

__all__ = ["candidates", "remember", "run", "supports"]

Outputs = tuple[Tensor | None, ...]

_GIVEN = {"q": "q", "k": "k", "v": "v", "g": "g", "gate": "gate", "start": "initial_state"}


def supports(signature: Signature, machine: Machine) -> Verdict:
    """float32 on a CPU."""
    return serves(signature, machine)


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """Products of whole chunks where their matrices fit, and the token scan, which needs none; first what has less to do."""
    chunks = [Candidate("numba_cpu", "chunks")] if refuse_chunk(signature) else []
    tokens = [Candidate("numba_cpu", "tokens")]
    return tokens + chunks if tokens_are_less(signature) else chunks + tokens


def run(call: FastCore, candidate: Candidate) -> Outputs:
    """o and the state after the last token."""
    return _again(call, candidate)(call)


def remember(call: FastCore, candidate: Candidate) -> tuple[Outputs, Again]:
    """`run`, and what repeats it."""
    again = _again(call, candidate)
    return again(call), from_values(FastCore, again)


def _launch(call: FastCore, sizes: Sizes, candidate: Candidate) -> Launch:
    options = {"scale": call.scale, "delta": 0, "reset": 1, "chunk": call.chunk_size, "offset": call.chunk_offset}
    if candidate.variant == "tokens":
        return token_launch(call, sizes, _GIVEN, options)
    return chunk_launch(call, sizes, _GIVEN, call.chunk_size, options)


def _again(call: FastCore, candidate: Candidate) -> Callable[[FastCore], Outputs]:
    sizes = Sizes.of(call.k, call.v, call.cu_seqlens)
    launch = _launch(call, sizes, candidate)
    new_o, states, final = maker(call.v), sizes.states, call.output_final_state

    def again(call: FastCore) -> Outputs:
        made = {"o": new_o(call.v), "final": new(states) if final else None}
        launch(call, made, bounds_of(call.cu_seqlens))
        return made["o"], made["final"]

    return again
