"""The cache's values and their text: byte-identical round trips, merge laws, and errors that name file and line."""

from __future__ import annotations

import string
from dataclasses import replace

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from titans_backends.cache import emit
from titans_backends.cache.nodes import SchemaError
from titans_backends.cache.schema import Bucket, Device, Entry, Environment, Table, canonical_when, diff, merge, prune
from titans_backends.cache.table_text import dump_table, parse_table
from titans_backends.cache.timings import Measurement, Timings, dump_timings, merge_timings, parse_timings

DEVICE = Device("cuda", "nvidia_h100", "NVIDIA H100 80GB HBM3", sm=90, sms=132)
ENVIRONMENT = Environment("0.1.0", "2.11.0", triton="3.6.0", cuda="13.0", date="2026-12-01")
DEFAULTS = {"group": 1, "launch": "eager", "chunk_size": 64, "scale": 1.0}

names = st.text(string.ascii_letters + string.digits + "_-.", min_size=1, max_size=8)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
candidates = st.builds("{}/{}".format, names, names)
microseconds = st.floats(0, 1e9)
params = st.lists(
    st.tuples(texts, st.booleans() | st.integers(-9, 99) | st.floats(allow_nan=False) | texts), max_size=3, unique_by=lambda pair: pair[0]
)
values = st.none() | st.booleans() | st.integers(-99, 99) | st.floats(allow_nan=False) | texts | st.lists(st.integers(0, 256), max_size=3).map(tuple)
whens = st.builds(
    lambda given, streams: canonical_when({"dtype": "bfloat16", "head_dim": (128, 128), **given, "streams": streams}, DEFAULTS),
    st.dictionaries(st.sampled_from(sorted(DEFAULTS)), values),
    st.integers(1, 99),
)
buckets = st.builds(Bucket, st.sampled_from(["slow_core", "fast_core"]), whens, st.integers(1, 2**20))
versions = st.sampled_from(["2.11.0", "2.12", "13.0"]) | texts
environments = st.builds(Environment, versions, versions, st.none() | versions, date=st.none() | st.dates().map(str))
entries = st.builds(
    Entry,
    use=candidates,
    us=microseconds,
    spread=microseconds,
    peak_mib=microseconds,
    params=params.map(tuple),
    backward=st.none() | candidates,
    backward_params=params.map(tuple),
    saves_states=st.booleans(),
    next=st.none() | texts,
    next_us=st.none() | microseconds,
    objective=st.sampled_from(["time", "memory"]),
    max_memory_mib=st.none() | microseconds,
    until=st.none() | st.integers(2, 2**40).flatmap(lambda longer: st.tuples(st.just(longer), st.integers(1, longer - 1))),
    env=st.sampled_from(["a", "no"]),
    source=texts,
)
measurements = st.builds(
    Measurement,
    candidate=candidates,
    params=params.map(tuple),
    direction=st.sampled_from(["forward", "backward"]),
    saves_states=st.booleans(),
    residual=texts,
    status=st.sampled_from(["ok", "failed", "refused"]),
    reason=texts,
    us=st.none() | microseconds,
    samples=st.none() | st.integers(0, 99),
    compile_s=st.none() | microseconds,
    errors=st.lists(st.tuples(names, st.floats(allow_nan=False)), max_size=2, unique_by=lambda pair: pair[0]).map(tuple),
    env=st.just("a"),
    source=texts,
)
tables = st.builds(
    lambda a, b, rows: Table(DEVICE, {"a": a, "no": b}, rows), environments, environments, st.dictionaries(buckets, entries, max_size=5)
)
lists = st.lists(measurements, min_size=1, max_size=3, unique_by=lambda one: one.identity).map(tuple)
timings = st.builds(lambda a, rows: Timings(DEVICE, {"a": a}, rows), environments, st.dictionaries(buckets, lists, max_size=3))


def defaults_of(op: str) -> dict[str, object]:
    return {"slow_core": DEFAULTS, "fast_core": DEFAULTS}[op]


def small(us: float = 12.3, **fields: object) -> Table:
    bucket = Bucket("slow_core", canonical_when({"dtype": "bfloat16", "head_dim": (128, 128), "streams": 32}, DEFAULTS), 512)
    entry = Entry("cupy/fused", us, 0.01, 1.5, params=(("rows", 64),), next="triton/fused", next_us=13.0, env="a", source="1a2b3c4d")
    return Table(DEVICE, {"a": ENVIRONMENT}, {bucket: replace(entry, **fields)})


TEXT = """\
schema: 1
device: {kind: cuda, slug: nvidia_h100, name: NVIDIA H100 80GB HBM3, sm: 90, sms: 132}
environments:
  a: {titans_backends: 0.1.0, torch: 2.11.0, triton: 3.6.0, cuda: '13.0', date: '2026-12-01'}
ops:
  slow_core:
    - when: {dtype: bfloat16, head_dim: [128, 128], streams: 32}
      by_seq_len:
        512: {use: cupy/fused, params: {rows: 64}, us: 12.3, spread: 0.01, peak_mib: 1.5, next: triton/fused, next_us: 13.0, env: a, source: 1a2b3c4d}
"""


def test_text_of_a_table_is_the_documented_one():
    text = dump_table(small(), defaults_of)
    assert "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#")) == TEXT
    assert yaml.safe_load(text)["ops"]["slow_core"][0]["by_seq_len"][512]["use"] == "cupy/fused"


def test_what_decided_is_written_where_it_was_not_time_alone_and_older_rows_are_of_time():
    ((_, old),) = parse_table(TEXT, "x", defaults_of).rows.items()
    assert (old.objective, old.max_memory_mib, old.tuned_with) == ("time", None, "")
    text = dump_table(small(objective="memory", max_memory_mib=512.5), defaults_of)
    assert "next_us: 13.0, objective: memory, max_memory_mib: 512.5, env: a" in text
    ((_, found),) = parse_table(text, "x", defaults_of).rows.items()
    assert found.tuned_with == "--objective memory --max-memory 512.5"
    assert small(max_memory_mib=12345.0).rows.popitem()[1].tuned_with == "--max-memory 12345"
    with pytest.raises(SchemaError, match="expected one of memory, time, found 'space'"):
        parse_table(text.replace("objective: memory", "objective: space"), "x", defaults_of)
    assert [change.new.objective for change in diff(small(), small(objective="memory"))] == ["memory"]


@settings(max_examples=60, deadline=None)
@given(tables)
def test_table_round_trip_is_the_same_table_and_the_same_bytes(table):
    text = dump_table(table, defaults_of)
    parsed = parse_table(text, "x", defaults_of)
    assert parsed == table
    assert dump_table(parsed, defaults_of) == text
    assert yaml.safe_load(text)["schema"] == 1
    assert sum(line.startswith("        ") for line in text.split("\n")) == len(table.rows)


@settings(max_examples=40, deadline=None)
@given(timings)
def test_timings_round_trip_is_byte_identical(content):
    text = dump_timings(content, defaults_of)
    parsed = parse_timings(text, "x", defaults_of)
    assert dump_timings(parsed, defaults_of) == text
    assert {bucket: set(found) for bucket, found in parsed.rows.items()} == {bucket: set(found) for bucket, found in content.rows.items()}
    assert sum(line.startswith("          - ") for line in text.split("\n")) == sum(map(len, content.rows.values()))


@pytest.mark.parametrize("text", ["1e5", "12345678", "1_000", "0x1f", "yes", "null", "~", "2026-12-01", "", " a", "a: b", "a #b", "it's", "-", "nan"])
def test_text_that_looks_like_something_else_is_quoted(text):
    assert emit.scalar(text)[0] in "'\""
    assert yaml.safe_load(emit.scalar(text)) == text


def test_errors_that_are_not_numbers_survive():
    (bucket,) = small().rows
    failed = Measurement("a/b", status="failed", reason="line 1\nline 2: \x00 \ud800", errors=(("o", float("nan")), ("s", float("inf"))), env="a")
    text = dump_timings(Timings(DEVICE, {"a": ENVIRONMENT}, {bucket: (failed,)}), defaults_of)
    (back,) = parse_timings(text, "x", defaults_of).rows[bucket]
    assert str(back.errors) == "(('o', nan), ('s', inf))"
    assert back.reason == "line 1\nline 2: \x00 ?"


@settings(max_examples=40, deadline=None)
@given(tables, tables)
def test_merge_keeps_every_bucket_and_the_newer_wins(older, newer):
    merged = merge(older, newer)
    assert set(merged.rows) == {*older.rows, *newer.rows}
    for bucket, entry in merged.rows.items():
        winner = newer if bucket in newer.rows else older
        assert replace(entry, env="", until=None) == replace(winner.rows[bucket], env="", until=None)
        assert entry.until in (None, winner.rows[bucket].until)
        assert merged.environment(entry).same(winner.environment(winner.rows[bucket]))
    assert set(merged.environments) == {entry.env for entry in merged.rows.values()}
    assert diff(merged, merge(merged, newer)) == []


@settings(max_examples=30, deadline=None)
@given(timings, timings)
def test_merged_timings_hold_each_measurement_once(older, newer):
    merged = merge_timings(older, newer)
    assert set(merged.rows) == {*older.rows, *newer.rows}
    for bucket, found in merged.rows.items():
        identities = [one.identity for one in found]
        assert len(set(identities)) == len(identities)
        assert {replace(one, env="") for one in newer.rows.get(bucket, ())} <= {replace(one, env="") for one in found}


def test_equal_environments_share_a_letter_and_the_later_day():
    later = replace(ENVIRONMENT, date="2027-01-01")
    other = Bucket("fast_core", next(iter(small().rows)).when, 64)
    newer = Table(DEVICE, {"q": later}, {other: Entry("x/y", 1.0, 0.0, 0.0, env="q")})
    assert merge(small(), newer).environments == {"a": later}
    updated = Table(DEVICE, {"a": replace(ENVIRONMENT, torch="9.9")}, {other: Entry("x/y", 1.0, 0.0, 0.0, env="a")})
    assert merge(small(), updated).rows[other].env == "b"


def test_diff_and_prune_speak_of_buckets():
    (change,) = diff(small(), small(us=11.0))
    assert (change.old.us, change.new.us) == (12.3, 11.0)
    empty = prune(small(), lambda bucket, entry: False)
    assert (empty.rows, empty.environments) == ({}, {})
    assert dump_table(empty, defaults_of).endswith("environments: {}\nops: {}\n")
    assert diff(small(), empty)[0].new is None


def test_a_row_forgets_where_it_ends_when_the_row_that_it_ends_at_is_another_tables():
    (short,) = small().rows
    long, longest = short._replace(seq_len=2048), short._replace(seq_len=8192)
    row = small().rows[short]
    older = replace(small(), rows={short: replace(row, until=(2048, 1180)), long: replace(row, until=(8192, 4000)), longest: row})
    merged = merge(older, replace(small(), rows={long: replace(row, us=1.0, until=(8192, 3000))}))
    assert {bucket.seq_len: entry.until for bucket, entry in merged.rows.items()} == {512: None, 2048: None, 8192: None}
    assert merge(older, replace(older, rows={})).rows[short].until == (2048, 1180)
    assert merge(replace(older, rows={}), older).rows[long].until == (8192, 4000)


@pytest.mark.parametrize("wrong", ["[2048]", "[1180, 2048]", "[2048, 2048]", "[2048, 0]", "2048", "[2048, 1180, 3]"])
def test_an_end_that_is_none_is_an_error_with_its_line(wrong):
    text = dump_table(small(until=(2048, 1180)), defaults_of)
    assert "until: [2048, 1180], env: a" in text
    assert parse_table(text, "x", defaults_of) == small(until=(2048, 1180))
    with pytest.raises(SchemaError, match=r"x:\d+: .*(until must be two lengths|expected a)"):
        parse_table(text.replace("[2048, 1180]", wrong), "x", defaults_of)


def test_tables_of_two_devices_do_not_merge():
    with pytest.raises(ValueError, match="two devices"):
        merge(small(), Table(replace(DEVICE, slug="other"), {}, {}))


def test_a_default_written_by_hand_is_the_same_key():
    by_hand = TEXT.replace("streams: 32}", "streams: 32, group: 1, launch: eager}")
    assert parse_table(by_hand, "x", defaults_of) == small()


def test_rows_of_an_unknown_op_are_carried_along():
    text = dump_table(small(), defaults_of).replace("slow_core", "later_core").replace("streams: 32}", "streams: 32, width: 4}")
    assert dump_table(parse_table(text, "x", defaults_of), defaults_of) == text


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("streams: 32", "streams: 32, colour: red", 7, "unknown field 'colour'; known here: chunk_size"),
        ("streams: 32", "group: 2", 7, "streams missing"),
        ("use: cupy/fused", "use: cupy", 9, "expected backend/variant, found 'cupy'"),
        ("env: a", "env: b", 9, "expected one of a, found 'b'"),
        ("us: 12.3", "us: fast", 9, "expected a number, found 'fast'"),
        ("us: 12.3", "us: -1", 9, "at least 0"),
        ("us: 12.3, ", "", 9, "us missing"),
        ("source: 1a2b3c4d", "source: 12345678", 9, "put it in quotes"),
        ("'2026-12-01'", "2026-12-01", 4, "quote it if it is text"),
        ("  a: {", "  a: !!python/object:os.system {", 4, "expected a mapping, found a mapping tagged"),
        ("512:", "0:", 9, "at least 1"),
        ("512:", "512: {use: a/b}\n        512:", 10, "'512' stands here twice"),
        ("spread: 0.01", "spread: 0.01, spread: 0.02", 9, "'spread' stands here twice"),
        ("schema: 1", "schema: one", 1, "whole number"),
        ("ops:", "opps:", 5, "unknown field 'opps'"),
    ],
)
def test_schema_errors_name_file_and_line(old, new, line, message):
    text = TEXT.replace(old, new, 1)
    with pytest.raises(SchemaError) as caught:
        parse_table(text, "x.yaml", defaults_of)
    assert str(caught.value).startswith(f"x.yaml:{line}: ")
    assert message in str(caught.value)


def test_a_file_cut_anywhere_is_an_error_or_holds_only_true_rows():
    table = merge(small(), Table(DEVICE, {"a": ENVIRONMENT}, {b._replace(seq_len=1024): e for b, e in small(us=7.0).rows.items()}))
    text, errors = dump_table(table, defaults_of), 0
    for end in range(len(text) - 1):
        try:
            rows = parse_table(text[:end], "x", defaults_of).rows
        except SchemaError:
            errors += 1
        else:
            assert all(table.rows[bucket] == entry for bucket, entry in rows.items())
    assert errors > 0.9 * len(text)
