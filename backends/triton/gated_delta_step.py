"""gated_delta_step: decode in one launch, on a state for each sequence or on the slots of a pool (SPEC.md 9).

Out of place, a pool's other slots must be in the result too: it is cloned, and the clone's slots are written. A state whose keys are contiguous (a view
of `[B, H, V, K]`) is read as it lies, and what comes back lies like it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.gated_delta_step import GatedDeltaStep
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict

from .ahead import ahead_of
from .grid import unit_stride
from .program import remembering
from .serving import serves, tile_width
from .step_tokens import STEP

__all__ = ["candidates", "compile_ahead", "remember", "run", "supports"]

_TILES = ((32, 4), (16, 1), (16, 2), (8, 1), (32, 2), (64, 4))
"""Value columns of a program and its warps."""
_NARROW = ((16, 2), (8, 1), (8, 2), (32, 4), (4, 1))
"""The same for few heads and sequences: more programs, fewer columns each."""
_NARROWEST = 4
_ELEMENTS = (4, 64)
"""Fewest and most state elements of a thread: 16-byte loads, and the tile in registers."""


def supports(signature: Signature, machine: Machine) -> Verdict:
    """What `serving.serves` says; every option."""
    return serves(signature, machine)


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """Tiles of value columns, the same for any number of heads; narrow ones first where few heads would leave most of the card idle."""
    keys, values = tile_width(signature.dim("K")), signature.dim("V")
    few = not signature.batch_invariant and 32 * signature.dim("B") * signature.dim("H") * -(-values // 32) < 64 * (machine.sms or 64)
    widest = max(_NARROWEST, 1 << (values - 1).bit_length())
    fitting = [
        (tile, warps)
        for tile, warps in dict.fromkeys((*_NARROW, *_TILES) if few else (*_TILES, *_NARROW))
        if tile <= widest and _ELEMENTS[0] <= keys * tile // (32 * warps) <= _ELEMENTS[1]
    ]
    return [Candidate("triton", "tokens", (("value_tile", tile), ("warps", warps))) for tile, warps in fitting or [(_NARROWEST, 1)]]


def _turned(state: Tensor) -> bool:
    """Whether keys, and not values, are contiguous."""
    return state.stride(3) != 1 and state.stride(2) == 1 and state.shape[3] > 1


def _steps(state: Tensor, turned: bool) -> tuple[int, int, int, int]:
    """From slot to slot, head to head, row to row, and within a row."""
    slot, head, key, value = state.stride()
    return (slot, head, value, key) if turned else (slot, head, key, value)


def run(call: GatedDeltaStep, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """o `[B, T, H, V]` and the state after the tokens: a new tensor, or the given one when in place."""
    q, k, v, beta, g, state, slots = unit_stride(call.q), unit_stride(call.k), unit_stride(call.v), call.beta, call.g, call.state, call.state_indices
    batch, tokens, heads, values = v.shape
    groups, keys = k.shape[2:]
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if slots is not None and slots.device != v.device:
        slots = slots.to(v.device)
    turned = _turned(state)
    if call.inplace:
        after = state
    elif slots is None:
        state = state if turned else unit_stride(state)
        after = torch.empty((batch, heads, values, keys) if turned else state.shape, dtype=state.dtype, device=state.device)
        after = after.transpose(2, 3) if turned else after
    else:
        state = state.transpose(2, 3) if turned else state
        state = state.clone(memory_format=torch.contiguous_format)
        after = state = state.transpose(2, 3) if turned else state
    tile = int(candidate.param("value_tile"))
    g_strides = (0, 0, 0) if g is None else g.stride()
    STEP(
        batch * heads * -(-values // tile),
        (
            q, k, v, beta, g, state, after, slots, o,
            keys**-0.5 if call.scale is None else float(call.scale), tokens, heads, heads // groups if groups else 1, 0 if slots is None else slots.stride(0),
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *beta.stride(), *g_strides, *_steps(state, turned), *_steps(after, turned)[:3],
        ),
        (keys, values, tile_width(keys), tile, tokens == 1, bool(call.qk_l2norm), state.stride(3) == 1 or values == 1, turned),
        int(candidate.param("warps")),
        2,
    )  # fmt: skip
    return o, after


compile_ahead = ahead_of(run)
remember = remembering(run)
