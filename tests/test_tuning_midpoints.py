"""Between two lengths that chose differently their choices meet: which lengths those are, and a real tune that finds, gates and writes them, and no others."""

from __future__ import annotations

import functools
import importlib
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

import titans_backends as tb
from titans_backends.buckets import Bucket, defaults_of
from titans_backends.cache import file
from titans_backends.cache.lookup import Hit, lookup
from titans_backends.cache.paths import timings_path
from titans_backends.cache.schema import Entry, Table, prune
from titans_backends.machine import detect
from titans_backends.offers import offers
from titans_backends.tuning import events
from titans_backends.tuning import run as running
from titans_backends.tuning.midpoints import disagreeing
from titans_backends.tuning.plan import plan
from titans_backends.tuning.problem import signature_of_bucket
from titans_backends.tuning.report import TuneInterrupted, TuneReport
from titans_backends.tuning.request import TuneRequest
from titans_backends.tuning.run import tune
from titans_backends.tuning.standing import Standing, measurement_of
from titans_backends.tuning.store import Store
from titans_backends.tuning.timing import RaceRules

PLUGINS = Path(__file__).parent / "plugins"
RUN = """    if name in ("late", "later"):
        time.sleep(0.004)
"""
CROSSING = """
    length = call.q.shape[1]
    timed = call.q.shape == (1, length, 1, 8) and length in (4, 8, 12, 36)
    if timed and (name == "later" or name == "short" and length > 20 or name == "long" and length < 20):
        time.sleep(0.01)
    if timed and length == 12 and name == os.environ.get("FAULTY_AT_12"):
        raise ValueError("not at this length")
"""


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forked_children: None) -> Iterator[Path]:
    """Where to write. `short` is the fastest below 20 tokens, `long` above, and the default is never."""
    shutil.copytree(PLUGINS / "faulty", tmp_path / "plugins" / "faulty", ignore=shutil.ignore_patterns("__pycache__"))
    module = tmp_path / "plugins" / "faulty" / "gated_delta_rule.py"
    assert RUN in module.read_text()
    module.write_text(module.read_text().replace(RUN, RUN + CROSSING))
    monkeypatch.syspath_prepend(tmp_path / "plugins")
    monkeypatch.setenv("TITANS_BACKENDS_PLUGINS", "faulty")
    monkeypatch.setenv("FAULTY_VARIANTS", "later,short,long")
    monkeypatch.setattr(running, "RaceRules", functools.partial(RaceRules, at_once_us=1e9))  # one interrupted sample lets nobody go
    importlib.invalidate_caches()
    tb.reset()
    yield tmp_path / "tuned.yaml"
    monkeypatch.undo()
    for name in [name for name in sys.modules if name.split(".")[0] == "faulty"]:
        del sys.modules[name]
    tb.reset()


def at(*seq_lens: int) -> tuple[Bucket, ...]:
    return plan("cpu", ops=["gated_delta_rule"], seq_lens=seq_lens, heads=[(1, 1)], head_dims=[(8, 8)], regimes=["inference"])


def tuned(output: Path, buckets: Sequence[Bucket], **request: object) -> tuple[TuneReport, list[events.Event]]:
    heard: list[events.Event] = []
    given = {"backends": ("faulty",), "bucket_s": 0.02, "output": output, **request}
    return tune(TuneRequest(tuple(buckets), **given), heard.append), heard  # type: ignore[arg-type]


def table(output: Path) -> Table:
    found = file.read(output, defaults_of).table
    assert found is not None
    return found


def raced(output: Path, bucket: Bucket) -> set[str]:
    timings = file.read_timings(timings_path(output), defaults_of).table
    assert timings is not None
    return {one.candidate.removeprefix("faulty/") for one in timings.rows[bucket]}


def test_the_choices_of_neighbours_that_differ_meet_in_the_middle_alone_and_once(output: Path) -> None:
    (middle,) = at(12)
    report, heard = tuned(output, at(4, 36))
    assert [row.entry.use for row in report.rows if row.entry] == ["faulty/short", "faulty/long"]
    (row,) = report.midpoints
    assert (row.bucket, row.between, row.choices, row.measured) == (middle, (4, 36), 2, True)
    assert row.entry is not None
    assert (row.entry.use, row.entry.next) == ("faulty/short", "faulty/long")
    assert [row.choices for row in report.rows] == [3, 3]
    assert {bucket.seq_len for bucket in table(output).rows} == {4, 12, 36}
    assert raced(output, middle) == {"short", "long"}, "two raced, and the timings say so; the default did not, nor the reference"
    found = lookup(table(output), middle.op, middle.when, 13, defaults_of(middle.op))
    assert isinstance(found, Hit)
    assert found.entry.use == "faulty/short", "without the midpoint it would be the longer one's"
    ends = {bucket.seq_len: entry.until for bucket, entry in table(output).rows.items()}
    assert ends[4] is None, "one choice at both"
    assert ends[12] is not None
    assert ends[12][0] == 36
    assert 12 < ends[12][1] < 36, "each is 10 ms the slower at the other's length"
    refining = next(index for index, event in enumerate(heard) if isinstance(event, events.Refining))
    assert heard[refining] == events.Refining((middle,))
    assert [event.bucket.seq_len for event in heard if isinstance(event, events.BucketDone)] == [4, 36, 12]
    assert isinstance(heard[refining - 1], events.BucketDone), "it comes after all that was asked for"

    again, heard = tuned(output, at(4, 36))
    assert again.nothing_to_do
    assert not [event for event in heard if isinstance(event, events.Refining)]

    asked, _ = tuned(output, [middle])
    assert raced(output, middle) == {"later", "short", "long", "reference/contract"}
    assert [row.choices for row in asked.rows] == [3]


def rewrite(output: Path, until: tuple[int, int] | None, length: int = 12) -> Table:
    """The table with another `until` in one row, as another process would write it."""
    rows = {bucket: replace(entry, until=until) if bucket.seq_len == length else entry for bucket, entry in table(output).rows.items()}
    return file.edit(output, lambda older: replace(older, rows=rows), device=table(output).device, defaults_of=defaults_of)


def test_a_tune_that_was_killed_before_its_last_step_is_made_good_by_the_next(output: Path) -> None:
    tuned(output, at(4, 36))
    told = table(output).rows[at(12)[0]].until
    assert told is not None
    rewrite(output, None)
    output.chmod(0o444)
    report, _ = tuned(output, at(4, 36))
    assert report.nothing_to_do, "a table that cannot be written is no error where all is current"
    assert table(output).rows[at(12)[0]].until is None
    output.chmod(0o644)
    report, _ = tuned(output, at(4, 36))
    assert report.nothing_to_do
    assert table(output).rows[at(12)[0]].until == told


def test_a_row_that_is_gone_comes_back_from_its_measurements(output: Path) -> None:
    tuned(output, at(4, 36))
    (middle,), whole = at(12), table(output)
    file.edit(output, lambda older: prune(older, lambda bucket, _: bucket != middle), device=whole.device, defaults_of=defaults_of)
    report, heard = tuned(output, at(4, 36))
    assert report.nothing_to_do
    assert not [event for event in heard if isinstance(event, events.Refining)], "nothing was left to measure"
    assert table(output).rows == whole.rows


def test_a_row_between_two_that_agree_is_measured_anew_where_no_call_would_take_it_any_more(output: Path) -> None:
    tuned(output, at(4, 8))
    (middle,), whole = at(6), table(output)
    assert [entry.use for entry in whole.rows.values()] == ["faulty/short", "faulty/short"]
    older = replace(whole.rows[at(4)[0]], use="faulty/later", source="0123456789ab")
    file.edit(output, lambda found: replace(found, rows={**found.rows, middle: older}), device=whole.device, defaults_of=defaults_of)
    report, _ = tuned(output, at(4, 8))
    assert [(row.bucket, row.between, row.choices, row.measured) for row in report.midpoints] == [(middle, (4, 8), 1, True)]
    row = table(output).rows[middle]
    assert (row.use, row.source) == ("faulty/short", whole.rows[at(4)[0]].source)
    assert tuned(output, at(4, 8))[0].nothing_to_do


def test_an_end_is_not_written_over_what_another_process_chose_meanwhile(output: Path) -> None:
    tuned(output, at(4, 36))
    told, store = rewrite(output, None), Store.opened(detect("cpu"), output)
    other = replace(told.rows[at(36)[0]], use="faulty/later")
    file.edit(output, lambda older: replace(older, rows={**older.rows, at(36)[0]: other}), device=told.device, defaults_of=defaults_of)
    store.switch({at(12)[0]: (36, 20)})
    assert table(output).rows[at(12)[0]].until is None
    store.switch({at(12)[0]: (36, 20)})
    assert table(output).rows[at(12)[0]].until == (36, 20), "it has seen the other's row by now"


def test_an_interruption_is_told_as_one_where_the_file_cannot_be_written_any_more(output: Path) -> None:
    def interrupted(event: events.Event) -> None:
        if isinstance(event, events.Refining):
            output.chmod(0o444)
            raise KeyboardInterrupt

    with pytest.raises(TuneInterrupted) as stop:
        tune(TuneRequest(at(4, 36), backends=("faulty",), bucket_s=0.02, output=output), interrupted)
    assert [row.entry is not None for row in stop.value.report.rows] == [True, True]


def test_what_was_not_asked_for_is_left_out_and_an_older_table_is_refined_later(output: Path) -> None:
    report, _ = tuned(output, at(4, 36), midpoints=False)
    assert (report.midpoints, set(table(output).rows)) == ((), {*at(4, 36)})
    report, heard = tuned(output, at(4, 36), backends=("eager",))
    assert not [event for event in heard if isinstance(event, events.Refining)], "the choices are of a backend that is not asked to race"
    report, _ = tuned(output, at(4, 36))
    assert not report.nothing_to_do
    assert [row.bucket for row in report.midpoints] == [*at(12)]


def test_a_neighbour_of_an_earlier_tune_counts_where_it_is_named(output: Path) -> None:
    tuned(output, at(4))
    report, _ = tuned(output, at(36))
    assert report.midpoints == ()
    report, _ = tuned(output, at(36), beside=at(4), force=True)
    assert [(row.bucket, row.between) for row in report.midpoints] == [(at(12)[0], (4, 36))]
    assert [row.bucket for row in report.rows] == [*at(36)]


def test_the_budget_ends_before_the_midpoints_and_what_is_left_is_told(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running._Run, "_is_over", lambda run: len(run.rows.told) >= 2)
    report, heard = tuned(output, at(4, 36), budget_s=60.0)
    assert (report.complete, report.nothing_to_do, report.midpoints, report.unrefined) == (True, False, (), at(12))
    assert heard[-1] == events.Unrefined(at(12))
    assert set(table(output).rows) == {*at(4, 36)}


def test_a_choice_that_fails_in_the_middle_does_not_win_there(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAULTY_AT_12", "short")
    report, _ = tuned(output, at(4, 36))
    (row,) = report.midpoints
    assert row.entry is not None
    assert (row.entry.use, row.choices) == ("faulty/long", 1)


ROW = Entry("faulty/short", 100.0, 0.01, 1.0)


def standing(times: dict[tuple[int, str], float]) -> object:
    """What is offered, with these times by length and variant."""

    def of(bucket: Bucket) -> Standing:
        signature = signature_of_bucket(bucket)
        found = Standing.of(bucket, signature, offers(signature, detect("cpu"), ["faulty"]), ())
        timed = [(c, times.get((bucket.seq_len, c.variant))) for c in found.candidates if c.direction == "forward"]
        return found.with_measured({c: replace(measurement_of(c), us=us, spread=0.0) for c, us in timed if us is not None})

    return of


def test_those_that_swing_most_come_first_and_only_where_the_rows_name_different_choices(output: Path) -> None:
    two = replace(ROW, use="faulty/long")
    rows = {**dict.fromkeys(at(8, 16), ROW), **dict.fromkeys(at(64, 256), two), **dict.fromkeys(at(1024), ROW)}
    times = {(16, "short"): 10.0, (16, "long"): 11.0, (64, "long"): 20.0, (64, "short"): 21.0}
    times |= {(256, "long"): 30.0, (256, "short"): 60.0, (1024, "short"): 100.0}
    found = disagreeing(at(8, 16, 64, 256, 1024), (), rows, standing(times))  # type: ignore[arg-type]
    assert [(one.bucket.seq_len, one.ends) for one in found] == [(512, (256, 1024)), (32, (16, 64))]
    assert [one.swing for one in found] == [pytest.approx(0.6931, abs=1e-3), pytest.approx(0.0953 + 0.0488, abs=1e-3)]
    assert [[pair.label for pair in one.choices] for one in found] == [["faulty/long", "faulty/short"], ["faulty/short", "faulty/long"]]


def test_where_a_row_lies_between_two_already_it_is_their_neighbour(output: Path) -> None:
    rows = {at(4)[0]: ROW, at(36)[0]: replace(ROW, use="faulty/long"), at(7)[0]: ROW}
    assert disagreeing(at(4, 36), (), rows, standing({})) == ()  # type: ignore[arg-type]
    rows[at(12)[0]] = rows.pop(at(7)[0])
    assert [one.bucket for one in disagreeing(at(4, 36), (), rows, standing({}))] == [*at(12)]  # type: ignore[arg-type]
    assert disagreeing(at(4), (), rows, standing({})) == disagreeing((), at(4, 36), rows, standing({})) == ()  # type: ignore[arg-type]
