"""One backend at a time: what these examples run the layer's ops on, and what then really ran. Imported by its neighbours and by benchmarks/scores.py.

`titans_backends.use_backend` is strict: it refuses a model as soon as one of its ops is missing in the backend. Here eager does what is missing, and says so.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

import titans_backends as tb
from titans_backends import registry
from titans_backends.contracts import CONTRACTS

__all__ = ["known_backends", "lacking", "only", "refusal", "starved", "unusable"]

_EVERY_MODE, _LOOP = ("qkv_prepare", "gated_rms_norm"), ("uw_transform", "token_flux", "chunk_flux", "coupled_core")
_DISABLE = "TITANS_BACKENDS_DISABLE"


def unusable(device: str) -> str:
    """Why nothing can be computed on this device here, and what to type instead; empty where it can."""
    try:
        why = "it computes nothing" if torch.device(device).type == "meta" else ""
        torch.zeros(1, device=device).add(1)
    except Exception as error:  # AssertionError, ModuleNotFoundError, NotImplementedError or RuntimeError, by the device
        why = f"{error}".strip().split("\n")[0].split(". ")[0][:240] or type(error).__name__
    return why and f"--device {device}: {why}; type --device {'cuda or --device cpu' if torch.cuda.is_available() else 'cpu'}"


def starved(error: BaseException) -> bool:
    """Whether it was memory that was wanting, on a device or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        told in str(error) for told in ("DefaultCPUAllocator", "calculation overflowed")
    )


def known_backends() -> tuple[str, ...]:
    """Every backend whose manifest can be read."""
    return tuple(registry.known())


def lacking(backend: str, mode: str) -> str:
    """A sentence on those of a layer's ops that this backend does not have, and that eager runs then; empty where it has all, and for "chosen"."""
    ops = (*_EVERY_MODE, *(_LOOP if mode == "loop" else ("dual_core",)))
    missing = [] if backend in ("chosen", "eager") else [op for op in ops if op in CONTRACTS and op not in registry.get(backend).ops]
    return f"{backend} has no {', '.join(missing)}: eager runs that" if missing else ""


@contextlib.contextmanager
def only(backend: str) -> Iterator[None]:
    """The ops run on this backend, and on eager where it lacks one; "chosen" leaves dispatch alone. Raises UnknownNameError for an unknown name."""
    if backend == "chosen":
        yield
        return
    registry.get(backend)
    before = os.environ.get(_DISABLE)
    os.environ[_DISABLE] = ",".join(name for name in known_backends() if name not in (backend, "eager"))
    tb.reset()
    try:
        yield
    finally:
        if before is None:
            del os.environ[_DISABLE]
        else:
            os.environ[_DISABLE] = before
        tb.reset()


def refusal(
    backend: str, mode: str, device: torch.device | str, dtype: torch.dtype, head_dim: int = 32, *, training: bool = False, packed: bool = False
) -> str:
    """Why this backend cannot run the memory of a layer's mode here (`dual_core`, for "loop" `coupled_core`); empty where it can. A mask packs sequences."""
    if backend == "chosen":
        return ""
    q, k, v = (torch.zeros(1, 64, 2, head_dim, device=device, dtype=dtype, requires_grad=training) for _ in range(3))
    beta, fast_gate, slow_gate = torch.zeros(3, 1, 64, 2, device=device, dtype=dtype)
    ends = torch.tensor([0, 40, 64], dtype=torch.int32, device=device) if packed else None
    always = {"fast_gate": fast_gate, "slow_gate": slow_gate, "cu_seqlens": ends, "backend": backend}
    try:
        with torch.set_grad_enabled(training):
            if mode == "loop":
                psi = torch.zeros(1, 2 if packed else 1, 2, device=device)
                tb.get_op("coupled_core").bind(q, k, v, beta, psi, transform="lam", **always)
            elif mode == "flat":
                tb.get_op("dual_core").bind(q, k, v, beta, memory="flat", transform="lam", **always)
            elif mode == "recurrent":
                tb.get_op("dual_core").bind(q, k, v, beta, torch.zeros(1, 64, 2, device=device), **always)
            else:
                tb.get_op("dual_core").bind(q, k, v, beta, **always)
    except tb.BackendRefusedError as error:
        return str(error)
    return ""
