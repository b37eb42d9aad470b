"""`cache`: what the files hold, what differs, and that only merge, prune and reset change one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from titans_backends.backend import Candidate
from titans_backends.buckets import Bucket, defaults_of
from titans_backends.cache import file, paths
from titans_backends.cache.schema import Device, Entry, Environment, canonical_when, device_of
from titans_backends.cache.source_hash import source_hash
from titans_backends.cache.timings import Measurement
from titans_backends.cli import app
from titans_backends.machine import detect
from titans_backends.offers import offers, source_modules
from titans_backends.tables import current_environment
from titans_backends.tuning.problem import signature_of_bucket
from titans_backends.tuning.standing import REFERENCE

run = CliRunner().invoke
GIVEN = {"dtype": "float32", "head_dim": (16, 16), "streams": 2}
SHORT, LONG = (Bucket("gated_delta_rule", canonical_when(GIVEN, defaults_of("gated_delta_rule")), length) for length in (64, 128))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's cache folder for each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    return paths.user_cache_path(detect("cpu").slug)


def first_candidate() -> Candidate:
    (eager,) = offers(signature_of_bucket(SHORT), detect("cpu"), ["eager"])
    return eager.forward[0]


def entry(us: float = 100.0, *, source: str | None = None) -> Entry:
    candidate = first_candidate()
    digest = source_hash(source_modules(candidate, "gated_delta_rule")) if source is None else source
    return Entry(candidate.name, us, 0.01, 2.0, candidate.params, next="eager/other", next_us=2 * us, source=digest)


def write(path: Path, rows: dict[Bucket, Entry], *, environment: Environment | None = None, device: Device | None = None) -> Path:
    own = device_of(detect("cpu")) if device is None else device
    file.update(path, device=own, environment=environment or current_environment("cpu"), changes=rows, defaults_of=defaults_of)
    return path


def test_path_is_where_tune_writes(own_cache: Path) -> None:
    result = run(app, ["cache", "path", "--device", "cpu"])
    assert result.stdout == f"{own_cache}\n"
    assert not own_cache.exists()


def test_show_prints_every_row_with_its_state(own_cache: Path) -> None:
    write(own_cache, {SHORT: entry(), LONG: entry(2000.0, source="0123456789ab")})
    result = run(app, ["cache", "show", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert any("64  eager/" in line and "100 µs" in line and "eager/other 200 µs" in line and line.endswith("fresh") for line in lines)
    assert any("128  eager/" in line and "2.00 ms" in line and line.endswith("ignored") for line in lines)
    assert "titans-backends tune --op gated_delta_rule --seq-lens 128 --heads 2 --head-dim 16 --dtype float32 --regime inference" in result.stdout
    rows = json.loads(run(app, ["cache", "show", "--device", "cpu", "--json"]).stdout)
    assert [(row["seq_len"], row["median_us"], row["state"]) for row in rows] == [(64, 100.0, "fresh"), (128, 2000.0, "ignored")]
    assert json.loads(run(app, ["cache", "show", "--device", "cpu", "--json", "--op", "slow_core"]).stdout) == []


def test_rows_for_traced_graphs_that_repeat_another_are_counted_not_listed(own_cache: Path) -> None:
    def of(bucket: Bucket, **given: object) -> Bucket:
        return bucket._replace(when=canonical_when({**dict(bucket.when), **given}, defaults_of(bucket.op)))  # type: ignore[arg-type]

    trained = replace(entry(), backward="eager/back", source="0123456789ab+0123456789ab")
    short, long = of(SHORT, regime="training"), of(LONG, regime="training")
    write(own_cache, {short: trained, of(short, saves="inputs"): trained, long: trained, of(long, saves="inputs"): replace(trained, us=50.0)})
    shown = run(app, ["cache", "show", "--device", "cpu"]).stdout
    assert shown.count("saves=inputs") == 3, "a title, the command that renews, and the count"
    assert "not listed: 1 row for traced graphs (saves=inputs) with the choice of the row beside; --json has all" in shown
    assert len(json.loads(run(app, ["cache", "show", "--device", "cpu", "--json"]).stdout)) == 4


def test_show_marks_what_noise_decided_and_says_how_to_settle_it(own_cache: Path) -> None:
    write(own_cache, {SHORT: entry(), LONG: entry(2000.0)})
    assert "doubt" not in run(app, ["cache", "show", "--device", "cpu"]).stdout
    write(own_cache, {LONG: replace(entry(2000.0), doubt=0.123)})
    result = run(app, ["cache", "show", "--device", "cpu"])
    assert [("? 12 %" in line) for line in result.stdout.splitlines() if "eager/" in line] == [False, True]
    assert "doubt: noise decided; the share of the winner's time that another candidate may save" in result.stdout
    assert "--doubtful" not in result.stdout, "without timings nothing says who the others are"
    common = {"device": device_of(detect("cpu")), "environment": current_environment("cpu"), "defaults_of": defaults_of}
    file.update_timings(paths.timings_path(own_cache), changes={LONG: [Measurement("eager/chunked", us=3.0)]}, **common)  # type: ignore[arg-type]
    assert "titans-backends tune --doubtful --device cpu" in run(app, ["cache", "show", "--device", "cpu"]).stdout
    assert f"titans-backends tune --doubtful --output {own_cache}" in run(app, ["cache", "show", str(own_cache)]).stdout
    rows = json.loads(run(app, ["cache", "show", "--device", "cpu", "--json"]).stdout)
    assert [row["doubt"] for row in rows] == [None, 0.123]


def test_a_row_that_memory_decided_says_so_and_is_renewed_so(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_memory = replace(entry(2000.0, source="0123456789ab"), objective="memory", max_memory_mib=512.0)
    write(own_cache, {SHORT: entry(source="0123456789ab"), LONG: by_memory})
    asked = "--objective memory --max-memory 512"
    shown = run(app, ["cache", "show", "--device", "cpu"]).stdout
    assert shown.count(f"tuned with {asked}") == 1
    commands = [line.strip() for line in shown.splitlines() if line.strip().startswith("titans-backends tune")]
    assert [("--seq-lens 64 " in line, "--seq-lens 128 " in line, line.endswith(asked)) for line in commands] == [
        (True, False, False), (False, True, True)
    ]  # fmt: skip
    rows = json.loads(run(app, ["cache", "show", "--device", "cpu", "--json"]).stdout)
    assert [(row["objective"], row["max_memory_mib"]) for row in rows] == [("time", None), ("memory", 512.0)]
    monkeypatch.setenv("COLUMNS", "80")
    assert f"tuned with {asked}" in " ".join(run(app, ["cache", "show", "--device", "cpu"]).stdout.split())


def test_two_tables_that_differ_in_what_decided_say_it(own_cache: Path, tmp_path: Path) -> None:
    write(own_cache, {SHORT: replace(entry(), objective="memory")})
    other = write(tmp_path / "other.yaml", {SHORT: entry()})
    told = run(app, ["cache", "diff", str(other)]).stdout
    assert "1 bucket differs" in told
    assert told.count("tuned with --objective memory") == 1


def test_doubtful_rows_of_another_limit_are_told_and_their_command_has_it(own_cache: Path) -> None:
    limited = replace(entry(2000.0), doubt=0.2, max_memory_mib=64.0)
    write(own_cache, {LONG: limited})
    common = {"device": device_of(detect("cpu")), "environment": current_environment("cpu"), "defaults_of": defaults_of}
    file.update_timings(paths.timings_path(own_cache), changes={LONG: [Measurement("eager/chunked", us=3.0)]}, **common)  # type: ignore[arg-type]
    assert "titans-backends tune --doubtful --max-memory 64 --device cpu" in run(app, ["cache", "show", "--device", "cpu"]).stdout
    result = run(app, ["tune", "--doubtful", "--device", "cpu", "--dry-run"])
    assert (
        "rows in doubt that were tuned with --max-memory 64 stay as they are; to measure them again: titans-backends tune --doubtful" in result.stderr
    )
    assert "stay as they are" not in run(app, ["tune", "--doubtful", "--max-memory", "64", "--device", "cpu", "--dry-run"]).stderr


def test_another_torch_is_stale(own_cache: Path) -> None:
    write(own_cache, {SHORT: entry()}, environment=Environment("0.1", "1.0.0"))
    result = run(app, ["cache", "show", "--device", "cpu"])
    assert "1 row stale" in result.stdout
    assert "torch 1.0.0, now" in result.stdout


def test_a_file_of_another_device_is_shown_without_grades(tmp_path: Path) -> None:
    path = write(tmp_path / "x.yaml", {SHORT: entry()}, device=Device("cuda", "some_gpu", "Some GPU", 90))
    rows = json.loads(run(app, ["cache", "show", str(path), "--json"]).stdout)
    assert [row["state"] for row in rows] == [None]


def test_a_damaged_file_is_named_by_line_and_left(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("schema: 1\nnonsense: 2\n")
    result = run(app, ["cache", "show", str(path)])
    assert result.exit_code == 2
    assert f"error: {path}:" in result.stderr
    assert path.exists()


def test_diff_shows_what_differs(tmp_path: Path) -> None:
    first = write(tmp_path / "a.yaml", {SHORT: entry(), LONG: entry()})
    second = write(tmp_path / "b.yaml", {SHORT: entry(), LONG: entry(900.0)})
    assert run(app, ["cache", "diff", str(first), str(first)]).stdout == "no difference\n"
    result = run(app, ["cache", "diff", str(first), str(second)])
    assert "1 bucket differs" in result.stdout
    assert "900 µs" in result.stdout
    (row,) = json.loads(run(app, ["cache", "diff", str(first), str(second), "--json"]).stdout)
    assert (row["seq_len"], row["old"]["median_us"], row["new"]["median_us"]) == (128, 100.0, 900.0)


def test_tables_that_differ_in_how_far_a_row_speaks_alone_say_it(tmp_path: Path) -> None:
    first = write(tmp_path / "a.yaml", {SHORT: entry(), LONG: entry()})
    second = write(tmp_path / "b.yaml", {SHORT: replace(entry(), until=(128, 90)), LONG: entry()})
    told = run(app, ["cache", "diff", str(first), str(second)]).stdout
    assert "1 bucket differs" in told
    assert told.count("up to 90, then that of 128") == 1
    (row,) = json.loads(run(app, ["cache", "diff", str(first), str(second), "--json"]).stdout)
    assert (row["old"]["until"], row["new"]["until"]) == (None, [128, 90])
    shown = json.loads(run(app, ["cache", "show", str(second), "--json"]).stdout)
    assert [row["until"] for row in shown] == [[128, 90], None]


def test_merge_takes_the_later_files_row_with_the_timings(tmp_path: Path, own_cache: Path) -> None:
    first = write(tmp_path / "a.yaml", {SHORT: entry(1.0), LONG: entry(2.0)})
    second = write(tmp_path / "b.yaml", {LONG: entry(3.0)})
    common = {"device": device_of(detect("cpu")), "environment": current_environment("cpu"), "defaults_of": defaults_of}
    file.update_timings(paths.timings_path(second), changes={LONG: [Measurement("eager/chunked", us=3.0)]}, **common)  # type: ignore[arg-type]
    out = tmp_path / "c.yaml"
    assert run(app, ["cache", "merge", str(first), str(second), "--output", str(out)]).exit_code == 0
    table = file.read(out, defaults_of).table
    assert table is not None
    assert {bucket.seq_len: row.us for bucket, row in table.rows.items()} == {64: 1.0, 128: 3.0}
    timings = file.read_timings(paths.timings_path(out), defaults_of).table
    assert timings is not None
    assert list(timings.rows) == [LONG]
    assert run(app, ["cache", "merge", str(first), "--device", "cpu"]).exit_code == 0
    assert own_cache.exists()


def test_tables_of_two_devices_do_not_merge(tmp_path: Path) -> None:
    first = write(tmp_path / "a.yaml", {SHORT: entry()})
    other = write(tmp_path / "b.yaml", {SHORT: entry()}, device=Device("cuda", "some_gpu", "Some GPU", 90))
    assert "only tables of one device merge" in run(app, ["cache", "merge", str(first), str(other), "--output", str(tmp_path / "c.yaml")]).stderr
    assert run(app, ["cache", "merge", str(other), "--device", "cpu"]).exit_code == 2


def test_prune_removes_what_no_longer_decides_and_nothing_else(own_cache: Path) -> None:
    write(own_cache, {SHORT: entry(), LONG: entry(source="0123456789ab")})
    candidate = first_candidate()
    good = Measurement(candidate.name, candidate.params, us=1.0, source=entry().source)
    reference, gone = Measurement(REFERENCE, us=9.0), Measurement("eager/forgotten", us=2.0, source="0123456789ab")
    common = {"device": device_of(detect("cpu")), "environment": current_environment("cpu"), "defaults_of": defaults_of}
    file.update_timings(paths.timings_path(own_cache), changes={SHORT: [good, reference, gone]}, **common)  # type: ignore[arg-type]
    before = own_cache.read_bytes()
    assert "would remove 1 of 2 rows" in run(app, ["cache", "prune", "--device", "cpu", "--dry-run"]).stdout
    assert own_cache.read_bytes() == before
    assert "removed 1 of 2 rows" in run(app, ["cache", "prune", "--device", "cpu"]).stdout
    table = file.read(own_cache, defaults_of).table
    timings = file.read_timings(paths.timings_path(own_cache), defaults_of).table
    assert table is not None
    assert timings is not None
    assert list(table.rows) == [SHORT]
    assert sorted(one.candidate for one in timings.rows[SHORT]) == sorted([candidate.name, REFERENCE])
    assert "nothing to prune" in run(app, ["cache", "prune", "--device", "cpu"]).stdout


@pytest.mark.parametrize("words", [["prune"], ["merge", "a.yaml"]], ids=["prune", "merge"])
def test_where_the_timings_may_not_be_written_the_table_stays_too(
    words: list[str], own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("a.yaml"), {LONG: entry(3.0)})
    write(own_cache, {SHORT: entry(source="0123456789ab")})
    beside = paths.timings_path(own_cache)
    common = {"device": device_of(detect("cpu")), "environment": current_environment("cpu"), "defaults_of": defaults_of}
    file.update_timings(beside, changes={SHORT: [Measurement("eager/chunked", us=3.0)]}, **common)  # type: ignore[arg-type]
    beside.chmod(0o444)
    before = own_cache.read_bytes()
    result = run(app, ["cache", *words, "--device", "cpu"])
    assert result.exit_code == 2
    assert f"{beside} is read-only" in result.stderr
    assert "titans-backends tune" not in result.stderr
    assert {"prune": "cache reset --device cpu", "merge": "cache merge a.yaml --output OTHER.yaml"}[words[0]] in result.stderr
    assert own_cache.read_bytes() == before


def test_prune_leaves_stale_rows_unless_asked(own_cache: Path) -> None:
    write(own_cache, {SHORT: entry()}, environment=Environment("0.1", "1.0.0"))
    assert "nothing to prune" in run(app, ["cache", "prune", "--device", "cpu"]).stdout
    assert "removed 1 of 1 row" in run(app, ["cache", "prune", "--device", "cpu", "--stale"]).stdout


def test_reset_asks_and_removes_only_the_cache(own_cache: Path) -> None:
    write(own_cache, {SHORT: entry()})
    damaged = own_cache.with_name(own_cache.name + ".damaged-1")
    damaged.write_text("x")
    asked = run(app, ["cache", "reset", "--device", "cpu"])
    assert asked.exit_code == 2
    assert "cache reset --yes" in asked.stderr
    assert own_cache.exists()
    assert run(app, ["cache", "reset", "--device", "cpu", "--dry-run"]).exit_code == 0
    assert own_cache.exists()
    assert run(app, ["cache", "reset", "--device", "cpu", "--yes"]).exit_code == 0
    assert not own_cache.exists()
    assert damaged.exists()
    assert run(app, ["cache", "reset", "--device", "cpu", "--yes", "--damaged"]).exit_code == 0
    assert not damaged.exists()
    assert "nothing to remove" in run(app, ["cache", "reset", "--device", "cpu", "--yes"]).stdout


def test_reset_leaves_a_folder_and_says_so_before_it_removes_anything(own_cache: Path) -> None:
    own_cache.mkdir(parents=True)
    beside = paths.timings_path(own_cache)
    beside.write_text("x")
    for more in (["--dry-run"], ["--yes"]):
        result = run(app, ["cache", "reset", "--device", "cpu", *more])
        assert result.exit_code == 2
        assert f"{own_cache} is a folder" in result.stderr
    assert beside.exists()
