"""How the backward of the delta rule is put together: the factors of every block, the state at every block's start, the gradient of the state
from the last block to the first, then the gradients of all inputs in parallel (SPEC.md 10).

The states are computed again by one scan forward, or were saved by the forward. Few heads on long sequences are cut into segments that run side by side
in both directions, exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .delta_gradients import ERASED, QUERIES, VECTORS, WRITTEN
from .delta_reverse import ENDS, REVERSE
from .delta_schedules import Factors, Operands, Params, divide, prepare, run_scan
from .delta_together import TOGETHER
from .delta_updates import UPDATES
from .grid import in_rows, strides
from .serving import tile_width
from .slow_scan import denormalized

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
        if x.final is not None and d_final is not None and x.initial is not None and d_final.numel():
            d_final = denormalized(x.final.copy_(x.initial), d_final)
        for name, grad in into.items():
            grad.copy_(d_final) if name == "initial_state" and d_final is not None else grad.zero_()
    elif into:
        d_o = torch.zeros_like(x.v) if grads[0] is None else in_rows(grads[0])
        _fill(x, p, d_o, d_final, saved, into)
    return tuple(into.get(name) for name in inputs)


def _fill(x: Operands, p: Params, d_o: Tensor, d_final: Tensor | None, saved: Tensor | None, into: Mapping[str, Tensor]) -> None:
    """Runs the kernels. With `x.final` the call returned that divided by its norm."""
    block, device, wanted = int(p["block"]), x.v.device, set(into)
    inputs = bool(wanted - {"initial_state", "u", "v"})  # more than the reverse scan alone gives
    again = saved is None and (inputs or x.final is not None)
    back = bool(wanted - {"q", "gate"})  # those two need the states alone
    made = prepare(x, p, backward=True)
    room = torch.empty((back and inputs) + again, x.slots(block) * x.heads * x.keys * x.values, dtype=x.k.dtype, device=device)
    leaving, states = room[0] if back and inputs else None, room[-1] if again else saved
    own = inputs and back and "u" not in into
    kept = torch.empty(inputs + own, x.v.numel(), dtype=x.v.dtype, device=device)
    updates = kept[0] if inputs else None
    errors = into.get("u", kept[1] if own else None)
    parts = x.slots(block) * x.heads * -(-x.values // int(p["value_tile"]))
    carried = torch.empty(parts, dtype=torch.float32, device=device) if {"g", "chunk_decay"} & wanted else None
    direct = torch.empty(parts, block, dtype=torch.float32, device=device) if "beta" in wanted else None
    d_initial = into.get("initial_state")
    if "segment" in p:
        starts, added, maps = divide(x, made, p, chain=again)
        if again:
            run_scan(x, made, p, starts, segment=int(p["segment"]), states=states, updates=updates)
        if x.final is not None and d_final is not None:
            d_final = denormalized(x.final, d_final)
        if back:
            _run_reverse(x, made, p, d_o, d_final=d_final, before=added)
            _run_ends(x, p, added, maps, d_final, starts, d_initial)
        behind: Tensor | None = starts
    else:
        if again:
            run_scan(x, made, p, x.initial, states=states, updates=updates)
        if x.final is not None and d_final is not None:
            d_final = denormalized(x.final, d_final)
        behind = d_final
    if back:
        d_v = into.get("v")
        _run_reverse(
            x,
            made,
            p,
            d_o,
            behind=behind,
            d_initial=d_initial,
            leaving=leaving,
            errors=errors,
            d_v=d_v,
            direct=direct,
            states=states,
            carried=carried,
        )
    if inputs and saved is not None and updates is not None:
        _run_updates(x, made, p, saved, updates)
    if inputs:
        _run_gradients(x, made, p, d_o, states, leaving, updates, errors, direct, carried, into)


def _run_updates(x: Operands, made: Factors, p: Params, states: Tensor, updates: Tensor) -> None:
    block, width = int(p["block"]), min(64, tile_width(x.values))
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
    UPDATES(x.slots(block) * x.heads * tiles, args, (x.keys, x.values, tile_width(x.keys), block, width, p["dot"]), int(p["update_warps"]), 1)


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
    d_v: Tensor | None = None,
    direct: Tensor | None = None,
    states: Tensor | None = None,
    carried: Tensor | None = None,
) -> None:
    block, width, segment = int(p["block"]), int(p["value_tile"]), int(p.get("segment", 0))
    tiles = -(-x.values // width)
    units = x.slots(block * segment) if segment else x.sequences
    args = (
        x.q,
        x.k,
        x.w,
        x.v,
        d_o,
        leaving,
        errors,
        d_v,
        direct,
        None if carried is None else states,
        carried,
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
    args += (x.v.shape[1], x.sequences, x.heads, x.group, tiles, *strides(x.q), *strides(x.k), *strides(x.w), *strides(x.v), *strides(d_o))
    constants = (x.keys, x.values, tile_width(x.keys), block, width, segment, p["dot"], p["stages"])
    REVERSE(units * x.heads * tiles, args, constants, int(p["warps"]), int(p["stages"]))


def _run_ends(x: Operands, p: Params, added: Tensor, maps: Tensor, d_final: Tensor | None, behind: Tensor, d_initial: Tensor | None) -> None:
    width = min(int(p["chain_tile"]), tile_width(x.values))
    tiles = -(-x.values // width)
    constants = (x.keys, x.values, tile_width(x.keys), width, int(p["block"]) * int(p["segment"]), p["dot"], p["chain_stages"])
    args = (added, maps, d_final, behind, d_initial, x.cu_seqlens, x.v.shape[1], x.heads, tiles)
    ENDS(x.sequences * x.heads * tiles, args, constants, int(p["chain_warps"]), int(p["chain_stages"]))


def _run_gradients(
    x: Operands,
    made: Factors,
    p: Params,
    d_o: Tensor,
    states: Tensor | None,
    leaving: Tensor | None,
    updates: Tensor | None,
    errors: Tensor | None,
    direct: Tensor | None,
    carried: Tensor | None,
    into: Mapping[str, Tensor],
) -> None:
    """The parallel kernels. With `gradients=one` a single one makes those of q, k and w, where all of them are wanted; else there are three, as wanted."""
    block, rule = int(p["block"]), x.w is None
    one = p.get("gradients") == "one" and {"q", "k"} | (set() if rule else {"w"}) <= set(into)
    columns = tile_width(x.keys) if one or x.l2norm else min(tile_width(x.keys), int(p["gradient_keys"]))
    tiles, places = -(-x.keys // columns), x.slots(block) * x.heads
    diagonal, *lines = _lines(places, block, tiles, x, into, one)
    kept = (states, leaving, updates, errors)
    if one:
        _run_together(x, made, p, d_o, kept, lines, into)
    else:
        _run_three(x, made, p, d_o, kept, columns, diagonal, lines, into)
    d_g, d_gate, d_beta, d_decay = (into.get(name) for name in ("g", "gate", "beta", "chunk_decay"))
    if d_g is not None or d_gate is not None or d_beta is not None or d_decay is not None:
        told, past, seen, taken, gone, asked, shed = lines
        parts = -(-x.values // int(p["value_tile"]))
        chunks = 0 if d_decay is None else d_decay.shape[1]
        args = (x.beta, x.g, x.gate, told, past, direct, seen, taken, gone, asked, shed, carried, d_beta, d_g, d_gate, d_decay, x.cu_seqlens)
        args += (x.v.shape[1], x.sequences, x.heads, places, parts, tiles, chunks, *strides(x.beta), *strides(x.g), *strides(x.gate))
        VECTORS(places, args, (block, x.k.dtype == torch.float32), 1 if block <= 32 else 2, 1)


def _run_together(
    x: Operands,
    made: Factors,
    p: Params,
    d_o: Tensor,
    kept: tuple[Tensor | None, ...],
    lines: Sequence[Tensor | None],
    into: Mapping[str, Tensor],
) -> None:
    """One kernel for the gradients of q, k and w. `kept`: states, their gradients, updates and errors."""
    block, stages = int(p["block"]), int(p["gradient_stages"])
    told, past, seen, taken, gone, asked, shed = lines
    erase = made.lines[1] if x.chunk_decay is not None else None
    args = (x.q, x.k, x.w, x.beta, x.g, x.gate, d_o, *kept, erase, told, past, asked, seen, shed, taken, gone, into["q"], into["k"], into.get("w"))
    args += (x.cu_seqlens, x.v.shape[1], x.sequences, x.heads, x.group, x.scale)
    for tensor in (x.q, x.k, x.w, x.beta, x.g, x.gate, d_o):
        args += strides(tensor)
    constants = (x.keys, x.values, tile_width(x.keys), block, int(p["gradient_tile"]), x.group > 1, x.l2norm, p["dot"], stages)
    TOGETHER(x.slots(block) * (x.heads // x.group), args, constants, int(p["gradient_warps"]), stages)


def _run_three(
    x: Operands,
    made: Factors,
    p: Params,
    d_o: Tensor,
    kept: tuple[Tensor | None, ...],
    columns: int,
    diagonal: Tensor | None,
    lines: Sequence[Tensor | None],
    into: Mapping[str, Tensor],
) -> None:
    """Three kernels, each where something wants it. They write over the factors, which nothing reads any more. `kept` as above."""
    block, width, stages, rule = int(p["block"]), int(p["gradient_tile"]), int(p["gradient_stages"]), x.w is None
    states, leaving, updates, errors = kept
    told, past, seen, taken, gone, asked, shed = lines
    tiles, places = -(-x.keys // columns), x.slots(block) * x.heads
    d_q, d_k, d_g, d_gate, d_beta, d_decay = (into.get(name) for name in ("q", "k", "g", "gate", "beta", "chunk_decay"))
    d_w = into.get("w")
    writes, grouped = d_k is not None or d_g is not None, x.group > 1
    pairs, links = (made.scores, made.inverses) if writes else (None, None)
    erase = made.lines[1] if x.chunk_decay is not None else None
    sums = None
    if (d_q is not None and grouped) or (d_k is not None and (rule or grouped)):
        sums = torch.empty(places // x.group * block * columns * tiles, dtype=torch.float32, device=x.v.device)
    constants = (x.keys, x.values, columns, block, width, x.l2norm, p["dot"], stages)
    warps, sizes, programs = int(p["gradient_warps"]), (x.v.shape[1], x.sequences, x.heads, x.group, places), places // x.group * tiles
    q, k, beta, g, gate = (strides(tensor) for tensor in (x.q, x.k, x.beta, x.g, x.gate))
    if writes or d_q is not None or d_gate is not None or d_decay is not None:
        args = (x.q, x.k, x.g, x.gate, d_o, states, updates, erase, pairs, diagonal, told, past, asked, sums if grouped else None, d_q, x.cu_seqlens)
        QUERIES(programs, (*args, *sizes, x.scale, *q, *k, *g, *gate, *strides(d_o)), constants, warps, stages)
    if d_w is not None or d_beta is not None or d_decay is not None or (rule and writes):
        left = sums if rule and d_k is not None else None
        args = (x.k, x.w, x.beta, x.g, states, updates, errors, erase, links, seen, shed, left, d_w, x.cu_seqlens, *sizes)
        ERASED(programs, (*args, *k, *strides(x.w), *beta, *g), constants, warps, stages)
    if writes:
        more = sums if d_k is not None and (rule or grouped) else None
        args = (x.q, x.k, x.beta, x.g, x.gate, leaving, updates, pairs, diagonal, links, taken, gone, more, d_k, x.cu_seqlens)
        WRITTEN(programs, (*args, *sizes, *q, *k, *beta, *g, *gate), constants, warps, stages)


def _lines(places: int, block: int, tiles: int, x: Operands, into: Mapping[str, Tensor], one: bool) -> tuple[Tensor | None, ...]:
    """Room for the diagonal of the scores, and for what `vectors` reads: told, past, seen, taken, gone, asked and shed, each where asked for; `one`: no diagonal."""
    line, rule, decay, factor = places * block, x.w is None, "g" in into, "chunk_decay" in into
    sizes = (
        line * ("k" in into and not one),
        tiles * line * ("gate" in into),
        tiles * line * decay,
        tiles * line * (rule and (decay or "beta" in into)),
        tiles * line * decay,
        tiles * line * decay,
        tiles * places * factor,
        tiles * places * factor,
    )
    room = torch.empty(sum(sizes), dtype=torch.float32, device=x.v.device)
    return tuple(part if part.numel() else None for part in room.split(sizes))
