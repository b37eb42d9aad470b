"""The gradients of gated_delta_rule: blocks prepared again, states and updates by a walk forward, the state's gradient by a walk back, then every input's in parallel
(SPEC.md 10; kernels in cuda/delta_prepare.cu, delta_walk.cu, delta_reverse.cu, delta_gradients.cu). A frozen input launches nothing of its own.

With what a forward kept (delta_kept.py) only the walk back and the last pass are left. The variant wgmma, and on Hopper what takes kept tensors, runs
Hopper's own kernels (delta_hopper.py) where they serve the call, those of every card elsewhere.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.gated_delta_rule import GatedDeltaRule
from titans_backends.machine import Machine
from titans_backends.signature import Signature

from . import delta_hopper
from .chunks import three_strides
from .delta_cut import CHAIN, Cut, cut_of
from .delta_kept import Kept, keeping
from .delta_prepare import SOURCE as PREPARE_SOURCE
from .delta_prepare import Factors, Rule, prepare, prepare_bytes, rule_of
from .delta_walk import SOURCE as WALK_SOURCE
from .delta_walk import THREADS, Plan, fewest, in_order, walk, walk_bytes
from .launch import Kernel
from .serving import CONSUMER_SHARED_BYTES, padded
from .sources import source_names
from .strides import aligned_rows, unit_stride

__all__ = ["backward_candidates", "run_backward"]

REVERSE = Kernel("delta_reverse.cu", "delta_reverse", "12P9q6i")
GRADIENTS = Kernel("delta_gradients.cu", "delta_gradients", "17P21q11if")
_SOURCES = (PREPARE_SOURCE, WALK_SOURCE, REVERSE.source, GRADIENTS.source)
_INPUTS = ("q", "k", "v", "beta", "g", "gate", "initial_state")


class _Way(NamedTuple):
    """A backward's tokens of a block; of both walks the warps that walk and the blocks in shared memory; of the gradients the warps that share rows and the
    slices in shared memory."""

    side: int
    walkers: int
    depth: int
    parts: int
    stages: int

    @property
    def plan(self) -> Plan:
        """Of the walks."""
        return Plan(self.side, self.walkers, self.depth)


_KEEPING = 2


class _Hopper(NamedTuple):
    """Of Hopper's own kernels: warpgroups that carry a head back together, blocks of the last pass, processors that few heads are cut for; zeros where those of every
    card run, or none is."""

    carriers: int
    blocks: int
    cut_for: int


_OFFERED = 3
"""Of the ways below, each first one that fits of those alike in tokens and walkers."""
_WAYS = (
    _Way(64, 2, 3, 2, 2),
    _Way(64, 4, 2, 2, 2),
    _Way(64, 2, 2, 2, 1),
    _Way(32, 2, 3, 4, 2),
    _Way(32, 1, 3, 2, 2),
    _Way(32, 2, 2, 2, 1),
    _Way(16, 2, 2, 2, 1),
)
_SMS = 132
"""Processors of an unknown card of Hopper's."""
_FLOAT_WAYS = (_Way(32, 2, 2, 4, 1), _Way(32, 1, 2, 4, 1), _Way(16, 2, 3, 4, 2), _Way(16, 2, 2, 4, 1), _Way(16, 1, 2, 2, 1))


def backward_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """Tiles that fit the card, the likeliest first; one fits a consumer card."""
    keys, values, dtype = signature.dim("K"), signature.dim("V"), signature.dtype
    room = machine.shared_memory_bytes or CONSUMER_SHARED_BYTES
    found: dict[tuple[int, int], Candidate] = {}
    for way in in_order(_FLOAT_WAYS if dtype == torch.float32 else _WAYS, signature, machine):
        way = way._replace(walkers=fewest(way.walkers, keys, values), parts=min(way.parts, padded(keys, 32) // 32))
        walks = max(walk_bytes(way.plan, keys, dtype, outputs=False), _reverse_bytes(way.plan, keys, dtype))
        if max(walks, prepare_bytes(way.side, keys, dtype), _gradient_bytes(way, keys, dtype, signature.dim("H") != signature.dim("G"))) <= room:
            made = Candidate("cupy", "walks", tuple(way._asdict().items()), "backward", sources=source_names(*_SOURCES))
            found.setdefault((way.side, way.walkers), made)
    walks = list(found.values())[:_OFFERED]
    if not delta_hopper.is_offered(signature, machine):
        return walks + keeping(walks, signature, _KEEPING)
    walk = next(one for one in walks if one.param("side") == delta_hopper.SIDE)
    wide: list[Candidate] = []
    blocks = machine.sms or _SMS
    for each in delta_hopper.params_of(signature, machine):
        files = source_names(*_SOURCES, *delta_hopper.BACKWARD_SOURCES, *((CHAIN.source,) if "cut_for" in each else ()))
        params = {**dict(walk.params), "carriers": each["carriers"], "blocks": blocks, **each}
        wide.append(replace(walk, variant="wgmma", params=tuple(params.items()), sources=files))
    return walks + wide + keeping(wide, signature, len(wide))


def _reverse_bytes(plan: Plan, keys: int, dtype: torch.dtype) -> int:
    """Dynamic shared memory of a block of the walk back."""
    side, walkers, depth = plan
    size, wide = dtype.itemsize, padded(keys, 32)
    columns = side * max(32, 16 * walkers) * size
    ahead = 2 * side * (wide + max(side, 32)) * size + -(-4 * (4 * side + 4) // 128) * 128 + columns
    return depth * ahead + 2 * (16 * walkers * wide * size + 2 * columns)


def _gradient_bytes(way: _Way, keys: int, dtype: torch.dtype, grouped: bool) -> int:
    """Dynamic shared memory of a block of the gradients."""
    side, parts, size, wide = way.side, way.parts, dtype.itemsize, padded(keys, 32)
    stage = (4 * side * 32 + 2 * 32 * wide) * size
    tiles = side * (2 * wide + (3 if size == 2 else 2) * max(side, 32)) * size + way.stages * stage
    return tiles + side * (32 + 28 * parts) + side // 4 * parts + 8 * side * wide * grouped


def run_backward(
    call: GatedDeltaRule, grads: tuple[Tensor | None, ...], states: tuple[Tensor, ...] | None, needs: frozenset[str], candidate: Candidate
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, beta, g, gate and the initial state, each like its input, None where `needs` leaves one out. `states`: the residual, if any."""
    way = _Way(*(int(candidate.param(name)) for name in _Way._fields))
    hopper = _Hopper(*(int(dict(candidate.params).get(name, 0)) for name in _Hopper._fields))
    kept, maps = None, None
    if candidate.residual and states is not None:
        kept, maps = Kept(*states[: len(Kept._fields)]), next(iter(states[len(Kept._fields) :]), None)
    into: dict[str, Tensor] = {}
    for name in _INPUTS:
        like = getattr(call, name)
        if name in needs and like is not None:
            into[name] = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    d_o, d_final = grads[0], None if grads[1] is None else grads[1].contiguous()
    if not call.v.numel():
        for name, gradient in into.items():
            gradient.copy_(d_final) if name == "initial_state" and d_final is not None else gradient.zero_()
    elif into:
        _fill(rule_of(call, way.side), way, None if d_o is None else unit_stride(d_o), d_final, into, hopper, kept, maps)
    return tuple(into.get(name) for name in _INPUTS)


def _fill(
    x: Rule,
    way: _Way,
    d_o: Tensor | None,
    d_final: Tensor | None,
    into: dict[str, Tensor],
    hopper: _Hopper,
    kept: Kept | None,
    maps: Tensor | None,
) -> None:
    """Runs the kernels that the wanted gradients need; `hopper`: zeros where the kernels of every card serve; `maps`: of the segments, of a forward that kept."""
    wanted = set(into)
    inputs, back = bool(wanted - {"initial_state", "v"}), bool(wanted - {"q", "gate"})
    own = bool(hopper.carriers) and delta_hopper.serves(x, d_o)
    made = kept.factors if kept is not None else (delta_hopper.prepare if own else prepare)(x, evenly=True)
    errors = updates = leaving = states = None
    cut = cut_of(x, hopper.cut_for, maps) if own else None
    if inputs:
        if kept is not None:
            states, updates = kept.states, kept.updates
        else:
            states = torch.empty((x.places, x.values, x.wide_keys), dtype=x.v.dtype, device=x.v.device)
            updates = torch.empty(x.v.shape, dtype=x.v.dtype, device=x.v.device)
            if cut is not None:
                delta_hopper.walk_segments(x, made, cut, states=states, updates=updates)
            elif own:
                delta_hopper.walk(x, made, hopper.carriers, states=states, updates=updates)
            else:
                walk(x, made, way.plan, states=states, updates=updates)
        if {"k", "g"} & wanted:
            leaving = torch.empty_like(states)
        if {"k", "beta", "g"} & wanted:
            errors = torch.empty(x.v.shape, dtype=x.v.dtype, device=x.v.device)
    if back:
        if cut is not None and kept is None and not inputs:
            delta_hopper.walk(x, made, 2, cut=cut, ends=True)
        _walk_back(x, made, way.plan, d_o, d_final, leaving, errors, into, hopper.carriers, cut)
    if inputs:
        _gradients(x, way, d_o, (states, leaving, updates, errors), into, hopper.blocks)


def _macros(x: Rule, d_o: Tensor | None) -> tuple[tuple[str, int | str | bool], ...]:
    """Those of the call, where the gradient of o is loaded like the inputs."""
    narrow = d_o is not None and not aligned_rows(d_o, whole=True)
    return tuple((name, value and not narrow if name == "ALIGNED" else value) for name, value in x.macros())


def _walk_back(
    x: Rule,
    made: Factors,
    plan: Plan,
    d_o: Tensor | None,
    d_final: Tensor | None,
    leaving: Tensor | None,
    errors: Tensor | None,
    into: dict[str, Tensor],
    carriers: int,
    cut: Cut | None,
) -> None:
    """`carriers`: of Hopper's own walk, 0 for the one of every card, which does not cut."""
    arriving = x.v if d_o is None else d_o
    operands = (
        x.q, x.k, arriving, made.inverses, made.scores, made.lines, d_final, leaving, errors, into.get("v"), into.get("initial_state"),
        x.slots.cu_seqlens, *x.q.stride()[:3], *x.k.stride()[:3], *arriving.stride()[:3],
    )  # fmt: skip
    numbers = (x.heads, x.group, x.slots.wide, x.tokens, x.slots.each)
    if carriers and delta_hopper.serves(x, d_o):
        delta_hopper.walk_back(x, carriers, (*operands, *numbers), cut)
        return
    REVERSE(
        (x.slots.sequences * x.heads * -(-x.values // (16 * plan.walkers)), 1, 1),
        THREADS,
        (*_macros(x, d_o), ("WALKERS", plan.walkers), ("DEPTH", plan.depth)),
        (*operands, *numbers, d_o is not None),
        _reverse_bytes(plan, x.keys, x.v.dtype),
    )


def _gradients(x: Rule, way: _Way, d_o: Tensor | None, kept: tuple[Tensor | None, ...], into: dict[str, Tensor], blocks: int) -> None:
    """The last pass; `kept`: states, their gradients, updates and errors; `blocks`: of Hopper's own, 0 for the one of every card."""
    arriving, gates = x.v if d_o is None else d_o, (x.beta, x.g, x.gate)
    operands = (
        x.q, x.k, x.v, arriving, *gates, *kept, *(into.get(name) for name in ("q", "k", "beta", "g", "gate")),
        x.slots.cu_seqlens, *x.q.stride()[:3], *x.k.stride()[:3], *x.v.stride()[:3], *arriving.stride()[:3],
        *(step for gate in gates for step in three_strides(gate)),
    )  # fmt: skip
    wide = (gate is not None and gate.dtype == torch.float32 for gate in gates)
    numbers = (x.heads, x.group, *wide, x.slots.wide, x.slots.sequences, x.tokens, x.slots.each)
    if blocks and delta_hopper.serves(x, d_o) and all(one is not None for one in kept):
        delta_hopper.gradients(x, blocks, (*operands, *numbers))
        return
    GRADIENTS(
        (x.places // x.group, 1, 1),
        2 * way.side * way.parts,
        (*_macros(x, d_o), ("PARTS", way.parts), ("STAGES", way.stages), ("GROUPED", x.group > 1)),
        (*operands, *numbers, x.l2norm, d_o is not None, x.scale),
        _gradient_bytes(way, x.keys, x.v.dtype, x.group > 1),
    )
