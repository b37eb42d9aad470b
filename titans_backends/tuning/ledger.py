"""The errors of one candidate against the float64 references: what limit binds, on what scale a tensor is compared, and the largest seen."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from titans_backends.contracts.contract import Call
from titans_backends.contracts.tolerance import Tolerance, compare, tolerance
from titans_backends.machine import Machine
from titans_backends.tuning.suite import Outputs

__all__ = ["Ledger", "Rejected", "gradient_floor", "limits"]

_NEGLIGIBLE = 0.01
"""A gradient that the formula cancels is compared on this share of the largest one."""
_LEAST = 1e-30
"""On a smaller scale no gradient is compared: float32 loses what deep_core keeps of a state after 32 tokens of g = -7."""
_CANCELLED = frozenset({"fast_decay", "slow_decay", "psi", "coupling"})
"""coupled_core's numbers per chunk."""


class Rejected(Exception):
    """A candidate's result is not what the contract says; the message says in what."""


@dataclass(slots=True)
class Ledger:
    """The largest error seen so far for each name."""

    errors: dict[str, float] = field(default_factory=dict)

    def compare(self, name: str, got: Tensor, want: Tensor, limit: float, where: str, *, floor: float = 0.0) -> None:
        """Notes the error of one tensor, on the reference's own scale or on `floor` where that is larger; Rejected where it is over the limit."""
        difference = compare(name, got, want)
        largest = float(want.abs().max()) if want.numel() else 0.0
        worst = max(difference.maximum, difference.rms) * min(1.0, (largest or 1.0) / floor if floor else 1.0)
        self.errors[name] = max(self.errors.get(name, 0.0), worst)
        if not difference.finite:
            raise Rejected(f"{name} is not finite on {where}")
        if worst > limit:
            raise Rejected(f"{name} is off by {worst:.1e} (limit {limit:.0e}) on {where}")


def limits(dtype: torch.dtype, machine: Machine, float32: str) -> Tolerance:
    """The tolerance that binds; the matmul precision loosens it on a GPU only."""
    return tolerance(dtype, float32 if machine.kind != "cpu" else "highest")


def gradient_floor(call: Call, name: str, wanted: Outputs) -> float:
    """The least scale that a gradient is compared on: what float32 can hold, but for the numbers per chunk whose effect a normalisation cancels.

    chunk_decay cancels in the read under normalize_read, and so do both decays of coupled_core, whose mixing cancels too where its
    states are parallel. Such a gradient may be zero: nothing but rounding, of the others' size.
    """
    if name not in _CANCELLED and not (name == "chunk_decay" and getattr(call, "normalize_read", False)):
        return _LEAST
    return max(_LEAST, _NEGLIGIBLE * max((float(want.abs().max()) for want in wanted if want is not None and want.numel()), default=0.0))
