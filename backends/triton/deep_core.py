"""deep_core: one to three launches forward, five backward: sums, blocks forward and in reverse, their scalars, all tokens (SPEC.md 7). Experimental.

Every variant of the op is served; a packed call's cu_seqlens is read on the device. The kernels: deep_scan, deep_gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.deep_core import DeepCore
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict

from .ahead import ahead_of
from .deep_gradients import SCALARS, TOKENS
from .deep_parallel import BACK, CHAIN, GATHER, READ
from .deep_plans import backward_ways, forward_ways, steps_rows
from .deep_scan import BLOCKS, REVERSE, SWEEP
from .grid import on_device, slot_count, strides, unit_stride
from .program import remembering, remembering_backward
from .serving import serves, tile_width

__all__ = ["backward_candidates", "candidates", "compile_ahead", "remember", "remember_backward", "run", "run_backward", "supports"]

_BLOCK_ROWS = 32
_INPUTS = ("q", "k", "v", "eta", "g", "gate", "initial_state", "initial_error", "initial_mass", "initial_log_decay")


def supports(signature: Signature, machine: Machine) -> Verdict:
    """What `serving.serves` says; every option."""
    return serves(signature, machine)


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """Tiles of value columns with their warps and stages, the expected best first."""
    return forward_ways(signature, machine)


def backward_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """The same of the backward."""
    return backward_ways(signature, machine)


def _matrix(x: Tensor | None) -> Tensor | None:
    return None if x is None else unit_stride(x)


def _pair(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.stride(0), x.stride(1))


class _Call:
    """What the kernels of a call share."""

    def __init__(self, call: DeepCore, candidate: Candidate) -> None:
        v = call.v
        self.q, self.k, self.v, self.eta, self.g, self.gate = unit_stride(call.q), unit_stride(call.k), unit_stride(v), call.eta, call.g, call.gate
        self.state, self.error = _matrix(call.initial_state), _matrix(call.initial_error)
        self.mass, self.log_decay = call.initial_mass, call.initial_log_decay
        self.packed = on_device(call.cu_seqlens, v)
        self.batch, self.tokens, self.heads, self.values = v.shape
        self.groups, self.keys = call.k.shape[2:]
        self.group = self.heads // self.groups if self.groups else 1
        self.sequences = self.batch if self.packed is None else self.packed.numel() - 1
        self.offset, self.span, self.scale, self.normalize = call.block_offset, call.chunk_size * call.period, float(call.scale), call.normalize
        self.rows = min(int(candidate.param("rows")), steps_rows(self.span))
        self.tile = min(int(candidate.param("value_tile")), tile_width(self.values))
        self.warps, self.stages, self.dot = int(candidate.param("warps")), int(candidate.param("stages")), str(candidate.param("dot"))
        self.columns = min(64, tile_width(self.values))
        self.block_warps = int(candidate.param("block_warps")) if candidate.variant == "blocks" else 4
        self.programs = self.sequences * self.heads * -(-self.values // self.tile)
        self.slots = slot_count(self.batch, self.tokens, self.span, self.packed, self.offset)
        self.numbers = (self.scale, self.tokens, self.sequences, self.heads)
        self.sizes = (self.keys, self.values, tile_width(self.keys))

    def new(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.v.device)

    def carry(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Room for D, E, mass and summed g of every sequence."""
        square, line = (self.sequences, self.heads, self.keys, self.values), (self.sequences, self.heads)
        return tuple(self.new(torch.float32, *shape) for shape in (square, square, line, line))  # type: ignore[return-value]  # four

    def blocks(self) -> tuple[Tensor, Tensor]:
        """Mass and G of every block before it closes, `[slots, H]`."""
        masses, logs = (self.new(torch.float32, self.slots, self.heads) for _ in range(2))
        BLOCKS(
            self.slots * self.heads,
            (
                self.k, self.eta, self.g, self.mass, self.log_decay, self.packed, masses, logs, *self.numbers[1:], self.group, self.offset,
                *strides(self.k), *strides(self.eta), *strides(self.g), *_pair(self.mass), *_pair(self.log_decay),
            ),
            (self.keys, self.sizes[2], min(_BLOCK_ROWS, steps_rows(self.span)), self.span),
            4,
            2,
        )  # fmt: skip
        return masses, logs

    def sweep(
        self, o: Tensor | None, summed: tuple[Tensor | None, Tensor | None], kept: tuple[Tensor | None, ...], final: tuple[Tensor | None, ...]
    ) -> None:
        """Forward: outputs, or D and E of every block; the carry after the last."""
        SWEEP(
            self.programs,
            (
                self.q, self.k, self.v, self.eta, self.g, self.gate, self.state, self.error, self.mass, self.log_decay, *summed, self.packed, o, *kept, *final,
                *self.numbers, self.group, self.offset,
                *strides(self.q), *strides(self.k), *strides(self.v), *strides(self.eta), *strides(self.g), *strides(self.gate),
                *strides(self.state), *strides(self.error), *_pair(self.mass), *_pair(self.log_decay),
            ),
            (*self.sizes, self.tile, self.rows, self.span, self.normalize, self.dot),
            self.warps,
            self.stages,
        )  # fmt: skip

    def gather(self, d_o: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, tuple[Tensor, Tensor]]:
        """N, R, with `d_o` also Y, `[slots, H, K, K or V]`; mass and G of every block."""
        maps = self.new(self.v.dtype, self.slots, self.heads, self.keys, self.keys)
        inputs = self.new(torch.float32, self.slots, self.heads, self.keys, self.values)
        reads = None if d_o is None else torch.empty_like(inputs)
        masses, logs = (self.new(torch.float32, self.slots, self.heads) for _ in range(2))
        column = self.columns
        parts = -(-self.keys // column) + (2 if d_o is not None else 1) * -(-self.values // column) + 1
        GATHER(
            self.slots * self.heads * parts,
            (
                self.q, self.k, self.v, self.eta, self.g, self.gate, d_o, self.mass, self.log_decay, self.packed, maps, inputs, reads, masses, logs,
                *self.numbers, self.group, self.offset,
                *strides(self.q), *strides(self.k), *strides(self.v), *strides(self.eta), *strides(self.g), *strides(self.gate), *strides(d_o),
                *_pair(self.mass), *_pair(self.log_decay),
            ),
            (*self.sizes, column, self.rows, self.span, self.dot),
            self.block_warps,
            2,
        )  # fmt: skip
        return maps, inputs, reads, (masses, logs)

    def chain(
        self, maps: Tensor, inputs: Tensor, summed: tuple[Tensor, Tensor], kept: tuple[Tensor, Tensor | None], final: tuple[Tensor | None, ...]
    ) -> None:
        """D of every block from N and R; the carry after the last."""
        CHAIN(
            self.programs,
            (
                maps, inputs, *summed, self.state, self.error, self.mass, self.log_decay, self.packed, *kept, *final, *self.numbers[1:], self.offset,
                *strides(self.state), *strides(self.error), *_pair(self.mass), *_pair(self.log_decay),
            ),
            (*self.sizes, self.tile, self.span, self.normalize, self.dot),
            self.warps,
            self.stages,
        )  # fmt: skip

    def in_parallel(self, o: Tensor, final: tuple[Tensor | None, ...]) -> None:
        """Forward with all blocks side by side."""
        maps, inputs, _, summed = self.gather(None)
        starts = self.new(self.v.dtype, *inputs.shape)
        self.chain(maps, inputs, summed, (starts, None), final)
        READ(
            self.slots * -(-self.span // self.rows) * self.heads * -(-self.values // self.columns),
            (
                self.q, self.gate, starts, self.packed, o, *self.numbers, self.group, self.offset, *strides(self.q), *strides(self.gate),
            ),
            (*self.sizes, self.columns, self.rows, self.span, self.dot),
            self.block_warps,
            1,
        )  # fmt: skip


def run(call: DeepCore, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """o and the final carry."""
    made = _Call(call, candidate)
    o = torch.empty(call.v.shape, dtype=call.v.dtype, device=call.v.device)
    final = made.carry() if call.output_final_state else (None,) * 4
    if o.numel() or call.output_final_state:
        if candidate.variant == "blocks":
            made.in_parallel(o, final)
        else:
            made.sweep(o, made.blocks() if candidate.variant == "prepared" else (None, None), (None, None), final)
    return o, *final


def run_backward(
    call: DeepCore, grads: tuple[Tensor | None, ...], states: Tensor | None, needs: frozenset[str], candidate: Candidate
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, eta, g, gate and the initial carry, in that order."""
    made = _Call(call, candidate)
    wanted = {name: getattr(call, name) for name in _INPUTS if name in needs}
    into = {name: torch.empty(like.shape, dtype=like.dtype, device=like.device) for name, like in wanted.items() if like is not None}
    square, operands = (made.slots, made.heads, made.keys, made.values), made.v.dtype
    safe = made.normalize == "safe" and not into.keys().isdisjoint(("k", "eta", "initial_mass"))
    ends = made.new(torch.float32 if operands == torch.float16 else operands, *square) if safe else None
    starts, d_o = made.new(operands, *square), _matrix(grads[0])
    maps, reads_of = None, None
    if candidate.variant == "blocks":
        maps, inputs, reads_of, (masses, logs) = made.gather(d_o)
        made.chain(maps, inputs, (masses, logs), (starts, ends), (None,) * 4)
    else:
        masses, logs = made.blocks()
        made.sweep(None, (masses, logs), (starts, ends), (None,) * 4)
    d_state, d_error = (_matrix(x) for x in grads[1:3])
    d_mass, d_log = grads[3:]
    sums = made.new(operands, *square)
    lines = (into.get("initial_mass"), into.get("initial_log_decay"))
    arriving = (d_state, d_error, d_mass, d_log)
    initial = (into.get("initial_state"), into.get("initial_error"), *lines)
    carried = (*strides(d_state), *strides(d_error), *_pair(d_mass), *_pair(d_log))
    if maps is not None:
        BACK(
            made.programs,
            (maps, reads_of, masses, logs, made.packed, *arriving, sums, *initial, *made.numbers[1:], made.offset, *carried),
            (*made.sizes, made.tile, made.span, made.normalize, made.dot),
            made.warps,
            made.stages,
        )
    else:
        REVERSE(
            made.programs,
            (
                made.q, made.k, made.eta, made.gate, d_o, masses, logs, made.packed, *arriving, sums, *initial, *made.numbers, made.group, made.offset,
                *strides(made.q), *strides(made.k), *strides(made.eta), *strides(made.gate), *strides(d_o), *carried,
            ),
            (*made.sizes, made.tile, made.rows, made.span, made.normalize, made.dot),
            made.warps,
            made.stages,
        )  # fmt: skip
    gradients = tuple(into.get(name) for name in ("q", "k", "v", "eta", "g", "gate"))
    reads = d_o is not None and not into.keys().isdisjoint(("q", "gate"))
    writes = any(x is not None for x in gradients[1:5])
    if d_o is None:
        for name in into.keys() & {"q", "gate"}:
            into[name].zero_()
    drawn = made.new(torch.float32, made.slots, made.heads) if ("k" in into or "eta" in into) and (safe or d_mass is not None) else None
    grown = made.new(torch.float32, made.slots, made.heads) if "g" in into or lines[1] is not None else None
    tile = min(64, tile_width(made.values))
    if drawn is not None or grown is not None or lines[0] is not None:
        SCALARS(
            made.slots * made.heads,
            (
                starts, ends, sums, masses, logs, d_mass, d_log, made.packed, drawn, grown, *lines,
                made.tokens, made.sequences, made.heads, made.offset, *_pair(d_mass), *_pair(d_log),
            ),
            (*made.sizes, tile, made.span, made.normalize),
            4 if made.keys > 32 else 1,
            1,
        )  # fmt: skip
    if reads or writes:
        rows = min(int(candidate.param("token_rows")), steps_rows(made.span))
        read = gradients if reads else (None, *gradients[1:5], None)
        TOKENS(
            made.slots * -(-made.span // rows) * made.groups * (reads + writes),
            (
                made.q, made.k, made.v, made.eta, made.gate, d_o, starts, sums, drawn, grown, made.packed, *read,
                *made.numbers, made.groups, made.group, made.offset,
                *strides(made.q), *strides(made.k), *strides(made.v), *strides(made.eta), *strides(made.gate), *strides(d_o),
            ),
            (*made.sizes, tile, rows, made.span, int(reads), int(writes), made.dot),
            int(candidate.param("token_warps")),
            1,
        )  # fmt: skip
    return tuple(into.get(name) for name in _INPUTS)


compile_ahead = ahead_of(run, "deep_core", run_backward)
remember, remember_backward = remembering(run), remembering_backward(run_backward)
