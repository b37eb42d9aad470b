"""coupled_core up to its states: u and w, the chunks' factors, the walk; forward and backward begin with it. What a plan's parameters mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from titans_backends.backend import Candidate, Param
from titans_backends.contracts.coupled_core import CoupledCore
from titans_backends.contracts.dual_core import DualCore
from titans_backends.contracts.uw_transform import UWTransform

from . import uw_transform
from .coupled_chunks import FACTORS
from .coupled_walks import NUMBERS, WALK
from .coupled_wide import WALK_WIDE
from .dual_inputs import unit_operands
from .grid import on_device, slot_count, strides, unit_stride
from .serving import tile_width

__all__ = ["LONGEST", "MAKE", "Plan", "Walked", "as_dual", "prepared", "sizes_of", "walk_bytes", "walked", "walks"]

MAKE = "make_"
"""What the transform's parameters begin with among a candidate's."""
LONGEST = 2**30
"""A chunk beyond any sequence: the kernels count tokens in 32 bits, and add a chunk to them."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A candidate's parameters: rows and columns of a tile, warps of the parallel kernels, the walk's warps, stages and rows of a tile
    (0: the states stay in registers), rounding, the transform's."""

    block: int
    tile: int
    warps: int
    walk_warps: int
    walk_stages: int
    walk_tile: int
    dot: str
    make: Candidate

    @classmethod
    def of(cls, params: Mapping[str, Param]) -> Plan:
        """From a candidate's."""
        inner = {name.removeprefix(MAKE): value for name, value in params.items() if name.startswith(MAKE)}
        make = Candidate("triton", str(inner.pop("variant")), tuple(inner.items()))
        numbers = (int(params[name]) for name in ("block", "tile", "warps", "walk_warps", "walk_stages", "walk_tile"))
        return cls(*numbers, str(params["dot"]), make)  # type: ignore[call-arg, arg-type]


@dataclass(frozen=True, slots=True)
class Walked:
    """u, w (None without the delta rule), the factor A^T, both states at the chunks' starts `[places, H, 2, V, K]`, their numbers, the final states.

    A sequence has a place more than it has chunks: the last is its end.
    """

    u: Tensor
    w: Tensor | None
    turned_a: Tensor | None
    starts: Tensor
    numbers: Tensor
    final: Tensor | None
    final_fast: Tensor | None


def walks(keys: int, values: int, *, backward: bool) -> list[tuple[int, int]]:
    """(warps, rows of a tile) of a walk over states of these tile widths, the default first: in registers up to 64 x 64."""
    if max(keys, values) > 64:
        return [(8, 32), (4, 32), (8, 16)]
    usual = (2 if keys * values <= 32 * 32 else 4) * (2 if backward else 1)
    return [(usual, 0), (2 * usual if usual < 8 else 4, 0)]


def walk_bytes(params: Mapping[str, Param], keys: int, values: int, *, matrices: int, products: int) -> int:
    """An upper bound of a walk's shared memory: its pipeline of the factor and of `matrices` states, and what becomes an operand."""
    split, stages = 2 if params["dot"] == "tf32x3" else 1, int(params["walk_stages"])
    state = keys * (int(params["walk_tile"]) or values)
    return 4 * (stages * keys * keys + (stages - 1) * matrices * state + split * products * state)


def as_dual(call: CoupledCore) -> DualCore:
    """The call as the kernels that both ops share take it."""
    return DualCore(
        call.q, call.k, call.v, call.beta, fast_gate=call.fast_gate, slow_gate=call.slow_gate, alpha=call.alpha, qk_l2norm=call.qk_l2norm
    )  # fmt: skip


def prepared(call: CoupledCore) -> CoupledCore:
    """The call with q and k of unit norm where asked, rows of unit stride, and cu_seqlens on the device."""
    q, k = unit_operands(as_dual(call))
    return replace(call, q=q, k=k, v=unit_stride(call.v), qk_l2norm=False, cu_seqlens=on_device(call.cu_seqlens, call.v))


def sizes_of(call: CoupledCore) -> tuple[int, int, int, int, int]:
    """(sequences, slots of chunks, heads, K, V)."""
    batch, tokens, heads, values = call.v.shape
    sequences = batch if call.cu_seqlens is None else call.cu_seqlens.numel() - 1
    return sequences, slot_count(batch, tokens, min(call.chunk_size, LONGEST), call.cu_seqlens), heads, call.k.shape[3], values


def walked(call: CoupledCore, plan: Plan, *, finals: bool) -> Walked:
    """Runs it for operands with rows of unit stride, normalised, and cu_seqlens on their device."""
    sequences, slots, heads, keys, values = sizes_of(call)
    device, tokens, chunk = call.v.device, call.v.shape[1], min(call.chunk_size, LONGEST)
    transform = UWTransform(call.k, call.v, call.beta, chunk_size=call.chunk_size, transform=call.transform, cu_seqlens=call.cu_seqlens)
    u, w = uw_transform.transformed(transform, plan.make)

    def room(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    turned_a = room(slots, heads, keys, keys) if call.delta else None
    turned_b = room(slots, heads, values, keys)
    width, group = tile_width(keys), heads // max(call.k.shape[2], 1)
    use_w = w if call.delta else None
    args = (
        call.k, u, use_w, turned_a, turned_b, call.cu_seqlens, tokens, 0 if call.cu_seqlens is None else sequences,
        *strides(call.k), *strides(u), *strides(use_w),
    )  # fmt: skip
    several = 1 if chunk <= plan.block else 2
    tile = min(plan.tile, max(tile_width(values), width))
    FACTORS(slots * heads, args, (heads, group, keys, values, chunk, plan.block, width, tile, plan.dot, several), plan.warps, 2)
    starts, numbers = room(slots + sequences, heads, 2, values, keys), room(slots + sequences, heads, NUMBERS)
    final, final_fast = (room(sequences, heads, keys, values), room(sequences, heads, keys, values)) if finals else (None, None)
    initial_fast, initial = (None if state is None else state.contiguous() for state in (call.initial_fast_state, call.initial_state))
    decays = (call.fast_decay, call.slow_decay)
    args = (
        turned_a, turned_b, call.psi, call.coupling, *decays, initial_fast, initial, starts, numbers, final_fast, final, call.cu_seqlens, tokens,
        *strides(call.psi), *strides(call.coupling), *strides(decays[0]), *strides(decays[1]),
    )  # fmt: skip
    constants = (heads, keys, values, chunk, width, plan.walk_tile or tile_width(values), call.delta, plan.dot, plan.walk_stages)
    walk = WALK_WIDE if plan.walk_tile else WALK
    walk(sequences * heads, args, constants, plan.walk_warps, plan.walk_stages)
    return Walked(u, use_w, turned_a, starts, numbers, final, final_fast)
