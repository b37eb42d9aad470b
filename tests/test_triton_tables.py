"""Every kernel that a shipped table names still exists, with the parameters that it was measured with."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec

import pytest

from tests.triton_forms import module_of
from tests.triton_machines import H100
from tests.triton_tables import gone, machine_of, rows, shipped
from titans_backends.buckets import Bucket
from titans_backends.cache.schema import Entry, Environment, Table, device_of
from titans_backends.tuning.plan import plan
from titans_backends.tuning.problem import signature_of_bucket

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="the package triton is not installed: pip install -c constraints.txt -e '.[test]'"
)


def planned() -> tuple[Bucket, ...]:
    """A few buckets of the default grid, of every op that the backend has."""
    return plan(
        "cuda",
        ops=tuple(import_module("titans_backends.backends.triton").BACKEND.ops),
        seq_lens=(512, 8192),
        regimes=("inference",),
        launches=("eager",),
    )


def table(**changes: object) -> Table:
    """A table that names each bucket's last candidate of today, with entries changed."""
    entries: dict[Bucket, Entry] = {}
    for bucket in planned():
        last = list(module_of(bucket.op).candidates(signature_of_bucket(bucket, "cuda"), H100))[-1]
        entries[bucket] = replace(Entry(last.name, 1.0, 0.01, 1.0, last.params, env="a"), **changes)  # type: ignore[arg-type]
    return Table(device_of(H100), {"a": Environment("0", "0")}, entries)


def test_no_row_of_a_shipped_table_names_a_kernel_that_is_gone() -> None:
    assert [line for one in shipped() for line in gone(one)] == []


def test_a_table_of_todays_candidates_is_whole() -> None:
    assert len(list(rows(table()))) == len(planned())
    assert gone(table()) == []


@pytest.mark.parametrize("change", [{"use": "triton/of another time"}, {"params": (("block", 3),)}])
def test_a_variant_or_a_parameter_that_is_gone_is_named(change: dict[str, object]) -> None:
    lines = gone(table(**change))
    assert len(lines) == len(planned())
    assert all(str(value).split("/")[-1] in lines[0] for value in change.values() if isinstance(value, str))


def test_rows_of_other_backends_are_left_alone() -> None:
    other = table(use="eager/chunked")
    assert list(rows(other)) == []
    assert machine_of(other) == replace(H100, slug=other.device.slug)


def test_a_training_row_whose_backward_is_gone_is_named() -> None:
    [one] = [table for table in shipped() if table.device.slug == H100.slug]
    bucket, entry = next((bucket, entry) for bucket, entry in rows(one) if (entry.backward or "").startswith("triton/"))
    assert gone(replace(one, rows={bucket: entry})) == []
    assert len(gone(replace(one, rows={bucket: replace(entry, backward_params=(("block", 3),))}))) == 1
