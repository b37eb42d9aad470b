"""gated_rms_norm in one launch, and its backward in two: `rms_rows.py` and `rms_gradients.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.gated_rms_norm import GatedRMSNorm
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict

from .ahead import ahead_of
from .grid import strides, unit_stride
from .partial_sums import add_up
from .program import remembering, remembering_backward
from .rms_gradients import RMS_GRADIENTS
from .rms_rows import RMS
from .serving import serves, tile_width

__all__ = ["backward_candidates", "candidates", "compile_ahead", "remember", "remember_backward", "run", "run_backward", "supports"]

_TILES = ((4096, 4), (2048, 4), (1024, 2))
"""Numbers of a forward program's tile, and its warps."""
_WALKS = ((2048, 8, 4), (2048, 1, 4), (4096, 4, 8))
"""Numbers of a backward program's tile, how many tiles it takes one after the other, and its warps."""
_FULL = 2048
"""Programs that fill a card."""


def supports(signature: Signature, machine: Machine) -> Verdict:
    """What `serving.serves` says; every option."""
    return serves(signature, machine)


def _few(signature: Signature, most: int) -> bool:
    sizes = dict(signature.dims)
    return not signature.batch_invariant and sizes["B"] * sizes["T"] * sizes["H"] * sizes["V"] < _FULL * most


def _rows(tile: int, values: int) -> int:
    return max(1, min(128, tile // tile_width(values)))


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """Tiles, the largest first but where they would leave the card idle."""
    plans = reversed(_TILES) if _few(signature, _TILES[0][0]) else _TILES
    found = dict.fromkeys((_rows(tile, signature.dim("V")), warps) for tile, warps in plans)
    return [Candidate("triton", "rows", (("rows", rows), ("warps", warps))) for rows, warps in found]


def backward_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """Tiles and how many a program takes, many first but where they would leave the card idle."""
    plans = (_WALKS[1], _WALKS[0], _WALKS[2]) if _few(signature, 2048 * 8) else _WALKS
    return [
        Candidate("triton", "rows", (("rows", _rows(tile, signature.dim("V"))), ("blocks", blocks), ("warps", warps)), direction="backward")
        for tile, blocks, warps in plans
    ]


def run(call: GatedRMSNorm, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """y, contiguous, in x's dtype."""
    x, gate = unit_stride(call.x), unit_stride(call.gate)
    batch, tokens, heads, values = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = int(candidate.param("rows"))
    RMS(
        batch * -(-tokens // rows) * heads,
        (x, gate, call.weight.contiguous(), y, float(call.eps), tokens, heads, *strides(x), *strides(gate)),
        (values, tile_width(values), rows, call.activation == "silu"),
        int(candidate.param("warps")),
        2,
    )
    return (y,)


def run_backward(
    call: GatedRMSNorm, grads: tuple[Tensor | None, ...], states: Tensor | None, needs: frozenset[str], candidate: Candidate
) -> tuple[Tensor | None, ...]:
    """Gradients of x, gate and weight, in that order."""
    (given,) = grads
    assert given is not None  # the only output
    x, gate, d_y = unit_stride(call.x), unit_stride(call.gate), unit_stride(given)
    batch, tokens, heads, values = x.shape
    found = [
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if name in needs else None
        for name, t in (("x", x), ("gate", gate), ("weight", call.weight))
    ]
    rows, blocks = int(candidate.param("rows")), int(candidate.param("blocks"))
    programs = batch * -(-tokens // (rows * blocks)) * heads
    partial = None if found[2] is None else x.new_empty((programs, values), dtype=torch.float32)
    RMS_GRADIENTS(
        programs,
        (
            x, gate, call.weight.contiguous(), d_y, found[0], found[1], partial, float(call.eps), tokens, heads,
            *strides(x), *strides(gate), *strides(d_y),
        ),
        (values, tile_width(values), rows, blocks, call.activation == "silu"),
        int(candidate.param("warps")),
        2,
    )  # fmt: skip
    if partial is not None:
        add_up(partial, programs, values, [(found[2], values)])
    return tuple(found)


compile_ahead = ahead_of(run, "gated_rms_norm", run_backward)
remember, remember_backward = remembering(run), remembering_backward(run_backward)
