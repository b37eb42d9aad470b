"""`accelerate`: puts the forward of every layer that it knows onto our ops, in place, and says what it did.

Three steps: look at every module once, ask what each becomes, and swap when all have answered. Nothing is changed before the last, and nothing half.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from titans_backends import registry, switches
from titans_backends.errors import AccelerateError
from titans_backends.integrations import forwards
from titans_backends.integrations.calling import expect_known
from titans_backends.integrations.classes import is_ours, pair_of, swapped_class
from titans_backends.integrations.known import Conversion, KnownLayer, known_layers
from titans_backends.integrations.report import Entry, Report, places
from titans_backends.integrations.swapped import BACKEND, LOCK, swap, undone
from titans_backends.verdict import Verdict

__all__ = ["accelerate"]

_OPTIONS = ("strict", "backend")


@dataclass(frozen=True, slots=True)
class _Found:
    """A module, under all its names."""

    module: nn.Module
    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Planned:
    """What is going to be swapped, and the entry that will tell of it."""

    found: _Found
    conversion: Conversion
    entry: Entry
    new: type


def accelerate(model: nn.Module, *misplaced: object, strict: bool = True, backend: str | None = None, **unknown: object) -> Report:
    """Swaps, in place, the layers of `model` that are known: their parameters stay, their forward runs on our ops. Returns what was done; `undo()` takes it back.

    `strict`: a layer that is recognised and cannot be swapped, and a model in which none is recognised, raise AccelerateError, and the model is as it was;
    otherwise the report tells. `backend`: every op of the swapped layers is forced to it; UnknownNameError lists what there is.
    """
    expect_known("accelerate", ("model",), misplaced, tuple(unknown), _OPTIONS)
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be a torch.nn.Module, got {type(model).__name__}; of a pipeline or a trainer pass its .model")
    if not isinstance(strict, bool):
        raise TypeError(f"accelerate: strict must be True or False, got {strict!r}")
    if backend is not None:
        registry.get(backend)
    layers = known_layers()
    with LOCK:
        return _accelerated(model, layers, strict, backend)


def _accelerated(model: nn.Module, layers: Sequence[KnownLayer], strict: bool, backend: str | None) -> Report:
    """What `accelerate` does, one caller at a time: two that plan the same layer would swap it twice."""
    modules = _modules(model)
    asked = [answer for found in modules if (answer := _asked(found, layers, backend)) is not None]
    if strict:
        _expect_all(asked)
        _expect_some(model, modules, asked, layers)
    kind, swaps = type(model), []
    try:
        for answer in asked:
            if isinstance(answer, _Planned):
                swaps.append(swap(answer.found.module, answer.found.paths[0], answer.conversion, answer.new, backend))
    except BaseException:
        undone(swaps)
        raise
    return Report(kind, [answer.entry if isinstance(answer, _Planned) else answer for answer in asked], swaps)


# --- looking


def _modules(model: nn.Module) -> list[_Found]:
    """Every module once, with all its paths, in the model's order."""
    found: dict[int, tuple[nn.Module, list[str]]] = {}
    for path, module in _walk(model, "", frozenset((id(model),))):
        found.setdefault(id(module), (module, []))[1].append(path)
    return [_Found(module, tuple(paths)) for module, paths in found.values()]


def _walk(module: nn.Module, path: str, above: frozenset[int]) -> Iterator[tuple[str, nn.Module]]:
    """As `named_modules(remove_duplicate=False)`, which does not end where a module holds one that holds it."""
    yield path, module
    for name, child in module._modules.items():
        if child is not None and id(child) not in above:
            yield from _walk(child, f"{path}.{name}" if path else name, above | {id(child)})


# --- asking


def _asked(found: _Found, layers: Sequence[KnownLayer], backend: str | None) -> _Planned | Entry | None:
    """What becomes of a module: a plan, an entry that says why nothing does, or None where no layer recognises it."""
    module, kind = found.module, type(found.module)
    if _stands_for_another(module):
        return None
    if is_ours(module):
        return _already(found, backend)
    refusals: dict[str, tuple[str, ...]] = {}
    for layer in (one for one in layers if one.recognise(module)):
        planned = _planned(found, layer, layer.convert(module, backend), backend)
        if isinstance(planned, _Planned):
            return planned
        refusals[layer.name] = planned
    if not refusals:
        return None
    reasons = [f"{name}: {reason}" if len(refusals) > 1 else reason for name, told in refusals.items() for reason in told]
    return Entry(found.paths, "refused", ", ".join(refusals), kind, reasons=tuple(reasons))


def _stands_for_another(module: nn.Module) -> bool:
    """Whether it has another module's attributes, or a forward that is no longer Python: torch.compile's wrapper, whose inside is asked itself; a script."""
    compiling = sys.modules.get("torch._dynamo.eval_frame")  # its import takes seconds
    return isinstance(module, torch.jit.ScriptModule) or (compiling is not None and isinstance(module, compiling.OptimizedModule))


def _already(found: _Found, backend: str | None) -> Entry:
    """The entry of a layer that runs on our ops before this call, which another backend than its own would not reach."""
    module, kind = found.module, type(found.module)
    pair = pair_of(module)
    lost = "" if pair is None else forwards.displaced(module, swapped_class(*pair))
    if lost:
        return Entry(found.paths, "refused", "", kind, reasons=(f"it was swapped already, and since then {lost}",))
    forced = getattr(module, BACKEND, None)
    if backend is None or backend == forced:
        return Entry(found.paths, "already", "", kind if pair is None else pair[1], kind)
    cure = "undo the report that swapped it first" if pair is not None else f"say use_backend({backend!r}) around its calls"
    return Entry(found.paths, "refused", "", kind, reasons=(f"it runs on titans_backends already, with backend={forced!r}; {cure}",))


def _planned(found: _Found, layer: KnownLayer, answer: Conversion | Verdict, backend: str | None) -> _Planned | tuple[str, ...]:
    """The plan of a conversion, or every reason against it."""
    module, old = found.module, type(found.module)
    if isinstance(answer, Verdict) and answer.reasons:
        return answer.reasons
    if not isinstance(answer, Conversion):
        raise TypeError(
            f"accelerate: {layer.name}'s convert returned {answer!r} for {old.__name__}; it returns a Conversion, or refused(...) with its reasons"
        )
    reasons = (*forwards.why_not(module), *_out_of_reach(answer.ops, backend), *_switched_away(answer.ops, backend))
    if parametrize.is_parametrized(module):
        reasons += ("it has parametrizations, which gave it a class of its own; remove them, accelerate, and register them again",)
    taken = [name for name in answer.attributes if hasattr(module, name)]
    if taken:
        reasons += (f"it has attributes of its own under the names that the new forward uses: {', '.join(taken)}",)
    try:
        new = swapped_class(answer.forward, old)
    except Exception as error:  # Python's, or whatever a stranger's __init_subclass__ raises
        return (*reasons, f"no class can be both {answer.forward.__name__} and {old.__name__}: {type(error).__name__}: {error}")
    lacking = () if backend is None else _lacking(backend, answer.ops)
    notes = (*answer.notes, *([f"backend {backend!r} has no {', '.join(lacking)}: those are chosen as ever"] if lacking else ()))
    return reasons or _Planned(found, answer, Entry(found.paths, "swapped", layer.name, old, new, notes=notes), new)


def _lacking(backend: str, ops: Sequence[str]) -> tuple[str, ...]:
    """Those of the ops that a backend does not declare."""
    return tuple(op for op in ops if op not in registry.get(backend).ops)


def _out_of_reach(ops: Sequence[str], backend: str | None) -> tuple[str, ...]:
    """Why each call would raise on the backend that the layer is forced to: what it needs is not there, or its module for an op cannot be imported."""
    if backend is None:
        return ()
    made = registry.get(backend)
    verdict = registry.reachable(made)
    for op in (one for one in ops if verdict and one in made.ops):
        verdict &= registry.module(made, op)[1]
    if verdict:
        return ()
    others = ", ".join(name for name, one in sorted(registry.known().items()) if name != backend and registry.reachable(one))
    cure = f"install or switch on what it lacks, name another that could ({others}), or none, to have each call chosen"
    return (f"backend {backend!r} cannot run here: {verdict}; {cure}",)


def _switched_away(ops: Sequence[str], backend: str | None) -> tuple[str, ...]:
    """Why the switch that forces every call of the process would make this layer's raise: its backend cannot run, or lacks ops that `backend` does not serve."""
    force = switches.current().force
    held = registry.known().get(force or "")
    if held is None:  # no switch, or an unknown name, which every call tells
        return ()
    name, served = f"{switches.PREFIX}FORCE", ops if backend is None else _lacking(backend, ops)
    reached = registry.reachable(held)
    if served and not reached:
        return (f"{name}={force} forces every op, and {force!r} cannot run here: {reached}; unset it, or install or switch on what it lacks",)
    lacking = _lacking(held.name, served)
    cure = f"unset it, and type accelerate(model, backend={force!r}): that forces those that it has"
    return (f"{name}={force} forces every op, and {force!r} has no {', '.join(lacking)}, which this layer calls; {cure}",) if lacking else ()


# --- strict


def _expect_all(asked: Sequence[_Planned | Entry]) -> None:
    """AccelerateError with every reason of every layer that was refused."""
    refusals: dict[tuple[type, tuple[str, ...]], list[Entry]] = {}
    for answer in asked:
        if isinstance(answer, Entry) and answer.status == "refused":
            refusals.setdefault((answer.old, answer.reasons), []).append(answer)
    if not refusals:
        return
    told = [f"  {places(alike)}, {old.__name__}: {'; '.join(reasons)}" for (old, reasons), alike in refusals.items()]
    others = sum(isinstance(answer, _Planned) for answer in asked)
    also = f" {others} other {'layer' if others == 1 else 'layers'} could be; pass strict=False to swap what can be swapped." if others else ""
    raise AccelerateError("\n".join([f"accelerate: layers were recognised that cannot be swapped, and nothing was.{also}", *told]))


def _expect_some(model: nn.Module, modules: Sequence[_Found], asked: Sequence[object], layers: Sequence[KnownLayer]) -> None:
    """AccelerateError where no layer is known, with what was looked for and what is there."""
    if asked:
        return
    own: dict[str, int] = {}
    for found in modules:
        kind = type(found.module)
        if not kind.__module__.startswith("torch.nn."):
            own[kind.__name__] = own.get(kind.__name__, 0) + 1
    words = {word for layer in layers for word in re.findall(r"\b[A-Z]\w*[a-z]\w*", layer.seeks)}
    near = {name: close[0] for name in own if (close := difflib.get_close_matches(name, sorted(words), 1, 0.6))}
    names = sorted(own, key=lambda name: name not in near)
    there = ", ".join(f"{name} ({own[name]}{f', like {near[name]}' if name in near else ''})" for name in names[:12])
    raise AccelerateError(
        "\n".join(
            [
                f"accelerate: no layer of {type(model).__name__} is known. Looked for:",
                *(f"  {layer.name}: {layer.seeks}" for layer in layers),
                f"Its own classes: {there or 'none'}{', ...' if len(names) > 12 else ''}.",
                "Describe a layer of yours with titans_backends.register_layer, or pass strict=False for a report that says so.",
            ]
        )
    )
