"""How far a result may be from the float64 reference, and how that distance is measured.

The numbers are the golden table's; nobody loosens them for a kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Difference", "Tolerance", "compare", "tolerance"]


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Limits on max|a-b| / max|b|, for outputs and for gradients; the root-mean-square figure has the same limits."""

    outputs: float
    gradients: float


_EXACT = Tolerance(1e-9, 1e-9)
_FLOAT32 = Tolerance(5e-6, 2e-5)
_TF32 = Tolerance(3e-3, 1e-2)
_BFLOAT16 = Tolerance(2e-2, 4e-2)


def tolerance(dtype: torch.dtype, float32: str = "highest") -> Tolerance:
    """The limits for operands of one dtype; `float32` is torch's matmul precision, which loosens float32 on a GPU only."""
    if dtype == torch.float64:
        return _EXACT
    if dtype == torch.float32:
        return {"highest": _FLOAT32, "high": _TF32, "medium": _BFLOAT16}[float32]
    return _TF32 if dtype == torch.float16 else _BFLOAT16


@dataclass(frozen=True, slots=True)
class Difference:
    """How far one tensor is from its reference: relative to the largest reference value, and in root mean square."""

    name: str
    maximum: float
    rms: float
    finite: bool

    def within(self, limit: float) -> bool:
        """Whether both figures keep the limit and nothing is NaN or infinite."""
        return self.finite and self.maximum <= limit and self.rms <= limit

    def __str__(self) -> str:
        return f"{self.name}: {self.maximum:.1e} (rms {self.rms:.1e})" if self.finite else f"{self.name}: not finite"


def compare(name: str, got: Tensor, want: Tensor) -> Difference:
    """The distance of `got` from `want`, in float64. A reference of all zeros is compared absolutely."""
    if got.shape != want.shape:
        raise ValueError(f"{name}: has shape {tuple(got.shape)}, the reference {tuple(want.shape)}")
    got, want = got.detach().to("cpu", torch.float64), want.detach().to("cpu", torch.float64)
    if not want.numel():
        return Difference(name, 0.0, 0.0, True)
    if not bool(torch.isfinite(got).all()):
        return Difference(name, float("inf"), float("inf"), False)
    error = got - want
    largest, norm = float(want.abs().max()), float(want.norm())
    return Difference(name, float(error.abs().max()) / (largest or 1.0), float(error.norm()) / (norm or 1.0), True)
