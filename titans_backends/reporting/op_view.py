"""One op on one machine as the page shows it: maps of winners, charts with the numbers of every candidate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from titans_backends.contracts import CONTRACTS
from titans_backends.reporting import numbers, svg
from titans_backends.reporting.canvas import Chart
from titans_backends.reporting.palette import style_of
from titans_backends.reporting.rows import Row, Timed
from titans_backends.reporting.summary import Summary, curves_of, summarize
from titans_backends.reporting.times import strips, times

__all__ = ["Bar", "Candidate", "Field", "Map", "OpView", "Panel", "bars", "drawn", "op_view"]


@dataclass(frozen=True, slots=True)
class Bar:
    """A part of a bar: its backends' roles, its share of the whole, and its words."""

    roles: tuple[str, ...]
    who: str
    count: int
    share: float


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a map of winners; no roles where nothing was measured."""

    roles: tuple[str, ...] = ()
    who: str = ""
    time: str = ""
    note: str = ""
    mark: str = ""


@dataclass(frozen=True, slots=True)
class Map:
    """Winners over size and length in one setting."""

    setting: str
    lengths: tuple[int, ...]
    lines: tuple[tuple[str, tuple[Field, ...]], ...]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A line of a panel's numbers."""

    label: str
    role: str
    direction: str
    time: str
    spread: str
    peak: str
    error: str
    note: str
    chosen: bool


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart with its numbers: per length a sentence and the candidates."""

    size: str
    setting: str
    drawn: str
    numbers: tuple[tuple[str, str, tuple[Candidate, ...]], ...]


@dataclass(frozen=True, slots=True)
class OpView:
    """One op on one machine."""

    name: str
    anchor: str
    about: str
    summary: Summary
    bars: tuple[Bar, ...]
    share: str
    maps: tuple[Map, ...]
    panels: tuple[Panel, ...]


def op_view(op: str, rows: Sequence[Row], anchor: str) -> OpView:
    found = summarize(rows)
    curves = [line for line in curves_of(rows) if len({row.place.seq_len for row in line}) > 1]
    single = [row for line in curves_of(rows) if line not in curves for row in line]
    panels = [_panel(line, times(line), f"{anchor}-{index}", line[0].place.size, line[0].place.setting) for index, line in enumerate(curves)]
    if single:
        panels.append(_panel(single, strips(single), f"{anchor}-x", "One length each", ""))
    contract = CONTRACTS.get(op)
    shares = [row.share for row in rows if row.share is not None]
    about = contract.summary if contract is not None else "an op that this version does not know"
    return OpView(op, anchor, about, found, bars(found.wins), numbers.percent(max(shares, default=None)), tuple(_maps(rows)), tuple(panels))


def bars(wins: Mapping[str, int]) -> tuple[Bar, ...]:
    total = sum(wins.values())
    return tuple(Bar(_roles(who.split(" + ")), who, count, count / total) for who, count in wins.items())


def drawn(chart: Chart, name: str) -> str:
    return svg.inlined(chart.figure, name, chart.title, chart.notes)


def _roles(backends: Sequence[str]) -> tuple[str, ...]:
    return tuple(style_of(name).role for name in backends)


def _maps(rows: Sequence[Row]) -> Iterator[Map]:
    """One for each setting: a line per size, a column per length."""
    settings: dict[str, list[Row]] = {}
    for row in rows:
        settings.setdefault(row.place.setting, []).append(row)
    for setting, found in settings.items():
        lengths = tuple(sorted({row.place.seq_len for row in found}))
        sizes = dict.fromkeys(row.place.size for row in found)
        at = {(row.place.size, row.place.seq_len): _field(row) for row in found}
        yield Map(setting, lengths, tuple((size, tuple(at.get((size, seq_len), Field()) for seq_len in lengths)) for size in sizes))


def _field(row: Row) -> Field:
    if row.winner is None:
        return Field((), "none", "", "no candidate passed")
    told = [row.winner.label, f"{numbers.factor(row.over_default)} the untuned default" if row.over_default else ""]
    told.append(f"next: {row.rival.who}, {numbers.factor(row.over_rival)} its time" if row.rival else "")
    mark = {"stale": "stale", "ignored": "ignored"}.get(row.state.kind, "")
    return Field(_roles(row.winner.backends), row.winner.who, numbers.time_us(row.winner.us), "; ".join(word for word in told if word), mark)


def _panel(rows: Sequence[Row], chart: Chart, name: str, size: str, setting: str) -> Panel:
    several = len({row.place.line for row in rows}) > 1 or not setting
    return Panel(size, setting, drawn(chart, name), tuple(_numbers(row, several) for row in rows))


def _numbers(row: Row, several: bool) -> tuple[str, str, tuple[Candidate, ...]]:
    """A length's title, its sentence, and its candidates."""
    title = numbers.amount(row.place.seq_len, "token")
    title = f"{row.place.setting} · {row.place.size} · {title}" if several else title
    told = []
    if row.winner is not None:
        told.append(f"{'Tuned choice' if row.decided else 'Fastest'} {row.winner.label}: {_timed(row.winner)}")
    if row.default is not None and not row.kept_default:
        told.append(f"untuned default {row.default.label}: {_timed(row.default)}")
    elif row.kept_default:
        told.append("the untuned default")
    elif row.default_reason:
        told.append(f"untuned default unknown: {row.default_reason}")
    if row.reference_us is not None:
        told.append(f"the contract’s plain reference, once: {numbers.time_us(row.reference_us)}")
    if row.floor is not None:
        told.append(f"floor {numbers.time_us(row.floor.us)}, set by {row.floor.bound}: {numbers.percent(row.share)}")
    if row.origin == "user":
        told.append("from the user’s cache")
    if row.state.kind in ("stale", "ignored"):
        told.append(f"{row.state.kind}: {row.state.reason}")
    members = row.winner.label.split(" + ") if row.winner is not None else []
    listed = [
        Candidate(
            one.label + (" (saves states)" if one.saves_states else ""), style_of(one.backend).role, one.direction if row.place.regime == "training" else "",
            numbers.time_us(one.us), "one run" if one.us is not None and one.spread is None else numbers.percent(one.spread),
            numbers.mib(one.peak_mib), numbers.error(one.error),
            f"{one.status}: {one.reason}" if one.status != "ok" else "",
            one.status == "ok" and _is_member(members, one.label, one.direction),
        )
        for one in row.tried
    ]  # fmt: skip
    if not listed:
        listed = [
            Candidate(one.label, style_of(one.backends[0]).role, "", numbers.time_us(one.us), numbers.percent(one.spread), numbers.mib(one.peak_mib), "", "",
                      row.winner is not None and one.label == row.winner.label)
            for one in row.best
        ]  # fmt: skip
    return title, "; ".join(told) + ".", tuple(listed)


def _is_member(members: Sequence[str], label: str, direction: str) -> bool:
    return bool(members) and label == members[-1 if direction == "backward" else 0]


def _timed(one: Timed) -> str:
    return numbers.time_us(one.us) + ("" if one.spread is None else f" ± {numbers.percent(one.spread)}")
