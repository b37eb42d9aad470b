"""Our ops as a backend of FLA itself: its layers, its models, and what else calls its functions, run on us without a changed line.

FLA asks its backends for each call of the functions that it dispatches, and takes the next one, or its own kernels, where the answer is no. It is asked
nothing for the others (in 0.6.0 `chunk_gated_delta_rule` alone is dispatched): `titans_backends.accelerate` swaps the layers that call those.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import FunctionType, TracebackType

from torch import Tensor

from titans_backends import registry
from titans_backends.errors import BackendRefusedError
from titans_backends.integrations.calling import expect_known
from titans_backends.integrations.fla.functions import READERS
from titans_backends.integrations.fla.rule import compute
from titans_backends.integrations.fla.verdicts import verdict_of
from titans_backends.scope import use_backend
from titans_backends.verdict import refused

__all__ = ["Registration", "register_with_fla"]

_MODULES: Mapping[str, str] = {
    "chunk_gated_delta_rule": "fla.ops.gated_delta_rule",
    "fused_recurrent_gated_delta_rule": "fla.ops.gated_delta_rule",
    "chunk_delta_rule": "fla.ops.delta_rule",
    "fused_recurrent_delta_rule": "fla.ops.delta_rule",
}
_PRIORITY = 1
"""Before FLA's own backends for a GPU; its lowest, 3, is asked first among those."""


@dataclass(slots=True)
class Registration:
    """What was registered, and what came of it; a context manager that undoes it.

    `functions` are FLA's that ask us, `left` those that ask nobody; `calls` counts what ran here, by function, `refusals` what was left to FLA, by reason.
    `holders`: how often it was asked for; the end of a `with` undoes it for the last of them, `undo()` for all.
    """

    functions: tuple[str, ...]
    left: tuple[str, ...]
    backend: str | None = None
    active: bool = True
    holders: int = 1
    calls: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)

    def undo(self) -> None:
        """FLA asks us no more. May be called twice."""
        global _ACTIVE
        self.active = False
        if _ACTIVE is self:
            _ACTIVE = None

    def __enter__(self) -> Registration:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.holders -= 1
        if self.holders < 1:
            self.undo()

    def __str__(self) -> str:
        lines = [f"FLA asks titans_backends for {', '.join(self.functions)}" + ("" if self.active else " (undone)")]
        if self.left:
            lines.append(f"FLA asks no backend for {', '.join(self.left)}: titans_backends.accelerate(model) swaps the layers that call them")
        lines += [f"  ran here: {name}, {count} {'call' if count == 1 else 'calls'}" for name, count in self.calls.items()]
        lines += [f"  left to FLA {'once' if count == 1 else f'{count} times'}: {reason}" for reason, count in self.refusals.items()]
        return "\n".join(lines)

    def verify(self, function: str, args: tuple[object, ...], kwargs: Mapping[str, object]) -> tuple[bool, str | None]:
        """Whether the call may run here, as FLA wants to be told it; a refusal is counted."""
        verdict = verdict_of(READERS[function], args, kwargs, self.backend)
        if verdict:
            return True, None
        self.refusals[str(verdict)] += 1
        return False, str(verdict)

    def run(self, function: str, args: tuple[object, ...], kwargs: Mapping[str, object]) -> tuple[Tensor, Tensor | None]:
        """The call, computed here and counted."""
        self.calls[function] += 1
        rule = READERS[function](*args, **kwargs)
        with nullcontext() if self.backend is None else use_backend(self.backend):
            return compute(rule)


_ACTIVE: Registration | None = None


def register_with_fla(*misplaced: object, backend: str | None = None, **unknown: object) -> Registration:
    """Makes our ops the first backend that FLA asks, until `undo()`; `backend` forces one of ours. While one is active, the same is returned.

    ImportError without FLA 0.6 or later, RuntimeError where FLA's dispatch is switched off, ValueError for another `backend` than the active one's,
    BackendRefusedError for one that could take no call here: FLA would run each on its own kernels, and nobody be told.
    """
    global _ACTIVE
    expect_known("register_with_fla", (), misplaced, tuple(unknown), ("backend",))
    if _ACTIVE is not None:
        if _ACTIVE.backend != backend:
            raise ValueError(
                f"register_with_fla: it is registered with backend={_ACTIVE.backend!r}, now backend={backend!r} was asked for; undo() the first one"
            )
        _ACTIVE.holders += 1
        return _ACTIVE
    if backend is not None:
        _expect_able(backend)
    operations = dict(_operations())
    if not operations:
        raise RuntimeError(
            "register_with_fla: FLA asks no backend for any of its delta rules; it reads FLA_DISABLE_BACKEND_DISPATCH when it is imported: "
            "unset it and start again, or swap a model's layers with titans_backends.accelerate(model)"
        )
    _ACTIVE = made = Registration(tuple(operations), tuple(name for name in _MODULES if name not in operations), backend)
    fla = importlib.import_module("fla.backends")
    adapter = _adapter(fla.BaseBackend, made)
    for operation in dict.fromkeys(operations.values()):
        fla.register(operation)(adapter)
    return made


def _expect_able(backend: str) -> None:
    """BackendRefusedError for a backend that is not there, or has neither of the ops that FLA's functions become."""
    made = registry.get(backend)
    verdict = registry.reachable(made)
    if not any(op in made.ops for op in ("gated_delta_rule", "gated_delta_step")):
        verdict &= refused(f"it has neither gated_delta_rule nor gated_delta_step (it has {', '.join(sorted(made.ops))})")
    if not verdict:
        raise BackendRefusedError(
            f"register_with_fla: backend {backend!r} can take none of FLA's calls here: {verdict}; "
            "install or switch on what it lacks, name another (titans-backends doctor lists them), or none, to have each call chosen"
        )


def _adapter(base: type, registration: Registration) -> type:
    """A class as FLA wants its backends: a method for each function, and one that says whether it takes the call."""
    methods: dict[str, object] = {
        "__doc__": "titans_backends as a backend of FLA.",
        "backend_type": "titans_backends",
        "env_var": "FLA_TITANS_BACKENDS",
        "priority": _PRIORITY,
        "is_enabled": lambda self: registration.active and base.is_enabled(self),  # type: ignore[attr-defined]
    }
    for name in registration.functions:
        methods[name] = _method(registration.run, name)
        methods[f"{name}_verifier"] = _method(registration.verify, name)
    return type("TitansBackends", (base,), methods)


def _method(act: Callable[[str, tuple[object, ...], Mapping[str, object]], object], name: str) -> Callable[..., object]:
    return lambda self, *args, **kwargs: act(name, args, kwargs)


def _operations() -> Iterator[tuple[str, str]]:
    """Each function that FLA dispatches, with the name of the operation that its backends register for."""
    try:
        kind = importlib.import_module("fla.backends").BackendRegistry
        functions = {name: getattr(importlib.import_module(module), name) for name, module in _MODULES.items()}
    except (ImportError, AttributeError) as absent:
        raise ImportError(f"register_with_fla needs FLA 0.6 or later: pip install 'flash-linear-attention>=0.6' ({absent})") from absent
    except Exception as broken:  # whatever a stranger's import raises is the reason
        raise ImportError(f"register_with_fla: FLA is installed and cannot be imported: {type(broken).__name__}: {broken}") from broken
    for name, function in functions.items():
        registry_of_it = _held(function, kind, set())
        if registry_of_it is not None:
            yield name, str(registry_of_it.operation_name)  # type: ignore[attr-defined]  # FLA's class


def _held(function: object, kind: type, seen: set[int]) -> object | None:
    """What of this kind a function, or one that it wraps, refers to. So it is known that FLA will ask, whatever switched that off."""
    if not isinstance(function, FunctionType) or id(function) in seen:
        return None
    seen.add(id(function))
    inner: list[object] = [function.__dict__.get("__wrapped__")]
    for cell in function.__closure__ or ():
        try:
            inner.append(cell.cell_contents)
        except ValueError:  # a name that was never bound
            continue
    for value in inner:
        found = value if isinstance(value, kind) else _held(value, kind, seen)
        if found is not None:
            return found
    return None
