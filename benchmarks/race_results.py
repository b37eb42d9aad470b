"""What `race.py` measured, as records, and what follows from them: one table of several runs, who won, what was chosen, and what that choice costs.

Pure. The rule of choice is the tuner's own (`titans_backends.tuning.select`).
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal, cast

from race_cells import CASES, GROUPS

from titans_backends.backend import Candidate
from titans_backends.offers import Pair
from titans_backends.tuning.select import Contender, select

__all__ = ["Chosen", "Entrant", "Part", "Picked", "Results", "Standings", "Way", "chosen_of", "merged", "rule_of", "standings"]

Way = Literal["graph", "wall"]
WAYS: tuple[Way, Way] = ("graph", "wall")
_APART = 10_000
"""Added to the order of another run's contenders: behind all of the first's, whose first is the default."""


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


@dataclass(slots=True)
class Results:
    """A race: the facts of each run by its group, and each case's parts by group. `begun`: by group, the case that a process was at."""

    runs: dict[str, dict[str, object]] = field(default_factory=dict)
    cases: dict[str, dict[str, Part]] = field(default_factory=dict)
    begun: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def read(path: Path) -> Results:
        """From a file; empty where there is none."""
        if not path.exists():
            return Results()
        told = json.loads(path.read_text(encoding="utf-8"))
        cases = {name: {group: _part(part) for group, part in parts.items()} for name, parts in told["cases"].items()}
        return Results(told["runs"], cases, told.get("begun", {}))

    def write(self, path: Path) -> None:
        """Whole or not at all; cases in the order of the race, numbers with five digits."""
        order = {str(case): index for index, case in enumerate(CASES)}
        names = sorted(self.cases, key=lambda name: (order.get(name, len(order)), name))
        told = {
            "runs": self.runs,
            "begun": self.begun,
            "cases": {name: {group: _plain(part) for group, part in self.cases[name].items()} for name in names},
        }
        text = json.dumps(_short(told), indent=None, separators=(", ", ": ")).replace('{"label"', '\n{"label"').replace('"1x', '\n"1x')
        beside = path.with_name(path.name + ".part")
        beside.write_text(text.replace('"8x', '\n"8x') + "\n", encoding="utf-8")
        os.replace(beside, path)


def _plain(part: Part) -> dict[str, object]:
    """As JSON has it, without what is at its default."""
    return cast("dict[str, object]", _without(part))


def _without(value: object) -> object:
    if hasattr(value, "__dataclass_fields__"):
        kept = {f.name: getattr(value, f.name) for f in fields(value)}  # type: ignore[arg-type]
        return {name: _without(one) for name, one in kept.items() if one not in (None, "", (), {}) and not (name == "kind" and one == "backend")}
    if isinstance(value, Mapping):
        return {name: _without(one) for name, one in value.items()}
    return [_without(one) for one in value] if isinstance(value, tuple) else value


def _short(value: object) -> object:
    """Five significant digits; what is not finite is text that JSON has."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _short(one) for name, one in value.items()}
    return [_short(one) for one in value] if isinstance(value, list | tuple) else value


def _part(told: Mapping[str, object]) -> Part:
    given = dict(told)
    entrants = tuple(Entrant(**one) for one in cast("list[dict[str, object]]", given.pop("entrants", [])))  # type: ignore[arg-type]
    contenders = tuple(Picked(**one) for one in cast("list[dict[str, object]]", given.pop("contenders", [])))  # type: ignore[arg-type]
    dispatch = {way: Chosen(**one) for way, one in cast("dict[str, dict[str, str]]", given.pop("dispatch", {})).items()}
    return Part(entrants, contenders, dispatch, **given)  # type: ignore[arg-type]


def merged(one: Results, other: Results) -> Results:
    """Both; where both have a case of a group the later one's stands, unless it has no time and the earlier has."""
    cases = {name: dict(parts) for name, parts in one.cases.items()}
    for name, parts in other.cases.items():
        mine = cases.setdefault(name, {})
        mine.update({group: part for group, part in parts.items() if group not in mine or _timed(part) or not _timed(mine[group])})
    return Results({**one.runs, **other.runs}, cases, {**one.begun, **other.begun})


def _timed(part: Part) -> bool:
    return any(entrant.us(way) is not None for entrant in part.entrants for way in WAYS)


@dataclass(frozen=True, slots=True)
class Standings:
    """A case's runs on the first one's scale. `scales`: by group and way, what its times were multiplied by; `adrift`: groups that share nothing with the first."""

    entrants: tuple[Entrant, ...]
    contenders: tuple[Picked, ...]
    dispatch: Mapping[str, Chosen]
    default: str
    floor_us: float | None
    refused: Mapping[str, str]
    scales: Mapping[str, Mapping[str, float]]
    adrift: tuple[str, ...]

    def timed(self, way: Way) -> list[Entrant]:
        """Those that compute the call and have a time, the fastest first."""
        found = [one for one in self.entrants if one.kind != "other" and one.us(way) is not None]
        return sorted(found, key=lambda one: cast(float, one.us(way)))

    def winner(self, way: Way, *, backends: bool = False) -> Entrant | None:
        """The fastest of all, peers' own functions included, or of the backends alone."""
        return next((one for one in self.timed(way) if one.kind == "backend" or not backends), None)

    def entrant(self, label: str) -> Entrant | None:
        """By its label."""
        return next((one for one in self.entrants if one.label == label), None)

    def best_of(self, who: str, way: Way) -> Entrant | None:
        """A backend's or a peer's fastest."""
        return next((one for one in self.timed(way) if one.who == who), None)

    def regret(self, label: str, way: Way, *, backends: bool = False) -> float | None:
        """What a choice takes over the fastest, as a share of that; None where it was not timed."""
        mine, best = self.entrant(label), self.winner(way, backends=backends)
        us = None if mine is None else mine.us(way)
        if us is None and way == "graph":  # chosen from all runs together, and no run had it among its finalists: its time in the tuner's manner
            us = next((one.us for one in self.contenders if one.label == label), None)
        return None if us is None or best is None else us / cast(float, best.us(way)) - 1


def standings(parts: Mapping[str, Part]) -> Standings | None:
    """One table of a case's parts; None where the first group's is missing or empty."""
    names = [name for name in GROUPS if name in parts and _timed(parts[name])]
    if not names:
        return None
    base = parts[names[0]]
    entrants, contenders = {one.label: one for one in base.entrants}, {one.label: one for one in base.contenders}
    refused, scales, adrift = dict(base.refused), dict[str, dict[str, float]](), list[str]()
    for name in names[1:]:
        part = parts[name]
        found = {way: _scale(base.entrants, part.entrants, way) for way in WAYS}
        if all(scale is None for scale in found.values()):
            adrift.append(name)
            continue
        kept = {way: 1.0 if scale is None else scale for way, scale in found.items()}
        scales[name] = dict(kept)
        for one in part.entrants:
            entrants.setdefault(one.label, _scaled(one, kept["graph"], kept["wall"]))
        for picked in part.contenders:
            contenders.setdefault(picked.label, replace(picked, us=picked.us * kept["graph"], order=picked.order + _APART))
        refused = {who: why for who, why in refused.items() if who not in GROUPS[name].backends} | dict(part.refused)
    there = {one.who for one in entrants.values()}
    refused = {who: why for who, why in refused.items() if who not in there}
    return Standings(tuple(entrants.values()), tuple(contenders.values()), base.dispatch, base.default, base.floor_us, refused, scales, tuple(adrift))


def _scale(base: Iterable[Entrant], other: Iterable[Entrant], way: Way) -> float | None:
    """The geometric mean of what both runs measured, the one over the other; None where there is nothing."""
    mine = {one.label: us for one in base if (us := one.us(way)) is not None}
    ratios = [mine[one.label] / us for one in other if one.label in mine and (us := one.us(way)) is not None]
    return statistics.geometric_mean(ratios) if ratios else None


def _scaled(one: Entrant, graph: float, wall: float) -> Entrant:
    def times(us: float | None, scale: float) -> float | None:
        return None if us is None else us * scale

    return replace(
        one,
        graph_us=times(one.graph_us, graph),
        wall_us=times(one.wall_us, wall),
        host_us=times(one.host_us, wall),
        pick_us=times(one.pick_us, wall),
    )


def chosen_of(found: Standings, way: Way, without: Sequence[str] = ()) -> str:
    """The label that the tuner's rule picks, by a graph's times or by eager ones; nothing where there is no contender. `without`: backends that are not there."""
    there = list(found.contenders)
    if way == "wall":
        known = {one.label: one for one in there}
        timed = [one for one in found.entrants if one.label in known and one.pick_us is not None]
        there = [replace(known[one.label], us=cast(float, one.pick_us), spread=one.pick_spread or 0.0) for one in timed]
    return rule_of([one for one in there if not set(one.who.split("+")) & set(without)])


def rule_of(contenders: Sequence[Picked]) -> str:
    """The tuner's choice by label; nothing where there is none."""
    pairs = [Contender(Pair(Candidate(one.label, "")), one.us, one.spread, 0.0, one.simplicity, one.order) for one in contenders]
    winner = select(pairs).winner
    return "" if winner is None else winner.pair.forward.backend
