"""Which layers of a torch model are known, and what each becomes. A list of descriptions: it walks no model and swaps nothing (`swap.py` does).

A known layer is recognised by its class's name or its structure, so that no package is imported to look for it, and converted in place: the module
object stays, with its parameters, hooks, device map and name; only its class gets a forward in front (`type(new, (forward, old), {})`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn

from titans_backends.integrations.builtin import load
from titans_backends.verdict import Verdict

__all__ = ["Conversion", "KnownLayer", "known_layers", "register_layer"]


@dataclass(frozen=True, slots=True)
class Conversion:
    """What a module becomes: `forward` is a class whose methods go before the module's own, `attributes` what that class reads from the instance.

    `forward` holds no parameters and has no `__init__`; `super().forward` is the module's own. `attributes` go into the instance's `__dict__` (so that
    nothing is registered) and leave with `undo()`; they hold no parameters or modules of their own beyond those that the module has already.
    `notes`: what the report tells about the swapped layer, in sentences, where it is not the old one in every respect. `settle(module)` is called once the
    module has its new class, for what must not be done to a model before every layer has agreed. `ops`: those that the forward calls; a layer is refused where
    TITANS_BACKENDS_FORCE names a backend that lacks one, since its calls would raise, and the report names those that `backend` lacks. `bypasses`: the
    submodules that the forward computes without calling them; `print(report)` tells what was hung on one after the swap, `convert` refuses what hangs there before.
    """

    forward: type
    attributes: Mapping[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    settle: Callable[[nn.Module], None] | None = None
    ops: tuple[str, ...] = ()
    bypasses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class KnownLayer:
    """A layer that can be swapped: `seeks` says in a few words what is looked for, for the error where nothing was found.

    `recognise(module)` is cheap, imports nothing, and is asked of every module of a model; `convert(module, backend)` says what it becomes, or
    why not, with every reason, and leaves it as it is.
    """

    name: str
    seeks: str
    recognise: Callable[[nn.Module], bool]
    convert: Callable[[nn.Module, str | None], Conversion | Verdict]


_KNOWN: dict[str, KnownLayer] = {}


def register_layer(layer: KnownLayer) -> KnownLayer:
    """Adds a layer to those that `accelerate` knows; one of the same name is replaced. Returns it, so that it may stand as a decorator's result."""
    if not isinstance(layer, KnownLayer):
        raise TypeError(f"register_layer: it takes a KnownLayer(name, seeks, recognise, convert), got {type(layer).__name__}")
    load()  # first, so that a user's layer is the later one, and replaces a built-in of its name
    _KNOWN[layer.name] = layer
    return layer


def known_layers() -> tuple[KnownLayer, ...]:
    """All of them, the latest registered first: a user's own layer is asked before the built-in ones."""
    load()
    return tuple(reversed(_KNOWN.values()))
