"""uw_transform: u and w for every chunk, a slab of chunks at a time; there is no state, so nothing is a loop (SPEC.md 3, 10).

A packed call's cu_seqlens is read on the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.uw_transform import UWTransform
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict

from .chunk_grid import ChunkGrid, Slab, compute_dtype
from .decay import Decay, log_decay_gradient
from .packing import refuse_packed_graph
from .scratch import HeadRange, by_heads, chunk_bytes, head_ranges, refuse_huge_chunk, slab_budget
from .transform import Transform, TransformGradients
from .triangular import DEPENDS_ON_PLACE, INVERSES

__all__ = ["backward_candidates", "candidates", "run", "run_backward", "supports"]

_INPUTS = ("k", "v", "beta", "g")


def supports(signature: Signature, machine: Machine) -> Verdict:
    """Everything but chunks above 4096 tokens, and packed calls in a captured graph."""
    return refuse_huge_chunk(signature) & refuse_packed_graph(signature)


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """For the exact transform both ways to the inverse; the others have none."""
    if signature.option("transform") != "exact":
        return [Candidate("eager", "chunked")]
    return [Candidate("eager", "chunked", (("inverse", inverse),), batch_invariant=inverse not in DEPENDS_ON_PLACE) for inverse in INVERSES]


def backward_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """As forward."""
    return [replace(candidate, direction="backward") for candidate in candidates(signature, machine)]


def _grid(call: UWTransform) -> ChunkGrid:
    return ChunkGrid(call.v.shape[0], call.v.shape[1], call.chunk_size, cu_seqlens=call.cu_seqlens, device=call.v.device)


def _slabs(call: UWTransform, grid: ChunkGrid, *, backward: bool) -> Iterator[Slab]:
    size = chunk_bytes(call.v.shape[2], grid.chunk, call.k.shape[3], call.v.shape[3], compute_dtype(call.v))
    return grid.slabs(size, slab_budget(call.v.device, backward=backward))


def _load(call: UWTransform, grid: ChunkGrid, slab: Slab, candidate: Candidate) -> tuple[Tensor, Tensor, Tensor, Decay | None, Transform]:
    heads, dtype = call.v.shape[2], compute_dtype(call.v)
    k, v, beta = (grid.gather(slab, x, heads, dtype) for x in (call.k, call.v, call.beta))
    decay = None if call.g is None else Decay.of(grid.gather(slab, call.g, heads, dtype))
    inverse = str(candidate.param("inverse")) if candidate.params else INVERSES[0]
    return k, v, beta, decay, Transform.of(k, v, beta, decay, call.transform, inverse)


def _ranges(call: UWTransform) -> list[HeadRange]:
    return head_ranges(call.v.shape[2], call.k.shape[2], min(call.chunk_size, call.v.shape[1]), compute_dtype(call.v))


def run(call: UWTransform, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """u `[B, T, H, V]` and w `[B, T, H, K]` in v's dtype."""
    ranges = _ranges(call)
    if len(ranges) > 1:
        return by_heads(call, ranges, lambda part, _: run(part, candidate), (2, 2))
    u = torch.empty(call.v.shape, dtype=call.v.dtype, device=call.v.device)
    w = torch.empty(*call.v.shape[:3], call.k.shape[3], dtype=call.v.dtype, device=call.v.device)
    grid = _grid(call)
    for slab in _slabs(call, grid, backward=False):
        transform = _load(call, grid, slab, candidate)[-1]
        grid.scatter(slab, transform.u(), u)
        grid.scatter(slab, transform.w(), w)
    return u, w


def run_backward(
    call: UWTransform, grads: tuple[Tensor | None, ...], states: Tensor | None, needs: frozenset[str], candidate: Candidate
) -> tuple[Tensor | None, ...]:
    """Gradients of k, v, beta and g, in that order."""
    ranges = _ranges(call)
    if len(ranges) > 1:

        def part(narrowed: UWTransform, heads: HeadRange) -> tuple[Tensor | None, ...]:
            return run_backward(narrowed, (heads.of(grads[0], 2), heads.of(grads[1], 2)), None, needs, candidate)

        return by_heads(call, ranges, part, (2, 2, 2, 2))
    wanted = [name for name in _INPUTS if name in needs and getattr(call, name) is not None]
    out = {name: torch.empty_like(getattr(call, name), memory_format=torch.contiguous_format) for name in wanted}
    grid = _grid(call)
    heads, dtype = call.v.shape[2], compute_dtype(call.v)
    for slab in _slabs(call, grid, backward=True):
        k, v, beta, decay, transform = _load(call, grid, slab, candidate)
        du, dw = (None if grad is None else grid.gather(slab, grad, heads, dtype) for grad in grads)
        d = TransformGradients.of(k, v, beta, decay, transform, transform.u(), transform.w(), du, dw, frozen_keys=not needs & {"k", "beta", "g"})
        found = {"k": d.k, "v": d.v, "beta": d.beta, "g": None if d.log is None else log_decay_gradient(d.log)}
        for name in wanted:
            grid.scatter(slab, _given(found[name]), out[name])
    return tuple(out.get(name) for name in _INPUTS)


def _given(grad: Tensor | None) -> Tensor:
    assert grad is not None  # dG is None only without g, and then nobody wants it
    return grad
