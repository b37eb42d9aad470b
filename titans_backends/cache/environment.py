"""The versions that a measurement taken now would have, read without importing a kernel package or asking the GPU."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import re
from pathlib import Path

import torch

from titans_backends._version import __version__
from titans_backends.cache.schema import Environment

__all__ = ["current_environment", "torch_version"]

_DRIVER = Path("/proc/driver/nvidia/version")
_TRITON = ("triton", "pytorch-triton", "triton-windows")
_CUPY = ("cupy-cuda13x", "cupy-cuda12x", "cupy")


def current_environment(kind: str, today: datetime.date | None = None) -> Environment:
    """This process's versions for a device kind: on a CPU numba's, elsewhere triton's, on CUDA those of cupy and numba-cuda too; no result depends on others."""
    gpu, cuda = kind != "cpu", kind == "cuda"
    return Environment(
        titans_backends=__version__,
        torch=torch_version(torch.__version__),
        triton=_version(*_TRITON) if gpu else None,
        numba=None if gpu else _version("numba"),
        cupy=_version(*_CUPY) if cuda else None,
        numba_cuda=_version("numba-cuda") if cuda else None,
        cuda=torch.version.cuda if gpu else None,
        driver=_driver_version() if cuda else None,
        python=".".join(platform.python_version_tuple()[:2]),
        date=(today or datetime.date.today()).isoformat(),
    )


def torch_version(full: str) -> str:
    """torch's version without the wheel's flavour: 2.13.0 for 2.13.0+cpu and 2.13.0+cu130 (the CUDA version stands apart)."""
    return re.sub(r"\+(cpu|cu\d+)\Z", "", str(full))


def _version(*distributions: str) -> str | None:
    """The version of the first that is installed."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _driver_version() -> str | None:
    try:
        found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", _DRIVER.read_text(encoding="utf-8"))
    except OSError:  # no NVIDIA kernel module in sight: a container may hide it
        return None
    return found[1] if found else None
