"""What follows from a case of a race: one table of several runs, who won, what was chosen, and what that choice costs.

Pure. The rule of choice is the tuner's own (`titans_backends.tuning.select`).
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

from titans_backends.backend import Candidate
from titans_backends.offers import Pair
from titans_backends.reporting.race_file import WAYS, Chosen, Entrant, Part, Picked, Way
from titans_backends.tuning.select import Contender, select

__all__ = ["Standings", "chosen_of", "rule_of", "standings"]

_STEADY = 0.1
"""How far apart, as a share of the median, the quartiles may lie of a time that two runs are compared by."""
_APART = 10_000
"""Added to the order of another run's contenders: behind all of the first's, whose first is the default."""


@dataclass(frozen=True, slots=True)
class Standings:
    """A case's runs on the first one's scale. `scales`: by run and way, what its times were multiplied by; `adrift`: runs that share nothing with the first."""

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

    def regret(self, label: str, way: Way, *, backends: bool = False) -> float | None:
        """What a choice takes over the fastest, as a share of that; None where it was not timed."""
        mine, best = self.entrant(label), self.winner(way, backends=backends)
        us = None if mine is None else mine.us(way)
        if us is None and way == "graph":  # chosen from all runs together, and no run had it among its finalists: its time in the tuner's manner
            us = next((one.us for one in self.contenders if one.label == label), None)
        return None if us is None or best is None else us / cast(float, best.us(way)) - 1


def standings(parts: Mapping[str, Part], runs: Mapping[str, Collection[str]]) -> Standings | None:
    """One table of a case's parts; None where nothing has a time. `runs`: whose backends each run measures, the yardstick first."""
    names = [name for name in runs if name in parts and parts[name].timed]
    if not names:
        return None
    base = parts[names[0]]

    def base_has(who: str) -> bool:
        """Whether the first run measured the backends of an entrant itself: what a later one adds is what the first one has not."""
        return set(who.split("+")) <= set(runs[names[0]])

    entrants, contenders = {one.label: one for one in base.entrants}, {one.label: one for one in base.contenders}
    refused, scales, adrift = dict(base.refused), dict[str, dict[str, float]](), list[str]()
    for name in names[1:]:
        part = parts[name]
        found = {way: _scale(base.entrants, part.entrants, way) for way in WAYS}
        if all(scale is None for scale in found.values()):
            adrift.append(name)
            continue
        either = next(scale for scale in found.values() if scale is not None)
        kept: dict[str, float] = {way: either if scale is None else scale for way, scale in found.items()}
        scales[name] = {**kept}
        for one in part.entrants:
            if base_has(one.who):
                continue
            entrants.setdefault(one.label, _scaled(one, kept["graph"], kept["wall"]))
        for picked in part.contenders:
            if base_has(picked.who):
                continue
            contenders.setdefault(picked.label, replace(picked, us=picked.us * kept["graph"], order=picked.order + _APART))
        refused = {who: why for who, why in refused.items() if who not in runs[name]} | dict(part.refused)
    there = {one.who for one in entrants.values()}
    refused = {who: why for who, why in refused.items() if who not in there}
    return Standings(tuple(entrants.values()), tuple(contenders.values()), base.dispatch, base.default, base.floor_us, refused, scales, tuple(adrift))


def _scale(base: Iterable[Entrant], other: Iterable[Entrant], way: Way) -> float | None:
    """The geometric mean of what both runs measured steadily, the one over the other; None where there is nothing."""
    mine = {one.label: us for one in base if (us := _steady(one, way)) is not None}
    ratios = [mine[one.label] / us for one in other if one.label in mine and (us := _steady(one, way)) is not None]
    return statistics.geometric_mean(ratios) if ratios else None


def _steady(one: Entrant, way: Way) -> float | None:
    """A time whose samples agree: the median of others says little of the machine."""
    spread = one.graph_spread if way == "graph" else one.wall_spread
    return None if (spread or 0.0) > _STEADY else one.us(way)


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
