"""Grades of staleness: the driver alone is nothing, torch or triton mark a row, a changed or vanished source takes it out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from titans_backends.cache.schema import IF_RACED, Bucket, Entry, Environment
from titans_backends.cache.staleness import grade

THEN = Environment("0.1.0", "2.11.0", triton="3.6.0", cuda="13.0", driver="580.1", date="2026-01-01")
ENTRY = Entry("cupy/fused", 1.0, 0.0, 0.0, params=(("rows", 64),), env="a", source="1a2b")
BUCKET = Bucket("slow_core", (("streams", 1),), 512)


@pytest.mark.parametrize(
    ("changes", "source", "kind", "reason"),
    [
        ({}, "1a2b", "fresh", ""),
        ({"driver": "600.0", "date": "2027-01-01", "titans_backends": "0.2", "cuda": "13.1"}, "1a2b", "fresh", ""),
        ({"torch": "2.12.0"}, "1a2b", "stale", "measured with torch 2.11.0, now 2.12.0"),
        ({"triton": None}, "1a2b", "stale", "measured with triton 3.6.0, now absent"),
        ({"numba": "0.68.1"}, "1a2b", "stale", "measured with numba absent, now 0.68.1"),
        ({"cupy": "14.2.0", "numba_cuda": "0.30.4"}, "1a2b", "fresh", ""),  # the row names neither: none of their candidates was in its race
        ({"torch": "2.12.0"}, "ffff", "ignored", "cupy/fused rows=64 has changed since (source 1a2b, now ffff)"),
        ({}, None, "ignored", "cupy/fused rows=64 is no longer there"),
    ],
)
def test_staleness_is_graded_and_says_how_to_renew(changes, source, kind, reason):
    found = grade(BUCKET, ENTRY, THEN, replace(THEN, **changes), source)
    assert (found.kind, found.reason) == (kind, reason)
    assert found.command == ("" if kind == "fresh" else "titans-backends tune --op slow_core --seq-lens 512")
    assert found.usable == (kind != "ignored")


@pytest.mark.parametrize("name", IF_RACED)
def test_a_row_that_names_a_version_is_stale_with_another_and_fresh_without(name):
    then = replace(THEN, **{name: "14.2.0"})
    assert grade(BUCKET, ENTRY, then, then, "1a2b").kind == "fresh"
    assert grade(BUCKET, ENTRY, then, replace(then, **{name: None}), "1a2b").kind == "fresh"
    found = grade(BUCKET, ENTRY, then, replace(then, **{name: "15.0.0"}), "1a2b")
    assert (found.kind, found.reason) == ("stale", f"measured with {name} 14.2.0, now 15.0.0")
