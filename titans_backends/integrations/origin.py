"""Whose code a class's forward is: a swap may pass by the code that it was written for, and nobody else's, also where that uses the same names."""

from __future__ import annotations

__all__ = ["forward_owner", "strangers"]


def forward_owner(kind: type) -> type:
    """The class that a class has its forward from."""
    return next(base for base in kind.__mro__ if "forward" in vars(base))


def strangers(kind: type, package: str) -> tuple[str, ...]:
    """Why a class's forward is not the package's own alone: the modules of others that it, or a wrapper around it, is from; empty where it is.

    A wrapper made by `functools.wraps` bears the name of what it wraps, so it is known by the module that its code lies in.
    """
    found, forward = [], getattr(kind, "forward", None)
    while forward is not None:
        inner = getattr(forward, "__wrapped__", None)
        home = getattr(forward, "__module__", None) if inner is None else getattr(forward, "__globals__", {}).get("__name__")
        home = str(home or type(forward).__module__)
        if not home.startswith(f"{package}."):
            how = "from" if inner is None else "wrapped by"
            found.append(f"{kind.__name__}.forward is {how} {home}, whose code a swap would pass by; take it off, or say register_layer what it is")
        forward = inner
    return tuple(found)
