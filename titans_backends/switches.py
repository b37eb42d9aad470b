"""The environment switches: one table, parsed strictly, read once at the first use.

An unknown `TITANS_BACKENDS_*` variable or a value that is not understood is an error, never ignored.
"""

from __future__ import annotations

import difflib
import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from titans_backends.errors import SwitchError

__all__ = ["PREFIX", "SWITCHES", "Switches", "current", "parse", "reload"]

PREFIX = "TITANS_BACKENDS_"

SWITCHES: Mapping[str, str] = {
    "FORCE": "NAME: every call uses this backend, or raises with its reasons",
    "CACHE": "PATH: a cache file that is read before the user's own",
    "DISABLE": "NAME[,NAME]: backends that refuse every call",
    "PLUGINS": "MODULE[,MODULE]: modules with a BACKEND, beside the entry points",
    "CHECK": "0 or 1: check the values of cu_seqlens, state_indices and position on a GPU too (waits for the device)",
}
"""Every switch's name, without the prefix, and what it does."""


@dataclass(frozen=True, slots=True)
class Switches:
    """The parsed values."""

    force: str | None = None
    cache: Path | None = None
    disable: tuple[str, ...] = ()
    plugins: tuple[str, ...] = ()
    check: bool = False


def _flag(name: str, text: str) -> bool:
    if text not in ("0", "1"):
        raise SwitchError(f"{PREFIX}{name} must be 0 or 1, got {text!r}")
    return text == "1"


def _names(name: str, text: str) -> tuple[str, ...]:
    parts = tuple(part.strip() for part in text.split(","))
    if not all(parts):
        raise SwitchError(f"{PREFIX}{name} must be names separated by commas, got {text!r}")
    return parts


def parse(environment: Mapping[str, str]) -> Switches:
    """The switches of an environment; SwitchError names the variable and what would be accepted. An empty value is as if unset."""
    given = {key.removeprefix(PREFIX): value for key, value in environment.items() if key.startswith(PREFIX) and value != ""}
    for name in given:
        if name not in SWITCHES:
            near = difflib.get_close_matches(name, SWITCHES, 1)
            hint = f"; did you mean {PREFIX}{near[0]}?" if near else ""
            raise SwitchError(f"unknown switch {PREFIX}{name}{hint}; known: {', '.join(PREFIX + known for known in SWITCHES)}")
    return Switches(
        force=given["FORCE"].strip() if "FORCE" in given else None,
        cache=Path(given["CACHE"]).expanduser() if "CACHE" in given else None,
        disable=_names("DISABLE", given["DISABLE"]) if "DISABLE" in given else (),
        plugins=_names("PLUGINS", given["PLUGINS"]) if "PLUGINS" in given else (),
        check=_flag("CHECK", given["CHECK"]) if "CHECK" in given else False,
    )


@functools.lru_cache(maxsize=1)
def current() -> Switches:
    """This process's switches, read at the first use."""
    return parse(os.environ)


def reload() -> None:
    """Forgets what was read; `titans_backends.reset()` calls it."""
    current.cache_clear()
