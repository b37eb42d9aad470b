"""Whose code a layer runs: a swap may pass by the code that it was written for, and nobody else's, also where that uses the same names.

Passed by are a class's forward and every method of the package's class that this forward reaches by name: who overrides one of them has changed what the
layer computes, though its forward is the package's.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from types import CodeType

from torch import nn

__all__ = ["forward_owner", "names_used", "strangers"]


def forward_owner(kind: type) -> type:
    """The class that a class has its forward from."""
    return next(base for base in kind.__mro__ if "forward" in vars(base))


def strangers(layer: nn.Module | type, package: str) -> tuple[str, ...]:
    """Why what a swap passes by is not the package's own alone: the modules of others that a method, or a wrapper around it, is from; empty where it is.

    A wrapper made by `functools.wraps` bears the name of what it wraps, so it is known by the module that its code lies in. Of a layer, what its instance
    holds in place of a method counts too, but for a `forward`, which `forwards` judges.
    """
    kind, held = (layer, {}) if isinstance(layer, type) else (type(layer), vars(layer))
    found = []
    for name in _passed_by(kind, package):
        found += [
            f"{kind.__name__}.{name} is {how} {home}, whose code a swap would pass by; take it off, or say register_layer what it is"
            for how, home in _homes(_function(inspect.getattr_static(kind, name, None)))
            if not home.startswith(f"{package}.")
        ]
        if name in held and name != "forward":
            found.append(f"its instance holds a {name} of its own, which a swap would pass by; take it off: del layer.{name}")
    return tuple(found)


def names_used(function: Callable[..., object]) -> frozenset[str]:
    """The globals, attributes and enclosing variables that a function's code names, below its decorators."""
    found: set[str] = set()
    codes = [getattr(inspect.unwrap(function), "__code__", None)]
    while codes:
        code = codes.pop()
        if isinstance(code, CodeType):
            found.update(code.co_names, code.co_freevars)
            codes.extend(constant for constant in code.co_consts if isinstance(constant, CodeType))
    return frozenset(found)


def _passed_by(kind: type, package: str) -> Iterator[str]:
    """`forward`, and the methods of the package's classes that it names, or that those name."""
    own: dict[str, Callable[..., object]] = {}
    for base in kind.__mro__:
        if base.__module__.startswith(f"{package}."):
            for name, value in vars(base).items():
                function = _function(value)
                if function is not None:
                    own.setdefault(name, function)
    ahead, seen = ["forward"], {"forward"}
    while ahead:
        name = ahead.pop()
        yield name
        used = names_used(own[name]) if name in own else frozenset()
        fresh = sorted((used & own.keys()) - seen)
        seen.update(fresh)
        ahead.extend(fresh)


def _function(value: object) -> Callable[..., object] | None:
    """What a class's attribute runs: a method's, a property's or a static method's function; None for a value that runs nothing."""
    if isinstance(value, property):
        value = value.fget
    elif isinstance(value, functools.cached_property):
        value = value.func
    value = getattr(value, "__func__", value)
    return value if callable(value) and not isinstance(value, type) else None


def _homes(function: object) -> Iterator[tuple[str, str]]:
    """How a function and each that it wraps came there, and the module that it is from."""
    while function is not None:
        inner = getattr(function, "__wrapped__", None)
        home = getattr(function, "__module__", None) if inner is None else getattr(function, "__globals__", {}).get("__name__")
        yield "from" if inner is None else "wrapped by", str(home or type(function).__module__)
        function = inner
