"""What there is to examine: backend x op x case x regime, as values with readable names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from titans_backends import registry
from titans_backends.contracts import CONTRACTS, contract
from titans_backends.contracts.case import Case, cases
from titans_backends.signature import Regime

__all__ = ["Item", "items"]


@dataclass(frozen=True, slots=True)
class Item:
    """One examination."""

    backend: str
    op: str
    case: Case
    regime: Regime
    device: str = "cpu"

    def __str__(self) -> str:
        dtype = str(self.case.dtype).removeprefix("torch.")
        return f"{self.backend}-{self.op}-{self.case.name}-{dtype}-{self.regime}"


def items(
    backend: str,
    *,
    ops: Iterable[str] | None = None,
    dtypes: Iterable[torch.dtype] = (torch.float64, torch.float32, torch.bfloat16),
    regimes: Iterable[Regime] = ("inference", "training"),
    device: str = "cpu",
) -> list[Item]:
    """Every item of a backend; `ops` limits it to some of those that it declares. UnknownNameError for an unknown backend or op."""
    declared = registry.get(backend).ops
    chosen = [name for name in CONTRACTS if name in declared] if ops is None else [contract(name).name for name in ops]
    return [
        Item(backend, op, case, regime, device)
        for op in chosen
        for dtype in dtypes
        for case in cases(CONTRACTS[op], dtype)
        for regime in regimes
        if regime == "inference" or not case.options.get("inplace")
    ]
