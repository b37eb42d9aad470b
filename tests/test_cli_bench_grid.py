"""`bench --grid`: the grids are problems that can be built, and a run of one leaves JSON and CSV that say the same, with the machine in them."""

from __future__ import annotations

import csv
import importlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import titans_backends as tb
from titans_backends.buckets import Bucket, bucket_of, field
from titans_backends.cli import app
from titans_backends.errors import UnknownNameError
from titans_backends.machine import detect
from titans_backends.signature import Signature
from titans_backends.tuning import benchmark
from titans_backends.tuning.benchmark import Timed, each_backend, floor_us, timed
from titans_backends.tuning.ceilings import Ceilings
from titans_backends.tuning.gate import GateResult
from titans_backends.tuning.grids import BENCH_GRIDS, Cell, cells_of
from titans_backends.tuning.plan import plan
from titans_backends.tuning.problem import signature_of_bucket
from titans_backends.tuning.session import Checked, Session

TOP = Ceilings(1e9, 1e9)
run = CliRunner().invoke
MODULE = importlib.import_module("titans_backends.cli.bench_grid")


def tiny(regime: str = "inference", op: str = "fused_uw") -> Bucket:
    (one,) = plan("cpu", ops=[op], seq_lens=[64], heads=[(1, 1)], head_dims=[(16, 16)], dtypes=["float32"], regimes=[regime])  # type: ignore[list-item]
    return one


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two backends and made-up ceilings."""
    monkeypatch.setenv("TITANS_BACKENDS_DISABLE", "inductor,numba_cpu")
    tb.reset()
    MODULE._ceilings.cache_clear()
    monkeypatch.setattr(importlib.import_module("titans_backends.tuning.ceilings"), "measure", lambda device, dtype: TOP)
    yield
    monkeypatch.undo()
    tb.reset()


@pytest.mark.parametrize("name", BENCH_GRIDS)
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_every_problem_of_a_grid_can_be_built_and_is_there_once(name: str, kind: str) -> None:
    cells = cells_of(name, kind)
    assert len({cell.bucket for cell in cells}) == len(cells) > 5
    for cell in cells:
        signature = signature_of_bucket(cell.bucket, kind, cell.heads)
        assert bucket_of(signature) == cell.bucket
        assert cell.bucket.op == "fused_uw" or signature.dim("H") == cell.heads
    assert ("graph" in {field(cell.bucket, "launch") for cell in cells}) == (kind == "cuda" and name != "cpu")


def test_the_grids_hold_the_published_cells() -> None:
    def cells(name: str, op: str) -> set[tuple[object, ...]]:
        found = [(c.bucket, c.heads) for c in cells_of(name, "cuda") if c.bucket.op == op and field(c.bucket, "launch") == "graph"]
        return {(b.seq_len, field(b, "streams"), h // int(str(field(b, "group"))), field(b, "head_dim")[0]) for b, h in found}  # type: ignore[index]

    rule = cells("qwen", "gated_delta_rule")
    assert {(length, v, k, 128) for length in (512, 2048, 8192, 32768) for k, v in ((2, 8), (16, 32), (16, 64))} < rule
    assert {(length, 12, 12, dim) for length in (512, 2048, 8192, 32768) for dim in (32, 64)} < rule
    assert (1024, 256, 16, 128) in rule
    assert (8192, 64, 16, 128) in cells("train", "gated_delta_rule")


def test_an_unknown_grid_lists_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match="unknown grid 'kwen'; known: cpu, decode, lam, qwen, seeds, train"):
        cells_of("kwen", "cpu")


def test_a_line_has_its_time_peak_floor_compile_time_and_error() -> None:
    signature = signature_of_bucket(tiny())
    lines = timed(signature, None, TOP, 0.01, backends=True)
    by_role = {one.what: one for one in lines if not one.problem}
    assert set(by_role) == {"chosen", "default", "backend", "reference"}
    chosen = by_role["chosen"]
    assert chosen.us is not None
    assert chosen.us > 0
    assert chosen.peak_mib is not None
    assert chosen.compile_s is not None
    assert chosen.error is not None
    assert 0 <= chosen.error < 1e-5
    assert chosen.floor_us == floor_us(tiny(), None, TOP)
    assert chosen.share_of_floor == chosen.floor_us / chosen.us
    assert {one.label for one in lines if one.problem} >= {"triton", "inductor"}
    assert all(one.problem.startswith("refuses: ") for one in lines if one.problem)


def test_in_training_a_pair_is_timed_and_its_floor_is_not_known() -> None:
    lines = timed(signature_of_bucket(tiny("training")), None, TOP, 0.01)
    assert " + " in lines[0].label
    assert {one.floor_us for one in lines} == {None}


def test_a_wrong_kernel_has_its_reason_and_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "check", lambda *_: Checked(GateResult("u is off by 0.5 on [strided]", (("u", 0.5),))))
    chosen = timed(signature_of_bucket(tiny()), None, TOP, 0.01)[0]
    assert (chosen.us, chosen.wrong, chosen.error) == (None, True, 0.5)
    assert "u is off by 0.5" in chosen.problem


def test_a_backends_line_is_its_fastest_where_timings_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signature = signature_of_bucket(tiny())
    first = each_backend(signature, detect("cpu"))["eager"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    from titans_backends import tables
    from titans_backends.buckets import defaults_of
    from titans_backends.cache import file
    from titans_backends.cache.paths import timings_path, user_cache_path
    from titans_backends.cache.schema import device_of
    from titans_backends.cache.timings import Measurement
    from titans_backends.offers import offers
    from titans_backends.tuning.standing import Standing

    (offer,) = [entry for entry in offers(signature, detect("cpu")) if entry.backend.name == "eager"]
    standing = Standing.of(tiny(), signature, [offer], ())
    measured = [
        Measurement(one.name, one.params, us=100.0 if one == first.forward else 50.0, spread=0.0, source=standing.hashes[one])
        for one in standing.candidates
    ]
    machine = detect("cpu")
    common = {"device": device_of(machine), "environment": tables.current_environment("cpu"), "defaults_of": defaults_of}
    file.update_timings(timings_path(user_cache_path(machine.slug)), changes={tiny(): measured}, **common)  # type: ignore[arg-type]
    tb.reset()
    assert each_backend(signature, machine)["eager"] != first


def made_up(signature: Signature, heads: int | None, top: Ceilings, budget_s: float, **given: object) -> list[Timed]:
    bucket = bucket_of(signature)
    return [
        Timed(bucket, "chosen", "eager/x", 100.0, 0.01, 1.0, 25.0, compile_s=0.5, error=1e-7),
        Timed(bucket, "default", "eager/x", 100.0, 0.01, 1.0, 25.0, compile_s=0.5, error=1e-7),
        Timed(bucket, "backend", "triton", None, None, None, 25.0, "refuses: it does not run on cpu"),
        Timed(bucket, "reference", "the plain formula", 400.0, None, None, 25.0),
    ]


@pytest.fixture
def two_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "cells_of", lambda name, kind: (Cell(tiny(), 1), Cell(tiny(op="gated_delta_rule"), 1)))
    monkeypatch.setattr(MODULE, "timed", made_up)


def test_a_grid_leaves_json_and_csv_that_say_the_same(two_problems: None, tmp_path: Path) -> None:
    result = run(app, ["bench", "--grid", "cpu", "--device", "cpu", "--output", str(tmp_path / "deep" / "x.json")])
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "deep" / "x.json").read_text())
    rows = list(csv.DictReader((tmp_path / "deep" / "x.csv").open()))
    assert len(told["rows"]) == len(rows) == 8
    for one, row in zip(told["rows"], rows, strict=True):
        assert (row["op"], row["candidate"], row["median_us"]) == (
            one["op"],
            one["candidate"],
            "" if one["median_us"] is None else str(one["median_us"]),
        )
        assert (row["device"], row["torch"]) == (told["device"]["name"], told["environment"]["torch"])
    assert told["rows"][0]["share_of_floor"] == 0.25
    assert told["measured_ceilings"] == {"float32": {"flop_per_s": 1e9, "bytes_per_s": 1e9}}
    assert "chosen, default" in result.stdout
    assert result.stdout.count("it does not run on cpu") == 2  # once for each op
    assert "25 %" in result.stdout


def test_what_a_limit_of_time_leaves_is_said_and_status_1(two_problems: None, tmp_path: Path) -> None:
    result = run(app, ["bench", "--grid", "cpu", "--device", "cpu", "--within", "1e-9", "--output", str(tmp_path / "x")])
    assert result.exit_code == 1
    assert len(json.loads((tmp_path / "x.json").read_text())["left"]) == 2
    assert "not timed: fused_uw" in result.stdout


def test_an_interrupt_keeps_what_is_done(two_problems: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(signature: Signature, *args: object, **given: object) -> list[Timed]:
        if signature.op != "fused_uw":
            raise KeyboardInterrupt
        return made_up(signature, None, TOP, 0.0)

    monkeypatch.setattr(MODULE, "timed", stopped)
    result = run(app, ["bench", "--grid", "cpu", "--device", "cpu", "--output", str(tmp_path / "x")])
    assert result.exit_code == 130
    told = json.loads((tmp_path / "x.json").read_text())
    assert (len(told["rows"]), [one["reason"] for one in told["left"]]) == (4, ["interrupted"])


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--grid", "cpu", "fused_uw"], "leave out OP, or leave out --grid"),
        (["--grid", "cpu", "--heads", "4", "--backend", "eager"], "leave out --heads, --backend, or"),
        (["fused_uw", "--within", "3"], "--within stands with --grid"),
        ([], "bench takes ops, or --grid with one of seeds, qwen, lam, decode, train, cpu"),
        (["--grid", "kwen"], "unknown grid 'kwen'"),
        (["--grid", "cpu", "--limit", "0"], "--limit must be above 0"),
    ],
)
def test_words_that_do_not_go_together_are_named(words: list[str], why: str) -> None:
    result = run(app, ["bench", *words, "--device", "cpu"])
    assert result.exit_code == 2
    assert why in " ".join(result.stderr.split())


def test_the_race_drops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    real = benchmark.race

    def race(runners: object, sample: object, clock: object, rules: object) -> object:
        seen.extend((rules.drop_factor, rules.hopeless_factor))  # type: ignore[attr-defined]
        return real(runners, sample, clock, rules)  # type: ignore[arg-type]

    monkeypatch.setattr(benchmark, "race", race)
    timed(signature_of_bucket(tiny()), None, TOP, 0.01)
    assert seen == [float("inf"), float("inf")]
