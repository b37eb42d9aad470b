"""How the backward of the delta rule is put together: the factors of every block, the state at every block's start, the gradient of the state
from the last block to the first, then the gradients of all inputs in parallel (SPEC.md 10).

The states are computed again by one scan forward, or, where the forward saved them, only the updates are, in parallel. Few heads on long sequences are
cut into segments that run side by side in both directions, exactly.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .delta_gradients import KEYS, QUERIES
from .delta_pairs import PAIRS
from .delta_reverse import ENDS, REVERSE
from .delta_schedules import Factors, Operands, Params, divide, prepare, run_scan
from .delta_updates import UPDATES
from .grid import strides, unit_stride
from .launch import Kernel
from .serving import tile_width

__all__ = ["gradients"]


def gradients(
    x: Operands, p: Params, call: object, grads: tuple[Tensor | None, ...], saved: Tensor | None, needs: frozenset[str], inputs: tuple[str, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients of the call's `inputs` that `needs` names, each like its input; for slow_core u and w stand in place of v and beta.

    `grads`: of o `[B, T, H, V]` and of the final state `[N, H, K, V]`; `saved`: the states `[B, M, H, K, V]` of a dense call on blocks of the plan's size.
    """
    wanted = {name: getattr(call, name) for name in inputs if name in needs}
    into = {name: torch.empty(like.shape, dtype=like.dtype, device=like.device) for name, like in wanted.items() if like is not None}
    d_final = None if grads[1] is None else grads[1].contiguous()
    if not x.v.numel():
        for name, grad in into.items():
            grad.copy_(d_final) if name == "initial_state" and d_final is not None else grad.zero_()
    elif into:
        d_o = torch.zeros_like(x.v) if grads[0] is None else unit_stride(grads[0])
        _fill(x, p, d_o, d_final, saved, into)
    return tuple(into.get(name) for name in inputs)


def _fill(x: Operands, p: Params, d_o: Tensor, d_final: Tensor | None, saved: Tensor | None, into: Mapping[str, Tensor]) -> None:
    """Runs the kernels."""
    block, device = int(p["block"]), x.v.device
    made = prepare(x, p, backward=True)
    room = torch.empty(2 if saved is None else 1, x.slots(block) * x.heads * x.keys * x.values, dtype=x.k.dtype, device=device)
    leaving, states = room[0], room[1] if saved is None else saved
    kept = torch.empty(2 - ("u" in into), x.v.numel(), dtype=x.v.dtype, device=device)
    errors, updates = into["u"] if "u" in into else kept[1], kept[0]
    alone = not set(into) - {"initial_state", "u"}
    d_initial = into.get("initial_state")
    if "segment" in p:
        starts, added, maps = divide(x, made, p)
        if not alone:
            run_scan(x, made, p, starts, segment=int(p["segment"]), states=states, updates=updates)
        _run_reverse(x, made, p, d_o, d_final=d_final, before=added)
        _run_ends(x, p, added, maps, d_final, starts, d_initial)
        _run_reverse(x, made, p, d_o, behind=starts, d_initial=d_initial, leaving=leaving, errors=errors)
    else:
        if not alone and saved is None:
            run_scan(x, made, p, x.initial, states=states, updates=updates)
        elif not alone:
            _run_updates(x, made, p, states, updates)
        _run_reverse(x, made, p, d_o, behind=d_final, d_initial=d_initial, leaving=leaving, errors=errors)
    if not alone:
        _run_pairs(x, made, p, d_o, states, leaving, updates, errors, into)
        size = x.slots(block) * (x.heads // x.group) * block * tile_width(x.keys)
        sums = None if x.group == 1 else torch.empty(size, dtype=torch.float32, device=device)
        if into.keys() & {"q", "g", "gate"}:
            _run_queries(x, made, p, d_o, states, sums, into)
        if into.keys() & {"k", "beta", "g", "w"}:
            _run_keys(x, made, p, states, leaving, updates, errors, sums, into)


def _run_updates(x: Operands, made: Factors, p: Params, states: Tensor, updates: Tensor) -> None:
    block, width = int(p["block"]), int(p["gradient_tile"])
    tiles = -(-x.values // width)
    args = (
        x.k,
        x.w,
        x.v,
        states,
        updates,
        made.inverses,
        made.weight,
        made.lines[1],
        x.cu_seqlens,
        x.v.shape[1],
        x.sequences,
        x.heads,
        x.group,
        tiles,
    )
    args += (*strides(x.k), *strides(x.w), *strides(x.v))
    UPDATES(x.slots(block) * x.heads * tiles, args, (x.keys, x.values, tile_width(x.keys), block, width, p["dot"]), int(p["gradient_warps"]), 1)


def _run_reverse(
    x: Operands,
    made: Factors,
    p: Params,
    d_o: Tensor,
    *,
    behind: Tensor | None = None,
    d_final: Tensor | None = None,
    before: Tensor | None = None,
    d_initial: Tensor | None = None,
    leaving: Tensor | None = None,
    errors: Tensor | None = None,
) -> None:
    block, width, segment = int(p["block"]), int(p["value_tile"]), int(p.get("segment", 0))
    tiles = -(-x.values // width)
    units = x.slots(block * segment) if segment else x.sequences
    args = (
        x.q,
        x.k,
        x.w,
        d_o,
        leaving,
        errors,
        made.inverses,
        made.weight,
        made.scores,
        *made.lines,
        behind,
        d_final,
        before,
        d_initial,
        x.cu_seqlens,
    )
    args += (x.v.shape[1], x.sequences, x.heads, x.group, tiles, *strides(x.q), *strides(x.k), *strides(x.w), *strides(d_o))
    constants = (x.keys, x.values, tile_width(x.keys), block, width, segment, p["dot"], p["stages"])
    REVERSE(units * x.heads * tiles, args, constants, int(p["warps"]), int(p["stages"]))


def _run_ends(x: Operands, p: Params, added: Tensor, maps: Tensor, d_final: Tensor | None, behind: Tensor, d_initial: Tensor | None) -> None:
    width = min(int(p["chain_tile"]), tile_width(x.values))
    tiles = -(-x.values // width)
    constants = (x.keys, x.values, tile_width(x.keys), width, int(p["block"]) * int(p["segment"]), p["dot"], p["chain_stages"])
    args = (added, maps, d_final, behind, d_initial, x.cu_seqlens, x.v.shape[1], x.heads, tiles)
    ENDS(x.sequences * x.heads * tiles, args, constants, int(p["chain_warps"]), int(p["chain_stages"]))


def _run_pairs(
    x: Operands, made: Factors, p: Params, d_o: Tensor, states: Tensor, leaving: Tensor, updates: Tensor, errors: Tensor, into: Mapping[str, Tensor]
) -> None:
    """Writes over the factors: nothing after this reads them."""
    block, keys, rule = int(p["block"]), tile_width(x.keys), x.w is None
    args = (x.q, x.k, x.v if rule else None, x.beta, x.g, x.gate, d_o, states, leaving, updates, errors, made.scores, made.inverses)
    slope, erase, _, total = made.lines
    args += (slope, made.weight, made.spare if erase is None else erase, total, into.get("v") if rule else None, x.cu_seqlens)
    args += (x.v.shape[1], x.sequences, x.heads, x.group, x.scale)
    for tensor in (x.q, x.k, x.v, x.beta, x.g, x.gate, d_o):
        args += strides(tensor)
    width, stages = int(p["pair_tile"]), int(p["pair_stages"])
    constants = (x.keys, x.values, keys, block, width, 16, x.l2norm, p["dot"], stages)
    PAIRS(x.slots(block) * x.heads, args, constants, int(p["pair_warps"]), stages)


def _run_queries(x: Operands, made: Factors, p: Params, d_o: Tensor, states: Tensor, sums: Tensor | None, into: Mapping[str, Tensor]) -> None:
    slope, erase, _, _ = made.lines
    args = (x.q, x.k, x.g, x.gate, d_o, states, made.scores, slope, made.spare if erase is None else erase, sums, into.get("q"), into.get("gate"))
    args += (x.cu_seqlens, x.v.shape[1], x.sequences, x.heads, x.group, x.scale)
    for tensor in (x.q, x.k, x.g, x.gate, d_o):
        args += strides(tensor)
    _launch(QUERIES, x, p, args)


def _run_keys(
    x: Operands,
    made: Factors,
    p: Params,
    states: Tensor,
    leaving: Tensor,
    updates: Tensor,
    errors: Tensor,
    sums: Tensor | None,
    into: Mapping[str, Tensor],
) -> None:
    d_w = None if x.w is None else into.get("w")
    if x.w is not None and d_w is None:
        d_w = torch.empty(x.w.shape, dtype=x.w.dtype, device=x.w.device)
    slope, _, _, total = made.lines
    args = (x.q, x.k, x.beta, x.g, states, leaving, updates, errors, made.scores, made.inverses, slope, made.weight, total, sums)
    args += (into.get("k"), d_w, into.get("beta"), into.get("g"), x.cu_seqlens, x.v.shape[1], x.sequences, x.heads, x.group)
    for tensor in (x.q, x.k, x.beta, x.g):
        args += strides(tensor)
    _launch(KEYS, x, p, args)


def _launch(kernel: Kernel, x: Operands, p: Params, args: tuple[object, ...]) -> None:
    """A program for each block and q/k head."""
    block, width, stages = int(p["block"]), int(p["gradient_tile"]), int(p["gradient_stages"])
    constants = (x.keys, x.values, tile_width(x.keys), block, width, x.l2norm, p["dot"], stages)
    kernel(x.slots(block) * (x.heads // x.group), args, constants, int(p["gradient_warps"]), stages)  # type: ignore[arg-type]
