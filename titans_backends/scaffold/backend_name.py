"""What a backend may be called: a name that Python can import, that no backend has and that hides no module."""

from __future__ import annotations

import importlib.util
import keyword
import re

from titans_backends import registry
from titans_backends.tuning.standing import REFERENCE

__all__ = ["checked_name"]


def checked_name(name: str, *, in_tree: bool = False) -> str:
    """The name itself; ValueError says why it cannot be one, and what could.

    A plugin's package is imported under the bare name, so there must be no module of that name; inside the library it cannot hide one.
    """
    wrong = _misspelled(name) or _taken(name, in_tree)
    if wrong:
        near = _near(name, in_tree)
        raise ValueError(f"{name!r} cannot be a backend's name: {wrong}. What could be: titans-backends new-backend {near}")
    return name


def _misspelled(name: str) -> str:
    """Why Python, or our lists, could not have the name; empty where they could."""
    strange = sorted(set(re.findall(r"[^A-Za-z0-9_]", name)))
    if not name:
        return "it is empty"
    if strange:
        return f"it holds {', '.join(map(repr, strange))}, and a name has only letters of ASCII, digits and _"
    if name[0].isdigit():
        return "it begins with a digit, and no name in Python does"
    if keyword.iskeyword(name):
        return "it is a keyword of Python, and cannot be imported"
    if name.startswith("_"):
        return "it begins with _, as what is private does"
    return "" if name.lower() == name else "it is not in lower case, as every backend's name is"


def _taken(name: str, in_tree: bool) -> str:
    """Who has the name already; empty where nobody has."""
    if name == REFERENCE.partition("/")[0]:
        return "it is what the contracts' references are called in the timings"
    backend = registry.known().get(name) or registry.broken().get(name)
    if backend is not None:
        return f"there is such a backend already ({backend.origin}); known: {', '.join(sorted(registry.known()))}"
    spec = None if in_tree else importlib.util.find_spec(name)
    if spec is not None and spec.origin is not None:
        return f"there is such a module already ({spec.origin}), which the backend's package would hide"
    return ""


def _near(name: str, in_tree: bool) -> str:
    """A name like this one that could be."""
    plain = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    for one in (plain, f"my_{plain}", f"my_{plain}_backend"):
        if plain and not _misspelled(one) and not _taken(one, in_tree):
            return one
    return "my_backend"
