"""gated_delta_rule: token by token, or in chunks of small products (SPEC.md 4).

The rule is the same on every grid, so a given chunk size binds nothing: both ways serve every call.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.gated_delta_rule import GatedDeltaRule
from titans_backends.launching.remember import from_values
from titans_backends.launching.tape import Again
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict

from .launches import TRANSFORMS, Launch, Sizes, bounds_of, chunk_launch, maker, new, token_launch
from .serving import serves

__all__ = ["candidates", "remember", "run", "supports"]

Outputs = tuple[Tensor | None, ...]

_GIVEN = {"q": "q", "k": "k", "v": "v", "beta": "beta", "g": "g", "gate": "gate", "start": "initial_state"}
_CHUNKS = (32, 16, 64)
_WIDE = 64


def supports(signature: Signature, machine: Machine) -> Verdict:
    """float32 on a CPU."""
    return serves(signature, machine)


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """Token by token, first for small heads, and chunks that are not twice too long; under batch invariance whatever the length."""
    tokens = [Candidate("numba_cpu", "tokens")]
    chunks = [
        Candidate("numba_cpu", "chunks", (("chunk_size", size),)) for size in _CHUNKS if signature.batch_invariant or size < 2 * signature.dim("T")
    ]
    return chunks + tokens if min(signature.dim("K"), signature.dim("V")) > _WIDE else tokens + chunks


def run(call: GatedDeltaRule, candidate: Candidate) -> Outputs:
    """o and the final state."""
    return _again(call, candidate)(call)


def remember(call: GatedDeltaRule, candidate: Candidate) -> tuple[Outputs, Again]:
    """`run`, and what repeats it."""
    again = _again(call, candidate)
    return again(call), from_values(GatedDeltaRule, again)


def _launch(call: GatedDeltaRule, sizes: Sizes, candidate: Candidate) -> Launch:
    scale = sizes.keys**-0.5 if call.scale is None else call.scale
    options = {"scale": scale, "l2norm": call.qk_l2norm, "delta": 1, "transform": TRANSFORMS["exact"]}
    if candidate.variant == "tokens":
        return token_launch(call, sizes, _GIVEN, options)
    return chunk_launch(call, sizes, _GIVEN, int(candidate.param("chunk_size")), options)


def _again(call: GatedDeltaRule, candidate: Candidate) -> Callable[[GatedDeltaRule], Outputs]:
    sizes = Sizes.of(call.k, call.v, call.cu_seqlens)
    launch = _launch(call, sizes, candidate)
    new_o, states, final = maker(call.v), sizes.states, call.output_final_state

    def again(call: GatedDeltaRule) -> Outputs:
        made = {"o": new_o(call.v), "final": new(states) if final else None}
        launch(call, made, bounds_of(call.cu_seqlens))
        return made["o"], made["final"]

    return again
