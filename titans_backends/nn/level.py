"""A level of the memory as its user names it: how slowly it learns and how much it says. Experimental; `levels` runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from titans_backends.errors import UnknownNameError

__all__ = ["Level"]

_NORMALIZE = ("safe", "mean", "sum")


@dataclass(frozen=True, slots=True)
class Level:
    """One more core. `period`: chunks a block; `weight`: its share of the output, taken from the two cores'; `normalize`: what a block's update is divided by."""

    period: int = 4
    weight: float = 0.1
    normalize: Literal["safe", "mean", "sum"] = "safe"

    def __post_init__(self) -> None:
        if self.normalize not in _NORMALIZE:
            raise UnknownNameError(f"Level: unknown normalize {self.normalize!r}; known: {', '.join(map(repr, _NORMALIZE))}")
        if self.period < 1:
            raise ValueError(f"Level: period must be at least 1 chunk, got {self.period}")
        if not 0.0 < self.weight < 1.0:
            raise ValueError(f"Level: weight, its share of the output, must lie between 0 and 1, both excluded, got {self.weight}")
