"""The rows of cache tables that name the Triton or the CuPy backend: the call that each was measured on, and its candidate as the code of today offers it."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import cast

from tests.triton_machines import CARDS
from titans_backends.backend import Candidate, TrainableOpModule
from titans_backends.buckets import Bucket, defaults_of
from titans_backends.cache import file, paths
from titans_backends.cache.schema import Entry, Table
from titans_backends.machine import Machine
from titans_backends.tuning.problem import signature_of_bucket

__all__ = ["candidates_of", "gone", "machine_of", "named", "rows", "shipped"]


def shipped() -> list[Table]:
    """Every shipped table; one that cannot be read is a failure."""
    return [table_at(path) for path in paths.shipped_paths()]


def table_at(path: Path) -> Table:
    """The table of a file."""
    loaded = file.read(path, defaults_of)
    assert loaded.table is not None, loaded.problem
    return loaded.table


GPU = ("triton", "cupy")
"""The backends whose rows are looked at."""


def rows(table: Table, backends: tuple[str, ...] = ("triton",)) -> Iterator[tuple[Bucket, Entry]]:
    """The buckets whose forward is one of the backends', and their entries."""
    for bucket, entry in table.rows.items():
        if entry.use.split("/")[0] in backends:
            yield bucket, entry


def _module(candidate: str, op: str) -> TrainableOpModule:
    return cast(TrainableOpModule, import_module(f"titans_backends.backends.{candidate.split('/')[0]}.{op}"))


def machine_of(table: Table) -> Machine:
    """The card that a table was measured on; the memory that its blocks may have is its architecture's."""
    device = table.device
    shared = CARDS[device.sm].shared_memory_bytes if device.sm in CARDS else None
    return Machine(device.kind, device.name, device.slug, device.sm, device.sms, shared)


def candidate_of(bucket: Bucket, entry: Entry, machine: Machine) -> Candidate | None:
    """The row's candidate among those that its op offers now; None where it is gone."""
    offered = _module(entry.use, bucket.op).candidates(signature_of_bucket(bucket, "cuda"), machine)
    return next((one for one in offered if (one.name, one.params, one.saves_states) == (entry.use, entry.params, entry.saves_states)), None)


def backward_of(bucket: Bucket, entry: Entry, machine: Machine) -> Candidate | None:
    """The same of a training row's backward."""
    offered = _module(str(entry.backward), bucket.op).backward_candidates(signature_of_bucket(bucket, "cuda"), machine)
    return next(
        (one for one in offered if (one.name, one.params, one.saves_states) == (entry.backward, entry.backward_params, entry.saves_states)), None
    )


def candidates_of(bucket: Bucket, entry: Entry, machine: Machine, backends: tuple[str, ...] = ("triton",)) -> list[Candidate | None]:
    """What of a row the backends run, as it is offered now."""
    found = [candidate_of(bucket, entry, machine)] if entry.use.split("/")[0] in backends else []
    return [*found, backward_of(bucket, entry, machine)] if (entry.backward or "").split("/")[0] in backends else found


def named(bucket: Bucket, entry: Entry) -> str:
    """A row for people."""
    return f"{bucket.op} {dict(bucket.when)} at {bucket.seq_len}: {entry.use} {dict(entry.params)}"


def gone(table: Table) -> list[str]:
    """The rows whose kernel or candidate no longer exists, a line each."""
    machine = machine_of(table)
    return [named(bucket, entry) for bucket, entry in rows(table, GPU) if None in candidates_of(bucket, entry, machine, GPU)]
