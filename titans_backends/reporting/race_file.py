"""What `benchmarks/race.py` measured, as records, and its file: every backend and peer in one race, by case and by run. Pure but for the reading."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

__all__ = ["WAYS", "Chosen", "Entrant", "Part", "Picked", "Race", "Way", "read_race"]

Way = Literal["graph", "wall"]
"""A call captured in a CUDA graph and replayed, or called eagerly, back to back."""
WAYS: tuple[Way, Way] = ("graph", "wall")


@dataclass(frozen=True, slots=True)
class Entrant:
    """One way to compute a call, timed as its user has it. Microseconds; spreads are half the width of the median's 95 % interval over the median.

    `kind`: a backend's candidates behind the registry, a peer's own function, or one that computes something else. `wall_*`: called eagerly, back to
    back; `pick_*`: the same in the rounds before, by which a choice is made. `errors`: relative to float64, root mean square.
    """

    label: str
    who: str
    kind: Literal["backend", "own", "other"] = "backend"
    graph_us: float | None = None
    graph_spread: float | None = None
    wall_us: float | None = None
    wall_spread: float | None = None
    host_us: float | None = None
    pick_us: float | None = None
    pick_spread: float | None = None
    errors: Mapping[str, float] = field(default_factory=dict)
    failed: str = ""

    def us(self, way: Way) -> float | None:
        """Its time in a graph, or called eagerly."""
        return self.graph_us if way == "graph" else self.wall_us


@dataclass(frozen=True, slots=True)
class Picked:
    """A contender for the tuner's rule: a pair as the tuner times it, each direction by itself and summed."""

    label: str
    who: str
    us: float
    spread: float
    simplicity: int
    order: int


@dataclass(frozen=True, slots=True)
class Chosen:
    """What dispatch runs, with its reason; `origin` as dispatch has it."""

    label: str
    origin: str
    reason: str


@dataclass(frozen=True, slots=True)
class Part:
    """One run's share of a case. `dispatch` has a choice for each way; `refused`: backends that take no part, with their reason.

    `spent`: the seconds of its parts; first runs hold what was compiled there.
    """

    entrants: tuple[Entrant, ...] = ()
    contenders: tuple[Picked, ...] = ()
    dispatch: Mapping[str, Chosen] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    default: str = ""
    candidates: int = 0
    floor_us: float | None = None
    seconds: float = 0.0
    failed: str = ""
    spent: Mapping[str, float] = field(default_factory=dict)

    @property
    def timed(self) -> bool:
        """Whether anything has a time."""
        return any(one.us(way) is not None for one in self.entrants for way in WAYS)


@dataclass(slots=True)
class Race:
    """The facts of each run by its name, and each case's parts by run. `begun`: by run, the case that a process was at."""

    runs: dict[str, dict[str, object]] = field(default_factory=dict)
    cases: dict[str, dict[str, Part]] = field(default_factory=dict)
    begun: dict[str, str] = field(default_factory=dict)


def read_race(path: Path) -> Race:
    """A race's file; OSError, or ValueError where it is none."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        cases = {name: {run: _part(part) for run, part in parts.items()} for name, parts in told["cases"].items()}
        return Race(dict(told["runs"]), cases, dict(told.get("begun", {})))
    except (AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"it is no race: {type(error).__name__}: {error}") from error


def _part(told: Mapping[str, object]) -> Part:
    given = dict(told)
    entrants = tuple(Entrant(**one) for one in cast("list[dict[str, object]]", given.pop("entrants", [])))  # type: ignore[arg-type]
    contenders = tuple(Picked(**one) for one in cast("list[dict[str, object]]", given.pop("contenders", [])))  # type: ignore[arg-type]
    dispatch = {way: Chosen(**one) for way, one in cast("dict[str, dict[str, str]]", given.pop("dispatch", {})).items()}
    return Part(entrants, contenders, dispatch, **given)  # type: ignore[arg-type]
