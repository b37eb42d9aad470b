"""What a backend may be called: a name that Python can import, that no backend has and that hides no module."""

from __future__ import annotations

import importlib.util
import keyword

from titans_backends import registry
from titans_backends.tuning.standing import REFERENCE

__all__ = ["checked_name"]


def checked_name(name: str, *, in_tree: bool = False) -> str:
    """The name itself; ValueError says why it cannot be one, and what could.

    A plugin's package is imported under the bare name, so there must be no module of that name; inside the library it cannot hide one.
    """
    if not (name.isidentifier() and name.isascii()) or keyword.iskeyword(name) or name.lower() != name or name.startswith("_"):
        raise ValueError(f"a backend's name is a Python identifier in lower case, as my_backend; got {name!r}")
    if name == REFERENCE.partition("/")[0]:
        raise ValueError(f"{name!r} is what the contracts' references are called in the timings; take another name")
    taken = registry.known().get(name) or registry.broken().get(name)
    if taken is not None:
        raise ValueError(f"there is a backend {name!r} already ({taken.origin}); known: {', '.join(sorted(registry.known()))}")
    if not in_tree:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            raise ValueError(f"there is a module {name!r} already ({spec.origin}), which the backend's package would hide; take another name")
    return name
