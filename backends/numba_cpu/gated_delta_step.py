"""gated_delta_step: the token loop on a state or on the slots of a pool, on one thread where the call is small (SPEC.md 9).

In place the given state is written; else it is read and another written, without a copy first unless it is a pool, whose other slots must come too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.gated_delta_step import GatedDeltaStep
from titans_backends.launching.remember import from_values
from titans_backends.launching.tape import Again
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict

from .call_row import Prepared, contiguous_strides
from .lanes import WIDTH
from .launches import Launch, Sizes, bounds_of, maker
from .serving import serves
from .threads import workers_for
from .workers import STEP

__all__ = ["candidates", "remember", "run", "supports"]

Outputs = tuple[Tensor | None, ...]


def supports(signature: Signature, machine: Machine) -> Verdict:
    """float32 on a CPU."""
    return serves(signature, machine)


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """One way."""
    return [Candidate("numba_cpu", "tokens")]


def run(call: GatedDeltaStep, candidate: Candidate) -> Outputs:
    """o `[B, T, H, V]` and the state after the tokens: a new tensor, or the given one when in place."""
    return _prepared(call)(call)


def remember(call: GatedDeltaStep, candidate: Candidate) -> tuple[Outputs, Again]:
    """`run`, and what repeats it."""
    again = _prepared(call)
    return again(call), from_values(GatedDeltaStep, again)


def _prepared(call: GatedDeltaStep) -> Callable[[GatedDeltaStep], Outputs]:
    sizes = Sizes.of(call.k, call.v, None)
    shape, pool, in_place = sizes.outputs, tuple(call.state.shape), call.inplace
    items = sizes.batch * sizes.heads
    workers = workers_for(sizes.work, items)
    given = {"q": "q", "k": "k", "v": "v", "beta": "beta", "g": "g", "start": "state"}
    made = {"o": contiguous_strides(shape), "final": call.state.stride() if in_place else contiguous_strides(pool)}
    scale = sizes.keys**-0.5 if call.scale is None else call.scale
    options = {**sizes.options(), "items": items, "scale": scale, "l2norm": call.qk_l2norm}
    launch = Launch(STEP, Prepared(call, given, made, (sizes.keys + 2) * WIDTH, options, workers), workers)
    new_o, new_state = maker(call.v), maker(call.state)

    def again(call: GatedDeltaStep) -> Outputs:
        state, indices = call.state, call.state_indices
        if in_place:
            after = state
        elif indices is None:
            after = new_state(state)
        else:
            after = state.clone(memory_format=torch.contiguous_format)
        o = new_o(call.v)
        launch(call, {"o": o, "final": after}, bounds_of(indices))
        return o, after

    return again
