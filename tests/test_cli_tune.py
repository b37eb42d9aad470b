"""`tune`: measures a tiny grid for real, then the exit status and the words of every ending with a tuner that is made up."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner, Result

import titans_backends as tb
from titans_backends.buckets import Bucket
from titans_backends.cache.schema import Entry
from titans_backends.cache.writing import CacheError
from titans_backends.cli import app
from titans_backends.cli.tune_rows import show_rows
from titans_backends.tuning.events import OnEvent
from titans_backends.tuning.plan import plan
from titans_backends.tuning.run import Row, TuneInterrupted, TuneReport, TuneRequest

TINY = ["tune", "--op", "fused_uw", "--seq-lens", "64", "--heads", "1/1", "--head-dim", "16", "--device", "cpu"]
MODULE = importlib.import_module("titans_backends.cli.tune_session")
run = CliRunner().invoke

Tuner = Callable[[TuneRequest, OnEvent], TuneReport]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A file made by a real tune, and what the command said."""
    path = tmp_path_factory.mktemp("tuned") / "out.yaml"
    return path, run(app, [*TINY, "--output", str(path)])


def test_a_broken_backend_is_told_and_the_others_race(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "explosive.py").write_text("raise RuntimeError('boom')\n")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        patch.setenv("TITANS_BACKENDS_PLUGINS", "explosive")
        tb.reset()
        result = run(app, [*TINY, "--dry-run"])
    tb.reset()
    assert result.exit_code == 0, result.output
    assert re.search(r"backend explosive is broken and does not race: .*boom", result.stderr.replace("\n", " "))


def test_a_tune_writes_the_file_and_shows_what_won(tuned: tuple[Path, Result]) -> None:
    path, result = tuned
    assert result.exit_code == 0, result.output
    assert str(path) in result.stdout
    rows = yaml.safe_load(path.read_text())["ops"]["fused_uw"]
    assert rows[0]["by_seq_len"][64]["use"] in result.stdout
    for word in ("seq_len", "median", "vs default"):
        assert word in result.stdout
    assert "[1/1]" in result.stderr
    assert "\x1b" not in result.output


def test_a_second_tune_has_nothing_to_do(tuned: tuple[Path, Result]) -> None:
    path, _ = tuned
    before = path.read_bytes()
    result = run(app, [*TINY, "--output", str(path)])
    assert result.exit_code == 0
    assert "nothing to do" in result.stdout.splitlines()
    assert path.read_bytes() == before


def test_json_is_the_rows_and_nothing_else(tuned: tuple[Path, Result]) -> None:
    path, _ = tuned
    result = run(app, [*TINY, "--output", str(path), "--json"])
    (row,) = json.loads(result.stdout)
    assert (row["op"], row["seq_len"], row["regime"]) == ("fused_uw", 64, "inference")
    assert row["median_us"] > 0
    assert row["winner"].startswith("eager/")
    assert "nothing to do" in result.stderr


def test_a_read_only_file_is_said_before_anything_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "out.yaml"
    tmp_path.chmod(0o500)
    try:
        result = run(app, [*TINY, "--output", str(path)])
    finally:
        tmp_path.chmod(0o700)
    assert result.exit_code == 2
    assert "read-only" in result.stderr
    assert "--output" in result.stderr
    assert "[1/1]" not in result.stderr


def test_a_dry_run_lists_the_grid_and_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "run_tune", lambda *_: pytest.fail("it measured"))
    result = run(app, ["tune", "--dry-run", "--device", "cpu", "--output", str(tmp_path / "x.yaml")])
    assert result.exit_code == 0, result.output
    assert all(bucket.op in result.stdout for bucket in plan("cpu"))
    rows = json.loads(run(app, ["tune", "--dry-run", "--json", "--device", "cpu"]).stdout)
    assert f"{len(rows)} buckets would be measured" in result.stdout
    between = [row["midpoint"] for row in rows if row["midpoint"]]
    assert f"then up to {len(between)} midpoints, where neighbouring lengths choose differently" in result.stdout
    without = [*("tune", "--dry-run", "--no-midpoints", "--device", "cpu", "--seq-lens", "128,512")]
    assert "midpoint" not in run(app, without).stdout
    assert [(row["seq_len"], row["midpoint"]) for row in json.loads(run(app, [*without, "--json"]).stdout)][:2] == [(128, None), (512, None)]
    without.remove("--no-midpoints")
    assert [(row["seq_len"], row["midpoint"]) for row in json.loads(run(app, [*without, "--json"]).stdout)][:2] == [(128, 256), (512, None)]
    assert all(row["candidates"] for row in rows)
    assert list(tmp_path.iterdir()) == []


def test_a_named_backend_that_cannot_race_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told = " ".join(ending(monkeypatch, lambda request, _: report(request), "--backend", "triton,eager").stderr.split())
    assert "triton does not race: it does not run on cpu" in told
    assert "eager does not race" not in told


def test_autotune_is_the_same_command(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(MODULE, "run_tune", lambda request, _: seen.append(request) or report(request))
    for verb in ("tune", "autotune"):
        run(app, [verb, *TINY[1:]])
    assert seen[0] == seen[1]


def entry(bucket: Bucket) -> Entry:
    return Entry("eager/x", 100.0, 0.01, 1.0, next="eager/y", next_us=120.0)


def report(request: TuneRequest, *, done: int | None = None, failed: str = "") -> TuneReport:
    buckets = request.buckets
    count = len(buckets) if done is None else done
    rows = [Row(b, None if failed else entry(b), 150.0, 400.0, measured=True, reason=failed) for b in buckets[:count]]
    return TuneReport(Path("somewhere.yaml"), tuple(rows), tuple(buckets[count:]), 3.0)


def ending(monkeypatch: pytest.MonkeyPatch, tuner: Tuner, *more: str) -> Result:
    monkeypatch.setattr(MODULE, "run_tune", tuner)
    return run(app, ["tune", "--op", "fused_uw", "--seq-lens", "64,128", "--heads", "1", "--head-dim", "16", "--device", "cpu", *more])


def test_gains_are_over_the_default_and_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    result = ending(monkeypatch, lambda request, _: report(request))
    line = next(line for line in result.stdout.splitlines() if "eager/x" in line)
    assert re.search(r"100 µs\s+1\.50×\s+4\.00×\s+eager/y 120 µs", line)


def refined(request: TuneRequest, left: int = 0) -> TuneReport:
    """Two buckets and what lies between them."""
    between = request.buckets[0]._replace(seq_len=91)
    row = Row(between, replace(entry(between), use="eager/y", next="eager/x"), measured=True, choices=2, between=(64, 128))
    return replace(report(request), midpoints=() if left else (row,), unrefined=(between,) * left)


def test_a_midpoint_is_told_as_such_in_the_table_and_in_json(monkeypatch: pytest.MonkeyPatch) -> None:
    result = ending(monkeypatch, lambda request, _: refined(request))
    assert result.exit_code == 0
    assert re.search(r"^ *~91  eager/y", result.stdout, re.MULTILINE)
    assert (
        "~ a midpoint, which nobody asked for: its two neighbours chose differently, or its row held no longer, and their choices alone raced there"
        in result.stdout
    )
    assert "measured 2 buckets and 1 midpoint in 3.0 s" in result.stdout
    rows = json.loads(ending(monkeypatch, lambda request, _: refined(request), "--json").stdout)
    assert [(row["seq_len"], row["between"], row["choices"]) for row in rows] == [(64, None, 0), (128, None, 0), (91, [64, 128], 2)]


def test_midpoints_that_the_budget_left_are_told_with_the_command_and_nothing_that_was_asked_for_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    result = ending(monkeypatch, lambda request, _: refined(request, left=1), "--budget", "5")
    assert result.exit_code == 0
    assert "the budget ended with 1 midpoint left. Go on with:" in result.stdout
    assert "--budget 5" in result.stdout


def test_at_80_columns_nothing_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = ending(monkeypatch, lambda request, _: report(request))
    table = result.stdout[: result.stdout.index("measured 2 buckets")]
    assert max(map(len, table.splitlines())) <= 80
    for word in ("eager/x", "eager/y 120 µs", "1.50×", "4.00×", "100 µs"):
        assert word in table


def test_a_budget_that_ends_early_is_status_1_and_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    result = ending(monkeypatch, lambda request, _: report(request, done=1), "--budget", "5")
    assert result.exit_code == 1
    assert "1 bucket left" in result.stdout
    assert "titans-backends tune --op fused_uw --seq-lens 64,128 --heads 1 --head-dim 16 --device cpu --budget 5" in result.stdout
    assert "--force" not in result.stdout


def test_a_forced_tune_that_ends_early_says_what_going_on_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    result = ending(monkeypatch, lambda request, _: report(request, done=1), "--budget", "5", "--force")
    assert "--device cpu --budget 5\n" in result.stdout
    assert "it measures what is not current; with --force it begins with the first bucket again" in result.stdout


def test_where_nothing_won_no_file_is_named_and_a_time_that_ran_out_is_told_its_option(monkeypatch: pytest.MonkeyPatch) -> None:
    result = ending(monkeypatch, lambda request, _: report(request, failed="eager/x: its probe: no answer within 60 s: it was killed"))
    said = " ".join(result.stdout.split())
    assert result.exit_code == 1
    assert "nothing won" in said
    assert "somewhere.yaml" not in said
    assert "the same with --force and a --timeout above 60" in said


def test_a_bucket_without_a_winner_is_status_1_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    result = ending(monkeypatch, lambda request, _: report(request, failed="no candidate passed: [x]"))
    assert result.exit_code == 1
    assert "no candidate passed: [x]" in result.stdout


def test_an_interrupt_is_status_130_and_says_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(request: TuneRequest, _: OnEvent) -> TuneReport:
        raise TuneInterrupted(report(request, done=1))

    result = ending(monkeypatch, interrupted)
    assert result.exit_code == 130
    assert "interrupted: 1 of 2 buckets have a row in somewhere.yaml" in result.stderr
    assert "titans-backends tune --op fused_uw" in result.stderr
    assert "eager/x" in result.stdout


def test_a_cache_that_cannot_be_written_is_status_2(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(request: TuneRequest, _: OnEvent) -> TuneReport:
        raise CacheError("it is read-only. To write another file: titans-backends tune --output OTHER.yaml")

    result = ending(monkeypatch, refused)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "error: it is read-only" in result.stderr


def test_the_request_holds_what_was_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[TuneRequest] = []

    def tuner(request: TuneRequest, on_event: OnEvent) -> TuneReport:
        seen.append(request)
        return report(request)

    words = [
        "--full",
        "--backend",
        "eager",
        "--objective",
        "memory",
        "--max-memory",
        "8",
        "--budget",
        "9",
        "--timeout",
        "300",
        "--regime",
        "training",
    ]
    ending(monkeypatch, tuner, *words, "--force", "--no-midpoints", "--output", str(tmp_path / "x.yaml"))
    ending(monkeypatch, tuner)
    assert (seen[0].quick, seen[0].backends, seen[0].objective, seen[0].max_memory_mib, seen[0].budget_s) == (False, ("eager",), "memory", 8.0, 9.0)
    assert (seen[0].midpoints, seen[1].midpoints) == (False, True)
    assert (seen[0].force, seen[0].output, seen[0].timeout_s, seen[1].timeout_s) == (True, tmp_path / "x.yaml", 300.0, 60.0)
    assert {dict(bucket.when)["regime"] for bucket in seen[0].buckets} == {"training"}
    assert (seen[1].quick, seen[1].backends, seen[1].output, seen[1].force) == (True, None, None, False)
    assert [bucket.seq_len for bucket in seen[1].buckets] == [64, 128]


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "out.yaml"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = ["tune", "--op", "fused_uw", "--seq-lens", ",".join(str(64 * n) for n in range(1, 60)), "--heads", "1", "--head-dim", "16"]
    command = [sys.executable, "-m", "titans_backends", *words, "--device", "cpu", "--output", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        deadline = time.monotonic() + 120
        while not path.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    kept = yaml.safe_load(path.read_text())["ops"]["fused_uw"][0]["by_seq_len"]
    assert 1 <= len(kept) < 59
    assert re.search(rf"interrupted: {len(kept)} of 59 buckets have a row", err)
    assert "eager/" in out
    assert "\x1b" not in out + err


def test_a_length_that_an_op_cannot_have_is_said() -> None:
    done = run(app, ["tune", "--op", "gated_delta_step", "--seq-lens", "2,9", "--dry-run", "--device", "cpu"])
    assert "gated_delta_step takes 1 to 8 tokens: it is measured at 2, not at 9" in " ".join(done.stderr.split())


def test_a_slower_winner_is_laid_to_noise_only_where_time_decided() -> None:
    def shown(**changes: object) -> str:
        entry = replace(Entry("eager/chunked", 20.0, 0.01, 1.0, next="eager/other", next_us=10.0), **changes)  # type: ignore[arg-type]
        out = io.StringIO()
        show_rows(Console(file=out, width=200), [Row(plan("cpu", ops=["fused_uw"])[0], entry)])
        return out.getvalue()

    assert "faster within the noise" in shown()
    by_memory = shown(objective="memory")
    assert "faster within the noise" not in by_memory
    assert "tuned with --objective memory" in by_memory


def test_the_doubtful_rows_alone_are_measured_again(tuned: tuple[Path, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.yaml"
    for suffix in (".yaml", ".timings.yaml"):
        path.with_suffix(suffix).write_text(tuned[0].with_suffix(suffix).read_text())
    words = ["tune", "--doubtful", "--device", "cpu", "--output", str(path)]
    quiet = re.sub(r"spread: [0-9.e-]+", "spread: 0.0", path.with_suffix(".timings.yaml").read_text())
    path.with_suffix(".timings.yaml").write_text(quiet)
    nothing = run(app, words)
    assert nothing.exit_code == 0, nothing.output
    assert "is in doubt: nobody may save more than 5 %" in " ".join(nothing.stdout.split())
    assert "is in doubt: nobody may save more than 5 %" in " ".join(run(app, [*words, "--dry-run"]).stdout.split())
    path.with_suffix(".timings.yaml").write_text(quiet.replace("spread: 0.0", "spread: 0.9"))
    found = run(app, words)
    assert found.exit_code == 0, found.output
    assert "1 bucket planned (in doubt, the most doubtful first)" in " ".join(found.stderr.split())
    assert "[1/1]" in found.stderr
    assert "spread: 0.9," not in path.with_suffix(".timings.yaml").read_text()
    for wrong, why in (
        ([*words, "--op", "fused_uw"], "leave out --op"),
        ([*words, "--force"], "leave out --force"),
        ([*words, "--objective", "memory"], "leave out --objective"),
        ([*words[:-1], str(tmp_path / "none.yaml")], "there is no table of"),
    ):
        refused = run(app, wrong)
        assert refused.exit_code == 2
        assert why in " ".join(refused.stderr.split())
    path.with_suffix(".timings.yaml").unlink()
    alone = run(app, words)
    assert alone.exit_code == 2
    assert "has no measurements beside it" in " ".join(alone.stderr.split())
