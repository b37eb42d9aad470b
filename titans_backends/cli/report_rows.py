"""The rows of `report` for people and for `--json`: a line per op for the one, every bucket with every candidate for the other."""

from __future__ import annotations

import math

from rich.console import Console
from rich.text import Text

from titans_backends.cli.keys import key_json
from titans_backends.cli.show import Column, Group, Json, command, heading, say, table
from titans_backends.reporting import numbers
from titans_backends.reporting.facts import Facts, FileFacts, MachineFacts
from titans_backends.reporting.race_rows import RaceRow, race_headline, race_rows
from titans_backends.reporting.rows import Row, Timed, Tried, rows_of
from titans_backends.reporting.summary import Renewal, Summary, by_op, failures, noisy, refusals, renewals, summarize

__all__ = ["report_json", "show_report"]

_RENEWALS = 8
"""So many groups of rows to renew are printed; a table of an older version may have a hundred."""


def report_json(facts: Facts) -> Json:
    """Everything that the page shows, with every digit; times in microseconds, gains as factors, shares as fractions, null where nothing is known."""
    return {
        "titans_backends": facts.version,
        "made": facts.made,
        "machines": [_machine_json(machine) for machine in facts.machines],
        "races": [{"path": one.path, "rows": [_race_json(row) for row in race_rows(one.race)]} for one in facts.races],
        "problems": [_file_json(one) for one in facts.problems],
    }


def show_report(out: Console, facts: Facts) -> None:
    """A line per op of each machine, then what to renew, and the files that are not used."""
    if not facts.machines:
        say(out, "no table has a row; to measure this machine: titans-backends tune")
    columns = [Column("op"), Column("won by", flexible=True)]
    columns += [Column(title, "right") for title in ("rows", "vs default", "vs next", "vs eager", "floor")]
    for machine in facts.machines:
        rows = rows_of(machine)
        about = f"{machine.device.name}{' (this machine)' if machine.here else ''}"
        lines = [[op, *_cells(summarize(found), found)] for op, found in {**by_op(rows), "all": rows}.items()]
        table(out, columns, [Group(Text(about, "bold"), lines)])
        to_renew = renewals(rows)
        for one in to_renew[:_RENEWALS]:
            say(out, Text(f"{one.kind}: {one.where}: {', '.join(map(str, one.seq_lens))}: {one.reason}", "yellow"))
            if one.command:
                command(out, one.command)
        if len(to_renew) > _RENEWALS:
            more = f"{len(to_renew) - _RENEWALS} more such groups of rows to renew; --output and --json list them all"
            say(out, Text(more, "yellow"))
        failed = failures(rows)
        if failed:
            say(
                out,
                Text(
                    f"{numbers.amount(sum(one.buckets for one in failed), 'candidate')} failed in a race; their reasons stand on the page", "yellow"
                ),
            )
        out.print()
    say(
        out,
        Text(
            "gains over the untuned default, the next backend and plain torch are geometric means, over the rows that know such a time; "
            "floor: the largest share of what the machine's ceilings allow",
            "dim",
        ),
    )
    for race in facts.races:
        out.print()
        for sentence in race_headline(race_rows(race.race)):
            say(out, sentence)
    if facts.problems:
        heading(out, "files that are not used")
        for problem in facts.problems:
            say(out, Text(f"{problem.path}: {problem.problem}", "yellow"))


def _cells(found: Summary, rows: list[Row]) -> list[str | Text]:
    wins = ", ".join(f"{who} {count}" for who, count in found.wins.items())
    share = max((row.share for row in rows if row.share is not None), default=None)
    gains = [f"{one:.2f}×" if one is not None else "" for one in (found.over_default, found.over_rival, found.over_eager)]
    return [Text(wins, "green"), str(found.rows), *gains, "" if share is None else numbers.percent(share)]


def _machine_json(machine: MachineFacts) -> Json:
    rows, ceilings = rows_of(machine), machine.ceilings
    device = machine.device
    return {
        "device": {name: getattr(device, name) for name in ("kind", "slug", "name", "sm", "sms", "threads", "isa")},
        "here": machine.here,
        "files": [_file_json(one) for one in machine.files],
        "ceilings": None if ceilings is None else {**ceilings.rates, "sources": list(ceilings.sources)},
        "repeated": machine.repeated,
        "summary": _summary_json(summarize(rows)),
        "rows": [_row_json(row) for row in rows],
        "renewals": [_renewal_json(one) for one in (*renewals(rows), *noisy(rows))],
        "failures": [
            {"op": one.op, "candidate": one.who, "what": one.what, "reason": one.reason, "buckets": one.buckets, "error": _finite(one.largest_error)}
            for one in failures(rows)
        ],
        "refusals": [{"op": one.op, "backend": one.who, "reason": one.reason, "buckets": one.buckets} for one in refusals(rows)],
    }


def _summary_json(found: Summary) -> Json:
    return {
        "rows": found.rows,
        "wins": {**found.wins},
        "compared_with_default": found.compared,
        "kept_default": found.kept,
        "gain_over_default": found.over_default,
        "gain_over_eager": found.over_eager,
        "gain_over_next_backend": found.over_rival,
        "compared_with_next_backend": found.rivals,
        "compared_with_eager": found.eagers,
        "stale": found.stale,
        "ignored": found.ignored,
        "behind_fastest": found.behind,
        "share_of_floor": {"graph": found.share_graph, "eager": found.share_eager, "training": found.share_training},
    }


def _row_json(row: Row) -> Json:
    return {
        **key_json(row.bucket),
        "origin": row.origin,
        "decided": row.decided,
        "winner": _timed_json(row.winner),
        "best_of_each_backend": [_timed_json(one) for one in row.best],
        "fastest": _timed_json(row.fastest),
        "default": _timed_json(row.default),
        "default_unknown": row.default_reason,
        "reference_us": row.reference_us,
        "gain_over_default": row.over_default,
        "gain_over_eager": row.over_eager,
        "gain_over_next_backend": row.over_rival,
        "floor_us": None if row.floor is None else row.floor.us,
        "floor_set_by": None if row.floor is None else row.floor.bound,
        "share_of_floor": row.share,
        "state": row.state.kind,
        "why": row.state.reason,
        "renew": row.renew,
        "candidates": [_tried_json(one) for one in row.tried],
    }


def _race_json(one: RaceRow) -> Json:
    row = one.row
    return {
        **key_json(row.bucket),
        "heads": row.place.size,
        "fastest": _timed_json(one.fastest),
        "best_of_each_backend": [_timed_json(best) for best in row.best],
        "tuned": _timed_json(row.winner),
        "costs_over_fastest": {**one.costs},
        "costs_over_fastest_backend": {**one.beside},
        "default": _timed_json(row.default),
        "floor_us": None if row.floor is None else row.floor.us,
    }


def _timed_json(one: Timed | None) -> Json:
    if one is None:
        return None
    return {"label": one.label, "backends": list(one.backends), "median_us": one.us, "spread": one.spread, "peak_mib": one.peak_mib}


def _tried_json(one: Tried) -> Json:
    found: dict[str, Json] = {name: getattr(one, name) for name in ("label", "direction", "status", "reason", "saves_states", "spread", "peak_mib")}
    return {**found, "median_us": one.us, "error": _finite(one.error)}


def _renewal_json(one: Renewal) -> Json:
    return {"kind": one.kind, "where": one.where, "seq_lens": list(one.seq_lens), "reason": one.reason, "command": one.command}


def _file_json(one: FileFacts) -> Json:
    return {"origin": one.origin, "path": one.path, "holds": one.holds, "problem": one.problem}


def _finite(value: float | None) -> float | str | None:
    """JSON has no infinity: it is the word."""
    return value if value is None or math.isfinite(value) else "infinite"
