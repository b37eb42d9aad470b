"""dual_core_step: decode of both cores and their merge in one launch, on states for each sequence or on the slots of pools (SPEC.md 9).

Out of place, a pool's other slots must be in the result too: both pools are cloned, and the clones' slots are written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.dual_core_step import DualCoreStep
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict

from .ahead import ahead_of
from .dual_step import DUAL_STEP
from .grid import strides, unit_stride
from .program import remembering
from .serving import serves, tile_width

__all__ = ["candidates", "compile_ahead", "remember", "run", "supports"]

_TILES = ((32, 4), (16, 2), (8, 1), (16, 4), (8, 2), (4, 1))
"""Value columns of a program and its warps, for many heads and sequences."""
_SMALL_TILES = ((32, 4), (16, 2), (8, 1), (4, 1))
"""The same for keys of up to 64."""
_FEW = (16, 2)
"""What comes first where there are few: more programs."""
_OFFERED = 4
_NARROWEST = 4
_ELEMENTS = (2, 32)
"""Fewest and most elements of each state a thread: both tiles in registers."""


def supports(signature: Signature, machine: Machine) -> Verdict:
    """What `serving.serves` says; every option."""
    return serves(signature, machine)


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """Tiles of value columns, the same for any number of heads; another first where few heads would leave most of the card idle."""
    keys, values = tile_width(signature.dim("K")), signature.dim("V")
    widest = max(_NARROWEST, 1 << (values - 1).bit_length())
    tiles = _SMALL_TILES if keys <= 64 else _TILES
    fitting = [(tile, warps) for tile, warps in tiles if tile <= widest and _ELEMENTS[0] <= keys * tile // (32 * warps) <= _ELEMENTS[1]][:_OFFERED]
    few = not signature.batch_invariant and 32 * signature.dim("B") * signature.dim("H") * -(-values // 32) < 64 * (machine.sms or 64)
    if few:
        fitting.sort(key=lambda one: one != _FEW)
    return [Candidate("triton", "tokens", (("value_tile", tile), ("warps", warps))) for tile, warps in fitting or [(_NARROWEST, 1)]]


def _mixing(alpha: float | Tensor) -> tuple[Tensor | None, float, tuple[int, int, int]]:
    """alpha as a tensor or a number, and its strides by batch, token and head."""
    if not isinstance(alpha, Tensor):
        return None, float(alpha), (0, 0, 0)
    return alpha, 0.0, strides(alpha) if alpha.dim() == 3 else (0, 0, alpha.stride(0) if alpha.dim() else 0)


def run(call: DualCoreStep, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """o `[B, T, H, V]` and both states after the tokens: new tensors, or the given ones when in place."""
    q, k, v, state, fast, slots = unit_stride(call.q), unit_stride(call.k), unit_stride(call.v), call.state, call.fast_state, call.state_indices
    batch, tokens, heads, values = v.shape
    groups, keys = k.shape[2:]
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    after = fast_after = None
    if not call.inplace and slots is None:
        after, fast_after = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (state, fast))
    elif not call.inplace:
        state, fast = (x.clone(memory_format=torch.contiguous_format) for x in (state, fast))
    tile = int(candidate.param("value_tile"))
    alpha, number, alpha_strides = _mixing(call.alpha)
    DUAL_STEP(
        batch * heads * -(-values // tile),
        (
            q, k, v, call.beta, call.g, call.fast_gate, call.slow_gate, alpha, state, fast, after, fast_after, call.position, slots, o,
            number, float(call.scale), tokens, heads, heads // groups if groups else 1, call.chunk_size, call.position.stride(0),
            0 if slots is None else slots.stride(0),
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *call.beta.stride(), *strides(call.g), *strides(call.fast_gate), *strides(call.slow_gate),
            *alpha_strides, *_by_slot(state), *_by_slot(fast),
        ),
        (keys, values, tile_width(keys), tile, tokens == 1, bool(call.qk_l2norm), values == 1 or state.stride(3) == fast.stride(3) == 1),
        int(candidate.param("warps")),
        2,
    )  # fmt: skip
    return (o, state, fast) if after is None else (o, after, fast_after)


def _by_slot(state: Tensor) -> tuple[int, int, int, int]:
    """From slot to slot, head to head, key to key and value to value."""
    found = state.stride()
    return found[0], found[1], found[2], found[3]


compile_ahead = ahead_of(run)
remember = remembering(run)
