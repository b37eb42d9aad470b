"""Every candidate's numbers, kept beside the winners: `<slug>.timings.yaml`, one line per measurement.

Selection reads it, so that a new candidate does not re-time the old ones. A failed or refused candidate is a measurement too: it
stands here with its reason and the size of its error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from titans_backends.cache import emit
from titans_backends.cache.document import Document, dump_document, dump_params, parse_document, parse_params
from titans_backends.cache.nodes import Cursor
from titans_backends.cache.schema import Bucket, DefaultsOf, Device, Environment, Params, join_environments, rounded

__all__ = ["Measurement", "Timings", "dump_timings", "merge_timings", "parse_timings", "prune_timings"]

Direction = Literal["forward", "backward"]
Status = Literal["ok", "failed", "refused"]

_HEADER = (
    "titans_backends: every candidate's measurements; the winners stand in the file without `.timings`. Written by `titans-backends tune`.",
    "us: median in microseconds of `samples` runs; spread: half-width of the 95 % interval / median; peak_mib: peak memory beyond the inputs",
    "in MiB; compile_s: seconds to the first result; errors: per output, the error against the reference as the gate measured it.",
)
_FIELDS = (
    *("candidate", "params", "direction", "saves_states", "residual", "status", "reason"),
    *("us", "spread", "samples", "peak_mib", "compile_s", "errors", "env", "source"),
)
_REQUIRED = ("candidate", "direction", "status", "env")


@dataclass(frozen=True, slots=True)
class Measurement:
    """What came of one candidate in one bucket: numbers where `status` is ok, a `reason` otherwise.

    The numbers have four significant digits, in memory as in the file.
    """

    candidate: str
    params: Params = ()
    direction: Direction = "forward"
    saves_states: bool = False
    status: Status = "ok"
    reason: str = ""
    us: float | None = None
    spread: float | None = None
    samples: int | None = None
    peak_mib: float | None = None
    compile_s: float | None = None
    errors: tuple[tuple[str, float], ...] = ()
    env: str = ""
    source: str = ""
    residual: str = ""

    def __post_init__(self) -> None:
        for name in ("us", "spread", "peak_mib", "compile_s"):
            object.__setattr__(self, name, rounded(getattr(self, name)))
        object.__setattr__(self, "errors", tuple((output, rounded(error)) for output, error in self.errors))

    @property
    def identity(self) -> tuple[str, Params, Direction, bool]:
        """What a newer measurement must share to replace this one; the order of the parameters does not matter."""
        return (self.candidate, tuple(sorted(self.params, key=lambda param: param[0])), self.direction, self.saves_states)

    @property
    def lacked_memory(self) -> bool:
        """Whether it failed for want of memory, which is of that moment: what else is on the device, and what the tuner held."""
        return self.status == "failed" and "out of memory" in self.reason.lower()

    @property
    def label(self) -> str:
        """The candidate for people: `eager/chunked chunk_size=64`."""
        return " ".join([self.candidate, *(f"{key}={value}" for key, value in self.params)])


@dataclass(frozen=True, slots=True)
class Timings:
    """One timings file: a device, the environments by letter, and the measurements of each bucket."""

    device: Device
    environments: Mapping[str, Environment]
    rows: Mapping[Bucket, tuple[Measurement, ...]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "environments", dict(self.environments))
        object.__setattr__(self, "rows", {bucket: tuple(found) for bucket, found in self.rows.items() if found})
        for bucket, found in self.rows.items():
            for measurement in found:
                if measurement.env not in self.environments:
                    known = ", ".join(self.environments) or "none"
                    place = f"{bucket.op} at seq_len {bucket.seq_len}, {measurement.label}"
                    raise ValueError(f"{place}: env {measurement.env!r} is not among the environments ({known})")

    def environment(self, measurement: Measurement) -> Environment:
        """The environment that a measurement of this file was taken in."""
        return self.environments[measurement.env]


def merge_timings(older: Timings, newer: Timings) -> Timings:
    """Both files' measurements, the newer winning where both have one of the same identity. ValueError for two devices."""
    if not older.device.same(newer.device):
        raise ValueError(f"timings of two devices do not merge: {older.device.kind} {older.device.slug} and {newer.device.kind} {newer.device.slug}")
    joined, renamed = join_environments(older.environments, newer.environments)
    rows = dict(older.rows)
    for bucket, found in newer.rows.items():
        fresh = [replace(measurement, env=renamed[measurement.env]) for measurement in found]
        by_identity = {measurement.identity: measurement for measurement in [*rows.get(bucket, ()), *fresh]}
        rows[bucket] = tuple(by_identity.values())
    return Timings(newer.device, _used(joined, rows), rows)


def prune_timings(timings: Timings, keep: Callable[[Bucket, Measurement], bool]) -> Timings:
    """The timings with only the measurements that `keep` accepts, and only the environments that they need."""
    rows = {bucket: tuple(one for one in found if keep(bucket, one)) for bucket, found in timings.rows.items()}
    return replace(timings, environments=_used(timings.environments, rows), rows=rows)


def parse_timings(text: str, origin: str, defaults_of: DefaultsOf, expected: Device | None = None) -> Timings:
    """Timings from their text; raises as `parse_table` does."""
    document = parse_document(text, origin, defaults_of, _parse_cell, expected)
    return Timings(document.device, document.environments, document.cells)


def dump_timings(timings: Timings, defaults_of: DefaultsOf) -> str:
    """The text of a timings file, the measurements of a bucket sorted by candidate."""
    cells = {
        bucket: ["", *(f"          - {_dump(one, repr(one.params))}" for one in sorted(found, key=_order))] for bucket, found in timings.rows.items()
    }
    return dump_document(_HEADER, Document(timings.device, timings.environments, cells), defaults_of)


def _used(environments: Mapping[str, Environment], rows: Mapping[Bucket, tuple[Measurement, ...]]) -> dict[str, Environment]:
    used = {measurement.env for found in rows.values() for measurement in found}
    return {letter: environment for letter, environment in environments.items() if letter in used}


def _order(measurement: Measurement) -> tuple[str, ...]:
    return (measurement.candidate, dump_params(measurement.params), measurement.direction, str(measurement.saves_states))


def _parse_cell(cursor: Cursor, environments: Mapping[str, Environment]) -> tuple[Measurement, ...]:
    found: dict[tuple[str, Params, Direction, bool], Measurement] = {}
    for item in cursor.items():
        measurement = _parse(item, environments)
        if measurement.identity in found:
            raise item.error(f"{measurement.label} ({measurement.direction}) stands in this bucket twice")
        found[measurement.identity] = measurement
    return tuple(found.values())


def _parse(cursor: Cursor, environments: Mapping[str, Environment]) -> Measurement:
    found = cursor.fields(_FIELDS, required=_REQUIRED)
    direction: Direction = "backward" if found["direction"].choice(("forward", "backward")) == "backward" else "forward"
    statuses: dict[str, Status] = {"ok": "ok", "failed": "failed", "refused": "refused"}
    return Measurement(
        candidate=found["candidate"].candidate(),
        params=parse_params(found["params"]) if "params" in found else (),
        direction=direction,
        saves_states=found["saves_states"].flag() if "saves_states" in found else False,
        status=statuses[found["status"].choice(statuses)],
        reason=found["reason"].text() if "reason" in found else "",
        us=found["us"].quantity() if "us" in found else None,
        spread=found["spread"].quantity() if "spread" in found else None,
        samples=found["samples"].integer(0) if "samples" in found else None,
        peak_mib=found["peak_mib"].quantity() if "peak_mib" in found else None,
        compile_s=found["compile_s"].quantity() if "compile_s" in found else None,
        errors=tuple((key.text(), value.number()) for key, value in found["errors"].mapping()) if "errors" in found else (),
        env=found["env"].choice(environments),
        source=found["source"].text() if "source" in found else "",
        residual=found["residual"].text() if "residual" in found else "",
    )


@functools.lru_cache(maxsize=32768)  # of a large file a tuner changes a few lines at a time
def _dump(one: Measurement, _params: str) -> str:
    """One line; `_params` tells measurements apart that are equal but not alike: 1, 1.0 and True."""
    fields = [
        ("candidate", emit.scalar(one.candidate)),
        ("params", dump_params(one.params) if one.params else ""),
        ("direction", one.direction),
        ("saves_states", "true" if one.saves_states else ""),
        ("residual", emit.scalar(one.residual) if one.residual else ""),
        ("status", one.status),
        ("reason", emit.scalar(one.reason) if one.reason else ""),
        *_numbers([("us", one.us), ("spread", one.spread)]),
        ("samples", str(one.samples) if one.samples is not None else ""),
        *_numbers([("peak_mib", one.peak_mib), ("compile_s", one.compile_s)]),
        ("errors", emit.flow_mapping(_numbers(one.errors)) if one.errors else ""),
        ("env", emit.scalar(one.env)),
        ("source", emit.scalar(one.source) if one.source else ""),
    ]
    return emit.flow_mapping((name, text) for name, text in fields if text)


def _numbers(pairs: Iterable[tuple[str, float | None]]) -> list[tuple[str, str]]:
    return [(name, emit.scalar(value) if value is not None else "") for name, value in pairs]
