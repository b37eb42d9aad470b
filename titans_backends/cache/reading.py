"""A cache file's text: of a plain file, of a size that such a file can have, in UTF-8; anything else is an error with a sentence and not a wait."""

from __future__ import annotations

import os
import stat
from pathlib import Path

__all__ = ["MOST_MIB", "read_text"]

MOST_MIB = 64
"""A hundred times the timings of a whole tuned card."""


def read_text(path: Path) -> str:
    """The text. FileNotFoundError where there is nothing, another OSError for what is no file or too large, UnicodeDecodeError for what is not UTF-8."""
    with open(path, "rb", opener=_without_waiting) as file:
        mode = os.fstat(file.fileno()).st_mode
        if not stat.S_ISREG(mode):
            raise OSError("it is no file but a device or pipe")
        content = file.read(MOST_MIB * 2**20 + 1)
    if len(content) > MOST_MIB * 2**20:
        raise OSError(f"it is larger than {MOST_MIB} MiB, and no such file of titans_backends is")
    return content.decode("utf-8")


def _without_waiting(path: str, flags: int) -> int:
    """A pipe that nobody writes to is opened at once, and refused then."""
    if os.path.isdir(path):
        raise OSError("it is no file but a folder")
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
