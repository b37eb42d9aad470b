"""The golden table: how far a computation in one dtype may be from a stored number, and the check that says which tensor is off.

A file's family decides, and whether the stored tensor is float32: transformers and FLA compute in float32 inside and carry 5e-7 of their own.
The root mean square keeps half of the limit on the largest error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from titans_backends.contracts.tolerance import compare

__all__ = ["Family", "Ledger"]

Family = Literal["float64 inside", "float32 inside", "layer"]
"""lam_*, own_* and the project's own files; hf_* and fla_*; lam_*_layer_*, where float32 goes through projections and norms too."""


@dataclass(frozen=True, slots=True)
class Ledger:
    """Collects every tensor that misses its limit, so that one failure names them all."""

    family: Family
    dtype: torch.dtype
    misses: list[str]

    @staticmethod
    def of(family: Family, dtype: torch.dtype) -> Ledger:
        """An empty ledger for computations in `dtype`."""
        return Ledger(family, dtype, [])

    def limit(self, stored: Tensor, *, gradient: bool = False) -> float:
        """What max|a-b| / max|b| may be against a stored tensor."""
        if self.dtype == torch.float32:
            return 2e-5 if gradient else 5e-5 if self.family == "layer" else 5e-6
        if self.family == "float32 inside":
            return 5e-6 if gradient else 2e-6
        return 1e-6 if stored.dtype == torch.float32 else 1e-9

    def add(self, name: str, got: Tensor | None, stored: Tensor, *, gradient: bool = False) -> None:
        """Compares one tensor; a missing one is a miss."""
        limit = self.limit(stored, gradient=gradient)
        if got is None:
            self.misses.append(f"{name}: is None")
            return
        found = compare(name, got, stored)
        if not (found.finite and found.maximum <= limit and found.rms <= limit / 2):
            self.misses.append(f"{found}, limits {limit:.0e} (rms {limit / 2:.0e})")

    def settle(self) -> None:
        """Fails with every miss, if there was one."""
        assert not self.misses, "; ".join(self.misses)
