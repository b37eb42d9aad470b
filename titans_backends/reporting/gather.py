"""Gathers the facts of a report: the tables in the order in which calls ask them, their timings, ceilings, and the backends' answers.

Reads only, and never sets a damaged file aside. What a file holds or lacks is a fact, not an error.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from titans_backends import __version__, switches
from titans_backends.buckets import Bucket, defaults_of
from titans_backends.cache import file, paths
from titans_backends.cache.repeats import repeats, twin_of
from titans_backends.cache.schema import Device, Entry, Table, device_of
from titans_backends.cache.staleness import Staleness
from titans_backends.cache.timings import Measurement, Timings
from titans_backends.machine import Machine
from titans_backends.reporting.answers import Answers, answers, machine_of
from titans_backends.reporting.ceilings import ceilings_in
from titans_backends.reporting.facts import Ceilings, Facts, FileFacts, MachineFacts, Measured, Origin, RaceFacts, State
from titans_backends.reporting.floors import work_of_bucket
from titans_backends.reporting.race_file import read_race
from titans_backends.reporting.race_rows import OP

__all__ = ["Edge", "gather"]

_Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Edge:
    """What a report is gathered from.

    `here` is this machine. `grade` says whether one of its rows holds, `renew` gives the command that measures a bucket again. `results` is a folder
    of benchmark results, `ops` limits the ops, `ceilings` are those of this machine where they were measured just now.
    """

    here: Machine
    grade: Callable[[Machine, Table, Bucket, Entry], Staleness]
    renew: Callable[[Bucket], str]
    results: Path | None = None
    ops: Collection[str] | None = None
    ceilings: Ceilings | None = None


@dataclass(slots=True)
class _Gathered:
    """What the files say of one device, in the order of precedence."""

    device: Device
    tables: list[tuple[Origin, Table, Timings | None]] = field(default_factory=list)
    loose: list[Timings] = field(default_factory=list)
    files: list[FileFacts] = field(default_factory=list)


def gather(edge: Edge) -> Facts:
    """Every fact of a report; this machine first, then those with a table, by name."""
    found: dict[_Key, _Gathered] = {}
    problems: list[FileFacts] = []
    for origin, path in _tables():
        _take_table(edge, origin, path, found, problems)
    for path in sorted(edge.results.glob("*.timings.yaml")) if edge.results is not None else ():
        _take_results(path, found, problems)
    measured = {} if edge.results is None else ceilings_in(edge.results)
    machines = [_machine(edge, one, measured) for one in found.values()]
    machines = [one for one in machines if one.cells or any(seen.problem for seen in one.files)]
    machines.sort(key=lambda one: (not one.here, all(cell.origin == "results" for cell in one.cells), one.device.name))
    races = tuple(_races(edge, problems))
    return Facts(tuple(machines), datetime.date.today().isoformat(), __version__, tuple(problems), races)


def _races(edge: Edge, problems: list[FileFacts]) -> Iterator[RaceFacts]:
    """The race of all backends and peers, where the results hold one and its op is asked for."""
    path = None if edge.results is None else edge.results / "race.json"
    if path is None or not path.exists() or (edge.ops is not None and OP not in edge.ops):
        return
    try:
        yield RaceFacts(_shown("results", path), read_race(path))
    except (OSError, ValueError) as error:
        problems.append(FileFacts("results", _shown("results", path), "", str(error)))


def _tables() -> Iterator[tuple[Origin, Path]]:
    """Every table that a call could ask: the named file, the user's cache folder, the shipped ones."""
    named = switches.current().cache
    if named is not None:
        yield "named", named
    for path in sorted(paths.user_cache_path("x").parent.glob("*.yaml")):
        if not path.name.endswith(".timings.yaml"):
            yield "user", path
    for path in paths.shipped_paths():
        yield "shipped", path


def _take_table(edge: Edge, origin: Origin, path: Path, found: dict[_Key, _Gathered], problems: list[FileFacts]) -> None:
    loaded = file.read(path, defaults_of)
    if loaded.table is None:
        reason = loaded.reason or "there is no such file"
        problems.append(FileFacts(origin, _shown(origin, path), "", reason))
        return
    device = loaded.table.device
    if origin == "user" and path.name != paths.user_cache_path(device.slug).name:
        reason = f"it holds rows of {device.slug}, and no call of that device looks under this name; they are left out"
        problems.append(FileFacts(origin, _shown(origin, path), "", reason))
        return
    mine = found.setdefault((device.kind, device.slug), _Gathered(device))
    mine.files.append(FileFacts(origin, _shown(origin, path), _count(len(loaded.table.rows), "row")))
    beside = paths.timings_path(path)
    timings = _timings(origin, beside, device, mine.files)
    if timings is None and edge.results is not None:
        timings = _timings("results", edge.results / beside.name, device, mine.files)
    mine.tables.append((origin, loaded.table, timings))


def _timings(origin: Origin, path: Path, device: Device, files: list[FileFacts]) -> Timings | None:
    loaded = file.read_timings(path, defaults_of, device)
    if loaded.problem is not None:
        files.append(FileFacts(origin, _shown(origin, path), "", loaded.reason))
    elif loaded.table is not None:
        files.append(FileFacts(origin, _shown(origin, path), _count(sum(map(len, loaded.table.rows.values())), "timing")))
    return loaded.table


def _take_results(path: Path, found: dict[_Key, _Gathered], problems: list[FileFacts]) -> None:
    """The timings of a device that has no table at all."""
    if any(seen.path == _shown("results", path) for one in found.values() for seen in one.files):
        return
    loaded = file.read_timings(path, defaults_of)
    if loaded.table is None:
        reason = loaded.reason or "it went away"
        problems.append(FileFacts("results", _shown("results", path), "", reason))
        return
    device = loaded.table.device
    mine = found.setdefault((device.kind, device.slug), _Gathered(device))
    if not mine.tables:
        mine.loose.append(loaded.table)
        mine.files.append(
            FileFacts("results", _shown("results", path), f"{_count(sum(map(len, loaded.table.rows.values())), 'timing')}, and no table")
        )


def _machine(edge: Edge, one: _Gathered, measured: Mapping[str, Ceilings]) -> MachineFacts:
    here = one.device.same(device_of(edge.here))
    machine = edge.here if here else machine_of(one.device)
    cells: dict[Bucket, Measured] = {}
    for origin, table, timings in one.tables:
        for bucket, entry in table.rows.items():
            if edge.ops is None or bucket.op in edge.ops:
                cell = _cell(edge, machine, here, origin, table, timings, bucket, entry)
                if bucket not in cells or (cells[bucket].state.kind == "ignored" and cell.state.kind != "ignored"):
                    cells[bucket] = cell
    for timings in one.loose:
        for bucket, measurements in timings.rows.items():
            if edge.ops is None or bucket.op in edge.ops:
                cells.setdefault(bucket, _told(answers(bucket, machine, here), Measured(bucket, "results", measurements=measurements)))
    kept = {bucket: cell for bucket, cell in cells.items() if not _repeats(cell, cells)}
    tables = [found for _, table, _ in one.tables for found in table.environments.values()]
    environments = (*tables, *(found for timings in one.loose for found in timings.environments.values()))
    ceilings = edge.ceilings if here and edge.ceilings is not None else measured.get(one.device.name)
    return MachineFacts(
        one.device, here, tuple(kept.values()), tuple(one.files), tuple(dict.fromkeys(environments)), ceilings, len(cells) - len(kept)
    )


def _cell(edge: Edge, machine: Machine, here: bool, origin: Origin, table: Table, timings: Timings | None, bucket: Bucket, entry: Entry) -> Measured:
    asked = answers(bucket, machine, here)
    if here:
        found = edge.grade(machine, table, bucket, entry)
        state = State(found.kind, found.reason, "" if found.kind == "fresh" else found.command)
    else:
        state = asked.state(entry, table.environment(entry))
    renew = "" if asked.problem else " ".join(word for word in (edge.renew(bucket), entry.tuned_with) if word)
    if state.command:
        state = replace(state, command=renew)
    measurements = _race(timings, bucket, entry)
    return _told(asked, Measured(bucket, origin, entry, table.environment(entry), measurements, state, renew=renew))


def _told(asked: Answers, cell: Measured) -> Measured:
    """The cell with what the backends say, and its work."""
    default, reason = asked.default(cell.measurements) if cell.measurements else (None, "its timings are not kept here")
    try:
        work = work_of_bucket(cell.bucket)
    except (KeyError, ValueError):  # an op, or a field of the key, of another version
        work = None
    refusals = asked.refusals(cell.measurements) if cell.measurements else ()
    return replace(cell, default=default, default_reason=reason, work=work, refusals=refusals)


def _race(timings: Timings | None, bucket: Bucket, entry: Entry) -> tuple[Measurement, ...]:
    """The measurements that the row was chosen from: those of the bucket, if the winner is among them with the row's own source."""
    if timings is None:
        return ()
    found = timings.rows.get(bucket) or tuple(one for one in timings.rows.get(twin_of(bucket), ()) if not one.saves_states)
    sources = entry.source.split("+")
    names = [(entry.use, entry.params, "forward"), (entry.backward, entry.backward_params, "backward")][: 1 if entry.backward is None else 2]
    for (name, params, direction), source in zip(names, sources, strict=False):
        identity = (name, tuple(sorted(params)), direction, entry.saves_states)
        if not any(one.identity == identity and one.source == source for one in found):
            return ()
    return found


def _repeats(cell: Measured, cells: Mapping[Bucket, Measured]) -> bool:
    """Whether it is the row for traced graphs, which save inputs only, and says what the row beside it says."""
    rows = {bucket: one.entry for bucket in (twin_of(cell.bucket),) if (one := cells.get(bucket)) is not None and one.entry is not None}
    return cell.entry is not None and repeats(cell.bucket, cell.entry, rows)


def _shown(origin: Origin, path: Path) -> str:
    """A path for a page that may leave this machine: a shipped table by its place in the library, the home folder as `~`."""
    if origin == "shipped":
        return f"{path.parent.name}/{path.name}"
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else str(path)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"
