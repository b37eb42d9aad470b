"""What the adapter of FLA refuses, and which of FLA's kernels gives the gradients of q, k and g."""

from __future__ import annotations

import importlib.util
import os

import torch

from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import ACCEPTED, Verdict, refused

from ..peers import missing_nvcc, numbers, refuse_dtype, refuse_empty, refuse_hip, refuse_version, version_of

__all__ = ["DISTRIBUTION", "INSTALL", "gradient_kernels", "refuse_backward", "serves", "without_gate"]

DISTRIBUTION = "fla-core"
INSTALL = "pip install 'fla-core>=0.6,<0.7'"

_WIDEST = 256
_OLDEST_SM = 80
_HOPPER = 90
_WRONG_FROM, _RIGHT_FROM = (3, 4), (3, 7, 1)
_ROUNDED = (torch.bfloat16, torch.float16)


def serves(signature: Signature, machine: Machine, *, exact: bool = False) -> Verdict:
    """Version, dtype, head_dims, card; `exact`: the kernels keep float32 as it is, where the others round its products to tf32."""
    verdict = refuse_version("fla", DISTRIBUTION, (0, 6), (0, 7), INSTALL) & refuse_hip() & refuse_empty(signature)
    if signature.dtype == torch.float32 and not exact and signature.float32 == "highest":
        verdict &= refused(
            "its products round float32 to tf32, and torch's float32 matmul precision is 'highest'; "
            "torch.set_float32_matmul_precision('high') allows that, or use backend='triton'"
        )
    verdict &= refuse_dtype(signature, (*_ROUNDED, torch.float32))
    if machine.sm is not None and machine.sm < _OLDEST_SM:
        verdict &= refused(f"it needs compute capability 8.0, and {machine.name} has {machine.sm // 10}.{machine.sm % 10}; use backend='eager'")
    for letter in "KV":
        if not 1 <= signature.dim(letter) <= _WIDEST:
            verdict &= refused(f"head_dim {letter}={signature.dim(letter)} is not in 1 to {_WIDEST}; use backend='eager'")
    return verdict


def without_gate(signature: Signature) -> bool:
    """Whether FLA's delta rule serves, which knows no decay: 16 bits, and a value head for each key head."""
    return not signature.has("g") and signature.dim("G") == signature.dim("H") and signature.dtype in _ROUNDED


def gradient_kernels(machine: Machine) -> tuple[str, ...]:
    """The kernels that may give the gated rule's gradients of q, k and g here, the first by default: FLA refuses its own on Hopper where Triton compiles it wrong."""
    found = numbers(version_of("triton") or "0")
    triton = () if machine.sm is not None and machine.sm // 10 == _HOPPER // 10 and _WRONG_FROM <= found < _RIGHT_FROM else ("triton",)
    hopper = machine.sm is not None and machine.sm // 10 == _HOPPER // 10
    return (*triton, "tilelang") if hopper and not _missing_for_tilelang() else triton


def refuse_backward(signature: Signature, machine: Machine) -> Verdict:
    """Refuses to train where no kernel of FLA's gives right gradients."""
    if signature.regime != "training" or without_gate(signature) or gradient_kernels(machine):
        return ACCEPTED
    return refused(
        f"it refuses its own backward on {machine.name} with Triton {version_of('triton')}, which compiles it wrong, and takes TileLang's instead; here "
        f"{' and '.join(_missing_for_tilelang())}. Install Triton 3.7.1 or later, or TileLang (pip install tilelang) and nvcc; or use backend='triton'"
    )


def _missing_for_tilelang() -> list[str]:
    """What keeps FLA from TileLang, as clauses."""
    missing = []
    if importlib.util.find_spec("tilelang") is None:
        missing.append("the package tilelang is not installed")
    if nvcc := missing_nvcc():
        missing.append(nvcc)
    if os.environ.get("FLA_DISABLE_BACKEND_DISPATCH") == "1":
        missing.append("FLA_DISABLE_BACKEND_DISPATCH=1 keeps it from TileLang")
    return missing
