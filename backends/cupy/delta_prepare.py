"""The first pass of the delta rule over blocks of tokens: every block's inverse, scores and factors, in parallel (kernel in cuda/delta_prepare.cu).

What a call is, as all passes take it (`Rule`), and what the first one leaves for the others (`Factors`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from titans_backends.contracts.gated_delta_rule import GatedDeltaRule

from .chunks import Slots, slots_of, three_strides
from .launch import DTYPES, Kernel, Macros
from .serving import padded
from .strides import aligned_rows, unit_stride

__all__ = ["SOURCE", "Factors", "Rule", "factors_of", "prepare", "prepare_bytes", "rule_of"]

SOURCE = "delta_prepare.cu"
PREPARE = Kernel(SOURCE, "delta_prepare", "9P15q10if")


@dataclass(frozen=True, slots=True)
class Rule:
    """A call's tensors, the last dimension contiguous, on a grid of blocks of `side` tokens."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    g: Tensor | None
    gate: Tensor | None
    initial: Tensor | None
    slots: Slots
    side: int
    scale: float
    l2norm: bool

    @property
    def tokens(self) -> int:
        """Of a batch row."""
        return self.v.shape[1]

    @property
    def heads(self) -> int:
        """Of the values."""
        return self.v.shape[2]

    @property
    def group(self) -> int:
        """Heads of the values that share a key's."""
        groups = self.k.shape[2]
        return self.heads // groups if groups else 1

    @property
    def keys(self) -> int:
        """Of a head."""
        return self.k.shape[3]

    @property
    def values(self) -> int:
        """Of a head."""
        return self.v.shape[3]

    @property
    def places(self) -> int:
        """Blocks and heads of the values."""
        return self.slots.count * self.heads

    @property
    def wide_keys(self) -> int:
        """A head's keys as states are kept between passes."""
        return padded(self.keys, 32)

    def macros(self) -> Macros:
        """What every pass is specialised to."""
        aligned = all(aligned_rows(x, whole=True) for x in (self.q, self.k, self.v))
        return ("DTYPE", DTYPES[self.v.dtype]), ("KEYS", self.keys), ("VALUES", self.values), ("SIDE", self.side), ("ALIGNED", aligned)


@dataclass(frozen=True, slots=True)
class Factors:
    """What delta_prepare.cu makes of a block: `inverses` and `scores` `[places, side, side]`, the lower squares alone, and `lines` `[places, 4 side + 4]` float32."""

    inverses: Tensor
    scores: Tensor
    lines: Tensor


def rule_of(call: GatedDeltaRule, side: int) -> Rule:
    """A call on blocks of `side` tokens."""
    v = call.v
    return Rule(
        unit_stride(call.q),
        unit_stride(call.k),
        unit_stride(v),
        call.beta,
        call.g,
        call.gate,
        None if call.initial_state is None else call.initial_state.contiguous(),
        slots_of(v, side, call.cu_seqlens),
        side,
        call.k.shape[-1] ** -0.5 if call.scale is None else float(call.scale),
        bool(call.qk_l2norm),
    )


def prepare_bytes(side: int, keys: int, dtype: torch.dtype) -> int:
    """Dynamic shared memory of a block of the first pass."""
    square = side * max(side, 32)
    return 2 * max(side * padded(keys, 32), square) * dtype.itemsize + 4 * square + side * 20 * 4 + side * 24


def factors_of(x: Rule) -> Factors:
    """Room for the factors of every block."""
    inverses, scores = torch.empty((2, x.places, x.side, x.side), dtype=x.v.dtype, device=x.v.device).unbind()
    return Factors(inverses, scores, torch.empty((x.places, 4 * x.side + 4), dtype=torch.float32, device=x.v.device))


def prepare(x: Rule, *, evenly: bool = False, into: Factors | None = None) -> Factors:
    """Launches the first pass; `evenly`: for gradients; `into`: where the factors go."""
    made = factors_of(x) if into is None else into
    macros = tuple((name, value) for name, value in x.macros() if name != "VALUES")
    gates = (x.beta, x.g, x.gate)
    PREPARE(
        (x.places, 1, 1),
        2 * x.side,
        (*macros, ("EVENLY", evenly)),
        (
            x.q, x.k, *gates, made.inverses, made.scores, made.lines, x.slots.cu_seqlens, *three_strides(x.q), *three_strides(x.k),
            *(step for gate in gates for step in three_strides(gate)), x.heads, x.group,
            *(gate is not None and gate.dtype == torch.float32 for gate in gates), x.slots.wide, x.slots.sequences, x.tokens, x.slots.each,
            x.l2norm, x.scale,
        ),
        prepare_bytes(x.side, x.keys, x.v.dtype),
    )  # fmt: skip
    return made
