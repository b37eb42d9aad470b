"""Which calls `race.py` races, in which order, and who takes part in which of its runs. Nothing is measured here.

The peers' table has 23 rows: fourteen forward, nine forward and backward. Beside them 12 heads of 32 and of 64 at four lengths, both ways: 37 in all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from against_fla import Cell

__all__ = ["CASES", "GROUPS", "Case", "Group", "Mode"]

Mode = Literal["forward", "training"]


@dataclass(frozen=True, slots=True)
class Case:
    """One call: its sizes, and whether it is the forward alone or a training step, forward and backward."""

    cell: Cell
    mode: Mode

    def __str__(self) -> str:
        return f"{self.cell} {self.mode}"


@dataclass(frozen=True, slots=True)
class Group:
    """What one process of a race imports and measures: peers' own functions, and whose candidates. `whole`: all of ours, else those that the first run chose.

    `slow`: the default alone of each backend races; of `first_only` too. No call of over `most_tokens` tokens (times sequences). `paths`: whose module folders.
    """

    name: str
    own: tuple[str, ...]
    backends: tuple[str, ...]
    whole: bool = False
    slow: bool = False
    first_only: tuple[str, ...] = ()
    most_tokens: int | None = None
    paths: str = ""


GROUPS: Mapping[str, Group] = {
    group.name: group
    for group in (
        Group("fla", ("fla", "flash_qla"), ("triton", "cupy", "fla", "flash_qla"), whole=True, first_only=("flash_qla",)),
        Group("flashinfer", ("flashinfer",), ("flashinfer",)),
        Group("plain", (), ("eager",), slow=True, most_tokens=8192),
        Group("compiled", (), ("inductor", "numba"), slow=True, most_tokens=2048),
        Group("ungated", ("fla_ungated",), (), paths="fla"),
    )
}
"""The first is the yardstick: what another measures is put on its scale by what both have measured."""

_HEADS = ((2, 8, 128), (16, 32, 128), (16, 64, 128))
_SMALL = ((12, 12, 32), (12, 12, 64))
_PEERS_TRAINED = {(8192, *heads) for heads in _HEADS} | {(32768, *heads) for heads in _HEADS} | {(2048, 16, 64, 128)}


def _cases() -> Iterator[Case]:
    """8192 tokens first: FLA tunes itself at its first call and keeps the choice for every length, and most models run there."""
    for tokens in (8192, 32768, 2048, 512):
        cells = [Cell(1, tokens, *heads) for heads in (*_HEADS, *_SMALL)]
        if tokens == 8192:
            cells.insert(3, Cell(8, 1024, 16, 32, 128))
        yield from (Case(cell, "forward") for cell in cells)
        yield from (Case(cell, "training") for cell in cells if cell.D != 128 or cell.B > 1 or (cell.T, cell.G, cell.H, cell.D) in _PEERS_TRAINED)


CASES = tuple(_cases())
"""The most important first."""
