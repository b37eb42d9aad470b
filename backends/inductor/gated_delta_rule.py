"""gated_delta_rule: A, the scores and what scales with the decay compiled; the inverse and the loop over the state in plain torch (SPEC.md 3, 4).

The loop works without w: U' = T (b ⊙ V - b ⊙ e^G ⊙ (K S)), K and Q reading S in one product. A packed call's cu_seqlens is read on the host.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.gated_delta_rule import GRID, GatedDeltaRule
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import ACCEPTED, Verdict

from ..eager.chunk_grid import ChunkGrid, Slab, compute_dtype
from ..eager.scratch import chunk_bytes, slab_budget
from ..eager.triangular import unit_lower_inverse
from ..eager.unit_norm import unit
from ..eager.workspace import Workspace
from .compiled import TRIANGLES
from .serving import EAGER_SOURCES, LARGEST_CHUNK, OWN_SOURCES, causal_mask, plain_modes, refuse_chunk, running_log, serves

__all__ = ["candidates", "run", "supports"]

_FREE = (32, GRID, 16)
_FREE_TRAINING = (GRID, 32)
_SOURCES = (*OWN_SOURCES, *EAGER_SOURCES, *(f"titans_backends.backends.eager.{name}" for name in ("triangular", "unit_norm", "workspace")))


def supports(signature: Signature, machine: Machine) -> Verdict:
    """Chunks of 8 tokens and more, where torch.compile can work; the rule is the same on every grid, so longer chunks than 256 run on one of 64."""
    asked = int(signature.option("chunk_size") or 0)
    return serves(signature, machine) & (ACCEPTED if asked == 0 or asked > LARGEST_CHUNK else refuse_chunk(signature))


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """Chunk sizes, where the call leaves them free; in training with kept states too."""
    asked = signature.option("chunk_size")
    free = _FREE if signature.regime == "inference" else _FREE_TRAINING
    sizes = free if asked is None else (int(asked) if int(asked) <= LARGEST_CHUNK else GRID,)
    found = [Candidate("inductor", "chunked", (("chunk_size", size),), batch_invariant=False, sources=_SOURCES) for size in sizes]
    if signature.regime == "training" and signature.may_save:
        found = [replace(one, saves_states=True) for one in found if one.param("chunk_size") == (asked or GRID)] + found
    return found


def run(call: GatedDeltaRule, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """o, the final state, and the chunk-start states where the candidate keeps them."""
    with plain_modes():
        v, dtype = call.v, compute_dtype(call.v)
        heads, widths = v.shape[2], (call.k.shape[3], v.shape[3])
        grid = ChunkGrid(v.shape[0], v.shape[1], int(candidate.param("chunk_size")), cu_seqlens=call.cu_seqlens, device=v.device)
        state = grid.states(call.initial_state, v, heads, widths)
        o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        saved = torch.empty(*grid.per_chunk_shape, *state.shape[1:], dtype=dtype, device=v.device) if candidate.saves_states else None
        workspace = Workspace(dtype, v.device)
        for slab in grid.slabs(chunk_bytes(heads, grid.chunk, *widths, dtype), slab_budget(v.device)):
            operands = _load(call, grid, slab, workspace)
            starts = None if saved is None else torch.empty(slab.size, *state.shape[1:], dtype=dtype, device=v.device)
            y = _advance(state, slab, operands, workspace, starts)
            if call.gate is not None:
                y.mul_(grid.gather(slab, call.gate, heads, dtype))
            grid.scatter(slab, y, o)
            if saved is not None and starts is not None:
                grid.scatter_per_chunk(slab, starts, saved)
        final = grid.in_call_order(state) if call.output_final_state else None
        return (o, final) if saved is None else (o, final, saved)


@dataclass(frozen=True, slots=True)
class _Operands:
    """One slab, `[n * H, *, *]`: K above Q, T, M, b ⊙ V, -b ⊙ e^G, e^(G_C - G) ⊙ K, and e^G and e^(G_C) where there is a decay."""

    both: Tensor
    t: Tensor
    m: Tensor
    values: Tensor
    rate: Tensor
    writing: Tensor
    head: Tensor | None
    total: Tensor | None


def _load(call: GatedDeltaRule, grid: ChunkGrid, slab: Slab, workspace: Workspace) -> _Operands:
    n, heads, chunk, dtype, take = slab.size, call.v.shape[2], grid.chunk, compute_dtype(call.v), workspace.take
    both = take("both", n, heads, 2 * chunk, call.k.shape[3])
    for x, rows in ((call.k, slice(None, chunk)), (call.q, slice(chunk, None))):
        grid.gather(slab, x, heads, dtype, both[:, :, rows])
    if call.qk_l2norm:
        both.copy_(unit(both))
    both[:, :, chunk:].mul_(call.k.shape[-1] ** -0.5 if call.scale is None else call.scale)
    values = grid.gather(slab, call.v, heads, dtype, take("v", n, heads, chunk, call.v.shape[3])).flatten(0, 1)
    rate = grid.gather(slab, call.beta, heads, dtype, take("beta", n, heads, chunk, 1)).flatten(0, 1)
    log = None if call.g is None else running_log(grid.gather(slab, call.g, heads, dtype).flatten(0, 1))
    both = both.flatten(0, 1)
    k, q = both[:, :chunk], both[:, chunk:]
    shape = (n * heads, chunk, chunk)
    minus_a, m = torch.bmm(k, k.mT, out=take("n", *shape)), torch.bmm(q, k.mT, out=take("m", *shape))
    writing = None if log is None else take("writing", *k.shape).copy_(k)
    decayed = TRIANGLES(minus_a, m, writing, values, rate, log, causal_mask(chunk, k, decayed=log is not None))
    t = unit_lower_inverse(minus_a, "blocks", take("t", *shape))
    head, total = decayed or (None, None)
    return _Operands(both, t, m, values, rate, k if writing is None else writing, head, total)


def _advance(state: Tensor, slab: Slab, x: _Operands, workspace: Workspace, starts: Tensor | None) -> Tensor:
    """Moves `state [sequences, H, K, V]` over the slab and returns o without its gate, `[n, H, C, V]`."""
    heads, chunk = state.shape[1], x.values.shape[1]
    sizes = [(step.last - step.first) * heads for step in slab.steps]
    seen, updates = workspace.take("seen", *x.both.shape[:2], x.values.shape[2]), workspace.take("u", *x.values.shape)
    error = workspace.take("error", max(sizes), *x.values.shape[1:])
    parts = [part.split(sizes) for part in (x.both, seen, seen[:, :chunk], x.values, x.rate, x.t, updates, x.writing.mT)]
    totals = None if x.total is None else x.total.split(sizes)
    for index, (step, left, out, missed, value, factor, t, update, write) in enumerate(zip(slab.steps, *parts, strict=True)):
        current = state[step.rows].flatten(0, 1)
        if starts is not None:
            starts[step.chunks].copy_(state[step.rows])
        torch.bmm(left, current, out=out)
        torch.bmm(t, torch.addcmul(value, factor, missed, out=error[: sizes[index]]), out=update)
        if totals is not None:
            current.mul_(totals[index])
        current.baddbmm_(write, update)
    read = seen[:, chunk:]
    if x.head is not None:
        read.mul_(x.head)
    torch.baddbmm(read, x.m, updates, out=x.values)  # b ⊙ V is spent
    return x.values.unflatten(0, (-1, heads))
