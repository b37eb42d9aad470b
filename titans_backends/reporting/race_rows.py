"""A race as the report's rows: one for each case and launch, with every backend's and every peer's fastest, the floor, and what was chosen. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from titans_backends.buckets import Bucket, defaults_of
from titans_backends.cache.schema import canonical_when
from titans_backends.reporting import numbers
from titans_backends.reporting.facts import State
from titans_backends.reporting.place import Place, place_of
from titans_backends.reporting.race_file import WAYS, Entrant, Race, Way
from titans_backends.reporting.race_standings import Standings, chosen_of, standings
from titans_backends.reporting.rows import Floor, Row, Timed

__all__ = ["BAND", "LAUNCHED", "OP", "RaceRow", "by_heads", "by_size", "race_headline", "race_rows", "wins"]

OP = "gated_delta_rule"
"""What is raced, in bfloat16 and with a decay."""
BAND = 0.05
"""What a choice may cost over the fastest."""
_CASE = re.compile(r"(\d+)x(\d+) (\d+)/(\d+) D(\d+) (forward|training)")
LAUNCHED: Mapping[Way, str] = {"graph": "in a CUDA graph, from a cold cache", "wall": "called eagerly, back to back"}
_LAUNCH: Mapping[Way, str] = {"graph": "graph", "wall": "eager"}


@dataclass(frozen=True, slots=True)
class RaceRow:
    """One case, launched one way. `row` as the charts know it: its winner is what tuning on that machine takes, its `fastest` the fastest of all.

    `costs`: by `tuned` and `shipped`, what the choice takes over the fastest, as a share; a choice that was not timed is left out. `beside`: the same
    over the fastest backend, peers' own functions left out.
    """

    row: Row
    way: Way
    standings: Standings
    costs: Mapping[str, float]
    beside: Mapping[str, float]

    @property
    def own(self) -> bool:
        """Whether the fastest is a peer's own function."""
        return self.standings.timed(self.way)[0].kind == "own"

    @property
    def fastest(self) -> Timed:
        """The fastest of all, peers' own functions included."""
        assert self.row.fastest is not None
        return self.row.fastest


def race_rows(race: Race) -> list[RaceRow]:
    """Every case that has a time, in the order of a report; names that are no case are left out."""
    runs = {name: {one.who for parts in race.cases.values() if name in parts for one in parts[name].entrants} for name in race.runs}
    found = []
    for name, parts in race.cases.items():
        case, stands = _CASE.fullmatch(name), standings(parts, runs)
        if case is not None and stands is not None:
            found += [row for way in WAYS if (row := _row(case, stands, way)) is not None]
    return sorted(found, key=_order)


def by_heads(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by heads alone, however many sequences, large heads first."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.place.size.partition(",")[0], []).append(row)
    return found


def by_size(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by heads and sequences, in their order."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.place.size, []).append(row)
    return found


def race_headline(rows: Sequence[RaceRow]) -> Iterator[str]:
    """Who is fastest, and how close the tuned choice comes, in words."""
    cases = {(one.row.place.regime, one.row.place.size, one.row.place.seq_len) for one in rows}
    who = dict.fromkeys(one.backends[0] for row in rows for one in row.row.best)
    forward = sum(regime == "inference" for regime, _, _ in cases)
    trained = len(cases) - forward
    yield (
        f"{numbers.amount(len(cases), 'case')} of {OP} in bfloat16{f', {forward} forward and {trained} forward and backward' if trained else ', forward'}: "
        f"{', '.join(who)}, checked against float64, in one race."
    )
    for way, launch in LAUNCHED.items():
        some = [one for one in rows if one.way == way]
        told = [f"{who} in {count}" for who, count in wins(some).items()]
        if told:
            listed = told[0] if len(told) == 1 else f"{', '.join(told[:-1])} and {told[-1]}"
            own = sum(one.own for one in some)
            counted = f", in {own} of these by a peer’s own function" if own else ""
            yield f"{launch[0].upper()}{launch[1:]}, the fastest is {listed}{counted}."


def wins(rows: Sequence[RaceRow]) -> dict[str, int]:
    return dict(Counter(one.fastest.who for one in rows).most_common())


def _row(case: re.Match[str], stands: Standings, way: Way) -> RaceRow | None:
    first = stands.winner(way)
    if first is None:
        return None
    batch, seq_len, group, heads, dim = (int(number) for number in case.groups()[:5])
    bucket = Bucket(OP, canonical_when(_when(batch, group, heads, dim, case[6], way), defaults_of(OP)), seq_len)
    labels = {"tuned": chosen_of(stands, way), "shipped": stands.dispatch[way].label if way in stands.dispatch else ""}
    costs = {what: cost for what, label in labels.items() if label and (cost := stands.regret(label, way)) is not None}
    chosen = None
    if "tuned" in costs:
        known = stands.entrant(labels["tuned"])
        who = next(one.who for one in stands.contenders if one.label == labels["tuned"])
        spread = None if known is None else _spread(known, way)
        chosen = Timed(labels["tuned"], tuple(who.split("+")), _timed(first, way).us * (1 + costs["tuned"]), spread)
    default = stands.entrant(stands.default)
    row = Row(
        place=_place(bucket, batch, group, heads, dim),
        bucket=bucket,
        origin="results",
        winner=chosen,
        decided=chosen is not None,
        best=tuple(_best(stands, way)),
        fastest=_timed(first, way),
        tried=(),
        default=_timed(default, way) if default is not None and default.us(way) is not None else None,
        default_reason="",
        reference_us=None,
        floor=None if stands.floor_us is None else Floor(stands.floor_us, ""),
        state=State("unchecked"),
        refusals=(),
    )
    beside = {what: cost for what in costs if (cost := stands.regret(labels[what], way, backends=True)) is not None}
    return RaceRow(row, way, stands, costs, beside)


def _when(batch: int, group: int, heads: int, dim: int, mode: str, way: Way) -> dict[str, str | int | bool | tuple[int, int]]:
    regime = "inference" if mode == "forward" else "training"
    return {
        "dtype": "bfloat16", "head_dim": (dim, dim), "streams": batch * heads, "group": heads // group, "g": True, "regime": regime, "launch": _LAUNCH[way],
    }  # fmt: skip


def _place(bucket: Bucket, batch: int, group: int, heads: int, dim: int) -> Place:
    """Heads of q and k, heads of v, head_dim; how many sequences where there are several."""
    size = f"{group}/{heads} × {dim}" + (f", {batch} sequences" if batch > 1 else "")
    return replace(place_of(bucket), size=size, options=())


def _best(stands: Standings, way: Way) -> Iterator[Timed]:
    """Each backend's fastest, a peer's own function where that is faster; pairs of two are for the choice alone."""
    seen: set[str] = set()
    for one in stands.timed(way):
        if "+" not in one.who and one.who not in seen:
            seen.add(one.who)
            yield _timed(one, way)


def _timed(one: Entrant, way: Way) -> Timed:
    us = one.us(way)
    assert us is not None
    return Timed(one.label, tuple(one.who.split("+")), us, _spread(one, way))


def _spread(one: Entrant, way: Way) -> float | None:
    return one.graph_spread if way == "graph" else one.wall_spread


def _order(one: RaceRow) -> tuple[object, ...]:
    """Forward in a graph, called eagerly, then training; large heads first, few of them first, batches behind single sequences."""
    place, head_dim = one.row.place, dict(one.row.bucket.when)["head_dim"]
    assert isinstance(head_dim, tuple)
    return place.regime, one.way, -head_dim[0], place.streams, place.size, place.seq_len
