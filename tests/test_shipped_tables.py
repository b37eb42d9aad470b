"""The tables that ship: sound files under their device's one name, whose every row can be asked for, names kernels that exist, and is of today's code.

A row whose code changed is left out at dispatch until `titans-backends tune` on that device measures it again; the last test names such rows.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.triton_tables import machine_of
from titans_backends import registry
from titans_backends.backend import Candidate
from titans_backends.buckets import Bucket, bucket_of, defaults_of
from titans_backends.cache import file, paths
from titans_backends.cache.schema import SCHEMA, Entry, Table
from titans_backends.cache.source_hash import join_hashes, source_hash
from titans_backends.cache.table_text import dump_table
from titans_backends.cache.timings import dump_timings
from titans_backends.device_names import slug_of
from titans_backends.machine import Machine
from titans_backends.offers import source_modules
from titans_backends.tuning.gate import taken
from titans_backends.tuning.problem import signature_of_bucket
from titans_backends.tuning.standing import measurement_of
from titans_backends.tuning.suite import hostile_cases, suite_key

SHIPPED = paths.shipped_paths()


@pytest.fixture(params=SHIPPED, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@functools.lru_cache(maxsize=8)
def table_at(path: Path) -> Table:
    loaded = file.read(path, defaults_of)
    assert loaded.table is not None, loaded.problem
    return loaded.table


@functools.lru_cache(maxsize=1024)
def offered(backend: str, bucket: Bucket, machine: Machine) -> tuple[Candidate, ...]:
    """Every candidate of a backend for a bucket on that card, installed here or not; none where it refuses."""
    module, verdict = registry.module(registry.get(backend), bucket.op)
    assert module is not None, verdict
    signature = signature_of_bucket(bucket, machine.kind)
    assert module.supports(signature, machine), f"{backend} refuses {bucket}: {module.supports(signature, machine)}"
    training = registry.trainable(module) if signature.regime == "training" else None
    backward = () if training is None else training.backward_candidates(signature, machine)
    return (*module.candidates(signature, machine), *backward)


def named(entry: Entry) -> Iterator[tuple[str, str, tuple[tuple[str, object], ...]]]:
    """Direction, name and parameters of each candidate that a row names."""
    yield "forward", entry.use, entry.params
    if entry.backward is not None:
        yield "backward", entry.backward, entry.backward_params


def found(bucket: Bucket, entry: Entry, machine: Machine) -> list[Candidate | None]:
    """The row's candidates as the code of today offers them; None where one is gone."""
    return [
        next(
            (
                one
                for one in offered(name.partition("/")[0], bucket, machine)
                if (one.direction, one.name, one.params, one.saves_states) == (direction, name, params, entry.saves_states)
            ),
            None,
        )
        for direction, name, params in named(entry)
    ]


def gone(table: Table) -> list[str]:
    """The rows that name what is not offered."""
    machine = machine_of(table)
    return [f"{bucket.op} at {bucket.seq_len}: {entry.label}" for bucket, entry in table.rows.items() if None in found(bucket, entry, machine)]


def changed(table: Table) -> list[str]:
    """The rows whose code is not the code that was measured."""
    machine, lines = machine_of(table), []
    for bucket, entry in table.rows.items():
        hashes = [source_hash(source_modules(one, bucket.op)) for one in found(bucket, entry, machine) if one is not None]
        today = functools.reduce(join_hashes, hashes) if hashes else ""
        if today != entry.source:
            lines.append(f"{bucket.op} at {bucket.seq_len} {dict(bucket.when)}: {entry.label}, source {entry.source}, now {today}")
    return lines


def test_there_is_a_shipped_table() -> None:
    assert SHIPPED


def test_the_file_is_sound_and_written_as_it_would_be_written_again(path: Path) -> None:
    assert table_at(path).schema == SCHEMA
    assert dump_table(table_at(path), defaults_of) == path.read_text(encoding="utf-8")


def test_the_device_stands_under_its_one_name(path: Path) -> None:
    device = table_at(path).device
    assert (device.slug, path.stem) == (slug_of(device.name), slug_of(device.name))
    assert device.kind != "cuda" or (device.sm and device.sms), "which relatives may borrow the rows hangs on these"


def test_every_row_can_be_asked_for(path: Path) -> None:
    table = table_at(path)
    assert [b for b in table.rows if bucket_of(signature_of_bucket(b, table.device.kind)) != b] == []
    assert [b for b, entry in table.rows.items() if entry.us <= 0 or entry.spread < 0 or entry.peak_mib < 0] == []


def test_every_kernel_and_parameter_exists(path: Path) -> None:
    assert gone(table_at(path)) == []


def test_a_kernel_or_parameter_that_is_gone_is_named(path: Path) -> None:
    table = table_at(path)
    bucket, entry = next((b, e) for b, e in table.rows.items() if e.backward is not None)
    assert gone(replace(table, rows={bucket: entry})) == []
    broken = (replace(entry, use=f"{entry.use.partition('/')[0]}/of another time"), replace(entry, params=(("block", 3),)))
    for row in (*broken, replace(entry, backward_params=(("block", 3),))):
        assert len(gone(replace(table, rows={bucket: row}))) == 1


def test_a_row_ends_between_its_own_length_and_the_next(path: Path) -> None:
    rows = table_at(path).rows
    ends = {bucket: entry.until for bucket, entry in rows.items() if entry.until is not None}
    assert len(ends) > 30
    for bucket, (longer, last) in ends.items():
        lengths = sorted(other.seq_len for other in rows if other._replace(seq_len=bucket.seq_len) == bucket)
        assert lengths[lengths.index(bucket.seq_len) + 1] == longer
        assert bucket.seq_len <= last < longer


def test_every_row_is_of_todays_code(path: Path) -> None:
    table = table_at(path)
    bucket, entry = next(iter(table.rows.items()))
    assert len(changed(replace(table, rows={bucket: replace(entry, source="000000000000")}))) == 1
    lines = changed(table)
    assert lines == [], f"{len(lines)} rows are left out at dispatch; on {table.device.name} type: titans-backends tune --output {path.name}"


MEASURED = sorted((Path(__file__).parent.parent / "benchmarks" / "results").glob("*.timings.yaml"))


@pytest.mark.parametrize("measured", MEASURED, ids=lambda path: path.stem)
def test_the_measurements_of_a_shipped_table_are_sound(measured: Path) -> None:
    """They say what is in doubt; a hash of digits alone, for one, has to be quoted."""
    loaded = file.read_timings(measured, defaults_of)
    assert loaded.table is not None, loaded.problem
    assert dump_timings(loaded.table, defaults_of) == measured.read_text(encoding="utf-8")


@pytest.mark.parametrize("measured", MEASURED, ids=lambda path: path.stem)
def test_what_was_measured_hands_on_by_the_name_of_today(measured: Path) -> None:
    """By that name a report pairs both directions: one that is measured again would find no partner among the older ones."""
    loaded = file.read_timings(measured, defaults_of)
    tables = [table_at(path) for path in SHIPPED if path.stem == measured.name.removesuffix(".timings.yaml")]
    assert loaded.table is not None
    wrong, seen = list[str](), 0
    for bucket, timed in loaded.table.rows.items():
        for one in (one for one in timed if one.residual.startswith("cupy/") and tables):
            known = {measurement_of(each).identity: each.residual for each in offered("cupy", bucket, machine_of(tables[0]))}
            seen += one.identity in known
            if known.get(one.identity, one.residual) != one.residual:
                wrong.append(f"{bucket.op} at {bucket.seq_len}: {one.label} hands on {one.residual!r}, today {known[one.identity]!r}")
    assert seen or not tables
    assert wrong == []


def test_no_candidate_of_a_shipped_tables_rows_passes_the_gate_unexamined(path: Path) -> None:
    """Each that a backend offers there takes at least one hostile case."""
    table = table_at(path)
    machine, seen, without = machine_of(table), set[tuple[Bucket, Candidate]](), list[str]()
    for bucket in table.rows:
        key = suite_key(bucket)
        cases = list(hostile_cases(key))
        for backend in (one for one in (registry.get("cupy"), registry.get("triton")) if bucket.op in one.ops):
            module, verdict = registry.module(backend, bucket.op)
            assert module is not None, verdict
            if not module.supports(signature_of_bucket(bucket, machine.kind), machine):
                continue
            for candidate in offered(backend.name, bucket, machine):
                if (key, candidate) not in seen:
                    seen.add((key, candidate))
                    if not any(taken(bucket, candidate, module, machine, machine.kind, cases)):
                        without.append(f"{candidate.label} at {bucket}")
    assert seen
    assert without == []
