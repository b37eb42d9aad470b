"""`report`: the page where it was asked for, a table that fits 80 columns, JSON of the same rows, and sentences where something is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.report_facts import bucket, cell, facts, machine
from titans_backends.cli import app
from titans_backends.reporting.facts import Facts, State
from titans_backends.reporting.gather import Edge

run = CliRunner().invoke
verb = import_module("titans_backends.cli.report")  # the package has the function under that name


@pytest.fixture(autouse=True)
def made_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Edge]:
    """The facts of a made-up machine instead of this one's; what was asked of `gather`."""
    asked: list[Edge] = []

    def gather(edge: Edge) -> object:
        asked.append(edge)
        return facts()

    monkeypatch.setattr(verb, "gather", gather)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return asked


def test_the_table_fits_80_columns_and_loses_nothing() -> None:
    result = run(app, ["report"])
    assert result.exit_code == 0, result.output
    assert all(len(line) <= 80 for line in result.stdout.splitlines() if "titans-backends" not in line)
    assert all(words in result.stdout for words in ("vs next", "vs eager", "floor\n", "triton 3, cupy +", " triton 1", "50 %"))


def test_the_table_says_who_wins_and_what_to_renew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    told = run(app, ["report"]).stdout
    for words in ("Made-up GPU", "triton 3, cupy + triton 1", "1.69×", "stale", "ignored", "titans-backends tune --seq-lens 2048", "not</b> a table"):
        assert words in told, words  # 1.69: the cube root of 2 × 2 × 1.2
    assert "titans-backends report --output report.html" in told


def test_a_hundred_rows_to_renew_are_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = State("ignored", "triton/scan has changed since", "titans-backends tune --seq-lens 512")
    many = machine(*(cell(512, bucket=bucket(512, streams=streams), state=gone) for streams in range(1, 12)))
    monkeypatch.setattr(verb, "gather", lambda edge: Facts((many,), "", ""))
    told = run(app, ["report"]).stdout
    assert told.count("ignored: ") == 8
    assert "3 more such groups of rows to renew" in told
    assert len(json.loads(run(app, ["report", "--json"]).stdout)["machines"][0]["renewals"]) == 11


def test_json_holds_every_row_and_every_candidate() -> None:
    result = run(app, ["report", "--json"])
    (one_machine,) = json.loads(result.stdout)["machines"]
    assert [row["seq_len"] for row in one_machine["rows"]] == [512, 2048, 8192, 512, 1]
    first = one_machine["rows"][0]
    assert (first["winner"]["median_us"], first["gain_over_default"], first["share_of_floor"], first["floor_set_by"]) == (10.0, 2.0, 0.5, "bytes")
    assert {one["label"] for one in first["candidates"]} >= {"triton/scan block=32", "cupy/bad"}
    assert one_machine["summary"]["wins"] == {"triton": 4, "cupy + triton": 1}
    assert {one["kind"] for one in one_machine["renewals"]} == {"stale", "ignored", "noisy"}
    (raced,) = json.loads(result.stdout)["races"]
    assert [(row["heads"], row["seq_len"], row["fastest"]["median_us"], row["costs_over_fastest"]["tuned"]) for row in raced["rows"][:2]] == [
        ("16/32 × 128", 512, 200.0, pytest.approx(0.1)), ("16/32 × 128", 2048, 400.0, pytest.approx(0.1))
    ]  # fmt: skip


def test_the_page_and_the_pictures_are_written_where_they_were_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the package matplotlib is not installed: pip install 'titans-backends[report]'")
    pytest.importorskip("jinja2", reason="the package jinja2 is not installed: pip install 'titans-backends[report]'")
    result = run(app, ["report", "--output", "report.html", "--pictures", "pictures"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert (tmp_path / "pictures" / "made_up_gpu-winners.svg").exists()
    assert "wrote report.html" in result.stderr
    assert "--output report.html" not in result.stdout


@pytest.mark.parametrize(("option", "missing"), [("--output", "jinja2"), ("--output", "matplotlib"), ("--pictures", "matplotlib")])
def test_a_missing_package_is_a_sentence_with_the_command(option: str, missing: str, monkeypatch: pytest.MonkeyPatch, made_up: list[Edge]) -> None:
    monkeypatch.setattr(verb, "find_spec", lambda name: None if name == missing else object())
    result = run(app, ["report", option, "somewhere"])
    assert result.exit_code == 2
    assert f"{option} needs {missing}, not installed here: pip install 'titans-backends[report]'" in result.stderr
    assert made_up == []  # before anything was read


def test_results_are_a_folder_or_those_of_a_checkout(tmp_path: Path, made_up: list[Edge]) -> None:
    result = run(app, ["report", "--results", "nowhere"])
    assert result.exit_code == 2
    assert "nowhere is not there" in result.stderr
    run(app, ["report"])
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    run(app, ["report"])
    run(app, ["report", "--results", str(tmp_path)])
    assert [edge.results for edge in made_up] == [None, Path("benchmarks/results"), tmp_path]


def test_an_op_that_does_not_exist_lists_those_that_do(made_up: list[Edge]) -> None:
    result = run(app, ["report", "--op", "slow_cor"])
    assert result.exit_code == 2
    assert "slow_core" in result.stderr
    run(app, ["report", "--op", "slow_core,fast_core"])
    assert [list(edge.ops or ()) for edge in made_up] == [["slow_core", "fast_core"]]


def test_a_page_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the package matplotlib is not installed: pip install 'titans-backends[report]'")
    (tmp_path / "file").write_text("")
    result = run(app, ["report", "--output", str(tmp_path / "file" / "report.html")])
    assert result.exit_code == 2
    assert "cannot be written" in result.stderr
    made = tmp_path / "new folder" / "report.html"
    assert run(app, ["report", "--output", str(made)]).exit_code == 0
    assert made.is_file()  # as `tune` and `record` make the folders of what they write


def test_ceilings_are_measured_where_that_was_asked_for(made_up: list[Edge], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verb.now, "_CPU_SIZE", 32)
    monkeypatch.setattr(verb.now, "_COPY_BYTES", {"cpu": 1 << 16})
    run(app, ["report", "--ceilings", "--device", "cpu"])
    run(app, ["report", "--device", "cpu"])
    with_ceilings, without = made_up
    assert with_ceilings.ceilings is not None
    assert set(with_ceilings.ceilings.rates) == {"copy", "fp32"}
    assert without.ceilings is None


def test_the_command_line_starts_without_the_packages_that_draw() -> None:
    code = "import sys, titans_backends.cli; print({'matplotlib', 'jinja2'} & {name.partition('.')[0] for name in sys.modules} - torch_has)"
    before = "import sys, torch; torch_has = {name.partition('.')[0] for name in sys.modules}; "
    assert subprocess.run([sys.executable, "-c", before + code], capture_output=True, text=True, check=True).stdout == "set()\n"
