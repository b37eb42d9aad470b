"""Whether torch.compile can work here, as far as can be said without compiling: switches, compiler, Triton, and what an earlier probe found.

It imports neither torch._dynamo nor torch._inductor, which take seconds; where they are loaded already their settings count.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys

from titans_backends.machine import Machine
from titans_backends.verdict import ACCEPTED, Verdict, refused

__all__ = ["compiler_name", "forget", "remember", "requirements", "toolchain"]

_OLDEST_SM = 70
_SWITCHES = ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE")
_probed: dict[str, Verdict] = {}


def toolchain(machine: Machine) -> Verdict:
    """Every reason why torch.compile cannot be used on this kind of device."""
    return requirements(machine) & _probed.get(machine.kind, ACCEPTED)


def requirements(machine: Machine) -> Verdict:
    """The same without what a probe found."""
    return _switched_on() & _tools(machine)


def remember(machine: Machine, outcome: Verdict) -> None:
    """Keeps what the probe found, for this process: a refusal then holds for every call."""
    _probed[machine.kind] = outcome


def forget() -> None:
    """Drops what probes found."""
    _probed.clear()


def _tools(machine: Machine) -> Verdict:
    """A C++ compiler on a CPU, Triton and compute capability 7.0 on a GPU."""
    if machine.kind == "cpu":
        name = compiler_name()
        if shutil.which(name) is None:
            return refused(f"torch.compile needs a C++ compiler, and {name!r} is not on the PATH; install g++, or name a compiler in CXX")
        return ACCEPTED
    if machine.kind != "cuda":
        return refused(f"it compiles for cpu and cuda, not for {machine.kind}")
    verdict = ACCEPTED
    if not _installed("triton"):
        verdict &= refused("torch.compile needs Triton on a GPU, and the package triton is not installed: pip install triton")
    if machine.sm is not None and machine.sm < _OLDEST_SM:
        verdict &= refused(f"torch.compile needs compute capability 7.0, and {machine.name} has {machine.sm // 10}.{machine.sm % 10}")
    return verdict


def compiler_name() -> str:
    """The C++ compiler that torch.compile would start: torch._inductor.config.cpp.cxx, or what that will be."""
    config = sys.modules.get("torch._inductor.config")
    if config is not None:
        configured = config.cpp.cxx
        return str(configured[-1] if isinstance(configured, (tuple, list)) else configured)
    default = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    return os.environ.get("CXX", default)


def _switched_on() -> Verdict:
    for name in _SWITCHES:
        if os.environ.get(name) == "1":
            return refused(f"torch.compile is switched off by {name}=1")
    config = sys.modules.get("torch._dynamo.config")
    if config is not None and config.disable:
        return refused("torch.compile is switched off by torch._dynamo.config.disable")
    return ACCEPTED


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
