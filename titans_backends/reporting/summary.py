"""What the rows say together: wins, gains, shares of the floor, what must be renewed, who refused or failed. Pure functions of rows."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from titans_backends.reporting.rows import Row

__all__ = [
    "BEHIND",
    "Failure",
    "Renewal",
    "Summary",
    "by_op",
    "curves_of",
    "failures",
    "geometric_mean",
    "noisy",
    "refusals",
    "renewals",
    "summarize",
]

BEHIND = 1.05
"""Beyond this the winner's median is worth another measurement: the faster candidate was within the noise, or the noise was large."""


@dataclass(frozen=True, slots=True)
class Summary:
    """Some rows in a few numbers. `wins` by backend, a pair of two under both names, most first; a mean is None where nothing counts.

    `over_default` and `kept` are over the `compared` rows whose default was in the race, `over_rival` and `over_eager` over the rows that
    know such a time (`rivals`, `eagers`); gains are geometric means, shares medians. `stale` and `ignored` count rows of that state.
    `behind`: rows whose winner is over `BEHIND` times the least median of its race, `most_behind` the largest such factor.
    """

    rows: int
    wins: Mapping[str, int]
    compared: int
    kept: int
    over_default: float | None
    most_over_default: Row | None
    over_eager: float | None
    over_rival: float | None
    rivals: int
    eagers: int
    stale: int
    ignored: int
    behind: int
    most_behind: float | None
    share_graph: float | None
    share_eager: float | None
    share_training: float | None


@dataclass(frozen=True, slots=True)
class Renewal:
    """Rows of one curve that are stale or decide nothing any more."""

    kind: str
    where: str
    seq_lens: tuple[int, ...]
    reason: str
    command: str


@dataclass(frozen=True, slots=True)
class Failure:
    """A reason that kept something from a race, with everything that it kept: once, however often it was said."""

    op: str
    who: str
    what: str
    reason: str
    buckets: int
    largest_error: float | None = None


def geometric_mean(values: Iterable[float]) -> float | None:
    """Of positive numbers; None of nothing."""
    logs = [math.log(value) for value in values if value > 0]
    return math.exp(statistics.fmean(logs)) if logs else None


def summarize(rows: Sequence[Row]) -> Summary:
    """The numbers of some rows."""
    wins = Counter(row.winner.who for row in rows if row.winner is not None)
    compared = [row for row in rows if row.over_default is not None]
    behind = [row.behind for row in rows if row.behind is not None and row.behind > BEHIND]
    return Summary(
        rows=len(rows),
        wins=dict(wins.most_common()),
        compared=len(compared),
        kept=sum(row.kept_default for row in compared),
        over_default=_mean(compared, lambda row: row.over_default),
        most_over_default=max(compared, key=lambda row: row.over_default or 0.0, default=None),
        over_eager=_mean(rows, lambda row: row.over_eager),
        over_rival=_mean(rows, lambda row: row.over_rival),
        rivals=sum(row.over_rival is not None for row in rows),
        eagers=sum(row.over_eager is not None for row in rows),
        stale=sum(row.state.kind == "stale" for row in rows),
        ignored=sum(row.state.kind == "ignored" for row in rows),
        behind=len(behind),
        most_behind=max(behind, default=None),
        share_graph=_median(rows, "inference", "graph"),
        share_eager=_median(rows, "inference", "eager"),
        share_training=_median(rows, "training"),
    )


def by_op(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each op, in their order."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.place.op, []).append(row)
    return found


def curves_of(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of one setting and size together, in their order."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        found.setdefault(row.place.line, []).append(row)
    return list(found.values())


def renewals(rows: Iterable[Row]) -> list[Renewal]:
    """What is stale or ignored, the lengths of one curve with one reason together. A command that names one length is made to name all."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.state.kind in ("stale", "ignored"):
            groups.setdefault((row.state.kind, _where(row), row.state.reason), []).append(row)
    return [
        Renewal(
            kind, where, tuple(row.place.seq_len for row in found), reason, _command([row.place.seq_len for row in found], found[0].state.command)
        )
        for (kind, where, reason), found in groups.items()
    ]


def noisy(rows: Iterable[Row]) -> list[Renewal]:
    """Rows that are `behind`, the worst first: what is faster, by how much, how wide the winner's interval is, and the command that measures again."""
    found = sorted((row for row in rows if (row.behind or 1.0) > BEHIND), key=lambda row: -(row.behind or 1.0))
    return [Renewal("noisy", _where(row), (row.place.seq_len,), _noise(row), f"{row.renew} --force" if row.renew else "") for row in found]


def _where(row: Row) -> str:
    return " · ".join([row.place.op, row.place.setting, row.place.size])


def _noise(row: Row) -> str:
    assert row.winner is not None
    assert row.fastest is not None
    own, other = (f" ± {100 * one.spread:.0f} %" if one.spread is not None else "" for one in (row.winner, row.fastest))
    return f"{row.fastest.label} took {row.fastest.us:.4g} µs{other}, the choice, {row.winner.label}, {row.winner.us:.4g} µs{own}"


def failures(rows: Iterable[Row]) -> list[Failure]:
    """Candidates that failed or were refused in a race, by op, candidate and reason, the most frequent first."""
    found: dict[tuple[str, str, str, str], list[float | None]] = {}
    for row in rows:
        for one in row.tried:
            if one.status != "ok":
                found.setdefault((row.place.op, one.label, f"{one.direction}, {one.status}", one.reason), []).append(one.error)
    told = [
        Failure(op, label, what, reason, len(errors), max((error for error in errors if error is not None), default=None))
        for (op, label, what, reason), errors in found.items()
    ]
    return sorted(told, key=lambda one: (-one.buckets, one.op, one.who))


def refusals(rows: Iterable[Row]) -> list[Failure]:
    """Backends that were not in a race, by op, backend and reason."""
    found = Counter((row.place.op, one.backend, one.reason) for row in rows for one in row.refusals)
    return [Failure(op, backend, "", reason, count) for (op, backend, reason), count in sorted(found.items(), key=lambda item: item[0])]


def _command(seq_lens: Sequence[int], command: str) -> str:
    one = f"--seq-lens {seq_lens[0]} "
    return f"{command} ".replace(one, f"--seq-lens {','.join(map(str, seq_lens))} ").rstrip()


def _mean(rows: Iterable[Row], value: Callable[[Row], float | None]) -> float | None:
    return geometric_mean(found for row in rows if (found := value(row)) is not None)


def _median(rows: Iterable[Row], regime: str, launch: str | None = None) -> float | None:
    shares = [row.share for row in rows if row.share is not None and row.place.regime == regime and launch in (None, row.place.launch)]
    return statistics.median(shares) if shares else None
