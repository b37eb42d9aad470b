"""coupled_core's backward: the states computed again, what arrives at them, the reverse walk, the chunks' gradients, those of the transform, the sums.

Launches: the forward's preparation and walk (norms before it with `qk_l2norm`), arrivals, the reverse walk, four for the chunks, uw_transform's
backward, the sums for q and k, those for the gates and alpha. None of them runs where nothing needs it. A chunk is one block of at most 64 tokens; longer ones
are left to another backend.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from titans_backends.backend import Candidate, Param
from titans_backends.contracts.coupled_core import CoupledCore
from titans_backends.contracts.uw_transform import UWTransform
from titans_backends.machine import Machine
from titans_backends.signature import Signature

from . import uw_transform
from .coupled_chunks import ARRIVALS
from .coupled_inputs import INPUTS
from .coupled_states import Plan, Walked, as_dual, grid_of, parts_of, prepared, shares_of, sizes_of, tile_of, walk_bytes, walked, walks
from .coupled_walks import WALK_BACK
from .coupled_wide import WALK_BACK_WIDE
from .dual_joins import joined_operands, joined_values
from .dual_recurrent import transform_signature
from .grid import strides, unit_stride
from .serving import CONSUMER_SHARED_BYTES, dots

__all__ = ["backward_candidates", "run_backward"]

_INPUTS = (
    "q", "k", "v", "beta", "psi", "coupling", "fast_decay", "slow_decay", "fast_gate", "slow_gate", "alpha", "initial_state", "initial_fast_state",
)  # fmt: skip
_BACK = "back_"
_THROUGH = frozenset({"k", "v", "beta"})
_GATES = frozenset({"alpha", "fast_gate", "slow_gate"})
_MIXING = frozenset({"psi", "coupling"})
_WALKED = frozenset({"fast_decay", "slow_decay", "initial_state", "initial_fast_state"})
_MADE = ("q", "k", "u", "w", "fast", "slow", "psi", "coupling")
_READS = (("q",), ("fast", "slow"))
_PARTS = (("u", "w", "psi", "coupling"), *_READS, ("k",))
"""What one launch of the chunks' kernel makes, so that registers hold it; each reads what it needs again, from L2."""
Made = dict[str, Tensor]


def backward_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """Warps of the walks; none for chunks of more than 64 tokens."""
    chunk = signature.option("chunk_size")
    assert isinstance(chunk, int)
    inner = transform_signature(replace(signature, may_save=False))
    if signature.dtype != torch.float32:  # u and w are float32 here, and so is what becomes of them
        inner = replace(inner, dtype=torch.float32, float32="high")
    back = uw_transform.backward_candidates(inner, machine)
    if chunk > 64 or not back:
        return []
    parts = [(f"{_BACK}variant", back[0].variant), *((_BACK + name, value) for name, value in back[0].params)]
    keys, values = tile_of(signature.dim("K")), tile_of(signature.dim("V"))
    found = []
    for walk_warps, walk_tile in walks(keys, values, backward=True):
        params: dict[str, Param] = {"block": max(16, tile_of(chunk)), "tile": min(32, max(keys, values)), "warps": 8}
        params |= {"walk_warps": walk_warps, "walk_stages": 1 if walk_tile else 2, "walk_tile": walk_tile, "dot": dots(signature)[0]}
        found.append(Candidate("triton", "again", (*params.items(), *parts), direction="backward"))
    room = machine.shared_memory_bytes or CONSUMER_SHARED_BYTES
    return [one for one in found if shared_bytes(signature, one, machine) <= room]


def shared_bytes(signature: Signature, candidate: Candidate, machine: Machine) -> int:
    """An upper bound of a program's shared memory: the reverse walk's pipeline and operands; those of the chunks' kernel, fitted to Triton 3.7.1."""
    params = dict(candidate.params)
    keys, values, block = tile_of(signature.dim("K")), tile_of(signature.dim("V")), int(params["block"])
    chunks = 20 * 1024 + parts_of(params, machine) * 12 * max(block, 32) * keys
    return max(walk_bytes(params, machine, keys, values, matrices=4, products=2), chunks) + 1024


def run_backward(
    call: CoupledCore, grads: tuple[Tensor | None, ...], states: Tensor | None, needs: frozenset[str], candidate: Candidate
) -> tuple[Tensor | None, ...]:
    """The gradients of every tensor argument but cu_seqlens, in the contract's order; float32 sums, each in its argument's dtype, contiguous."""
    needs = frozenset(name for name in needs if isinstance(getattr(call, name), Tensor))
    params = dict(candidate.params)
    plan, whole = Plan.of(params), call
    call = prepared(call)
    into = _rooms(whole, needs)
    if needs:
        back = bool(needs & (_THROUGH | _MIXING | _WALKED))
        found = walked(call, plan, finals=False, operands=bool(needs - _WALKED), outputs=back and grads[0] is not None)
        d_o = None if grads[0] is None else unit_stride(grads[0])
        d_mixed = _walked_back(call, plan, found, d_o, (grads[2], grads[1]), into, bool(needs & (_THROUGH | _MIXING))) if back else None
        inner: Made = {}
        if needs - _WALKED:
            inner = _chunks(call, plan, found, d_o, d_mixed, needs, into)
        through = needs & _THROUGH
        below: Made = {}
        if through:
            names = {name.removeprefix(_BACK): value for name, value in params.items() if name.startswith(_BACK)}
            way = Candidate("triton", str(names.pop("variant")), tuple(names.items()), direction="backward")
            transform = UWTransform(
                found.factors.k, found.factors.v, call.beta, chunk_size=grid_of(call), transform=call.transform, cu_seqlens=call.cu_seqlens
            )
            made = uw_transform.run_backward(transform, (inner["u"], inner.get("w")), None, through, way)
            below = {name: grad for name, grad in zip(("k", "v", "beta"), made, strict=False) if grad is not None}
        if needs & {"q", "k"}:
            into |= joined_operands(as_dual(whole), {}, inner, below, needs)
        if needs & (_GATES | {"v", "beta"}):
            fast, slow = ({"gate": inner[name]} if name in inner else {} for name in ("fast", "slow"))
            into |= joined_values(as_dual(whole), fast, slow, below, needs & (_GATES | {"v", "beta"}))
    return tuple(into.get(name) for name in _INPUTS)


def _rooms(call: CoupledCore, needs: frozenset[str]) -> Made:
    """Where the walk and the chunks' kernel write what is an argument's gradient at once."""
    given = {name: getattr(call, name) for name in needs & (_WALKED | _MIXING)}
    return {name: torch.empty(x.shape, dtype=x.dtype, device=x.device) for name, x in given.items()}


def _walked_back(
    call: CoupledCore, plan: Plan, found: Walked, d_o: Tensor | None, d_finals: tuple[Tensor | None, Tensor | None], into: Made, mixed: bool
) -> Tensor | None:
    """dZ `[slots, H, 2, V, K]` of the mixed states where it is wanted; the gradients of decays and initial states into their rooms."""
    sequences, slots, heads, keys, values = sizes_of(call)
    device, tokens, chunk = call.v.device, call.v.shape[1], grid_of(call)
    width = tile_of(keys)
    matrices = (slots, heads, 2, values, keys)
    tiled = plan.walk_tile > 0
    d_reads = torch.empty(matrices, dtype=torch.float32, device=device) if d_o is not None or tiled else None
    if d_o is not None:
        shares, number = shares_of(call)
        args = (
            found.factors.reader, d_o, *shares, d_reads, call.cu_seqlens, tokens, 0 if call.cu_seqlens is None else sequences, number,
            *strides(d_o), *(step for x in shares for step in strides(x)),
        )  # fmt: skip
        ARRIVALS(slots * heads, args, (heads, keys, values, chunk, plan.block, width, min(plan.tile, tile_of(values)), plan.dot), 4, 1)
    d_mixed = torch.empty(matrices, dtype=torch.float32, device=device) if mixed or tiled else None
    finals = tuple(None if grad is None else grad.contiguous() for grad in d_finals)
    rooms = tuple(into.get(name) for name in ("initial_fast_state", "initial_state", "fast_decay", "slow_decay"))
    arrays = (found.factors.factor_a, found.starts, found.numbers, d_reads, *finals, d_mixed, *rooms)
    shape = (heads, keys, values, chunk, width, plan.walk_tile or tile_of(values), call.delta, plan.dot, plan.walk_stages)
    if tiled:
        d_states = torch.empty((sequences, *matrices[1:]), dtype=torch.float32, device=device)
        WALK_BACK_WIDE(sequences * heads, (*arrays, d_states, call.cu_seqlens, tokens), (*shape, d_o is not None), plan.walk_warps, 1)
    else:
        WALK_BACK(sequences * heads, (*arrays, call.cu_seqlens, tokens), shape, plan.walk_warps, plan.walk_stages)
    return d_mixed if mixed else None


def _chunks(call: CoupledCore, plan: Plan, found: Walked, d_o: Tensor | None, d_mixed: Tensor | None, needs: frozenset[str], into: Made) -> Made:
    """What the chunks' kernel makes: the parts of q and k, u, w, the two cores' share of the gates; psi and the coupling into their rooms."""
    sequences, slots, heads, keys, values = sizes_of(call)
    chunk, (batch, tokens) = grid_of(call), call.v.shape[:2]
    through, gated = needs & _THROUGH, bool(needs & _GATES)
    made: Made = {name: torch.empty_like(getattr(call, name), memory_format=torch.contiguous_format) for name in needs & {"q", "k"}}
    if through:
        made["u"] = torch.empty(call.v.shape, dtype=torch.float32, device=call.v.device)
    if through & {"k", "beta"} and found.factors.w is not None:
        made["w"] = torch.empty((batch, tokens, heads, keys), dtype=torch.float32, device=call.v.device)
    if gated:
        made["fast"], made["slow"] = (torch.empty((batch, tokens, heads), dtype=torch.float32, device=call.v.device) for _ in range(2))
    shares, number = shares_of(call)
    places = {**made, **{name: into[name] for name in _MIXING if name in into}}
    group, width = heads // max(call.k.shape[2], 1), tile_of(keys)
    constants = (heads, group, keys, values, chunk, plan.block, width, min(plan.tile, tile_of(values)), plan.dot)
    for part in _PARTS:
        if places.keys() & set(part):
            args = (
                call.q, call.k, found.factors.u, found.factors.w, d_o, *shares, call.psi, call.coupling, found.starts, found.numbers, None if part in _READS else d_mixed,
                *(places.get(name) if name in part else None for name in _MADE),
                call.cu_seqlens, tokens, 0 if call.cu_seqlens is None else sequences, number, float(call.scale),
                *strides(call.q), *strides(call.k), *strides(found.factors.u), *strides(found.factors.w), *strides(d_o), *(step for x in shares for step in strides(x)),
                *strides(call.psi), *strides(call.coupling),
            )  # fmt: skip
            INPUTS(slots * (heads // group), args, constants, plan.warps, 1)
    return made
