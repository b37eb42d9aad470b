"""How the kernels of the exact gated delta rule are put together: one function per schedule, each from a call's operands to its outputs.

Scratch is taken from torch's allocator in few pieces; nothing here looks at a tensor's values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from titans_backends.backend import Param

from .delta_output import OUTPUT
from .delta_prepare import PREPARE
from .delta_scan import CHAIN, SCAN, TRANSITIONS
from .delta_whole import WHOLE
from .grid import slot_count, strides
from .serving import tile_width

__all__ = ["SCHEDULES", "Factors", "Fast", "Operands", "Params", "divide", "prepare", "run_scan"]

Params = Mapping[str, Param]


@dataclass(slots=True)
class Fast:
    """The fast core beside the rule, for `dual_core`: `alpha` is a number, or a tensor whose strides broadcast it to `[B, T, H]`."""

    chunk: int
    alpha: float | Tensor
    gate: Tensor | None
    initial: Tensor | None
    final: Tensor | None


@dataclass(slots=True)
class Operands:
    """A call as the kernels want it: rows of q, k and v contiguous, states contiguous, cu_seqlens on the device, `o` and `final` to be written.

    With `w` the values `v` are u, and beta is not needed; `chunk_decay` `[B, M, H]` is for a backward with `w`, on blocks that are chunks. `kept`, for a
    backward: where `scan` and `split` write the state at each block's start.
    `offset`: every sequence begins that many absent tokens earlier, so that the block grid agrees with the fast core's chunks.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor | None
    g: Tensor | None
    gate: Tensor | None
    initial: Tensor | None
    final: Tensor | None
    o: Tensor | None
    cu_seqlens: Tensor | None
    scale: float
    l2norm: bool
    offset: int = 0
    fast: Fast | None = None
    w: Tensor | None = None
    chunk_decay: Tensor | None = None
    kept: Tensor | None = None

    @property
    def sequences(self) -> int:
        """N: rows of the batch, or packed sequences."""
        return self.v.shape[0] if self.cu_seqlens is None else self.cu_seqlens.numel() - 1

    @property
    def heads(self) -> int:
        """Heads of v."""
        return self.v.shape[2]

    @property
    def group(self) -> int:
        """Heads of v for each head of q and k."""
        return self.v.shape[2] // max(self.k.shape[2], 1)

    @property
    def keys(self) -> int:
        """K."""
        return self.k.shape[3]

    @property
    def values(self) -> int:
        """V."""
        return self.v.shape[3]

    def saving(self, block: int) -> Tensor:
        """Room for `kept`: `[B, M, H, K, V]` in the dtype of k, of a dense call."""
        tokens = self.v.shape[1]
        self.kept = torch.empty(self.v.shape[0], -(-tokens // block), self.heads, self.keys, self.values, dtype=self.k.dtype, device=self.v.device)
        return self.kept

    def slots(self, unit: int) -> int:
        """Slots of `unit` tokens."""
        return slot_count(self.v.shape[0], self.v.shape[1], unit, self.cu_seqlens, self.offset)


@dataclass(slots=True)
class Factors:
    """What `delta_prepare` wrote."""

    inverses: Tensor | None
    scores: Tensor
    lines: tuple[Tensor | None, ...]
    fast: tuple[Tensor | None, ...]
    weight: Tensor | None = None


def prepare(x: Operands, p: Params, *, backward: bool = False) -> Factors:
    """Runs `delta_prepare`: the factors of every block; for a backward with the inverse and beta apart."""
    block, heads, fast = int(p["block"]), x.heads, x.fast
    places = x.slots(block) * heads
    given = x.w is not None
    squares = torch.empty(2 - given if fast is None else 3, places * block * block, dtype=x.k.dtype, device=x.v.device)
    weigh = backward and not given
    count = 3 + weigh if fast is None else 5
    floats = torch.empty(places * (count * block + 1), dtype=torch.float32, device=x.v.device)
    lines, total = floats[: places * count * block].view(count, places * block), floats[places * count * block :]
    made = Factors(
        None if given else squares[1],
        squares[0],
        (lines[0], lines[1] if not given or x.chunk_decay is not None else None, lines[2], total),
        (None, None, None) if fast is None else (squares[2], lines[3], lines[4]),
        lines[3] if weigh else None,
    )
    alpha = fast.alpha if fast is not None else 0.0
    weight = alpha if isinstance(alpha, Tensor) else None
    fast_gate = None if fast is None else fast.gate
    args = (
        x.q,
        x.k,
        x.beta,
        x.g,
        x.chunk_decay,
        x.gate,
        fast_gate,
        weight,
        x.cu_seqlens,
        made.inverses,
        made.weight,
        made.scores,
        *made.lines,
        *made.fast,
    )
    args += (x.v.shape[1], x.sequences, x.offset, heads, x.group, x.scale, 0.0 if isinstance(alpha, Tensor) else float(alpha))
    for tensor in (x.q, x.k, x.beta, x.g, x.chunk_decay, x.gate, fast_gate, weight):
        args += strides(tensor)
    PREPARE(places, args, (x.keys, tile_width(x.keys), block, x.l2norm, p["dot"]), int(p["prepare_warps"]), 1, int(p.get("prepare_registers", 0)))
    return made


def run_scan(
    x: Operands,
    made: Factors,
    p: Params,
    initial: Tensor | None,
    *,
    segment: int = 0,
    o: Tensor | None = None,
    states: Tensor | None = None,
    updates: Tensor | None = None,
) -> None:
    """Runs the scan over whole sequences, or side by side over segments of some blocks, writing whatever is given."""
    block, width = int(p["block"]), int(p["value_tile"])
    tiles = -(-x.values // width)
    units = x.slots(block * segment) if segment else x.sequences
    fast = x.fast
    ends = (None, None) if fast is None else (fast.initial, fast.final)
    args = (
        x.q,
        x.k,
        x.w,
        x.v,
        o,
        states,
        updates,
        made.inverses,
        made.weight,
        made.scores,
        *made.lines,
        *made.fast,
        initial,
        x.final,
        *ends,
        x.cu_seqlens,
    )
    args += (x.v.shape[1], x.sequences, x.offset, x.heads, x.group, tiles, 1 if fast is None else fast.chunk)
    args += (*strides(x.q), *strides(x.k), *strides(x.w), *strides(x.v))
    constants = (x.keys, x.values, tile_width(x.keys), block, width, segment, x.offset > 0, p["dot"], p["stages"])
    SCAN(units * x.heads * tiles, args, constants, int(p["warps"]), int(p["stages"]))


def whole(x: Operands, p: Params) -> None:
    """One launch."""
    width = int(p["value_tile"])
    tiles = -(-x.values // width)
    args = (x.q, x.k, x.v, x.beta, x.g, x.gate, x.o, x.initial, x.final, x.cu_seqlens, x.v.shape[1], x.heads, x.group, tiles, x.scale)
    for tensor in (x.q, x.k, x.v, x.beta, x.g, x.gate):
        args += strides(tensor)
    constants = (x.keys, x.values, tile_width(x.keys), p["block"], width, x.l2norm, p["dot"], p["stages"])
    WHOLE(x.sequences * x.heads * tiles, args, constants, int(p["warps"]), int(p["stages"]))


def scan(x: Operands, p: Params) -> None:
    """Blocks prepared in parallel, then one scan per sequence."""
    run_scan(x, prepare(x, p), p, x.initial, o=x.o, states=x.kept)


def states(x: Operands, p: Params) -> None:
    """The scan writes the state at each block's start; outputs in parallel."""
    made = prepare(x, p)
    block, width = int(p["block"]), int(p["output_tile"])
    slots, tiles = x.slots(block), -(-x.values // width)
    kept = torch.empty(slots * x.heads * x.keys * x.values, dtype=x.k.dtype, device=x.v.device)
    run_scan(x, made, p, x.initial, states=kept)
    read, erase = made.lines[:2]
    args = (x.q, x.k, x.v, x.o, kept, made.inverses, made.scores, read, erase, x.cu_seqlens, x.v.shape[1], x.sequences, x.heads, x.group, tiles)
    args += (*strides(x.q), *strides(x.k), *strides(x.v))
    OUTPUT(slots * x.heads * tiles, args, (x.keys, x.values, tile_width(x.keys), block, width, p["dot"]), int(p["output_warps"]), 1)


def _chain(x: Operands, p: Params, offsets: Tensor, maps: Tensor, starts: Tensor) -> None:
    """Runs over the segments: the state at each one's start."""
    width = min(int(p["chain_tile"]), tile_width(x.values))
    tiles = -(-x.values // width)
    args = (offsets, maps, x.initial, starts, x.final, x.cu_seqlens, x.v.shape[1], x.sequences, x.offset, x.heads, tiles)
    constants = (x.keys, x.values, tile_width(x.keys), width, int(p["block"]) * int(p["segment"]), p["dot"], p["chain_stages"])
    CHAIN(x.sequences * x.heads * tiles, args, constants, int(p["chain_warps"]), int(p["chain_stages"]))


def _segments(x: Operands, p: Params) -> tuple[int, Tensor, Tensor, Tensor]:
    """Segment slots, and room for starts, N and M of each."""
    units = x.slots(int(p["block"]) * int(p["segment"]))
    size = units * x.heads * x.keys
    room = torch.empty(size * (2 * x.values + x.keys), dtype=torch.float32, device=x.v.device)
    return units, room[: size * x.values], room[size * x.values : 2 * size * x.values], room[2 * size * x.values :]


def divide(x: Operands, made: Factors, p: Params, *, chain: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """The state at every segment's start (with `chain`, else room for it), and N and M of the segments between: S_out = M S_in + N.

    N and M may be written over.
    """
    units, starts, offsets, maps = _segments(x, p)
    width, segment = int(p["map_tile"]), int(p["segment"])
    tiles = -(-(x.values + x.keys) // width)
    _, erase, write, total = made.lines
    args = (x.k, x.w, x.v, offsets, maps, made.inverses, made.weight, erase, write, total, x.initial, x.cu_seqlens)
    args += (x.v.shape[1], x.sequences, x.offset, x.heads, x.group, tiles, *strides(x.k), *strides(x.w), *strides(x.v))
    constants = (x.keys, x.values, tile_width(x.keys), p["block"], width, segment, p["dot"], p["stages"])
    TRANSITIONS(units * x.heads * tiles, args, constants, int(p["map_warps"]), int(p["stages"]))
    if chain:
        _chain(x, p, offsets, maps, starts)
    return starts, offsets, maps


def split(x: Operands, p: Params) -> None:
    """Segments side by side: what each does to the state, the states at their starts, then the scan of all segments at once."""
    made = prepare(x, p)
    run_scan(x, made, p, divide(x, made, p)[0], segment=int(p["segment"]), o=x.o, states=x.kept)


SCHEDULES: Mapping[str, Callable[[Operands, Params], None]] = {"whole": whole, "scan": scan, "split": split, "states": states}
