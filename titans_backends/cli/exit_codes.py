"""What the command line's exit status says, the same for every verb."""

from __future__ import annotations

__all__ = ["FALLS_SHORT", "FINE", "INTERRUPTED", "MISUSED"]

FINE = 0
"""Done, and all is well."""
FALLS_SHORT = 1
"""Done, and something is refused, wrong, missing or unfinished; the output says what."""
MISUSED = 2
"""Not done: what was asked cannot be understood, or something is broken."""
INTERRUPTED = 130
"""Ctrl-C; what was finished is kept."""
