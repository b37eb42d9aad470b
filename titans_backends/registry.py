"""Which backends there are: found by looking, without importing any kernel package, each with its status and its reasons.

Built-in backends are the folders of `titans_backends.backends`; others come from the entry-point group `titans_backends.backends`
and from TITANS_BACKENDS_PLUGINS. A backend that is broken, doubled or of another contract version is kept as a reason, not raised.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import pkgutil
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Literal, cast

import torch

from titans_backends import switches
from titans_backends.backend import (
    CONTRACT_VERSION,
    AheadOpModule,
    Backend,
    OpModule,
    RememberingBackwardOpModule,
    RememberingOpModule,
    TrainableOpModule,
)
from titans_backends.errors import BackendError, SwitchError, UnknownNameError, unknown
from titans_backends.machine import Machine
from titans_backends.verdict import ACCEPTED, Verdict, refused

__all__ = [
    "GROUP",
    "Broken",
    "Status",
    "availability",
    "broken",
    "compiling_ahead",
    "get",
    "known",
    "module",
    "order",
    "probe",
    "reachable",
    "remembering",
    "remembering_backward",
    "reset",
    "trainable",
]

GROUP = "titans_backends.backends"


@dataclass(frozen=True, slots=True)
class Broken:
    """A backend that was found but cannot be used: why, and the traceback where there is one."""

    name: str
    origin: str
    reason: str
    trace: str = ""


@dataclass(frozen=True, slots=True)
class Status:
    """A backend on one machine. usable: its smallest case compiled, ran and was right; importable: no more than that its packages are there."""

    state: Literal["usable", "importable", "refused", "broken"]
    verdict: Verdict
    trace: str = ""


@dataclass(frozen=True, slots=True)
class _Found:
    backends: Mapping[str, Backend]
    broken: Mapping[str, Broken]


def _sources() -> Iterator[tuple[str, str, str]]:
    """Name, module and origin of every backend, before any is imported."""
    built_in = importlib.import_module("titans_backends.backends")
    for info in sorted(pkgutil.iter_modules(built_in.__path__), key=lambda info: info.name):
        if info.ispkg:
            yield info.name, f"{built_in.__name__}.{info.name}", "built in"
    for point in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda point: point.name):
        owner = point.dist.name if point.dist is not None else "an unnamed distribution"
        yield point.name, point.value, f"entry point of {owner}"
    for name in switches.current().plugins:
        yield name.rpartition(".")[2], name, f"{switches.PREFIX}PLUGINS"


def _manifest(name: str, module_name: str, origin: str) -> Backend | Broken:
    try:
        found = importlib.import_module(module_name)
    except Exception as error:  # whatever a stranger's module raises is a reason, not our failure
        why = f"importing {module_name} raised {type(error).__name__}: {error}"
        if isinstance(error, ModuleNotFoundError) and error.name == module_name.partition(".")[0] and origin.startswith(switches.PREFIX):
            why += "; what is not installed is found by PYTHONPATH (PYTHONPATH=. finds what lies in the current folder)"
        return Broken(name, origin, why, traceback.format_exc())
    backend = getattr(found, "BACKEND", None)
    if not isinstance(backend, Backend):
        return Broken(name, origin, f"{module_name} has no BACKEND of type titans_backends.Backend, but {type(backend).__name__}")
    if backend.contract_version != CONTRACT_VERSION:
        return Broken(
            backend.name, origin, f"{backend.name} is written for contract version {backend.contract_version}; this library has {CONTRACT_VERSION}"
        )
    if backend.tables is None:
        return replace(backend, origin=origin)
    folder = Path(getattr(found, "__file__", None) or "").parent / backend.tables
    if not folder.is_dir():
        told = f"its manifest says tables={backend.tables!r}, and there is no folder {folder}; correct the name, or package the folder as data"
        return Broken(backend.name, origin, told)
    return replace(backend, origin=origin, tables=str(folder))


@functools.lru_cache(maxsize=1)
def _found() -> _Found:
    backends: dict[str, Backend] = {}
    failed: dict[str, Broken] = {}
    for name, module_name, origin in _sources():
        result = _manifest(name, module_name, origin)
        if isinstance(result, Broken):
            failed[f"{result.name} ({origin})" if result.name in failed or result.name in backends else result.name] = result
        elif result.name in backends:
            first = backends[result.name].origin
            failed[f"{result.name} ({origin})"] = Broken(
                result.name, origin, f"the name {result.name!r} is taken by the one that is {first}; rename it"
            )
        else:
            backends[result.name] = result
    for name in switches.current().disable:
        if name not in backends and name not in failed:
            raise SwitchError(f"{switches.PREFIX}DISABLE names an unknown backend {name!r}; known: {', '.join(sorted(backends))}")
    return _Found(MappingProxyType(backends), MappingProxyType(failed))


def known() -> Mapping[str, Backend]:
    """Every backend whose manifest could be read, by name."""
    return _found().backends


def broken() -> Mapping[str, Broken]:
    """What was found but cannot be used, with its reason."""
    return _found().broken


def get(name: str) -> Backend:
    """One backend; an unknown name lists the known ones and, if it is broken, says so."""
    found = known().get(name) if isinstance(name, str) else None
    if found is None:
        if isinstance(name, str) and name in broken():
            raise BackendError(f"backend {name!r} is broken: {broken()[name].reason}. See: titans-backends doctor")
        others = f"; broken, as titans-backends doctor says: {', '.join(sorted(broken()))}" if broken() else ""
        raise UnknownNameError(f"{unknown('backend', name, known())}{others}")
    return found


def order(kind: str) -> list[Backend]:
    """The backends that serve a device kind, in the order of their untuned ranks there."""
    ranked = [(b.rank.get(kind, b.rank.get("*")), b.simplicity, b.name, b) for b in known().values()]
    return [entry[3] for entry in sorted((e for e in ranked if e[0] is not None), key=lambda e: (e[0], e[1], e[2]))]


def _installed(package: str) -> bool:
    """Whether a package could be imported, without importing it; a module that was put in place by hand, without a spec, is there."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:
        return sys.modules.get(package) is not None


def availability(backend: Backend, machine: Machine) -> Verdict:
    """Whether it is switched on, serves this kind of device and has its packages; imports nothing."""
    verdict = _switched_on(backend)
    if machine.kind not in backend.rank and "*" not in backend.rank:
        verdict &= refused(f"it does not run on {machine.kind} (it runs on {', '.join(backend.rank)})")
    return verdict & _packages(backend)


def reachable(backend: Backend) -> Verdict:
    """Whether any call of this process could run on it, wherever its tensors will lie: switched on, a device that it serves, its packages; imports nothing.

    Only a backend of CUDA alone is refused for want of a device: what torch sees of other kinds is asked of nobody.
    """
    verdict = _switched_on(backend)
    if set(backend.rank) == {"cuda"} and not torch.cuda.is_available():
        verdict &= refused("it runs on cuda alone, and torch sees no such device here")
    return verdict & _packages(backend)


def _switched_on(backend: Backend) -> Verdict:
    return refused(f"it is disabled by {switches.PREFIX}DISABLE") if backend.name in switches.current().disable else ACCEPTED


def _packages(backend: Backend) -> Verdict:
    missing = [package for package in backend.requires if not _installed(package)]
    cure = f": {backend.install}" if backend.install else ""
    return refused(*(f"the package {package} is not installed{cure}" for package in missing)) if missing else ACCEPTED


@functools.lru_cache(maxsize=256)
def _import(module_name: str) -> tuple[ModuleType | None, str, str]:
    try:
        return importlib.import_module(module_name), "", ""
    except Exception as error:  # a broken optional package disables its backend and nothing else
        return None, f"importing {module_name} raised {type(error).__name__}: {error}", traceback.format_exc()


def module(backend: Backend, op: str) -> tuple[OpModule | None, Verdict]:
    """The backend's module for an op, imported at the first need; None with the reason where there is none or it is broken."""
    if op not in backend.ops:
        return None, refused(f"it does not implement {op} (it has {', '.join(sorted(backend.ops))})")
    found, reason, _ = _import(backend.ops[op])
    if found is None:
        return None, refused(reason)
    missing = [name for name in ("supports", "candidates", "run") if not hasattr(found, name)]
    if missing:
        return None, refused(f"its module {backend.ops[op]} lacks {', '.join(missing)}")
    return cast(OpModule, found), ACCEPTED


def trainable(found: OpModule) -> TrainableOpModule | None:
    """The same module if it has a backward."""
    return cast(TrainableOpModule, found) if hasattr(found, "run_backward") and hasattr(found, "backward_candidates") else None


def compiling_ahead(found: OpModule) -> AheadOpModule | None:
    """The same module if it can compile without a GPU."""
    return cast(AheadOpModule, found) if hasattr(found, "compile_ahead") else None


def remembering(found: OpModule) -> RememberingOpModule | None:
    """The same module if it can repeat a call."""
    return cast(RememberingOpModule, found) if hasattr(found, "remember") else None


def remembering_backward(found: OpModule) -> RememberingBackwardOpModule | None:
    """The same module if it can repeat a backward."""
    return cast(RememberingBackwardOpModule, found) if hasattr(found, "remember_backward") else None


def probe(backend: Backend, machine: Machine) -> Status:
    """Runs the backend's own smallest check; for `doctor` and the tuner, never inside a call."""
    verdict = availability(backend, machine)
    if not verdict:
        return Status("refused", verdict)
    for op in sorted(backend.ops):
        found, reason = module(backend, op)
        if found is None:
            return Status("broken", reason, _import(backend.ops[op])[2])
    if backend.probe is None:
        return Status("importable", ACCEPTED)
    checker, reason_text, trace = _import(backend.probe)
    if checker is None:
        return Status("broken", refused(reason_text), trace)
    try:
        verdict = cast(Verdict, checker.probe(machine))
    except Exception as error:  # the traceback is kept for doctor
        return Status("broken", refused(f"its probe raised {type(error).__name__}: {error}"), traceback.format_exc())
    return Status("usable", verdict) if verdict else Status("refused", verdict)


def reset() -> None:
    """Forgets what was found, so that the next use looks again."""
    _found.cache_clear()
    _import.cache_clear()
