"""What the adapters of other people's libraries share: which version is here, loading one at its first run, and what all of them refuse.

A peer is imported by the first call that runs it, never by a choice among backends: some take many seconds, and most calls do not want them.
One that cannot be imported refuses from then on, with what its import raised.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from titans_backends.backend import Backend
from titans_backends.errors import BackendError
from titans_backends.machine import Machine
from titans_backends.plans import invalidate
from titans_backends.signature import Signature
from titans_backends.verdict import ACCEPTED, Verdict, refused

__all__ = [
    "as_given",
    "dense",
    "gated",
    "load",
    "missing_nvcc",
    "numbers",
    "own_offsets",
    "refuse_card",
    "refuse_dtype",
    "refuse_empty",
    "refuse_head_dim",
    "refuse_hip",
    "refuse_packed_graph",
    "refuse_scale_zero",
    "refuse_version",
    "sources",
    "version_of",
]

_ALIGNMENT = 16
_FAILED: dict[str, str] = {}
_LOADED: dict[str, ModuleType] = {}
_OFFSETS = WeakTensorKeyDictionary()


@functools.cache
def version_of(distribution: str) -> str | None:
    """The installed version of a distribution, read from its metadata; None where it is not there."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def sources(*distributions: str) -> tuple[str, ...]:
    """What a candidate names as its sources for other people's code: each distribution at its version, so that a row ends with an upgrade."""
    return tuple(f"{name}=={version_of(name) or 'unknown'}" for name in distributions)


def numbers(version: str) -> tuple[int, ...]:
    """A version's leading numbers, to be compared: (3, 7, 1) for 3.7.1+cu13."""
    return tuple(int(part) for part in re.findall(r"\d+", re.split(r"[a-z+-]", version, maxsplit=1)[0]))


def load(backend: str, module: str, functions: tuple[str, ...]) -> ModuleType:
    """A peer's module that has these functions, imported at its first run. BackendError where that fails or one is missing; the backend then refuses every later
    call."""
    there = _LOADED.get(module)
    if there is not None and sys.modules.get(module) is there:  # what importlib does first costs the host four microseconds, several times in a call
        return there
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # whatever a stranger's import raises is the reason
        raise _unusable(backend, f"importing {module} raised {type(error).__name__}{f': {error}' if str(error) else ''}") from error
    missing = [name for name in functions if not hasattr(found, name)]
    if missing:
        where = getattr(found, "__file__", None) or "a folder without __init__.py, as an uninstall may leave one"
        raise _unusable(backend, f"{module} ({where}) lacks {', '.join(missing)}; install it again: {_install_of(backend)}")
    _LOADED[module] = found
    return found


def _install_of(backend: str) -> str:
    """What installs a peer, as its manifest says."""
    manifest: Backend = importlib.import_module(f"{__package__}.{backend}").BACKEND
    return manifest.install


def _unusable(backend: str, reason: str) -> BackendError:
    """The error to raise for a peer that is there and cannot run; from now on it refuses."""
    _FAILED[backend] = reason
    invalidate()  # a choice that named it is made again
    return BackendError(
        f"backend {backend!r} is installed and cannot be used: {reason}. It refuses every call from now on. "
        f"See: titans-backends doctor --traceback {backend}; or set TITANS_BACKENDS_DISABLE={backend}"
    )


def refuse_version(backend: str, distribution: str, least: tuple[int, ...], below: tuple[int, ...], install: str) -> Verdict:
    """Refuses a version whose functions the adapter does not know, and a peer that could not be imported."""
    found, wanted = version_of(distribution), f"{'.'.join(map(str, least))} or later, below {'.'.join(map(str, below))}"
    if backend in _FAILED:
        return refused(_FAILED[backend])
    if found is None:
        return refused(f"its package is there without the metadata of {distribution}, so that its version is not known; it takes {wanted}: {install}")
    if not least <= numbers(found) < below:
        return refused(f"{distribution} {found} is installed, and its functions are known from {wanted}: {install}")
    return ACCEPTED


def refuse_dtype(signature: Signature, accepted: Sequence[torch.dtype] = (torch.bfloat16, torch.float16)) -> Verdict:
    """Refuses operands of other dtypes."""
    if signature.dtype in accepted:
        return ACCEPTED
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in accepted)
    return refused(f"dtype {str(signature.dtype).removeprefix('torch.')} is not in {{{names}}}; use backend='triton' or backend='eager'")


def refuse_head_dim(signature: Signature, only: int) -> Verdict:
    """Refuses heads of another size than the one that the kernels are written for."""
    keys, values = signature.dim("K"), signature.dim("V")
    if keys == values == only:
        return ACCEPTED
    return refused(f"head_dim K={keys}, V={values}: it takes K = V = {only} alone; use backend='triton'")


def refuse_card(machine: Machine, accepted: Sequence[int], names: str) -> Verdict:
    """Refuses cards that the kernels are not written for."""
    if machine.sm is None or machine.sm in accepted:
        return ACCEPTED
    return refused(f"it runs on {names}, and {machine.name} has {machine.sm // 10}.{machine.sm % 10}; use backend='triton'")


def refuse_hip() -> Verdict:
    """Refuses torch for AMD cards, where nobody has checked these kernels here."""
    return refused("this torch is built for ROCm, where it is not checked; use backend='triton'") if torch.version.hip is not None else ACCEPTED


def refuse_empty(signature: Signature) -> Verdict:
    """Refuses a call without tokens, heads or sequences, for which there is no grid to launch."""
    empty = [f"{letter}={signature.dim(letter)}" for letter in "BTHN" if signature.dim(letter) == 0]
    return refused(f"{', '.join(empty)}: an empty call; use backend='eager'") if empty else ACCEPTED


def refuse_packed_graph(signature: Signature) -> Verdict:
    """Refuses a packed call in a captured graph, for a peer that reads cu_seqlens on the host."""
    if signature.launch == "graph" and signature.packed:
        return refused("it reads cu_seqlens on the host, which a captured graph cannot; use backend='triton', or sequences of one length as a batch")
    return ACCEPTED


def refuse_scale_zero(signature: Signature) -> Verdict:
    """Refuses a scale of 0, which some take for none given."""
    return refused("scale=0 would be taken for K ** -0.5; use backend='eager'") if signature.option("scale") == 0 else ACCEPTED


def missing_nvcc() -> str:
    """Why TileLang would find no nvcc, as a clause; empty where it finds one. It looks where CUDA_HOME or else CUDA_PATH says and then nowhere else; where
    neither is set in PATH, /usr/local/cuda and the wheel, which has one from 13.0 on."""
    named = next((name for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)), None)
    if named is not None:
        there = (Path(os.environ[named]) / "bin" / "nvcc").exists()
        return "" if there else f"there is no bin/nvcc in {os.environ[named]}, which {named} names, and it looks nowhere else then"
    if shutil.which("nvcc") or (Path("/usr/local/cuda") / "bin" / "nvcc").exists() or numbers(version_of("nvidia-cuda-nvcc") or "0") >= (13,):
        return ""
    return "no nvcc was found in PATH, /usr/local/cuda or the wheel nvidia-cuda-nvcc 13, and neither CUDA_HOME nor CUDA_PATH is set"


def own_offsets(cu_seqlens: Tensor, device: torch.device) -> Tensor:
    """A copy of cu_seqlens on the device, the same one for as long as its values stay: a caller may hold it on the CPU, and peers remember what they read
    from one by its identity, and would not see it change."""
    if cu_seqlens.is_inference():
        return cu_seqlens.to(device, copy=True)  # no version says whether it has changed
    kept = _OFFSETS.get(cu_seqlens)
    if kept is None or kept[0] != (cu_seqlens._version, device):
        kept = _OFFSETS[cu_seqlens] = ((cu_seqlens._version, device), cu_seqlens.to(device, copy=True))
    found: Tensor = kept[1]
    return found


def dense(x: Tensor) -> Tensor:
    """The tensor itself, or a copy where it is not contiguous or does not start on 16 bytes: peers take rows by whole vectors and do not ask."""
    x = x.contiguous()
    return x if x.data_ptr() % _ALIGNMENT == 0 else x.clone()


def as_given(gradient: Tensor | None, given: Tensor) -> Tensor | None:
    """A gradient in its input's dtype; torch's own look whether it is costs a microsecond."""
    return gradient if gradient is None or gradient.dtype is given.dtype else gradient.to(given.dtype)


def gated(o: Tensor, gate: Tensor | None) -> Tensor:
    """o times the output gate `[B, T, H]`, in its own memory."""
    return o if gate is None else o.mul_(gate.unsqueeze(-1))
