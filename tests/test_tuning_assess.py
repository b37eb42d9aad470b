"""The tuner's own quality: the arithmetic of regret and flips, and an assessment that finds a bad choice, a flip and a bad midpoint that were put there."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

import titans_backends as tb
from titans_backends import tables
from titans_backends.backend import Candidate
from titans_backends.buckets import Bucket, defaults_of
from titans_backends.cache import file
from titans_backends.cache.schema import Entry, device_of
from titans_backends.cli import app
from titans_backends.dispatch import pair_source
from titans_backends.machine import detect
from titans_backends.offers import Pair, offers, pairs
from titans_backends.tuning import assess as assessing
from titans_backends.tuning import assess_full, assess_tunes, first_use
from titans_backends.tuning.ahead import Job, Limits, Target
from titans_backends.tuning.assess import Assessment, assess
from titans_backends.tuning.assess_order import in_order, spread_out, units
from titans_backends.tuning.events import CompiledAhead
from titans_backends.tuning.first_use import FirstUse
from titans_backends.tuning.midpoints import midpoints
from titans_backends.tuning.plan import plan
from titans_backends.tuning.problem import signature_of_bucket
from titans_backends.tuning.regret import Assessed, Choice, Flip, flip_of, judged, summary
from titans_backends.tuning.run import Row, TuneReport, TuneRequest
from titans_backends.tuning.select import Contender
from titans_backends.tuning.timing import RaceRules

run = CliRunner().invoke


def buckets(seq_lens: list[int], op: str = "gated_delta_rule", heads: list[tuple[int, int]] | None = None) -> tuple[Bucket, ...]:
    return plan("cpu", ops=[op], seq_lens=seq_lens, heads=heads or [(1, 1)], head_dims=[(8, 8)], dtypes=["float32"], regimes=["inference"])


def field(*times: tuple[float, float]) -> dict[Pair, Contender]:
    """Contenders with these times and spreads; the first is the default."""
    found = [Contender(Pair(Candidate("x", f"v{i}")), us, spread, 0.0, 0, i) for i, (us, spread) in enumerate(times)]
    return {one.pair: one for one in found}


def test_regret_is_over_the_best_and_says_whether_it_is_more_than_noise() -> None:
    contenders = field((100.0, 0.01), (102.0, 0.01), (110.0, 0.01))
    default, near, far = contenders
    assert judged(default, contenders) == Choice("x/v0", 100.0, 0.01, 0.0, False)
    found = judged(near, contenders)
    assert found is not None
    assert (round(found.regret, 6), found.beyond_noise) == (0.02, True)
    quiet, loud = judged(far, contenders), judged(far, field((100.0, 0.1), (102.0, 0.1), (110.0, 0.1)))
    assert quiet is not None
    assert loud is not None
    assert (quiet.beyond_noise, loud.beyond_noise) == (True, False)
    assert judged(Pair(Candidate("x", "gone")), contenders) is None


@pytest.mark.parametrize(
    ("times", "within", "cost"),
    [
        (((200.0, 0.0), (100.0, 0.0), (101.5, 0.0)), "tie", 0.015),
        (((200.0, 0.0), (100.0, 0.03), (104.0, 0.03)), "tie", 0.04),  # within the joint margin
        (((200.0, 0.0), (100.0, 0.3), (115.0, 0.3)), "outside", 0.15),  # no margin makes a tie so wide
        (((200.0, 0.0), (100.0, 0.0), (103.0, 0.0)), "outside", 0.03),
    ],
)
def test_a_flip_between_challengers_is_a_tie_or_outside(times: tuple[tuple[float, float], ...], within: str, cost: float) -> None:
    contenders = field(*times)
    _, one, other = contenders
    assert flip_of(one, other, contenders) == Flip(within, pytest.approx(cost))  # type: ignore[arg-type]
    assert flip_of(one, one, contenders) == Flip("same", 0.0)
    assert flip_of(one, Pair(Candidate("x", "gone")), contenders) is None


@pytest.mark.parametrize(("us", "within"), [(97.5, "margin"), (96.0, "outside"), (99.0, "tie")])
def test_a_flip_from_the_default_may_be_at_its_margin(us: float, within: str) -> None:
    contenders = field((100.0, 0.0), (us, 0.0))
    default, challenger = contenders
    found = flip_of(default, challenger, contenders)
    assert found is not None
    assert found.within == within


def test_the_summary_counts_every_choice_of_every_tune() -> None:
    (bucket,) = buckets([8])

    def assessed(*regrets: float, flip: Flip | None = None) -> Assessed:
        return Assessed(bucket, "x", 1.0, 0.0, 2, tuple(Choice("x", 1.0, 0.0, regret, False) for regret in regrets), flip)

    found = summary([assessed(0.0, 0.04, flip=Flip("margin", 0.04)), assessed(0.01, 0.01, flip=Flip("same", 0.0))], [assessed(0.05), assessed(0.06)])
    assert (found.buckets, found.mean_regret, found.worst_regret) == (2, pytest.approx(0.015), 0.04)
    assert (found.flips, found.flips_outside, found.worst_flip_cost) == (1, 0, 0.04)
    assert (found.midpoints, found.midpoints_within, found.worst_midpoint_regret) == (2, 0.5, 0.06)
    assert summary([], []).mean_regret is None


def test_midpoints_lie_between_neighbours_of_one_key() -> None:
    assert [(one.seq_len, between) for one, between in midpoints(buckets([64, 2048, 512, 65]))] == [(182, (65, 512)), (1024, (512, 2048))]
    assert [one.seq_len for one, _ in midpoints(buckets([64, 512], "fused_uw"))] == [192]  # whole matrices of 64
    assert midpoints((*buckets([64]), *buckets([512], heads=[(2, 2)]))) == ()
    both = (*buckets([64]), *buckets([8, 32], heads=[(2, 2)]), *buckets([512]))
    assert [one.seq_len for one, _ in in_order(both)] == [64, 512, 181, 8, 32, 16]


def test_few_buckets_are_of_every_op_with_their_lengths_together() -> None:
    planned = (*buckets([8, 64], heads=[(1, 1), (2, 2)]), *buckets([64, 128], "fused_uw"))
    chosen = spread_out(planned, 5)
    assert [(one.op, one.seq_len, dict(one.when)["streams"]) for one in chosen] == [
        ("gated_delta_rule", 8, 1), ("gated_delta_rule", 64, 1), ("fused_uw", 64, 1), ("fused_uw", 128, 1), ("gated_delta_rule", 8, 2),
    ]  # fmt: skip
    assert set(spread_out(planned)) == set(planned)
    small = (*buckets([64], "fused_uw"), *buckets([256, 8, 64, 1024, 512], "dual_core"), *buckets([8]))
    together = [[(one.op, one.seq_len) for one in unit] for unit in units(small)]
    assert together == [
        [("gated_delta_rule", 8)], [("dual_core", 8), ("dual_core", 64)], [("fused_uw", 64)], [("dual_core", 256), ("dual_core", 512)], [("dual_core", 1024)],
    ]  # fmt: skip
    assert units(spread_out(small)) == units(small)  # what the command takes on in this order stays in it


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The backend whose `late` takes 20 ms longer than its `good`, and is the default."""
    shutil.copytree(Path(__file__).parent / "plugins" / "faulty", tmp_path / "plugins" / "faulty", ignore=shutil.ignore_patterns("__pycache__"))
    module = tmp_path / "plugins" / "faulty" / "gated_delta_rule.py"
    module.write_text(module.read_text().replace("sleep(0.004)", "sleep(0.02)"))
    monkeypatch.syspath_prepend(tmp_path / "plugins")
    monkeypatch.setenv("TITANS_BACKENDS_PLUGINS", "faulty")
    monkeypatch.setenv("FAULTY_VARIANTS", "late,good,raises")
    for early in ("begin", "ready"):  # a made-up tune needs no process
        monkeypatch.setattr(assessing.Host, early, lambda host: None)
    monkeypatch.setattr(assessing, "first_use", lambda *_: "out of luck")
    tb.reset()
    yield
    monkeypatch.undo()
    for name in [name for name in sys.modules if name.split(".")[0] == "faulty"]:
        del sys.modules[name]
    tb.reset()


def made_up(names: dict[str, dict[int, int]]) -> object:
    """A tune that writes the places among the candidates that it is told, by file and length."""

    def tune(request: TuneRequest, on_event: object = None, host: object = None) -> TuneReport:
        assert request.output is not None
        machine, rows = detect("cpu"), []
        for bucket in [one for one in request.buckets if one.seq_len in names[request.output.stem]]:
            signature = signature_of_bucket(bucket)
            pair = pairs(offers(signature, machine, ["faulty"]), signature)[names[request.output.stem][bucket.seq_len]]
            entry = Entry(pair.forward.name, 1.0, 0.01, 1.0, source=pair_source(pair, bucket.op))
            common = {"device": device_of(machine), "environment": tables.current_environment("cpu"), "defaults_of": defaults_of}
            file.update(request.output, changes={bucket: entry}, **common)  # type: ignore[arg-type]
            rows.append(Row(bucket, entry))
        return TuneReport(request.output, tuple(rows), (), 1.0)

    return tune


def test_a_bad_choice_a_flip_and_a_bad_midpoint_are_found(faulty: None, monkeypatch: pytest.MonkeyPatch) -> None:
    late, good = 0, 1
    monkeypatch.setattr(assess_tunes, "tune", made_up({"first": {4: good, 16: late}, "second": {4: good, 16: good}}))
    monkeypatch.setattr(assessing, "_MOST_CAP_S", 0.3)
    kept: list[Assessment] = []
    found = assess(TuneRequest(buckets([4, 16]), backends=("faulty",)), keep=kept.append)
    by_length = {one.bucket.seq_len: one for one in (*found.tuned, *found.midpoints)}
    assert list(by_length) == [4, 16, 8]
    assert {one.best for one in by_length.values()} == {"faulty/good"}
    assert [one.candidates for one in by_length.values()] == [2, 2, 2]  # the one that raises is none
    assert [choice.regret for choice in by_length[4].choices] == [0.0, 0.0]
    assert by_length[4].flip == Flip("same", 0.0)
    bad, fine = by_length[16].choices
    assert (bad.label, fine.label) == ("faulty/late", "faulty/good")
    assert bad.us - fine.us > 10000
    assert bad.regret == pytest.approx(bad.us / fine.us - 1)
    assert fine.regret == 0.0
    assert by_length[16].flip == Flip("outside", pytest.approx(bad.us / fine.us - 1))
    (between,) = by_length[8].choices  # 8 lies as far from 4 as from 16: the longer one's row decides
    assert between.label == "faulty/late"
    assert (found.summary.flips, found.summary.flips_outside, found.summary.midpoints_within) == (1, 1, 0.0)
    assert [reason for _, reason in found.left] == ["its first use in a fresh process failed: out of luck"]
    assert [(len(one.tuned), len(one.midpoints), len(one.left)) for one in kept] == [(1, 0, 2), (2, 0, 1), (2, 1, 0)]
    assert {reason for one in kept for _, reason in one.left} == {"it was not finished when this was written"}


def test_a_row_that_the_first_tune_made_between_is_judged_among_everybody_and_splits_the_midpoint(
    faulty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    late, good = 0, 1
    (middle,) = buckets([8])
    make = made_up({"first": {4: good, 8: late, 16: late}, "second": {4: good, 16: late}})

    def tune(request: TuneRequest, *given: object) -> TuneReport:
        report = make(replace(request, buckets=(*request.buckets, middle)), *given)  # type: ignore[operator]
        between = tuple(replace(row, between=(4, 16)) for row in report.rows if row.bucket == middle)
        return replace(report, rows=tuple(row for row in report.rows if row.bucket != middle), midpoints=between)

    monkeypatch.setattr(assess_tunes, "tune", tune)
    monkeypatch.setattr(assessing, "_MOST_CAP_S", 0.3)
    found = assess(TuneRequest(buckets([4, 16]), backends=("faulty",)))
    (between,) = found.refined
    assert (between.bucket, between.between, between.best, between.candidates) == (middle, (4, 16), "faulty/good", 2)
    assert [choice.label for choice in between.choices] == ["faulty/late"]
    assert found.summary.worst_refined_regret == between.choices[0].regret > 0.5
    chosen = {one.bucket.seq_len: [choice.label for choice in one.choices] for one in found.midpoints}
    assert chosen == {6: ["faulty/late"], 11: ["faulty/late"]}  # a length as far from both takes the longer one's row


def test_without_time_nothing_is_begun_and_all_of_it_is_left(faulty: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assess_tunes, "tune", lambda *_: pytest.fail("tuned"))
    found = assess(TuneRequest(buckets([4, 16]), backends=("faulty",)), budget_s=1e-9)
    assert (found.tuned, found.midpoints, found.batches, found.planned) == ((), (), 0, (2, 1))
    why = "the budget ended before its turn"
    assert [(bucket.seq_len, reason) for bucket, reason in found.left] == [(4, why), (16, why), (8, why)]


@pytest.mark.parametrize("regime", ["inference", "training"])
def test_the_first_use_is_timed_and_says_who_chose(regime: str, capsys: pytest.CaptureFixture[str]) -> None:
    (bucket,) = plan("cpu", ops=["fused_uw"], seq_lens=[64], heads=[(1, 1)], head_dims=[(8, 8)], dtypes=["float32"], regimes=[regime])  # type: ignore[list-item]
    from titans_backends.tuning import wire

    first_use.main({"bucket": wire.bucket_to(bucket), "device": "cpu", "heads": None}, 0.5)
    told = json.loads(capsys.readouterr().out)
    assert told["first_s"] > 0.5
    assert told["second_s"] > 0
    assert told["origin"] == "default"


def test_an_interrupt_is_status_130_with_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*asked: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(assessing._Run, "_batch", interrupted)
    path = tmp_path / "assessed.json"
    words = [
        "tune",
        "--assess",
        "--op",
        "fused_uw",
        "--seq-lens",
        "64",
        "--heads",
        "2",
        "--head-dim",
        "16",
        "--dtype",
        "float32",
        "--regime",
        "inference",
    ]
    result = run(app, [*words, "--device", "cpu", "--output", str(path)])
    assert result.exit_code == 130, result.output
    assert [one["reason"] for one in json.loads(path.read_text())["left"]] == ["it was interrupted"]


def test_the_command_writes_the_figures_with_the_machine_and_shows_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("titans_backends.cli.assess")
    seen: list[TuneRequest] = []

    def made(request: TuneRequest, budget_s: float | None, progress: object, keep: Callable[[Assessment], None]) -> Assessment:
        seen.append(request)
        one = request.buckets[0]
        choices = (Choice("eager/x", 110.0, 0.01, 0.1, True), Choice("eager/y", 100.0, 0.01, 0.0, False))
        tuned = Assessed(one, "eager/y", 100.0, 0.01, 2, choices, None if len(seen) > 1 else Flip("outside", 0.1))
        keep(Assessment((tuned,), (), (3.0, 2.0), (1, 1), (), ((one._replace(seq_len=7), "not yet"),), 8.0))
        early = json.loads(path.read_text())  # what a killed command leaves
        assert (early["summary"]["worst_regret"], early["left"][0]["seq_len"], early["first_uses"]) == (0.1, 7, [])
        return Assessment((tuned,), (), (3.0, 2.0), (1, 1), (FirstUse(one, 1.25, 0.001, "tuned"),), (), 9.0, None, 3, (1, 0))

    monkeypatch.setattr(module, "assess", made)
    path = tmp_path / "results" / "assessed.json"
    words = ["tune", "--assess", "--op", "fused_uw", "--seq-lens", "64,128", "--limit", "1", "--device", "cpu"]
    result = run(app, [*words, "--output", str(path)])
    assert result.exit_code == 0, result.output
    assert len(seen[0].buckets) == 1
    assert seen[0].output is None  # its tables are its own
    for said in (
        "eager/x | eager/y",
        "10 %",
        "outside",
        "mean 5.0 %, worst 10 % (10 % beyond noise)",
        "1.2 s with a table there, in a fresh process (choice: tuned)",
        "3.0 s for 1 bucket | 2.0 s for 1 bucket, in 3 batches",
    ):
        assert said in result.stdout
    told = json.loads(path.read_text())
    assert told["device"]["slug"] == detect("cpu").slug
    assert told["environment"]["torch"]
    assert told["command"] == "titans-backends tune --op fused_uw --seq-lens 64,128 --device cpu --assess --limit 1"
    assert (told["left"], told["batches"], told["planned"]) == ([], 3, {"buckets": 1, "midpoints": 0, "refined": 0})
    assert told["summary"]["worst_regret"] == 0.1
    assert told["tuned"][0]["choices"][0]["label"] == "eager/x"
    assert "; worst cost 10 %" in result.stdout
    assert "worst cost" not in run(app, [*words, "--output", str(path)]).stdout  # the second has no flip
    for wrong, why in (
        ([*words, "--output", "x.yaml"], "--output must end in .json"),
        (
            [*words, "--output", "/dev/null/x.json"],
            "--assess: the result could not be written: /dev/null, on the way to /dev/null/x.json, is not a folder",
        ),
        ([*words, "--force"], "leave out --force"),
        (["tune", "--limit", "3", "--device", "cpu"], "stand with --assess"),
    ):
        refused = run(app, wrong)
        assert refused.exit_code == 2
        assert why in " ".join(refused.stderr.split())


def test_everything_of_a_batch_is_compiled_ahead_at_once_and_the_tunes_compile_nothing_ahead(faulty: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []
    tunes: list[TuneRequest] = []
    made = made_up({"first": {4: 1, 16: 1}, "second": {4: 1, 16: 1}})

    def compiled(todo: list[Job], target: Target, limits: Limits, most: int) -> CompiledAhead:
        asked.extend((job.candidate.variant, bucket.seq_len) for job in todo for bucket in job.buckets)
        assert limits.whole_s <= 35
        return CompiledAhead(len(asked), most, 1.0)

    def tune(request: TuneRequest, *given: object) -> TuneReport:
        tunes.append(request)
        return made(request)  # type: ignore[operator,no-any-return]

    monkeypatch.setattr(assessing, "processes", lambda: 2)
    monkeypatch.setattr(assessing, "hooked", lambda given, candidates: [one for one in candidates if one.backend == "faulty"])
    monkeypatch.setattr(assessing, "compile_ahead", compiled)
    monkeypatch.setattr(assess_tunes, "tune", tune)
    monkeypatch.setattr(assessing._Run, "_measure", lambda *_: None)
    found = assess(TuneRequest(buckets([4, 16]), backends=("faulty",)), budget_s=100.0)
    assert set(asked) == {(variant, length) for variant in ("late", "good", "raises") for length in (4, 8, 16)}
    assert found.compiled == CompiledAhead(9, 2, 1.0)
    assert [request.ahead for request in tunes] == [False, False]


def test_the_finals_are_between_the_choices_and_the_fastest_that_may_be_faster() -> None:
    from tests.test_tuning_doubt import BUCKET, standing_of

    met: list[str] = []

    class Bench:
        rules = assess_full.rules(3.0)

        def again(self, group: list[Candidate], measured: object, rules: RaceRules) -> dict[Candidate, object]:
            assert (rules.max_rounds, rules.target_spread, rules.final_band) == (1000, 0.002, 0.05)
            assert rules.budget_s + self.rules.budget_s == pytest.approx(3.0)
            met.extend(candidate.variant for candidate in group)
            return {}

    standing = standing_of(BUCKET, [(100, 0.01), (103, 0.0), (200, 0.01), (99, 0.01), (107, 0.1), *((97.0 + i / 10, 0.0) for i in range(6))])
    assert assess_full.finals(Bench(), standing, standing.pairs[:1], 3.0) == {}  # type: ignore[arg-type]
    assert met == ["v0", *(f"v{5 + i}" for i in range(6))]
    met.clear()
    assess_full.finals(Bench(), standing, standing.pairs[5:6], 3.0)  # type: ignore[arg-type]
    assert met == ["v4", "v5"]
