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
from titans_backends.machine import Machine

from . import uw_transform
from .coupled_chunks import FACTORS
from .coupled_prepare import PREPARE
from .coupled_walks import NUMBERS, WALK
from .coupled_wide import WALK_WIDE
from .dual_inputs import unit_operands
from .grid import on_device, slot_count, strides, unit_stride
from .serving import tile_width

__all__ = [
    "MAKE",
    "Plan",
    "Walked",
    "as_dual",
    "grid_of",
    "parts_of",
    "prepared",
    "shares_of",
    "sizes_of",
    "tile_of",
    "walk_bytes",
    "walked",
    "walks",
]

MAKE = "make_"
"""What the transform's parameters begin with among a candidate's."""
_LONGEST = 2**30
"""A chunk beyond any sequence: the kernels count tokens in 32 bits, and add a chunk to them."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A candidate's parameters: rows and columns of a tile, warps of the parallel kernels, the walk's warps, stages and rows of a tile
    (0: the states stay in registers), whether one product takes both states, rounding, the transform's (None: coupled_prepare has its own)."""

    block: int
    tile: int
    warps: int
    walk_warps: int
    walk_stages: int
    walk_tile: int
    walk_pair: bool
    dot: str
    make: Candidate | None

    @classmethod
    def of(cls, params: Mapping[str, Param]) -> Plan:
        """From a candidate's."""
        inner = {name.removeprefix(MAKE): value for name, value in params.items() if name.startswith(MAKE)}
        make = Candidate("triton", str(inner.pop("variant")), tuple(inner.items())) if inner else None
        numbers = (int(params[name]) for name in ("block", "tile", "warps", "walk_warps", "walk_stages", "walk_tile"))
        return cls(*numbers, bool(params.get("walk_pair", False)), str(params["dot"]), make)  # type: ignore[call-arg, arg-type]


@dataclass(frozen=True, slots=True)
class Factors:
    """A and B^T of every chunk, and of u, w, the reader and the inside what was asked for; k and v, in float32 where u and w are."""

    factor_a: Tensor | None
    turned_b: Tensor
    u: Tensor | None
    w: Tensor | None
    reader: Tensor | None
    inside: Tensor | None
    k: Tensor
    v: Tensor


@dataclass(frozen=True, slots=True)
class Walked:
    """Both states at the chunks' starts `[places, H, 2, V, K]`, their numbers, the final states; the factors; what the outputs and the backward read.

    A sequence has a place more than it has chunks: the last is its end. w and A are None without the delta rule.
    """

    starts: Tensor
    numbers: Tensor
    final: Tensor | None
    final_fast: Tensor | None
    factors: Factors


def tile_of(size: int) -> int:
    """The width of a tile, at least 32: float32 products of 64 rows and 16 columns end in illegal addresses (H100, Triton 3.6)."""
    return max(32, tile_width(size))


def walks(keys: int, values: int, *, backward: bool) -> list[tuple[int, int]]:
    """(warps, rows of a tile) of a walk over states of these tile widths, the default first: in registers up to 64 x 64."""
    if max(keys, values) > 64:
        return [(8, 32), (4, 32), (8, 16)]
    usual = 4 if keys * values <= 32 * 64 and not backward else 8
    return [(usual, 0), (12 - usual, 0)]


def is_direct(machine: Machine) -> bool:
    """Whether products read their operands from shared memory."""
    return (machine.sm or 90) // 10 in (9, 10, 11)


def parts_of(params: Mapping[str, Param], machine: Machine) -> int:
    """How many times an operand lies there: both parts of a split float32."""
    return 2 if params["dot"] == "tf32x3" and is_direct(machine) else 1


def walk_bytes(params: Mapping[str, Param], machine: Machine, keys: int, values: int, *, matrices: int, products: int) -> int:
    """An upper bound of a walk's shared memory: its pipeline of the factor and of `matrices` states, and what becomes an operand."""
    split, stages, direct = parts_of(params, machine), int(params["walk_stages"]), is_direct(machine)
    state = keys * (int(params["walk_tile"]) or values)
    return 4 * ((stages + split - 2 + direct) * keys * keys + (stages - 1) * matrices * state + split * products * state)


def as_dual(call: CoupledCore) -> DualCore:
    """The call as the kernels that both ops share take it."""
    return DualCore(
        call.q, call.k, call.v, call.beta, fast_gate=call.fast_gate, slow_gate=call.slow_gate, alpha=call.alpha, qk_l2norm=call.qk_l2norm
    )  # fmt: skip


def prepared(call: CoupledCore) -> CoupledCore:
    """The call with q and k of unit norm where asked, rows of unit stride, and cu_seqlens on the device."""
    q, k = unit_operands(as_dual(call))
    return replace(call, q=q, k=k, v=unit_stride(call.v), qk_l2norm=False, cu_seqlens=on_device(call.cu_seqlens, call.v))


def shares_of(call: CoupledCore) -> tuple[tuple[Tensor | None, Tensor | None, Tensor | None], float]:
    """alpha `[B, T, H]` and both gates, and alpha where it is a number."""
    alpha, number = (call.alpha.expand(call.v.shape[:3]), 0.0) if isinstance(call.alpha, Tensor) else (None, float(call.alpha))
    return (alpha, call.fast_gate, call.slow_gate), number


def grid_of(call: CoupledCore) -> int:
    """Tokens of a chunk for the kernels: one number for all calls of one chunk, lest every length of them be compiled for itself."""
    return _LONGEST if call.chunk_size >= call.v.shape[1] else call.chunk_size


def sizes_of(call: CoupledCore) -> tuple[int, int, int, int, int]:
    """(sequences, slots of chunks, heads, K, V)."""
    batch, tokens, heads, values = call.v.shape
    sequences = batch if call.cu_seqlens is None else call.cu_seqlens.numel() - 1
    return sequences, slot_count(batch, tokens, grid_of(call), call.cu_seqlens), heads, call.k.shape[3], values


def walked(call: CoupledCore, plan: Plan, *, finals: bool, operands: bool, outputs: bool) -> Walked:
    """Runs it for operands with rows of unit stride, normalised, and cu_seqlens on their device.

    `operands`: u and w are wanted; `outputs`: the reader and the inside, where the plan has them.
    """
    sequences, slots, heads, keys, values = sizes_of(call)
    chunk = grid_of(call)
    found = _transformed(call, plan) if plan.make is not None else _prepared(call, plan, operands, outputs)
    starts, numbers = _room(call, slots + sequences, heads, 2, values, keys), _room(call, slots + sequences, heads, NUMBERS)
    final, final_fast = (_room(call, sequences, heads, keys, values) if finals else None for _ in range(2))
    initial_fast, initial = (None if state is None else state.contiguous() for state in (call.initial_fast_state, call.initial_state))
    given = (call.psi, call.coupling, call.fast_decay, call.slow_decay)
    args = (
        found.factor_a, found.turned_b, *given, initial_fast, initial, starts, numbers, final_fast, final, call.cu_seqlens, call.v.shape[1],
        *(step for x in given for step in strides(x)),
    )  # fmt: skip
    constants = (heads, keys, values, chunk, tile_of(keys), plan.walk_tile or tile_of(values), call.delta, plan.dot, plan.walk_stages, plan.walk_pair)
    walk = WALK_WIDE if plan.walk_tile else WALK
    walk(sequences * heads, args, constants, plan.walk_warps, plan.walk_stages)
    return Walked(starts, numbers, final, final_fast, found)


def _room(call: CoupledCore, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=call.v.device)


def _prepared(call: CoupledCore, plan: Plan, operands: bool, outputs: bool) -> Factors:
    """In one launch, everything in float32."""
    sequences, slots, heads, keys, values = sizes_of(call)
    batch, tokens = call.v.shape[:2]
    factor_a = _room(call, slots, heads, keys, keys) if call.delta else None
    turned_b = _room(call, slots, heads, values, keys)
    u = _room(call, batch, tokens, heads, values) if operands else None
    w = _room(call, batch, tokens, heads, keys) if operands and call.delta else None
    inside = _room(call, batch, tokens, heads, values) if outputs and not operands else None
    reader = _room(call, batch, tokens, heads, keys) if outputs else None
    wide = operands and call.v.dtype != torch.float32
    k = _room(call, *call.k.shape) if wide else None
    v = _room(call, *call.v.shape) if wide else None
    args = (
        call.q, call.k, call.v, call.beta, u, w, reader, inside, factor_a, turned_b, k, v, call.cu_seqlens, tokens,
        0 if call.cu_seqlens is None else sequences, float(call.scale), *strides(call.q), *strides(call.k), *strides(call.v), *strides(call.beta),
    )  # fmt: skip
    constants = (
        heads, heads // max(call.k.shape[2], 1), keys, values, grid_of(call), plan.block, tile_of(keys), min(plan.tile, tile_of(values)),
        call.transform == "lam", call.transform == "none", call.delta, plan.dot,
    )  # fmt: skip
    PREPARE(slots * heads, args, constants, plan.warps, 1)
    return Factors(factor_a, turned_b, u, w, reader, inside, call.k if k is None else k, call.v if v is None else v)


def _transformed(call: CoupledCore, plan: Plan) -> Factors:
    """By uw_transform, and a launch for the factors: chunks of any length."""
    assert plan.make is not None
    sequences, slots, heads, keys, values = sizes_of(call)
    transform = UWTransform(call.k, call.v, call.beta, chunk_size=grid_of(call), transform=call.transform, cu_seqlens=call.cu_seqlens)
    u, made = uw_transform.transformed(transform, plan.make)
    w = made if call.delta else None
    factor_a = _room(call, slots, heads, keys, keys) if call.delta else None
    turned_b = _room(call, slots, heads, values, keys)
    args = (
        call.k, u, w, factor_a, turned_b, call.cu_seqlens, call.v.shape[1], 0 if call.cu_seqlens is None else sequences,
        *strides(call.k), *strides(u), *strides(w),
    )  # fmt: skip
    width, chunk = tile_of(keys), grid_of(call)
    constants = (heads, heads // max(call.k.shape[2], 1), keys, values, chunk, plan.block, width, min(plan.tile, max(tile_of(values), width)))
    FACTORS(slots * heads, args, (*constants, plan.dot, 2), plan.warps, 2)
    return Factors(factor_a, turned_b, u, w, None, None, call.k, call.v)
