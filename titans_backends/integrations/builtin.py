"""Which modules register the layers that come with the library. Each registers at its import, and imports nothing of the package that it serves."""

from __future__ import annotations

from importlib import import_module

__all__ = ["MODULES", "load"]

MODULES = ("titans_backends.integrations.lam", "titans_backends.integrations.transformers", "titans_backends.integrations.fla")

_loaded = False


def load() -> None:
    """Imports them, once; what they register while they are imported comes back here, and goes on."""
    global _loaded
    if _loaded:
        return
    _loaded = True
    try:
        for name in MODULES:
            import_module(name)
    except BaseException:
        _loaded = False
        raise
