"""The exact gated delta rule in two launches: blocks prepared side by side, then a walk with the state in registers (kernel in cuda/delta_walk.cu).

Which blocks, walkers and depths a card is offered, and the launches; the walk also keeps states for a backward.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.gated_delta_rule import GatedDeltaRule
from titans_backends.machine import Machine
from titans_backends.signature import Signature

from .delta_kept import kept_of
from .delta_prepare import SOURCE as PREPARE_SOURCE
from .delta_prepare import Factors, Rule, prepare, prepare_bytes, rule_of
from .launch import Kernel
from .serving import CONSUMER_SHARED_BYTES, padded
from .serving import candidate as _candidate

__all__ = ["SOURCE", "Plan", "fewest", "in_order", "run_walk", "walk", "walk_bytes", "walk_candidates"]

SOURCE = "delta_walk.cu"
WALK = Kernel(SOURCE, "delta_walk", "12P9q5i")
THREADS = 256
_P = TypeVar("_P", bound=tuple[int, ...])
_PLANS = ((64, 2, 3), (64, 4, 3), (64, 2, 2), (32, 2, 3), (64, 1, 3), (32, 1, 3), (32, 2, 2), (16, 2, 3), (16, 2, 2))
"""Tokens of a block, warps that walk (16 value columns each), blocks in shared memory; of those alike in the first two the first that fits is offered."""
_OFFERED = 4
_FLOAT_PLANS = ((32, 2, 2), (32, 1, 2), (32, 4, 2), (16, 2, 3), (16, 2, 2), (16, 1, 3))
_CROWDED = 0.75
"""From this many blocks of two walkers for each of a card's processors the first plan has four: half the bytes from the second-level cache, which bind then."""


class Plan(NamedTuple):
    """A walk's tokens of a block, warps that walk, and blocks in shared memory."""

    side: int
    walkers: int
    depth: int


def walk_bytes(plan: Plan, keys: int, dtype: torch.dtype, *, outputs: bool = True) -> int:
    """Dynamic shared memory of a block of the walk."""
    side, walkers, depth = plan
    size, wide = dtype.itemsize, padded(keys, 32)
    lines = -(-4 * (4 * side + 4) // 128) * 128
    both = side * (wide + max(side, 32)) * size + lines
    columns = side * max(32, 16 * walkers) * size
    return depth * (both * (1 + outputs) + columns) + 2 * (16 * walkers * wide * size + columns)


def fewest(walkers: int, keys: int, values: int) -> int:
    """Warps that walk where there are so many keys and values."""
    return min(walkers, padded(values) // 16, padded(keys, 32) // 16)


def in_order(plans: tuple[_P, ...], signature: Signature, machine: Machine) -> list[_P]:
    """Plans, whose second number is that of the walkers: one with four comes first where blocks of two would crowd the card."""
    crowded = signature.dim("N") * signature.dim("H") * -(-signature.dim("V") // 32) >= _CROWDED * (machine.sms or 108)
    if signature.batch_invariant or not crowded or signature.dim("V") <= 32:
        return list(plans)
    return sorted(plans, key=lambda plan: plan is not next((one for one in plans if one[1] == 4), None))


def walk_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """Plans that fit the card, the likeliest first; one fits a consumer card."""
    keys, values, dtype = signature.dim("K"), signature.dim("V"), signature.dtype
    room = machine.shared_memory_bytes or CONSUMER_SHARED_BYTES
    found: dict[tuple[int, int], Candidate] = {}
    for side, walkers, depth in in_order(_FLOAT_PLANS if dtype == torch.float32 else _PLANS, signature, machine):
        plan = Plan(side, fewest(walkers, keys, values), depth)
        if max(walk_bytes(plan, keys, dtype), prepare_bytes(side, keys, dtype)) <= room:
            found.setdefault(plan[:2], _candidate("walk", (PREPARE_SOURCE, SOURCE), **plan._asdict()))
    return list(found.values())[:_OFFERED]


def run_walk(call: GatedDeltaRule, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """o `[B, T, H, V]` and the final state; by a candidate with a residual its tensors, too."""
    plan = Plan(*(int(candidate.param(name)) for name in Plan._fields))
    x = rule_of(call, plan.side)
    o = torch.empty(x.v.shape, dtype=x.v.dtype, device=x.v.device)
    final = None
    if call.output_final_state:
        final = torch.empty((x.slots.sequences, x.heads, x.keys, x.values), dtype=torch.float32, device=x.v.device)
    if candidate.residual:
        kept = kept_of(x)
        if x.tokens or final is not None:
            walk(x, prepare(x, evenly=True, into=kept.factors), plan, o=o, final=final, states=kept.states, updates=kept.updates)
        return o, final, *kept
    if x.tokens or final is not None:
        walk(x, prepare(x), plan, o=o, final=final)
    return o, final


def walk(
    x: Rule,
    made: Factors,
    plan: Plan,
    *,
    o: Tensor | None = None,
    final: Tensor | None = None,
    states: Tensor | None = None,
    updates: Tensor | None = None,
) -> None:
    """Walks forward. With `o` it is computed; `states` `[places, V, wide keys]` at every block's start and `updates` `[B, T, H, V]` may be kept."""
    columns, keeps = 16 * plan.walkers, states is not None or updates is not None
    WALK(
        (x.slots.sequences * x.heads * -(-x.values // columns), 1, 1),
        THREADS,
        (*x.macros(), ("WALKERS", plan.walkers), ("DEPTH", plan.depth), ("OUTPUTS", o is not None), ("KEEPS", keeps)),
        (
            x.q, x.k, x.v, made.inverses, made.scores, made.lines, x.initial, o, states, updates, final, x.slots.cu_seqlens,
            *x.q.stride()[:3], *x.k.stride()[:3], *x.v.stride()[:3], x.heads, x.group, x.slots.wide, x.tokens, x.slots.each,
        ),
        walk_bytes(plan, x.keys, x.v.dtype, outputs=o is not None),
    )  # fmt: skip
