"""One colour and one mark per backend, on a light page and on a dark one; the same in every chart, table and picture.

Told apart without colour too: every mark differs, and every chart names its backends beside their lines. The colours of one kind of device's
backends keep their distance for red-blind and green-blind eyes as well, and their contrast on the page (tests/test_reporting_palette.py measures both).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["INKS", "PALETTE", "Style", "key_of", "style_of", "styles"]


@dataclass(frozen=True, slots=True)
class Style:
    """`role` names the colour in style sheets; `mark` is matplotlib's letter for a marker."""

    role: str
    light: str
    dark: str
    mark: str = "o"


PALETTE: dict[str, Style] = {
    "triton": Style("triton", "#0a66b5", "#5fb2f5", "o"),
    "cupy": Style("cupy", "#c44d08", "#ff9d5c", "s"),
    "eager": Style("eager", "#6a7280", "#a6aebb", "D"),
    "inductor": Style("inductor", "#16a77e", "#5beab6", "^"),
    "numba": Style("numba", "#601067", "#bb43e8", "v"),
    "numba_cpu": Style("numba_cpu", "#925911", "#e6ae3f", "P"),
    "fla": Style("fla", "#602146", "#d64e7d", "X"),
    "flash_qla": Style("flash_qla", "#5ca03c", "#b5f097", "*"),
    "flashinfer": Style("flashinfer", "#009cb4", "#b5f2f6", "p"),
}
"""The backends that this library knows by name."""

_SPARE = (
    Style("other-a", "#7a5230", "#d9b38c", "h"),
    Style("other-b", "#3d4a66", "#b7c4e0", "<"),
    Style("other-c", "#9b1c31", "#f4929f", ">"),
)

_SIGNS = {"o": "●", "s": "■", "D": "◆", "^": "▲", "v": "▼", "P": "✚", "X": "✖", "*": "★", "p": "⬟", "h": "⬢", "<": "◀", ">": "▶"}

INKS: dict[str, Style] = {
    "ink": Style("ink", "#1c2530", "#e3e8ee"),
    "muted": Style("muted", "#5b6673", "#9aa5b1"),
    "grid": Style("grid", "#e1e5ea", "#313a45"),
    "paper": Style("paper", "#fffffe", "#12171e"),
}
"""Text, quiet text, rules, and the page behind them."""


def style_of(backend: str) -> Style:
    """A backend's colour and mark; one that is not known by name always gets the same spare one."""
    return PALETTE.get(backend) or _SPARE[zlib.crc32(backend.encode()) % len(_SPARE)]


def key_of(backends: Iterable[str]) -> tuple[tuple[str, str, str], ...]:
    """A chart's key: each backend's name, its role, and a letter that looks like its mark."""
    return tuple((name, style_of(name).role, _SIGNS[style_of(name).mark]) for name in backends)


def styles() -> list[Style]:
    """Every colour that a chart may have."""
    return [*PALETTE.values(), *_SPARE, *INKS.values()]
