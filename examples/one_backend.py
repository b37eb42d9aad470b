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

__all__ = ["known_backends", "only", "refusal"]

_DISABLE = "TITANS_BACKENDS_DISABLE"


def known_backends() -> tuple[str, ...]:
    """Every backend whose manifest can be read."""
    return tuple(registry.known())


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


def refusal(backend: str, mode: str, device: torch.device | str, dtype: torch.dtype, head_dim: int = 32, *, training: bool = False) -> str:
    """Why this backend cannot run the memory of a layer's mode here (`dual_core`, for "loop" `coupled_core`); empty where it can."""
    if backend == "chosen":
        return ""
    q, k, v = (torch.zeros(1, 64, 2, head_dim, device=device, dtype=dtype, requires_grad=training) for _ in range(3))
    beta, fast_gate, slow_gate = torch.zeros(3, 1, 64, 2, device=device, dtype=dtype)
    try:
        with torch.set_grad_enabled(training):
            if mode == "loop":
                psi = torch.zeros(1, 1, 2, device=device)
                tb.get_op("coupled_core").bind(q, k, v, beta, psi, fast_gate=fast_gate, slow_gate=slow_gate, transform="lam", backend=backend)
            elif mode == "flat":
                tb.get_op("dual_core").bind(
                    q, k, v, beta, fast_gate=fast_gate, slow_gate=slow_gate, memory="flat", transform="lam", backend=backend
                )  # fmt: skip
            else:
                tb.get_op("dual_core").bind(q, k, v, beta, fast_gate=fast_gate, slow_gate=slow_gate, backend=backend)
    except tb.BackendRefusedError as error:
        return str(error)
    return ""
