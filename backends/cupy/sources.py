"""The CUDA files of this backend: a file with all that it includes, by name; nothing outside of the folder is ever included."""

from __future__ import annotations

import functools
import re
from pathlib import Path

__all__ = ["FOLDER", "closure", "source_names"]

FOLDER = Path(__file__).parent / "cuda"
_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


@functools.cache
def closure(name: str) -> dict[str, str]:
    """The text of a file and of what it includes, the file first. FileNotFoundError for one that is not there."""
    found: dict[str, str] = {}
    todo = [name]
    while todo:
        each = todo.pop(0)
        if each not in found:
            found[each] = (FOLDER / each).read_text(encoding="utf-8")
            todo += _INCLUDE.findall(found[each])
    return found


def source_names(*names: str) -> tuple[str, ...]:
    """Files and what they include as `Candidate.sources` names them: paths from this folder on."""
    return tuple(dict.fromkeys(f"{FOLDER.name}/{each}" for name in names for each in closure(name)))
