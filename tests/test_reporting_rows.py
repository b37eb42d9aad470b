"""The report's figures are what their definitions say, on numbers that can be checked in the head."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from tests.report_facts import CEILINGS, bucket, cell, facts, machine, timed, training
from titans_backends.cache.schema import Entry
from titans_backends.contracts.contract import Work
from titans_backends.reporting.facts import Ceilings, State
from titans_backends.reporting.place import place_of
from titans_backends.reporting.rows import row_of, rows_of
from titans_backends.reporting.summary import failures, geometric_mean, noisy, refusals, renewals, summarize


def test_a_row_has_its_winner_its_gains_and_its_share_of_the_floor() -> None:
    row = row_of(cell(), CEILINGS)
    assert row.winner is not None
    assert (row.winner.label, row.winner.backends, row.winner.us) == ("triton/scan block=32", ("triton",), 10.0)
    assert [(one.who, one.us) for one in row.best] == [("triton", 10.0), ("cupy", 30.0), ("eager", 100.0)]
    assert (row.over_default, row.over_rival, row.over_eager) == (2.0, 3.0, 10.0)
    assert not row.kept_default
    assert row.reference_us == 9000.0
    assert row.floor is not None
    assert (row.floor.us, row.floor.bound, row.share) == (5.0, "bytes", 0.5)


def test_products_set_the_floor_where_they_take_longer() -> None:
    row = row_of(cell(work=Work(flop=8e8, bytes=5e6)), CEILINGS)
    assert row.floor is not None
    assert row.floor.bound == "products"
    assert row.floor.us == pytest.approx(8.0)


@pytest.mark.parametrize(
    ("dtype", "float32", "rate"),
    [
        ("bfloat16", "highest", 1e14),
        ("float16", "highest", 1e14),
        ("float32", "high", 6e13),
        ("float32", "highest", 2e13),
        ("float64", "highest", None),
    ],
)
def test_the_ceiling_for_products_depends_on_the_dtype(dtype: str, float32: str, rate: float | None) -> None:
    assert CEILINGS.flop_per_s(dtype, float32) == rate  # float32 at highest: a third of TF32's 6e13 is more than 1e13


def test_where_a_ceiling_is_missing_there_is_no_floor() -> None:
    for known in (None, Ceilings({}, ()), Ceilings({"copy": 1e12}, ()), Ceilings({"bf16": 1e14}, ())):
        assert row_of(cell(), known).floor is None
    assert row_of(cell(work=None), CEILINGS).floor is None


def test_a_single_run_has_no_spread_and_what_failed_has_no_time() -> None:
    row = row_of(cell(), CEILINGS)
    by_label = {one.label: one for one in row.tried}
    assert by_label["eager/plain"].spread is None
    assert by_label["triton/scan block=32"].spread == 0.1
    assert (by_label["cupy/bad"].us, by_label["cupy/bad"].status, by_label["cupy/bad"].error) == (None, "failed", 0.3)
    assert by_label["triton/scan block=32"].error == 2e-3
    assert "reference/contract" not in by_label


def test_in_training_a_time_is_a_pairs_and_only_directions_that_fit_are_paired() -> None:
    row = row_of(training(), CEILINGS)
    assert row.winner is not None
    assert row.winner.who == "cupy + triton"
    assert [(one.who, one.us) for one in row.best] == [("triton", 45.0), ("cupy", 60.0)]  # 15 + 30 save states, 20 + 40 save none
    assert row.best[0].label == "triton/scan + triton/kept"
    assert row.default is not None
    assert row.default.us == 60.0
    assert row.over_default == pytest.approx(1.2)
    assert row.over_rival == pytest.approx(0.9)
    assert row.fastest is not None
    assert row.fastest.us == 45.0
    assert row.best[0].spread == pytest.approx(math.hypot(1.5, 3.0) / 45)


def test_without_timings_a_row_knows_the_winner_and_the_runner_up() -> None:
    row = row_of(cell(measurements=(), default=None, default_reason="not kept"), CEILINGS)
    assert [(one.who, one.us) for one in row.best] == [("triton", 10.0), ("cupy", 30.0)]
    assert (row.over_default, row.over_eager, row.over_rival) == (None, None, 3.0)
    second = Entry("cupy/a", 1.0, 0.1, 0.0, backward="triton/b", next="eager/c x=1 + eager/d", next_us=4.0, env="a")
    assert [one.backends for one in row_of(cell(entry=second, measurements=()), None).best] == [("eager",)]  # a pair of two is no backend's own


def test_without_a_table_the_fastest_is_shown_and_nothing_was_bought() -> None:
    row = row_of(cell(entry=None, origin="results"), CEILINGS)
    assert row.winner is not None
    assert (row.winner.us, row.decided, row.over_default, row.behind) == (10.0, False, None, None)


def test_places_are_told_by_what_is_no_default() -> None:
    place = place_of(bucket(512, g=True, launch="graph", group=2, head_dim=(16, 32)))
    assert (place.setting, place.size, place.seq_len) == ("inference · graph · bfloat16 · g", "4 × 16x32, group 2", 512)
    assert place_of(bucket(512, regime="training", saves="inputs")).setting == "training · bfloat16 · saves=inputs"
    eager, graph = (place_of(bucket(512, regime="training", launch=launch)) for launch in ("eager", "graph"))
    assert (eager.setting, graph.setting) == ("training · bfloat16", "training · graph · bfloat16"), "one curve for each"
    assert place_of(bucket(64, "fused_uw", streams=1)).size == "16"
    later = place_of(bucket(8)._replace(op="an op of tomorrow"))
    assert (later.op, later.size) == ("an op of tomorrow", "4 × 16")


def test_a_summary_counts_wins_and_takes_geometric_means() -> None:
    kept = cell(2048, default=(timed("triton/scan", 10.0, block=32).identity,))
    found = summarize(rows_of(machine(cell(), kept, training())))
    assert found.wins == {"triton": 2, "cupy + triton": 1}
    assert (found.compared, found.kept) == (3, 1)
    assert found.over_default == pytest.approx((2.0 * 1.0 * 1.2) ** (1 / 3))
    assert found.most_over_default is not None
    assert found.most_over_default.place.seq_len == 512
    assert (found.share_eager, found.share_graph) == (0.5, None)
    assert (found.behind, found.most_behind) == (1, pytest.approx(50 / 45))


def test_of_nothing_there_is_no_mean() -> None:
    assert geometric_mean([]) is None
    found = summarize([])
    assert (found.rows, found.wins, found.over_default, found.most_over_default, found.share_graph) == (0, {}, None, None, None)


def test_what_must_be_renewed_is_told_once_a_curve_with_every_length() -> None:
    stale = State("stale", "measured with torch 2.10.0, now 2.11.0", "titans-backends tune --op x --seq-lens 512 --heads 4")
    rows = rows_of(machine(cell(512, state=stale), cell(2048, state=stale), cell(8192)))
    (one,) = renewals(rows)
    assert (one.kind, one.seq_lens, one.reason) == ("stale", (512, 2048), stale.reason)
    assert one.command == "titans-backends tune --op x --seq-lens 512,2048 --heads 4"


def test_a_winner_that_noise_keeps_is_named_with_what_was_faster() -> None:
    slow = Entry("eager/plain", 100.0, 0.8, 2.0, env="a")
    (one,) = noisy(rows_of(machine(cell(entry=slow), cell(2048))))
    assert one.reason == "triton/scan block=32 took 10 µs ± 10 %, the choice, eager/plain, 100 µs ± 80 %"
    assert one.command.endswith(" --force")
    assert noisy(rows_of(machine(cell()))) == []
    assert noisy(rows_of(machine(cell(entry=replace(slow, objective="memory"))))) == []  # it was not chosen for its time


def test_failures_and_refusals_are_told_once_a_reason() -> None:
    rows = rows_of(facts().machines[0])
    (failed,) = [one for one in failures(rows) if one.op == "gated_delta_rule"]
    assert (failed.who, failed.what, failed.buckets, failed.largest_error) == ("cupy/bad", "forward, failed", 2, 0.3)
    assert "at most 1.0e-02" in failed.reason
    assert {(one.op, one.who, one.reason) for one in refusals(rows)} >= {("gated_delta_rule", "inductor", "it does not implement this op")}


def test_an_infinite_error_is_kept() -> None:
    bad = replace(timed("cupy/bad", None), errors=(("o", math.nan),))
    (tried,) = row_of(cell(entry=None, measurements=(bad,)), None).tried
    assert tried.error == math.inf
    assert row_of(cell(entry=None, measurements=(bad,)), None).winner is None
