"""A race of all backends and peers as the page shows it: who is fastest where, by how much, what tuning takes there, and every time. Decides nothing."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from titans_backends.reporting import numbers, overviews
from titans_backends.reporting.op_view import Bar, Candidate, Field, Map, Panel, bars, drawn
from titans_backends.reporting.palette import key_of, style_of
from titans_backends.reporting.race_file import Race, Way
from titans_backends.reporting.race_rows import BAND, LAUNCHED, RaceRow, by_heads, by_size, race_headline, race_rows, wins
from titans_backends.reporting.rows import Row, Timed
from titans_backends.reporting.times import strips, times

__all__ = ["RaceChoice", "RaceGroup", "RaceView", "race_view"]

_MODES = {"inference": "Forward", "training": "Forward and backward"}
_SHORT: Mapping[Way, str] = {"graph": "in a graph", "wall": "eagerly"}
_CHOICES = {"tuned": "tuned there, peers installed", "shipped": "shipped tables, which name no peer"}
_SAID = 0.02
"""From this cost on a field of the map says it."""


@dataclass(frozen=True, slots=True)
class RaceChoice:
    """How good a choice was, launched one way: in how many cases it is within the band, of the backends alone too, its mean cost, its worst and where."""

    what: str
    launch: str
    within: int
    beside: int
    cases: int
    mean: str
    worst: str
    where: str


@dataclass(frozen=True, slots=True)
class RaceGroup:
    """One direction, launched one way."""

    title: str
    map: Map
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class RaceView:
    """One race. `runs`: name, date and versions of each process that measured; `refused`: who took no part, why, and in how many cases."""

    device: str
    anchor: str
    path: str
    headline: tuple[str, ...]
    bars: tuple[Bar, ...]
    choices: tuple[RaceChoice, ...]
    gains: str
    shares: str
    groups: tuple[RaceGroup, ...]
    refused: tuple[tuple[str, str, int], ...]
    failed: tuple[tuple[str, str, str], ...]
    runs: tuple[tuple[str, str], ...]
    backends: tuple[tuple[str, str, str], ...]


def race_view(race: Race, path: str, anchor: str = "race") -> RaceView | None:
    """The view of a race; None where no case has a time."""
    rows = race_rows(race)
    if not rows:
        return None
    graph = [one for one in rows if one.way == "graph"]
    shown = [one.row for one in graph]
    replaced = any(row.over_default and not row.kept_default for row in shown)
    return RaceView(
        device=_device(race),
        anchor=anchor,
        path=path,
        headline=tuple(race_headline(rows)),
        bars=bars(wins(graph or rows)),
        choices=tuple(_choices(rows)),
        gains=drawn(overviews.gains(shown, by_heads), f"{anchor}g") if replaced else "",
        shares=drawn(overviews.shares(shown, by_heads, lambda row: row.place.regime == "training"), f"{anchor}s")
        if any(row.share for row in shown)
        else "",
        groups=tuple(_groups(rows, anchor)),
        refused=_refused(graph or rows),
        failed=tuple(
            (name, one.label, one.failed) for name, parts in race.cases.items() for part in parts.values() for one in part.entrants if one.failed
        ),
        runs=tuple((name, _versions(run)) for name, run in race.runs.items()),
        backends=key_of(dict.fromkeys(one.backends[0] for row in rows for one in row.row.best)),
    )


def _choices(rows: Sequence[RaceRow]) -> Iterator[RaceChoice]:
    for way in LAUNCHED:
        for what, said in _CHOICES.items():
            some = [one for one in rows if one.way == way and what in one.costs]
            if some:
                worst = max(some, key=lambda one: one.costs[what])
                mean = statistics.fmean(one.costs[what] for one in some)
                beside = sum(one.beside.get(what, 0.0) <= BAND for one in some)
                within = sum(one.costs[what] <= BAND for one in some)
                yield RaceChoice(said, _SHORT[way], within, beside, len(some), _cost(mean), _cost(worst.costs[what]), _where(worst.row))


def _groups(rows: Sequence[RaceRow], anchor: str) -> Iterator[RaceGroup]:
    for way, launch in LAUNCHED.items():
        for regime, mode in _MODES.items():
            some = [one for one in rows if one.way == way and one.row.place.regime == regime]
            if some:
                yield RaceGroup(f"{mode}, {launch}", _map(some), tuple(_panels(some, f"{anchor}-{way}-{regime}")))


def _map(rows: Sequence[RaceRow]) -> Map:
    """The fastest by heads and length; a field says what the tuned choice costs there where that is not next to nothing."""
    lengths = tuple(sorted({one.row.place.seq_len for one in rows}))
    at = {(one.row.place.size, one.row.place.seq_len): _field(one) for one in rows}
    sizes = dict.fromkeys(one.row.place.size for one in rows)
    return Map("fastest of all", lengths, tuple((size, tuple(at.get((size, seq_len), Field()) for seq_len in lengths)) for size in sizes))


def _field(one: RaceRow) -> Field:
    first, told = one.fastest, [one.fastest.label]
    told += [f"next: {other.who}, {numbers.factor(other.us / first.us)} its time" for other in one.row.best if other.backends != first.backends][:1]
    told += [f"tuned choice: {one.row.winner.label}, {_cost(one.costs['tuned'])}"] if one.row.winner is not None else []
    cost = one.costs.get("tuned", 0.0)
    roles = tuple(style_of(name).role for name in first.backends)
    return Field(
        roles, first.who + (", own" if one.own else ""), numbers.time_us(first.us), "; ".join(told), f"tuned {_cost(cost)}" if cost >= _SAID else ""
    )


def _panels(rows: Sequence[RaceRow], anchor: str) -> Iterator[Panel]:
    """A chart for each size over length; sizes of one length in one chart together."""
    by_row = {id(one.row): one for one in rows}
    sizes = by_size([one.row for one in rows])
    curves = [line for line in sizes.values() if len(line) > 1]
    single = [row for line in sizes.values() if len(line) == 1 for row in line]
    for index, line in enumerate(curves):
        yield Panel(
            line[0].place.size, line[0].place.setting, drawn(times(line), f"{anchor}-{index}"), tuple(_numbers(by_row[id(row)]) for row in line)
        )
    if single:
        yield Panel(
            "One length each", single[0].place.setting, drawn(strips(single), f"{anchor}-x"), tuple(_numbers(by_row[id(row)]) for row in single)
        )


def _numbers(one: RaceRow) -> tuple[str, str, tuple[Candidate, ...]]:
    """A case's title, its sentence, and everybody's times."""
    row, way = one.row, one.way
    told = [f"Fastest {one.fastest.label}: {_time(one.fastest)}"]
    if row.winner is not None:
        told.append(f"tuned choice {row.winner.label}: {numbers.time_us(row.winner.us)}, {_cost(one.costs['tuned'])}")
    if "shipped" in one.costs:
        told.append(f"shipped choice {one.standings.dispatch[way].label}: {_cost(one.costs['shipped'])}")
    if row.default is not None:
        told.append(f"untuned default {row.default.label}: {numbers.time_us(row.default.us)}")
    if row.floor is not None:
        told.append(f"floor {numbers.time_us(row.floor.us)}: {numbers.percent(row.floor.us / one.fastest.us)} of the fastest’s time")
    listed = []
    for entrant in [*one.standings.timed(way), *(other for other in one.standings.entrants if other.kind == "other" and other.us(way) is not None)]:
        spread = entrant.graph_spread if way == "graph" else entrant.wall_spread
        errors = [error for error in entrant.errors.values() if isinstance(error, (int, float)) and math.isfinite(error)]
        listed.append(
            Candidate(
                entrant.label, style_of(entrant.who.split("+")[0]).role, "", numbers.time_us(entrant.us(way)), numbers.percent(spread), "",
                numbers.error(max(errors, default=None)), "computes another rule: not in the race" if entrant.kind == "other" else "",
                row.winner is not None and entrant.label == row.winner.label,
            )
        )  # fmt: skip
    title = (
        f"{row.place.size} · {numbers.amount(row.place.seq_len, 'token')}" if "," in row.place.size else numbers.amount(row.place.seq_len, "token")
    )
    return title, "; ".join(told) + ".", tuple(listed)


def _refused(rows: Sequence[RaceRow]) -> tuple[tuple[str, str, int], ...]:
    counts = Counter((who, why) for one in rows for who, why in one.standings.refused.items())
    return tuple((who, why, count) for (who, why), count in sorted(counts.items()))


def _versions(run: Mapping[str, object]) -> str:
    versions = run.get("versions")
    told = [str(run.get("date", "")), f"torch {run.get('torch', '?')}"]
    told += [f"{name} {number}" for name, number in versions.items() if name != "fla_ungated"] if isinstance(versions, Mapping) else []
    return ", ".join(word for word in told if word)


def _device(race: Race) -> str:
    return str(next((run.get("device") for run in race.runs.values() if run.get("device")), "a GPU"))


def _where(row: Row) -> str:
    return f"{_MODES[row.place.regime].lower()}, {row.place.size}, {row.place.seq_len} tokens"


def _cost(cost: float) -> str:
    return f"+{100 * cost:.1f} %" if cost > 0 else "0"


def _time(one: Timed) -> str:
    return numbers.time_us(one.us) + ("" if one.spread is None else f" ± {numbers.percent(one.spread)}")
