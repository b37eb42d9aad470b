"""chunk_flux in two launches, the chunks' means and the network over them, and its backward in eight at most.

Backward: the means again, the network's gradients (`flux_gradients.py`, four launches), the tokens' and the bilinear form's, and the latter's sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.chunk_flux import ChunkFlux
from titans_backends.contracts.chunks import chunk_rows
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict

from .ahead import ahead_of
from .chunk_gradients import FORM_GRADIENTS, TOKEN_GRADIENTS
from .chunk_means import MEANS
from .flux_calls import Network, network, network_gradients, serves_network
from .grid import on_device, strides, unit_stride
from .partial_sums import add_up
from .program import remembering, remembering_backward
from .serving import dots, narrow_warps, tile_width

__all__ = ["backward_candidates", "candidates", "compile_ahead", "remember", "remember_backward", "run", "run_backward", "supports"]

_INPUTS = ("k", "u", "bilinear", "temp", "w1", "b1", "w2", "b2")
_NETWORK = ("w1", "b1", "w2", "b2")
_ROWS, _NETWORK_ROWS = (64, 32), 16
_SLAB_BYTES = 128
_SPLITS = 16
"""Parts of the bilinear form's gradient, at most."""


def supports(signature: Signature, machine: Machine) -> Verdict:
    """What `flux_calls.serves_network` says."""
    return serves_network(signature, machine)


def _ways(signature: Signature, direction: str) -> list[Candidate]:
    found = [(rows, dots(signature)[0]) for rows in _ROWS] + [(_ROWS[1], dot) for dot in dots(signature)[1:]]
    if signature.dtype.itemsize == 4:  # products of float32 want registers
        found = found[1:] + found[:1]
    return [
        Candidate("triton", "chunks", (("rows", rows), ("dot", dot)), direction="backward" if direction == "backward" else "forward")
        for rows, dot in found
    ]


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """Tokens that a program takes at a time."""
    return _ways(signature, "forward")


def backward_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """The same."""
    return _ways(signature, "backward")


@dataclass(frozen=True, slots=True)
class _Sizes:
    """What the launches of a call share: numbers that the kernels take, and their constants."""

    slots: int
    rows: int
    numbers: tuple[int, ...]
    keys: int
    values: int
    chunk: int


def _ready(call: ChunkFlux) -> tuple[ChunkFlux, Tensor | None, _Sizes]:
    """The call with rows and weights as the kernels read them, `cu_seqlens` on the device, and the sizes."""
    packed = on_device(call.cu_seqlens, call.k)
    k, u, *weights = (unit_stride(call.k), unit_stride(call.u), *(getattr(call, name).contiguous() for name in _INPUTS[2:]))
    made = ChunkFlux(k, u, *weights, chunk_size=call.chunk_size, cu_seqlens=packed)
    batch, tokens, heads, values = u.shape
    groups, keys = k.shape[2:]
    sequences = 0 if packed is None else packed.numel() - 1
    rows = chunk_rows(tokens, call.chunk_size, None if packed is None else sequences)
    numbers = (tokens, sequences, rows, call.chunk_size, heads, heads // groups if groups else 1, *strides(k), *strides(u))
    return made, packed, _Sizes(batch * rows, rows, numbers, keys, values, 1 if packed is None else call.chunk_size)


def _means(call: ChunkFlux, packed: Tensor | None, sizes: _Sizes, rows: int, dot: str) -> tuple[Tensor, Tensor, Tensor]:
    """The means `[B, Z, G, K]`, `[B, Z, H, V]` and `[B, Z, H]`; nothing is written for rows without a chunk."""
    k, u = call.k, call.u
    found = tuple(k.new_empty((k.shape[0], sizes.rows, *shape), dtype=torch.float32) for shape in (k.shape[2:], u.shape[2:], u.shape[2:3]))
    slab = min(_SLAB_BYTES // k.dtype.itemsize, tile_width(sizes.values))
    MEANS(
        sizes.slots * k.shape[2],
        (k, u, call.bilinear, call.temp, packed, *found, *sizes.numbers),
        (sizes.keys, sizes.values, tile_width(sizes.keys), slab, rows, sizes.chunk, dot),
        narrow_warps(k.dtype, rows, slab, 4),
        2,
    )
    return found[0], found[1], found[2]


def _network(call: ChunkFlux, packed: Tensor | None, sizes: _Sizes, means: tuple[Tensor, Tensor, Tensor]) -> Network:
    mean_k, mean_u, mean_e = means
    return Network(mean_k, mean_u, None, mean_e, call.w1, call.b1, call.w2, call.b2, packed, sizes.chunk)


def run(call: ChunkFlux, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """psi, float32."""
    rows, dot = int(candidate.param("rows")), str(candidate.param("dot"))
    call, packed, sizes = _ready(call)
    psi = call.k.new_empty((call.k.shape[0], sizes.rows, call.u.shape[2]), dtype=torch.float32)
    network(_network(call, packed, sizes, _means(call, packed, sizes, rows, dot)), psi, _NETWORK_ROWS, dot)
    return (psi,)


def run_backward(
    call: ChunkFlux, grads: tuple[Tensor | None, ...], states: Tensor | None, needs: frozenset[str], candidate: Candidate
) -> tuple[Tensor | None, ...]:
    """Gradients of k, u, bilinear, temp, w1, b1, w2 and b2, in that order."""
    (d_psi,) = grads
    assert d_psi is not None  # the only output
    rows, dot = int(candidate.param("rows")), str(candidate.param("dot"))
    outs = {name: torch.empty(x.shape, dtype=x.dtype, device=x.device) for name in _INPUTS if name in needs for x in (getattr(call, name),)}
    call, packed, sizes = _ready(call)
    means = _means(call, packed, sizes, rows, dot)
    wanted = {name: out for name, out in outs.items() if name in _NETWORK}
    for name, mean, names in zip(("k", "v", "extra"), means, ("k", "u", ""), strict=True):
        if names in outs or (name == "extra" and set(outs) - set(_NETWORK)):
            wanted[name] = torch.empty(mean.shape, dtype=mean.dtype, device=mean.device)
    network_gradients(_network(call, packed, sizes, means), d_psi, wanted, _NETWORK_ROWS, 1, dot)
    k, u, heads = call.k, call.u, call.u.shape[2]
    slabs = tuple(min(_SLAB_BYTES // k.dtype.itemsize, tile_width(size)) for size in (sizes.keys, sizes.values))
    constants = (sizes.keys, sizes.values, slabs[0], slabs[1], rows, sizes.chunk, dot)
    if {"k", "u"} & set(outs):
        TOKEN_GRADIENTS(
            sizes.slots * k.shape[2],
            (
                k, u, call.bilinear, call.temp, wanted.get("k"), wanted.get("v"), wanted["extra"], packed, outs.get("k"), outs.get("u"), *sizes.numbers,
            ),
            constants,
            narrow_warps(k.dtype, rows, min(slabs), 4),
            2,
        )  # fmt: skip
    if {"bilinear", "temp"} & set(outs):
        splits, form = min(_SPLITS, max(1, sizes.slots)), call.bilinear.numel()
        partial = k.new_empty((splits, form + heads), dtype=torch.float32)
        tiles = -(-sizes.keys // slabs[0]) * -(-sizes.values // slabs[1])
        FORM_GRADIENTS(
            splits * heads * tiles,
            (k, u, call.temp, means[2], wanted["extra"], packed, partial, sizes.slots, splits, *sizes.numbers),
            constants,
            narrow_warps(k.dtype, slabs[0], slabs[1], 4),
            2,
        )
        add_up(partial, splits, form + heads, [(outs.get("bilinear"), form), (outs.get("temp"), heads)])
    return tuple(outs.get(name) for name in _INPUTS)


compile_ahead = ahead_of(run, "chunk_flux", run_backward)
remember, remember_backward = remembering(run), remembering_backward(run_backward)
