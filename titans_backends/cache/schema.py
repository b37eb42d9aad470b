"""What a cache file holds, as frozen values, and the pure operations on it: merge, diff, prune.

A bucket is (op, when, seq_len). `when` is canonical: fields sorted by name, those that equal their op's default left out, so that
one call has one key. Nothing here reads a file or knows YAML.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args, overload

from titans_backends.device_names import canonical

if TYPE_CHECKING:
    from titans_backends.machine import Machine

__all__ = [
    "ALWAYS",
    "IF_RACED",
    "OBJECTIVES",
    "SCHEMA",
    "Bucket",
    "Change",
    "DefaultsOf",
    "Device",
    "Entry",
    "Environment",
    "Objective",
    "Params",
    "Table",
    "When",
    "WhenValue",
    "canonical_when",
    "device_of",
    "diff",
    "full_when",
    "join_environments",
    "letters",
    "merge",
    "prune",
    "rounded",
]

SCHEMA = 1
"""The file format that this version writes; it reads this one and none above."""

IF_RACED = ("cupy", "numba_cuda")
"""Versions that an environment has only where a candidate of its race needed the package."""

ALWAYS = ("dtype", "head_dim", "streams")
"""Fields of `when` that every row has, unless the op lists a default for them."""

Objective = Literal["time", "memory"]
"""What decides a race: the least time, or the least peak and then the time."""
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)

WhenValue = str | int | bool | float | tuple[int, ...] | None
When = tuple[tuple[str, WhenValue], ...]
Params = tuple[tuple[str, int | float | str | bool], ...]
DefaultsOf = Callable[[str], Mapping[str, WhenValue] | None]
"""Every field of an op's key that has a default; None (or KeyError) for an op that this version does not know."""


class Bucket(NamedTuple):
    """The full key of one row."""

    op: str
    when: When
    seq_len: int


@dataclass(frozen=True, slots=True)
class Device:
    """The device that a file was measured on; `kind` and `slug` identify it, the rest is for people."""

    kind: str
    slug: str
    name: str
    sm: int | None = None
    sms: int | None = None
    threads: int | None = None
    isa: str | None = None

    def same(self, other: Device) -> bool:
        """Whether rows of the one hold on the other: one kind of card under any of its names, never a card and a slice of it."""
        return self.kind == other.kind and (self.slug == other.slug or canonical(self.slug) == canonical(other.slug))


@dataclass(frozen=True, slots=True)
class Environment:
    """The versions that a row was measured with; `date` is an ISO day and does not tell two environments apart.

    cupy and numba_cuda stand only where a candidate that needs them was in the race.
    """

    titans_backends: str
    torch: str
    triton: str | None = None
    numba: str | None = None
    cupy: str | None = None
    numba_cuda: str | None = None
    cuda: str | None = None
    driver: str | None = None
    python: str | None = None
    date: str | None = None

    def same(self, other: Environment) -> bool:
        """Whether the versions agree, whatever the day."""
        return replace(self, date=None) == replace(other, date=None)

    def of_race(self, packages: Collection[str]) -> Environment:
        """The same without cupy or numba_cuda where the candidates of a race needed other packages alone."""
        return replace(self, cupy=self.cupy if "cupy" in packages else None, numba_cuda=self.numba_cuda if "numba_cuda" in packages else None)


@dataclass(frozen=True, slots=True)
class Entry:
    """The winner of one bucket. What was measured has four significant digits, in memory as in the file.

    `us` is the median in microseconds (of forward and backward together for a training pair), `spread` the half-width of its
    95 % interval over the median, `next` the runner-up. `doubt`: noise decided, and another may save this share of the time;
    None where nobody may save more than 5 %. `objective` and `max_memory_mib` are what the tune was asked for beside the bucket.
    `env` is a letter of the table's environments, `source` the winner's source hash, for a pair both, joined by "+".
    `saves_states`: the pair's forward hands chunk-start states to its backward. `until`: the next longer row's length, and up to which length this row
    speaks for a call between the two; where it is None the nearer one in log2 does.
    """

    use: str
    us: float
    spread: float
    peak_mib: float
    params: Params = ()
    backward: str | None = None
    backward_params: Params = ()
    saves_states: bool = False
    next: str | None = None
    next_us: float | None = None
    doubt: float | None = None
    objective: Objective = "time"
    max_memory_mib: float | None = None
    until: tuple[int, int] | None = None
    env: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        for name in ("us", "spread", "peak_mib", "next_us", "doubt"):
            object.__setattr__(self, name, rounded(getattr(self, name)))

    @property
    def label(self) -> str:
        """The winner for people: `cupy/fused rows=64 + eager/chunked`."""
        forward = " ".join([self.use, *(f"{key}={value}" for key, value in self.params)])
        if self.backward is None:
            return forward
        return " ".join([forward, "+", self.backward, *(f"{key}={value}" for key, value in self.backward_params)])

    @property
    def tuned_with(self) -> str:
        """What was typed so that this won and not the fastest: `--objective memory --max-memory 500`; empty where time alone decided."""
        limit = "" if self.max_memory_mib is None else f"--max-memory {str(self.max_memory_mib).removesuffix('.0')}"
        return " ".join(words for words in (f"--objective {self.objective}" if self.objective != "time" else "", limit) if words)


@dataclass(frozen=True, slots=True)
class Table:
    """One file: a device, the environments by letter, and one entry per bucket."""

    device: Device
    environments: Mapping[str, Environment]
    rows: Mapping[Bucket, Entry]
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        object.__setattr__(self, "environments", dict(self.environments))
        object.__setattr__(self, "rows", dict(self.rows))
        for bucket, entry in self.rows.items():
            if entry.env not in self.environments:
                known = ", ".join(self.environments) or "none"
                raise ValueError(f"{bucket.op} at seq_len {bucket.seq_len}: env {entry.env!r} is not among the table's environments ({known})")

    def environment(self, entry: Entry) -> Environment:
        """The environment that an entry of this table was measured in."""
        return self.environments[entry.env]


@dataclass(frozen=True, slots=True)
class Change:
    """One bucket that differs between two tables; None where a table lacks it."""

    bucket: Bucket
    old: Entry | None
    new: Entry | None


def device_of(machine: Machine) -> Device:
    """What a file records of a machine."""
    return Device(machine.kind, machine.slug, machine.name, machine.sm, machine.sms, machine.threads, machine.isa)


def canonical_when(given: Mapping[str, WhenValue] | When, defaults: Mapping[str, WhenValue]) -> When:
    """The key as rows hold it: sorted by name, without what equals its default."""
    kept = {name: value for name, value in dict(given).items() if name not in defaults or defaults[name] != value}
    return tuple(sorted(kept.items(), key=lambda item: item[0]))


def full_when(when: Mapping[str, WhenValue] | When, defaults: Mapping[str, WhenValue]) -> When:
    """The key with every field, for people: sorted by name, the defaults filled in."""
    return tuple(sorted({**defaults, **dict(when)}.items(), key=lambda item: item[0]))


@overload
def rounded(number: float) -> float: ...


@overload
def rounded(number: float | None) -> float | None: ...


def rounded(number: float | None) -> float | None:
    """To four significant digits, so that a number is the same after it was written and read; no -0.0."""
    return None if number is None else float(f"{number:.4g}") + 0.0


def letters() -> Iterator[str]:
    """a, b, ... z, aa, ab, ..."""
    for length in itertools.count(1):
        for combination in itertools.product(string.ascii_lowercase, repeat=length):
            yield "".join(combination)


def join_environments(older: Mapping[str, Environment], newer: Mapping[str, Environment]) -> tuple[dict[str, Environment], dict[str, str]]:
    """Both sets under one lettering, and the newer set's letters in it.

    The older letters stay; equal environments share a letter, with the later of the two days.
    """
    joined, renamed = dict(older), dict[str, str]()
    for letter, environment in newer.items():
        twin = next((key for key, known in joined.items() if known.same(environment)), None)
        if twin is None:
            twin = letter if letter not in joined else next(key for key in letters() if key not in joined)
            joined[twin] = environment
        elif (environment.date or "") > (joined[twin].date or ""):
            joined[twin] = environment
        renamed[letter] = twin
    return joined, renamed


def merge(older: Table, newer: Table) -> Table:
    """Both tables' rows, the newer winning where both have a bucket; environments without a row go. ValueError for two devices."""
    if not older.device.same(newer.device):
        raise ValueError(f"tables of two devices do not merge: {older.device.kind} {older.device.slug} and {newer.device.kind} {newer.device.slug}")
    taken = {bucket: entry for bucket, entry in older.rows.items() if bucket not in newer.rows}
    joined, renamed = join_environments(_used(older.environments, taken), _used(newer.environments, newer.rows))
    rows = taken | {bucket: replace(entry, env=renamed[entry.env]) for bucket, entry in newer.rows.items()}
    return Table(newer.device, joined, {bucket: _forgetful(bucket, entry, taken, newer.rows) for bucket, entry in rows.items()})


def _forgetful(bucket: Bucket, entry: Entry, taken: Collection[Bucket], newer: Collection[Bucket]) -> Entry:
    """The entry without its `until` where the row that it looks to is the other table's: its choice may be another than it was then."""
    if entry.until is None:
        return entry
    longer = bucket._replace(seq_len=entry.until[0])
    return entry if longer in (taken if bucket in taken else newer) else replace(entry, until=None)


def diff(old: Table, new: Table) -> list[Change]:
    """The buckets whose entry or environment differs, in no particular order; letters and days do not count."""

    def content(table: Table, bucket: Bucket) -> tuple[Entry, Environment] | None:
        entry = table.rows.get(bucket)
        return None if entry is None else (replace(entry, env=""), replace(table.environment(entry), date=None))

    buckets = dict.fromkeys([*old.rows, *new.rows])
    return [Change(bucket, old.rows.get(bucket), new.rows.get(bucket)) for bucket in buckets if content(old, bucket) != content(new, bucket)]


def prune(table: Table, keep: Callable[[Bucket, Entry], bool]) -> Table:
    """The table with only the rows that `keep` accepts, and only the environments that they need."""
    rows = {bucket: entry for bucket, entry in table.rows.items() if keep(bucket, entry)}
    return replace(table, environments=_used(table.environments, rows), rows=rows)


def _used(environments: Mapping[str, Environment], rows: Mapping[Bucket, Entry]) -> dict[str, Environment]:
    used = {entry.env for entry in rows.values()}
    return {letter: environment for letter, environment in environments.items() if letter in used}
