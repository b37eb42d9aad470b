"""One class for each pair of a new forward and a module's old class: the new methods first, then everything that the module was.

Made once a pair, so that two swapped layers of one class are of one class too; pickled and copied as the pair, since a class made at run time has no
place that it could be imported from.
"""

from __future__ import annotations

import copyreg
from typing import Any
from weakref import WeakValueDictionary

from torch import nn

__all__ = ["is_ours", "pair_of", "portable", "swapped_class", "unpacked"]

_PAIR = "_titans_backends_pair"
_NEW = copyreg.__newobj__  # type: ignore[attr-defined]
_CLASSES: WeakValueDictionary[tuple[int, int], type] = WeakValueDictionary()
"""By the ids of the two, which the class itself keeps alive: no entry outlives them."""


def swapped_class(forward: type, old: type) -> type:
    """`Titans<old>`, a subclass of both; TypeError where Python cannot make one."""
    key = (id(forward), id(old))
    found = _CLASSES.get(key)
    if found is None:
        found = _CLASSES[key] = _made(forward, old)
    return found


def pair_of(module: nn.Module) -> tuple[type, type] | None:
    """The forward and the old class of a swapped module, under whatever class another library has put before ours since; None where it is not swapped."""
    pair: tuple[type, type] | None = getattr(type(module), _PAIR, None)
    return pair


def portable(kind: type) -> type | tuple[type, type]:
    """What a copy or a file names a class by: itself, or the pair of one that was made here; `unpacked` takes it back."""
    pair: tuple[type, type] | None = kind.__dict__.get(_PAIR)
    return kind if pair is None else pair


def unpacked(kind: type | tuple[type, type]) -> type:
    """The class that `portable` named."""
    return swapped_class(*kind) if isinstance(kind, tuple) else kind


def is_ours(module: nn.Module) -> bool:
    """Whether it runs on our ops already: swapped, or a layer of `titans_backends.nn`."""
    return pair_of(module) is not None or any(kind.__module__ == "titans_backends.nn.dual_core" for kind in type(module).__mro__)


def _made(forward: type, old: type) -> type:
    name = f"Titans{old.__name__}"
    namespace: dict[str, object] = {
        _PAIR: (forward, old),
        "__module__": old.__module__,
        "__qualname__": name,
        "__doc__": f"{old.__name__} with the forward of {forward.__qualname__}; made by titans_backends.accelerate.",
    }
    made: type = type(name, (forward, old), namespace)

    def reduce(self: object, protocol: int) -> tuple[object, ...] | str:
        """As the module's own, with the pair in place of a class that cannot be imported."""
        reduced: tuple[Any, ...] | str = super(made, self).__reduce_ex__(max(int(protocol), 2))  # type: ignore[arg-type]
        if isinstance(reduced, tuple) and reduced[0] is _NEW and reduced[1][0] is made:
            return _restored, (forward, old, *reduced[1][1:]), *reduced[2:]
        return reduced

    made.__reduce_ex__ = reduce  # type: ignore[assignment,method-assign]
    return made


def _restored(forward: type, old: type, *args: object) -> object:
    """A bare instance, which its state is put into."""
    kind = swapped_class(forward, old)
    return kind.__new__(kind, *args)
