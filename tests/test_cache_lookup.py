"""Lookup laws: exact first, then the nearest streams within a factor of 2, then the nearest length inside the tuned range, or a miss."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titans_backends.cache.lookup import Difference, Hit, Miss, lookup
from titans_backends.cache.schema import Bucket, Device, Entry, Environment, Table, canonical_when

DEFAULTS = {"group": 1, "launch": "eager"}


def key(streams, **fields):
    return canonical_when({"dtype": "float32", "head_dim": (64, 64), "streams": streams, **fields}, DEFAULTS)


def table(*cells, op="slow_core", **fields):
    rows = {Bucket(op, key(streams, **fields), seq_len): Entry("a/b", streams + seq_len / 1e6, 0, 0, env="a") for streams, seq_len in cells}
    return Table(Device("cpu", "c", "c"), {"a": Environment("0", "2")}, rows)


def find(tuned, streams, seq_len, **fields):
    return lookup(tuned, "slow_core", key(streams, **fields), seq_len, DEFAULTS)


@pytest.mark.parametrize(
    ("asked", "kind", "found"),
    [
        ((16, 512), "exact", (16, 512)),
        ((16, 1000), "nearest", (16, 512)),
        ((16, 1024), "nearest", (16, 2048)),  # between 512 and 2048 in log2: the longer
        ((32, 600), "nearest", (64, 512)),  # between 16 and 64: the larger
        ((31, 600), "nearest", (16, 512)),
        ((128, 512), "nearest", (64, 512)),
    ],
)
def test_nearest_row_in_log2_with_ties_to_the_larger(asked, kind, found):
    hit = find(table((16, 512), (16, 2048), (64, 512), (64, 2048)), *asked)
    assert (hit.kind, (hit.streams, hit.seq_len)) == (kind, found)
    assert hit.entry.us == pytest.approx(found[0] + found[1] / 1e6, rel=1e-3)


@pytest.mark.parametrize(("asked", "found"), [(513, 512), (700, 512), (701, 2048), (2047, 2048), (2049, 2048), (4096, 8192)])
def test_between_two_lengths_the_times_of_both_decide_where_the_shorter_row_has_them(asked, found):
    tuned = table((16, 512), (16, 2048), (16, 8192))
    rows = {bucket: replace(entry, until=(2048, 700)) if bucket.seq_len == 512 else entry for bucket, entry in tuned.rows.items()}
    hit = find(replace(tuned, rows=rows), 16, asked)
    assert (hit.kind, hit.seq_len) == ("nearest", found)
    told = "between 512 and 2048 the choice changes after 700, by the times of both at either"
    assert hit.why == (told if asked < 2048 else "")


def test_an_end_at_a_row_that_is_no_neighbour_any_more_says_nothing():
    tuned = table((16, 512), (16, 1024), (16, 2048))
    rows = {bucket: replace(entry, until=(2048, 2000)) if bucket.seq_len == 512 else entry for bucket, entry in tuned.rows.items()}
    assert find(replace(tuned, rows=rows), 16, 900).seq_len == 1024
    assert find(replace(tuned, rows=rows), 32, 512).seq_len == 512, "other streams, a tuned length"


def test_an_end_before_its_own_row_says_nothing():
    tuned = table((16, 512), (16, 2048))
    rows = {bucket: replace(entry, until=(2048, 100)) if bucket.seq_len == 512 else entry for bucket, entry in tuned.rows.items()}
    hit = find(replace(tuned, rows=rows), 16, 600)
    assert (hit.seq_len, hit.why) == (512, "")


@pytest.mark.parametrize(
    ("streams", "seq_len", "reason"),
    [
        (16, 511, "seq_len 511 is outside the tuned range, 512 to 2048 at streams 16"),
        (16, 2049, "outside the tuned range"),
        (16, 0, "outside the tuned range"),
        (33, 512, "streams 33 is not within a factor of 2 of a tuned one (16)"),
        (7, 512, "not within a factor of 2"),
        (0, 512, "not within a factor of 2"),
    ],
)
def test_beyond_what_was_tuned_is_a_miss_with_its_reason(streams, seq_len, reason):
    miss = find(table((16, 512), (16, 2048)), streams, seq_len)
    assert isinstance(miss, Miss)
    assert reason in miss.reason


def test_a_miss_names_the_closest_keys_field_by_field():
    miss = find(table((8, 512), (32, 512), (32, 64)), 16, 512, group=2)
    assert miss.reason == "no row with this key"
    assert [row.seq_lens for row in miss.closest] == [(64, 512), (512,)]
    assert miss.closest[0].differences == (Difference("group", 2, 1), Difference("streams", 16, 32))


def test_the_closest_keys_are_sought_when_they_are_read_and_not_by_a_call(monkeypatch):
    def sought(*_):
        raise AssertionError("of a table of 1,400 rows that takes 2 ms, twice a first call")

    monkeypatch.setattr("titans_backends.cache.lookup._closest", sought)
    miss = find(table((8, 512), (32, 512)), 16, 512, group=2)
    assert miss.reason == "no row with this key"
    with pytest.raises(AssertionError, match="2 ms"):
        _ = miss.closest


def test_another_op_is_no_answer():
    miss = find(table((16, 512), op="fast_core"), 16, 512)
    assert (miss.reason, miss.closest) == ("no row for slow_core", ())


def test_full_and_canonical_keys_find_the_same_row():
    tuned = table((16, 512))
    assert lookup(tuned, "slow_core", {**DEFAULTS, **dict(key(16))}, 512, DEFAULTS) == find(tuned, 16, 512)


sizes = st.integers(1, 4096)


@settings(max_examples=200, deadline=None)
@given(st.sets(st.tuples(sizes, sizes), min_size=1, max_size=8), sizes, sizes)
def test_no_tuned_row_is_nearer_than_the_one_found(cells, streams, seq_len):
    found = find(table(*cells), streams, seq_len)
    near = [tuned for tuned, _ in cells if max(tuned, streams) <= 2 * min(tuned, streams)]
    if (streams, seq_len) in cells:
        assert found.kind == "exact"
    if isinstance(found, Miss):
        assert not near or all(not min(lengths) <= seq_len <= max(lengths) for lengths in [_lengths(cells, _nearest(near, streams))])
        return
    assert isinstance(found, Hit)
    assert (found.streams, found.seq_len) in cells
    assert found.streams == _nearest(near, streams)
    lengths = _lengths(cells, found.streams)
    assert min(lengths) <= seq_len <= max(lengths)
    assert found.seq_len == _nearest(lengths, seq_len)


def _lengths(cells, streams):
    return [seq_len for tuned, seq_len in cells if tuned == streams]


def _nearest(tuned, asked):
    """By exact comparison: a is nearer than b when (a/asked or its inverse) is smaller, ties to the larger."""
    best = max(tuned)
    for value in tuned:
        (top, bottom), (best_top, best_bottom) = sorted((value, asked))[::-1], sorted((best, asked))[::-1]
        if top * best_bottom < best_top * bottom or (top * best_bottom == best_top * bottom and value > best):
            best = value
    assert math.isfinite(best)
    return best
