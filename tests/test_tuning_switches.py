"""Where a choice changes between two lengths: the crossing of two straight lines in logarithms, and which rows of a table get one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from titans_backends.backend import Backend, Candidate
from titans_backends.buckets import Bucket
from titans_backends.cache.schema import Entry
from titans_backends.cache.timings import Measurement
from titans_backends.offers import Offer
from titans_backends.tuning.problem import signature_of_bucket
from titans_backends.tuning.standing import Standing, measurement_of
from titans_backends.tuning.switches import crossing, switches
from titans_backends.verdict import ACCEPTED

KEY = Bucket("fast_core", (("dtype", "float32"), ("head_dim", (8, 8)), ("streams", 2)), 0)
ONE, OTHER = Candidate("eager", "one"), Candidate("eager", "other")


@pytest.mark.parametrize(
    ("at_shorter", "at_longer", "last"),
    [
        ((10.0, 20.0), (40.0, 20.0), 1024),  # each gains as much at its own length: the middle in log2
        ((10.0, 10.1), (40.0, 20.0), 522),  # hardly at the shorter one
        ((10.0, 20.0), (20.2, 20.0), 2008),
        ((10.0, 9.0), (40.0, 20.0), 512),  # kept there as the default, though slower
        ((10.0, 20.0), (19.0, 20.0), 2047),
        ((10.0, 10.0), (20.0, 20.0), None),
    ],
)
def test_the_choice_changes_where_the_lines_cross(at_shorter: tuple[float, float], at_longer: tuple[float, float], last: int | None) -> None:
    assert crossing(512, 2048, at_shorter, at_longer) == last


positive = st.floats(0.5, 1e6)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the first float of a process may take a second
@given(st.integers(1, 10**6), st.integers(1, 10**6), positive, positive, st.floats(-2, 2), st.floats(-2, 2))
def test_of_two_power_laws_the_faster_one_is_taken_everywhere_between(shorter: int, more: int, a: float, b: float, x: float, y: float) -> None:
    longer = shorter + more
    one, other = (lambda length: a * (length / shorter) ** x), (lambda length: b * (length / shorter) ** y)
    if not (one(shorter) < 0.999 * other(shorter) and 0.999 * one(longer) > other(longer)):
        return
    last = crossing(shorter, longer, (one(shorter), other(shorter)), (one(longer), other(longer)))
    assert last is not None
    assert shorter <= last < longer
    assert one(last) <= other(last) * (1 + 1e-6)
    if last + 1 < longer:
        assert other(last + 1) <= one(last + 1) * (1 + 1e-6)


def standing(length: int, us: Mapping[Candidate, float | None]) -> Standing:
    bucket = KEY._replace(seq_len=length)
    offer = Offer(Backend("eager", "", 1, {"fast_core": "x.y"}, 0, {}), ACCEPTED, None, (ONE, OTHER), ())
    current: dict[Candidate, Measurement] = {c: replace(measurement_of(c), status="ok", us=each) for c, each in us.items() if each is not None}
    return Standing(bucket, signature_of_bucket(bucket, "cpu"), (offer,), {ONE: "", OTHER: ""}, current)


def row(candidate: Candidate, **changes: object) -> Entry:
    return replace(Entry(candidate.name, 1.0, 0.0, 0.0), **changes)  # type: ignore[arg-type]


TIMES: dict[int, dict[Candidate, float | None]] = {512: {ONE: 10.0, OTHER: 20.0}, 2048: {ONE: 40.0, OTHER: 20.0}, 8192: {ONE: 160.0, OTHER: 20.0}}


def found(
    rows: Mapping[int, Entry], times: Mapping[int, Mapping[Candidate, float | None]] = TIMES, refused: int | None = None
) -> dict[int, tuple[int, int] | None]:
    told = switches(
        {KEY._replace(seq_len=length): entry for length, entry in rows.items()},
        lambda bucket: bucket._replace(seq_len=0) == KEY,
        lambda bucket: None if bucket.seq_len == refused else standing(bucket.seq_len, times[bucket.seq_len]),
    )
    return {bucket.seq_len: until for bucket, until in told.items()}


def test_a_row_ends_where_the_next_ones_choice_becomes_the_faster() -> None:
    rows = {512: row(ONE), 2048: row(OTHER), 8192: row(OTHER)}
    assert found(rows) == {512: (2048, 1024)}
    assert found({**rows, 512: row(ONE, until=(2048, 1024))}) == {}, "nothing is written that stands there"
    assert found({**rows, 2048: row(OTHER, until=(8192, 4000)), 8192: row(OTHER, until=(9000, 8500))}) == {512: (2048, 1024), 2048: None, 8192: None}


@pytest.mark.parametrize("changes", [{"objective": "memory"}, {"max_memory_mib": 500.0}])
def test_who_was_not_chosen_by_time_alone_ends_nowhere(changes: dict[str, object]) -> None:
    assert found({512: row(ONE, **changes), 2048: row(OTHER)}) == {}
    assert found({512: row(ONE, until=(2048, 600)), 2048: row(OTHER, **changes)}) == {512: None}


def test_a_choice_that_was_not_timed_at_both_lengths_says_nothing() -> None:
    assert found({512: row(ONE), 2048: row(OTHER)}, {**TIMES, 2048: {ONE: None, OTHER: 20.0}}) == {}
    assert found({512: row(ONE), 2048: row(OTHER)}, refused=2048) == {}


def test_what_was_measured_earlier_stands_where_the_times_are_gone_or_of_other_versions() -> None:
    gone: dict[int, dict[Candidate, float | None]] = {length: {} for length in TIMES}
    rows = {512: row(ONE, until=(2048, 600)), 2048: row(OTHER)}
    assert found(rows, gone) == found(rows, refused=2048) == {}
    assert found({**rows, 2048: row(OTHER, use="eager/gone")}) == {}, "its backend may be disabled today"
    assert found({**rows, 1024: row(ONE)}, {**gone, 1024: {}}) == {512: None}, "another row is the next one"
    assert found({**rows, 2048: row(ONE)}, gone) == {512: None}, "one choice at both"


def test_rows_of_other_keys_are_left_alone() -> None:
    other = KEY._replace(when=(("dtype", "bfloat16"), *KEY.when[1:]))
    rows = {other._replace(seq_len=length): row(candidate, until=(4096, 3000)) for length, candidate in ((512, ONE), (2048, OTHER))}
    assert switches(rows, lambda bucket: bucket.when == KEY.when, lambda bucket: standing(bucket.seq_len, TIMES[bucket.seq_len])) == {}


def test_the_middle_is_that_of_logarithms() -> None:
    assert crossing(100, 10_000, (1.0, 2.0), (2.0, 1.0)) == math.isqrt(100 * 10_000)
