"""deep_core_step: decode in one launch on a carry of each row's own, or on the slots of a pool; in place two where a head is several tiles (SPEC.md 7, 9).

Out of place, a pool's other slots must be in the results too: it is cloned, and the clones' slots are written. Experimental.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.deep_core_step import DeepCoreStep
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict

from .ahead import ahead_of
from .deep_step import STEP, SUMS
from .grid import strides, unit_stride
from .program import remembering
from .serving import serves, tile_width

__all__ = ["candidates", "compile_ahead", "remember", "run", "supports"]

_TILES = ((32, 4), (128, 16), (16, 2), (8, 1))
"""Value columns of a program and its warps."""
_NARROW = ((8, 1), (128, 16), (16, 2), (4, 1))
"""The same for few heads and rows: more programs, fewer columns each."""
_NARROWEST = 4
_ELEMENTS = (4, 64)
"""Fewest and most elements of D that a thread has; it has as many of E."""


def supports(signature: Signature, machine: Machine) -> Verdict:
    """What `serving.serves` says; every option."""
    return serves(signature, machine)


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """Tiles of value columns, whole heads among them, which need no second launch in place; narrow ones first where few heads would leave the card idle."""
    keys, values = tile_width(signature.dim("K")), signature.dim("V")
    few = not signature.batch_invariant and signature.dim("B") * signature.dim("H") * -(-values // 32) < 2 * (machine.sms or 64)
    widest = max(_NARROWEST, 1 << (values - 1).bit_length())
    offered = [(min(tile, widest), warps) for tile, warps in (_NARROW if few else _TILES)]
    fitting = [(tile, warps) for tile, warps in dict.fromkeys(offered) if _ELEMENTS[0] <= keys * tile // (32 * warps) <= _ELEMENTS[1]]
    return [Candidate("triton", "tokens", (("value_tile", tile), ("warps", warps))) for tile, warps in fitting or [(_NARROWEST, 1)]]


def _result(x: Tensor, *, inplace: bool, pool: bool) -> Tensor:
    """Where a part of the carry goes."""
    if inplace:
        return x
    return x.clone(memory_format=torch.contiguous_format) if pool else torch.empty(x.shape, dtype=x.dtype, device=x.device)


def run(call: DeepCoreStep, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """o `[B, T, H, V]` and the carry after the tokens: new tensors, or the given ones when in place."""
    q, k, v = unit_stride(call.q), unit_stride(call.k), unit_stride(call.v)
    batch, tokens, heads, values = v.shape
    groups, keys = k.shape[2:]
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    slots, position = (x if x is None or x.device == v.device else x.to(v.device) for x in (call.state_indices, call.position))
    assert position is not None
    carry = (call.state, call.error, call.mass, call.log_decay)
    after = tuple(_result(x, inplace=call.inplace, pool=slots is not None) for x in carry)
    tile, key_tile = int(candidate.param("value_tile")), tile_width(keys)
    group, span = heads // groups if groups else 1, call.chunk_size * call.period
    places = (position.stride(0), 0 if slots is None else slots.stride(0))
    unit = values == 1 or call.state.stride(3) == call.error.stride(3) == 1
    again = call.inplace and tile < values
    STEP(
        batch * heads * -(-values // tile),
        (
            q, k, v, call.eta, call.g, call.gate, *carry, position, slots, o, *after, float(call.scale), tokens, heads, group, span, *places,
            *strides(q), *strides(k), *strides(v), *strides(call.eta), *strides(call.g), *strides(call.gate),
            *call.state.stride(), *call.error.stride(), *call.mass.stride(), *call.log_decay.stride(),
            *after[0].stride()[:3], *after[1].stride()[:3], *after[2].stride(), *after[3].stride(),
        ),
        (keys, values, key_tile, tile, tokens == 1, call.normalize, call.inplace, unit, not again),
        int(candidate.param("warps")),
        2,
    )  # fmt: skip
    if again:
        SUMS(
            batch * heads,
            (
                k, call.eta, call.g, call.mass, call.log_decay, position, slots, tokens, heads, group, span, *places,
                *strides(k), *strides(call.eta), *strides(call.g), *call.mass.stride(), *call.log_decay.stride(),
            ),
            (keys, key_tile),
            1,
            2,
        )  # fmt: skip
    return o, *after


compile_ahead = ahead_of(run)
remember = remembering(run)
