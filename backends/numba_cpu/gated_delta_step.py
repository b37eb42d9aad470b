"""gated_delta_step: the token loop on a state or on the slots of a pool, on one thread where the call is small (SPEC.md 9).

In place the given state is written; else it is read and another written, without a copy first unless it is a pool, whose other slots must come too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.gated_delta_step import GatedDeltaStep
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict

from .call_row import Prepared, contiguous_strides
from .lanes import WIDTH
from .serving import serves
from .threads import launch, workers_for
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


def remember(call: GatedDeltaStep, candidate: Candidate) -> tuple[Outputs, Callable[[GatedDeltaStep], Outputs]]:
    """`run`, and what repeats it."""
    again = _prepared(call)
    return again(call), again


def _prepared(call: GatedDeltaStep) -> Callable[[GatedDeltaStep], Outputs]:
    v, keys, pool = call.v, call.k.shape[3], call.state.shape
    batch, tokens, heads, values = v.shape
    in_place, slots = call.inplace, call.state_indices is not None
    items = batch * heads
    workers = workers_for(8.0 * v.numel() * keys, items)
    prepared = Prepared(
        call,
        {"q": "q", "k": "k", "v": "v", "beta": "beta", "g": "g", "start": "state"},
        {"o": contiguous_strides(v.shape), "final": call.state.stride() if in_place else contiguous_strides(pool)},
        (keys + 2) * WIDTH,
        {
            "tokens": tokens, "heads": heads, "group": heads // max(call.k.shape[2], 1), "keys": keys, "values": values, "items": items,
            "scale": keys**-0.5 if call.scale is None else call.scale, "l2norm": call.qk_l2norm,
        },
    )  # fmt: skip
    shape = v.shape

    def again(call: GatedDeltaStep) -> Outputs:
        o, state = torch.empty(shape, dtype=torch.float32, device="cpu"), call.state
        indices = None
        if call.state_indices is not None:
            indices = call.state_indices.to(torch.int64)
            after = state if in_place else state.clone(memory_format=torch.contiguous_format)
        else:
            after = state if in_place else torch.empty(pool, dtype=torch.float32, device="cpu")
        row, scratch = prepared.row(call, {"o": o, "final": after}, indices, workers)
        launch(STEP, row, workers)
        return o, after

    return again
