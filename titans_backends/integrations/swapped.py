"""One module's swap, done and undone: its class, the forward that its instance holds, and what the new forward reads from it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import ref

from torch import nn

from titans_backends.integrations import forwards
from titans_backends.integrations.bypassed import bypassed
from titans_backends.integrations.known import Conversion

__all__ = ["BACKEND", "LOCK", "Swapped", "lost", "overlooked", "swap", "undone"]

BACKEND = "_titans_backends_forced"
"""Where a swapped module keeps the backend that it was forced to."""
LOCK = threading.RLock()
"""Held while layers are swapped or undone; a layer's own `convert` or `settle` may accelerate again."""


@dataclass(frozen=True, slots=True)
class Swapped:
    """What undoes one swap. The module is held weakly; `attributes`: the names that were put into its `__dict__`;
    `bypasses`: its parts that are computed without being called."""

    module: ref[nn.Module]
    path: str
    old: type
    new: type
    attributes: tuple[str, ...]
    bypasses: tuple[str, ...] = ()


def swap(module: nn.Module, path: str, conversion: Conversion, new: type, backend: str | None) -> Swapped:
    """Gives the module its new class and what that reads; as it was, where one of the steps raises."""
    attributes = {**conversion.attributes, BACKEND: backend}
    done = Swapped(ref(module), path, type(module), new, tuple(attributes), conversion.bypasses)
    module.__dict__.update(attributes)
    try:
        object.__setattr__(module, "__class__", new)  # past a __setattr__ of the module's own, which may refuse it
        forwards.rebind(module, done.old, new)
        if conversion.settle is not None:
            conversion.settle(module)
    except BaseException:
        _restore(module, done)
        raise
    return done


def lost(done: Swapped) -> str:
    """Why a swapped module's call runs another forward than ours by now; empty where it does not, and of a module that is gone or was undone."""
    module = done.module()
    return "" if module is None or type(module) is done.old else forwards.displaced(module, done.new)


def overlooked(done: Swapped) -> tuple[str, ...]:
    """What was hung since on a part of a swapped module that is never called; empty of a module that is gone or was undone."""
    module = done.module()
    if module is None or type(module) is done.old:
        return ()
    return tuple(f"{reason}: it was put there since, and is not called" for reason in bypassed(module, done.bypasses))


def undone(swaps: Sequence[Swapped]) -> None:
    """Undoes them all, the last first, or none: RuntimeError where a module's class is another by now. A module that is gone, or was undone, is passed over."""
    with LOCK:
        _undone(swaps)


def _undone(swaps: Sequence[Swapped]) -> None:
    alive = [(module, done) for done in reversed(swaps) if (module := done.module()) is not None and type(module) is not done.old]
    foreign = [(done, type(module)) for module, done in alive if type(module) is not done.new]
    if foreign:
        told = "; ".join(f"{done.path or 'the model itself'} was {done.new.__name__} and is {now.__name__}" for done, now in foreign[:4])
        more = f"; and {len(foreign) - 4} more" if len(foreign) > 4 else ""
        raise RuntimeError(
            f"undo: {told}{more}. Something gave these modules another class after accelerate (fully_shard and register_parametrization do). "
            "Undo that first, or undo the report before it; nothing was undone"
        )
    for module, done in alive:
        _restore(module, done)


def _restore(module: nn.Module, done: Swapped) -> None:
    object.__setattr__(module, "__class__", done.old)
    forwards.rebind(module, done.new, done.old)
    for name in done.attributes:
        module.__dict__.pop(name, None)
