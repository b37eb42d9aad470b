"""gated_delta_rule by Hopper's own products: both walks with a state in a warpgroup's registers, and the gradients of every input in one pass.

Heads of 128 keys and values in bfloat16 or float16, compute capability 9.0, blocks of 64 tokens, rows that 16-byte copies can take. Kernels in
cuda/delta_prepare_hopper.cu, delta_walk_hopper.cu, delta_reverse_hopper.cu and delta_gradients_hopper.cu; few heads in segments by delta_cut.py.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.gated_delta_rule import GatedDeltaRule
from titans_backends.machine import Machine
from titans_backends.signature import Signature

from .chunks import three_strides
from .delta_cut import CHAIN, Cut, chain, cut_of, processors_of
from .delta_kept import kept_of
from .delta_prepare import Factors, Rule, factors_of, rule_of
from .launch import DTYPES, Arg, Kernel
from .serving import candidate as _candidate
from .strides import aligned_rows

__all__ = [
    "BACKWARD_SOURCES",
    "SIDE",
    "carriers_of",
    "forward_candidates",
    "gradients",
    "is_offered",
    "params_of",
    "prepare",
    "run",
    "serves",
    "walk",
    "walk_back",
    "walk_segments",
]

SIDE = 64
"""Tokens of a block."""
PREPARE = Kernel("delta_prepare_hopper.cu", "delta_prepare_hopper", "9P15q12if")
WALK = Kernel("delta_walk_hopper.cu", "delta_walk_hopper", "12P9q6i2P")
REVERSE = Kernel("delta_reverse_hopper.cu", "delta_reverse_hopper", "12P9q6iP")
GRADIENTS = Kernel("delta_gradients_hopper.cu", "delta_gradients_hopper", "17P21q10if")
BACKWARD_SOURCES = (PREPARE.source, WALK.source, REVERSE.source, GRADIENTS.source)
_WHOLE, _SEGMENTS, _ENDS = range(3)
"""What a walk takes: cuda/delta_carriers.cuh's CUT."""
_SM, _WIDTH, _GROUP, _SQUARE, _LINES, _SMS = 90, 128, 128, 8192, 1152, 132
_STAGES = {1: 3, 2: 2}
_GRADIENT_BYTES = 2 * 8 * _SQUARE + 4 * 2 * _SQUARE + 3 * _SQUARE + (2 * 1040 + 6 * 64) * 4
"""Of the last pass: two stages, rows of q and k, as they are and weighed, three squares, lines."""
_PREPARE_BYTES, _EACH, _FULL = 4 * _SQUARE + 18 * 1024 + (2 * 512 + 2 * 64) * 4, 2, 264
"""Of the first pass; v heads of a q/k head that a block of it may take, and how many such blocks there must be."""


def is_offered(signature: Signature, machine: Machine) -> bool:
    """Whether a card has them for a call's heads and dtype."""
    wide = signature.dim("K") == signature.dim("V") == _WIDTH and signature.dtype in (torch.bfloat16, torch.float16)
    return wide and machine.sm == _SM and (machine.shared_memory_bytes or 0) >= _GRADIENT_BYTES


def carriers_of(signature: Signature, machine: Machine) -> tuple[int, ...]:
    """Warpgroups that carry a head together, likelier number first: one while every half of a head finds a processor, then also two, which read its tiles once."""
    halves = 2 * signature.dim("N") * signature.dim("H")
    return (1,) if signature.batch_invariant or halves <= (machine.sms or _SMS) else (2, 1)


def params_of(signature: Signature, machine: Machine) -> list[dict[str, int]]:
    """Of every candidate: its carriers and, where few heads are cut, in one behind the others the processors that they are cut for."""
    processors = processors_of(signature, machine)
    return [{"carriers": each} for each in carriers_of(signature, machine)] + [{"carriers": 1, "cut_for": processors}] * (processors > 0)


def forward_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """One for each number of carriers that may be faster, and one that cuts; none where they are not offered."""
    if not is_offered(signature, machine):
        return []
    files = (PREPARE.source, WALK.source)
    found = params_of(signature, machine)
    return [_candidate("wgmma", (*files, CHAIN.source) if "cut_for" in each else files, side=SIDE, **each) for each in found]


def serves(x: Rule, d_o: Tensor | None) -> bool:
    """Whether a backward's gradient of o arrives, and all rows lie where copies can take them."""
    return d_o is not None and all(aligned_rows(one, whole=True) for one in (x.q, x.k, x.v, d_o))


def run(call: GatedDeltaRule, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """o `[B, T, H, V]`, the final state and, by a candidate with a residual, its tensors."""
    x = rule_of(call, SIDE)
    x = replace(x, **{name: one.contiguous().clone() for name in "qkv" if not aligned_rows(one := getattr(x, name), whole=True)})
    o, final = torch.empty(x.v.shape, dtype=x.v.dtype, device=x.v.device), None
    if call.output_final_state:
        final = torch.empty((x.slots.sequences, x.heads, x.keys, x.values), dtype=torch.float32, device=x.v.device)
    kept, cut = kept_of(x) if candidate.residual else None, cut_of(x, int(dict(candidate.params).get("cut_for", 0)))
    if x.tokens or final is not None:
        made = prepare(x) if kept is None else prepare(x, evenly=True, into=kept.factors)
        states, updates = (None, None) if kept is None else (kept.states, kept.updates)
        if cut is None:
            walk(x, made, int(candidate.param("carriers")), o=o, final=final, states=states, updates=updates)
        else:
            walk_segments(x, made, cut, o=o, final=final, states=states, updates=updates)
    return o, final, *(kept or ()), *(() if kept is None or cut is None else (cut.maps,))


def prepare(x: Rule, *, evenly: bool = False, into: Factors | None = None) -> Factors:
    """The first pass, as the one of every card; `evenly`: for gradients; `into`: where the factors go."""
    made, gates = factors_of(x) if into is None else into, (x.beta, x.g, x.gate)
    each = _EACH if x.group >= _EACH and x.places >= _EACH * _FULL else 1
    parts = -(-x.group // each)
    PREPARE(
        (x.places // x.group * parts, 1, 1),
        _GROUP,
        (("DTYPE", DTYPES[x.v.dtype]), ("NORMALIZED", x.l2norm), ("EVENLY", evenly)),
        (
            x.q, x.k, *gates, made.inverses, made.scores, made.lines, x.slots.cu_seqlens, *x.q.stride()[:3], *x.k.stride()[:3],
            *(step for gate in gates for step in three_strides(gate)), x.heads, x.group,
            *(gate is not None and gate.dtype == torch.float32 for gate in gates), x.slots.wide, x.slots.sequences, x.tokens, x.slots.each,
            each, x.heads // x.group, parts, x.scale,
        ),
        _PREPARE_BYTES,
    )  # fmt: skip
    return made


def walk(
    x: Rule,
    made: Factors,
    carriers: int,
    *,
    o: Tensor | None = None,
    final: Tensor | None = None,
    states: Tensor | None = None,
    updates: Tensor | None = None,
    cut: Cut | None = None,
    ends: bool = False,
) -> None:
    """Walks forward; with `o` it is computed, and `states` `[places, V, K]` at every block's start and `updates` `[B, T, H, V]` may be kept.

    `cut`: segments side by side from its `states`; `ends`: for those and its maps alone, by two carriers.
    """
    outputs, keeps = o is not None, states is not None or updates is not None
    stages, columns = (3, 1) if ends else (_STAGES[carriers], carriers)
    WALK(
        *_grid(x, carriers, cut, ends),
        (("DTYPE", DTYPES[x.v.dtype]), ("CARRIERS", carriers), ("OUTPUTS", outputs), ("KEEPS", keeps), ("CUT", _cut(cut, ends))),
        (
            x.q, x.k, x.v, made.inverses, made.scores, made.lines, x.initial, o, states, updates, final, x.slots.cu_seqlens,
            *x.q.stride()[:3], *x.k.stride()[:3], *x.v.stride()[:3], x.heads, x.group, x.slots.wide, x.tokens, x.slots.each,
            *((0, None, None) if cut is None else (cut.segments, cut.states, cut.maps)),
        ),
        stages * ((3 + columns + 3 * outputs) * _SQUARE + _LINES) + carriers * (outputs + 3 * keeps) * _SQUARE,
    )  # fmt: skip


def walk_segments(
    x: Rule,
    made: Factors,
    cut: Cut,
    *,
    o: Tensor | None = None,
    final: Tensor | None = None,
    states: Tensor | None = None,
    updates: Tensor | None = None,
) -> None:
    """The same as `walk` in three launches: what every segment does to a state, the states between them, and all segments from theirs."""
    walk(x, made, 2, cut=cut, ends=True)
    chain(x, cut, back=False)
    walk(x, made, 1, o=o, final=final, states=states, updates=updates, cut=cut)


def walk_back(x: Rule, carriers: int, values: tuple[Arg, ...], cut: Cut | None = None) -> None:
    """Walks back. `values`: those of the walk of every card, without what says that a gradient of o arrives; `cut`: with the maps of a walk forward."""
    if cut is not None:
        _reverse(x, carriers, (*values[:7], None, None, None, None, *values[11:]), cut, ends=True)
        chain(x, cut, back=True)
    _reverse(x, carriers, values, cut)


def _reverse(x: Rule, carriers: int, values: tuple[Arg, ...], cut: Cut | None, *, ends: bool = False) -> None:
    """One walk back; `ends`: for the gradients of the states between segments alone."""
    macros, values = (
        (("DTYPE", DTYPES[x.v.dtype]), ("CARRIERS", carriers), ("CUT", _cut(cut, ends))),
        (*values, *((0, None) if cut is None else (cut.segments, cut.states))),
    )
    REVERSE(*_grid(x, carriers, cut, ends), macros, values, _STAGES[carriers] * ((6 + carriers) * _SQUARE + _LINES) + carriers * 4 * _SQUARE)


def gradients(x: Rule, blocks: int, values: tuple[Arg, ...]) -> None:
    """The last pass, in at most so many blocks. `values`: those of the pass of every card as far as they are the same."""
    items = x.places // x.group
    macros = (("DTYPE", DTYPES[x.v.dtype]), ("NORMALIZED", x.l2norm))
    GRADIENTS((min(items, blocks), 1, 1), 4 * _GROUP, macros, (*values, items, x.scale), _GRADIENT_BYTES)


def _cut(cut: Cut | None, ends: bool) -> int:
    return _WHOLE if cut is None else _ENDS if ends else _SEGMENTS


def _grid(x: Rule, carriers: int, cut: Cut | None, ends: bool) -> tuple[tuple[int, int, int], int]:
    """Blocks and threads of a walk; forward for `ends` both carriers have the same half of a head."""
    walked = 1 if cut is None else cut.segments - ends
    return (x.slots.sequences * walked * x.heads * (2 if ends else 2 // carriers), 1, 1), _GROUP * (2 + carriers)
