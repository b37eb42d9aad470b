"""How torch lets float32 products round: "highest", "high" or "medium", also where a program set it by torch's newer names."""

from __future__ import annotations

import torch

__all__ = ["float32_precision"]

_NEWER = {"ieee": "highest", "tf32": "high", "bf16": "medium"}


def float32_precision(on_cuda: bool) -> str:
    """torch.get_float32_matmul_precision(); where torch refuses to answer because `fp32_precision` was set, that setting of the device's products."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return _NEWER.get(_setting(on_cuda), "highest")


def _setting(on_cuda: bool) -> str:
    """What `fp32_precision` says of a device's products, or of all; "none" where nothing was said."""
    products = torch.backends.cuda.matmul if on_cuda else torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    found = str(products.fp32_precision)
    return found if found != "none" else str(getattr(torch.backends, "fp32_precision", "none"))
