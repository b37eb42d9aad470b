"""Tuning with a real child process: what fails is written down and outlived, what is current is not measured again."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

import titans_backends as tb
from titans_backends.buckets import Bucket, defaults_of
from titans_backends.cache import file
from titans_backends.cache.paths import timings_path, user_cache_path
from titans_backends.cache.schema import WhenValue, canonical_when
from titans_backends.cache.timings import Measurement
from titans_backends.machine import detect
from titans_backends.tuning import events
from titans_backends.tuning.plan import plan
from titans_backends.tuning.run import TuneInterrupted, TuneReport, TuneRequest, tune
from titans_backends.tuning.standing import without_states

PLUGINS = Path(__file__).parent / "plugins"


@dataclass
class Workshop:
    """A copy of the faulty backend in a folder of its own, and a cache beside it."""

    folder: Path
    patch: pytest.MonkeyPatch
    events: list[events.Event] = field(default_factory=list)

    @property
    def output(self) -> Path:
        return self.folder / "tuned.yaml"

    def offer(self, *variants: str) -> None:
        """Says which of the backend's candidates there are."""
        self.patch.setenv("FAULTY_VARIANTS", ",".join(variants))
        tb.reset()

    def tune(self, buckets: Sequence[Bucket], on_event: Callable[[events.Event], None] | None = None, **request: object) -> TuneReport:
        self.events.clear()

        def heard(event: events.Event) -> None:
            self.events.append(event)
            if on_event is not None:
                on_event(event)

        given = {"backends": ("faulty",), "bucket_s": 0.02, "output": self.output, **request}
        return tune(TuneRequest(tuple(buckets), **given), heard)  # type: ignore[arg-type]

    def timed(self) -> list[str]:
        """The labels that the last tune raced."""
        return [label for event in self.events if isinstance(event, events.BucketStarted) for label in event.candidates]

    def measurements(self, bucket: Bucket) -> dict[tuple[str, str], Measurement]:
        timings = file.read_timings(timings_path(self.output), defaults_of).table
        assert timings is not None
        return {(one.candidate.removeprefix("faulty/"), one.direction): one for one in timings.rows[bucket]}

    def rows(self) -> dict[Bucket, object]:
        table = file.read(self.output, defaults_of).table
        return {} if table is None else dict(table.rows)


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forked_children: None) -> Iterator[Workshop]:
    shutil.copytree(PLUGINS / "faulty", tmp_path / "plugins" / "faulty", ignore=shutil.ignore_patterns("__pycache__"))
    for name in [name for name in sys.modules if name.split(".")[0] == "faulty"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path / "plugins")
    monkeypatch.setenv("TITANS_BACKENDS_PLUGINS", "faulty")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    importlib.invalidate_caches()
    yield Workshop(tmp_path, monkeypatch)
    monkeypatch.undo()
    for name in [name for name in sys.modules if name.split(".")[0] == "faulty"]:
        del sys.modules[name]
    tb.reset()


def small(seq_lens: Sequence[int] = (16,), regime: str = "inference") -> tuple[Bucket, ...]:
    return plan("cpu", ops=["gated_delta_rule"], seq_lens=seq_lens, heads=[(1, 1)], head_dims=[(8, 8)], regimes=[regime])  # type: ignore[list-item]


def test_faults_are_recorded_with_their_reasons_and_the_rest_is_raced(workshop: Workshop) -> None:
    workshop.offer("raises", "good", "nan", "segfault", "wrong", "exits", "huge", "hangs", "later")
    (bucket,) = small()
    report = workshop.tune([bucket], timeout_s=2.0)
    assert report.complete
    found = {name: one for (name, _), one in workshop.measurements(bucket).items()}
    said = {
        "raises": "raised on the timed shape, seq_len 16: ValueError: no such instruction",
        "nan": "o is not finite",
        "wrong": "o is off by",
        "segfault": "killed by signal 11 (SIGSEGV)",
        "exits": "exited with status 3",
        "huge": "out of memory",
        "hangs": "no answer within 2 s",
    }
    for name, reason in said.items():
        assert found[name].status == "failed"
        assert reason in found[name].reason
        assert found[name].us is None
    assert dict(found["wrong"].errors)["o"] > 1e-5
    assert {name for name, one in found.items() if one.status == "ok"} == {"good", "later", "reference/contract"}
    (row,) = report.rows
    assert row.entry is not None
    assert {row.entry.use, row.entry.next} == {"faulty/good", "faulty/later"}  # the same but for the list's order: a busy machine may tell them apart
    assert row.default_us is None  # the default is the one that raises
    done = {event.label: event.status for event in workshop.events if isinstance(event, events.CandidateDone)}
    assert done == {**{f"faulty/{name}": "failed" for name in said}, "faulty/good": "ok", "faulty/later": "ok"}


def test_a_candidate_that_is_wrong_at_the_timed_shape_only_is_rejected(workshop: Workshop) -> None:
    workshop.offer("good", "late", "long_only")
    (bucket,) = small([256])
    workshop.tune([bucket])
    one = workshop.measurements(bucket)["long_only", "forward"]
    assert (one.status, one.us) == ("failed", None)
    assert "on the timed shape, seq_len 256" in one.reason


def test_a_training_pair_needs_a_right_backward_and_a_row_without_states_is_kept(workshop: Workshop) -> None:
    workshop.offer("good", "nan", "backward:wrong", "backward:segfault", "backward:good")
    (bucket,) = small(regime="training")
    report = workshop.tune([bucket])
    found = workshop.measurements(bucket)
    assert "dk is off by" in found["wrong", "backward"].reason
    assert "SIGSEGV" in found["segfault", "backward"].reason
    (row,) = report.rows
    assert row.entry is not None
    assert (row.entry.use, row.entry.backward) == ("faulty/good", "faulty/good")
    assert row.entry.us == pytest.approx((found["good", "forward"].us or 0) + (found["good", "backward"].us or 0), rel=1e-3)
    assert set(workshop.rows()) == {bucket, without_states(bucket)}


def test_a_backward_whose_dg_holds_what_cancels_is_recorded_as_failed_and_not_chosen_though_it_is_the_default_and_faster(workshop: Workshop) -> None:
    workshop.offer("good", "backward:cancels", "backward:late")
    values: dict[str, WhenValue] = {"dtype": "float32", "head_dim": (8, 8), "streams": 1, "g": True, "regime": "training"}
    bucket = Bucket("fast_core", canonical_when(values, defaults_of("fast_core")), 40)
    report = workshop.tune([bucket])
    found = workshop.measurements(bucket)
    wrong = found["cancels", "backward"]
    assert (wrong.status, wrong.us) == ("failed", None)
    assert "dg is off by" in wrong.reason
    assert "on g -7 to -6" in wrong.reason  # every other case it keeps
    assert (found["late", "backward"].status, found["late", "backward"].reason) == ("ok", "")
    (row,) = report.rows
    assert row.entry is not None
    assert (row.entry.use, row.entry.backward) == ("faulty/good", "faulty/late")


def test_a_second_run_has_nothing_to_do_and_a_changed_kernel_is_raced_with_its_yardsticks_alone(workshop: Workshop) -> None:
    workshop.offer("good", "late", "later")
    buckets = small([8, 16])
    workshop.tune(buckets)
    before = workshop.output.read_bytes()
    again = workshop.tune(buckets)
    assert again.nothing_to_do
    assert [type(event) for event in workshop.events] == [events.Planned, events.Skipped, events.Skipped]
    assert workshop.events[0] == events.Planned(total=2, to_measure=0)
    assert workshop.output.read_bytes() == before

    source = workshop.folder / "plugins" / "faulty" / "late.py"
    source.write_text(source.read_text().replace("0.004", "0.0041"))
    changed = workshop.tune(buckets[:1])
    assert not changed.nothing_to_do
    assert workshop.timed() == ["faulty/good", "faulty/late"]  # the winner and the default are the same one
    assert workshop.measurements(buckets[0])["later", "forward"].status == "ok"

    source.write_text(source.read_text().replace("What the", "All that the"))
    assert workshop.tune(buckets[:1]).nothing_to_do  # a docstring is no change


def test_a_row_says_what_decided_and_a_tune_by_time_chooses_again_without_measuring(workshop: Workshop) -> None:
    workshop.offer("good", "late")
    buckets = small()

    def asked() -> set[tuple[str, float | None]]:
        return {(row.objective, row.max_memory_mib) for row in workshop.rows().values()}  # type: ignore[attr-defined]

    workshop.tune(buckets, objective="memory")
    assert asked() == {("memory", None)}
    assert workshop.tune(buckets, objective="memory").nothing_to_do
    before = workshop.output.read_bytes()
    assert workshop.tune(buckets, max_memory_mib=64).nothing_to_do
    assert asked() == {("time", 64)}
    assert workshop.output.read_bytes() != before
    workshop.tune(buckets)
    assert asked() == {("time", None)}
    assert "objective" not in workshop.output.read_text()
    assert "max_memory" not in workshop.output.read_text()


def test_what_fails_is_not_tried_again_until_it_changes(workshop: Workshop) -> None:
    workshop.offer("good", "raises")
    buckets = small()
    workshop.tune(buckets)
    assert workshop.tune(buckets).nothing_to_do
    assert workshop.tune(buckets, force=True).complete
    assert workshop.timed() == ["faulty/good", "faulty/raises"]


def test_what_lacked_memory_is_tried_again_where_nothing_else_passed(workshop: Workshop) -> None:
    buckets = small()
    workshop.offer("huge", "raises")
    workshop.tune(buckets)
    assert not workshop.tune(buckets).nothing_to_do
    assert workshop.timed() == ["faulty/huge"]

    workshop.offer("good", "huge", "raises")
    workshop.tune(buckets)
    assert workshop.timed() == ["faulty/good"]
    assert workshop.tune(buckets).nothing_to_do  # there is a winner


def test_a_bucket_without_a_passing_candidate_has_no_row_and_says_why(workshop: Workshop) -> None:
    workshop.offer("nan")
    buckets = small()
    report = workshop.tune(buckets)
    assert not report.complete
    assert "faulty/nan (forward): o is not finite" in report.rows[0].reason
    assert workshop.rows() == {}


def test_a_killed_tune_keeps_every_finished_bucket(workshop: Workshop) -> None:
    workshop.offer("good")
    buckets = small([4, 8, 16])

    def interrupt(event: events.Event) -> None:
        if isinstance(event, events.BucketStarted) and event.index == 2:
            raise KeyboardInterrupt

    with pytest.raises(TuneInterrupted) as caught:
        workshop.tune(buckets, interrupt)
    assert [row.bucket for row in caught.value.report.rows] == list(buckets[:2])
    assert caught.value.report.remaining == buckets[2:]
    assert set(workshop.rows()) == set(buckets[:2])
    report = workshop.tune(buckets)
    assert report.complete
    assert [event.bucket for event in workshop.events if isinstance(event, events.BucketStarted)] == [buckets[2]]


def test_a_tune_killed_outright_keeps_its_rows_and_leaves_no_process_behind(workshop: Workshop) -> None:
    workshop.offer("good", "hangs_at_16")
    buckets = small([4, 16])
    script = (
        "from pathlib import Path; import sys\n"
        "from titans_backends.tuning.plan import plan\n"
        "from titans_backends.tuning.run import TuneRequest, tune\n"
        "buckets = plan('cpu', ops=['gated_delta_rule'], seq_lens=[4, 16], heads=[(1, 1)], head_dims=[(8, 8)], regimes=['inference'])\n"
        "say = lambda event: print(type(event).__name__, flush=True)\n"
        "tune(TuneRequest(buckets, backends=('faulty',), bucket_s=0.02, output=Path(sys.argv[1])), say)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in sys.path)}
    command = [sys.executable, "-c", script, str(workshop.output)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = [process.stdout.readline().strip()]
        while said[-1] != "BucketDone":
            assert said[-1], f"it ended after {said}"
            said.append(process.stdout.readline().strip())
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
    assert set(workshop.rows()) == {buckets[0]}
    assert children
    deadline = time.monotonic() + 10
    while any(_runs(int(child)) for child in children):
        assert time.monotonic() < deadline, f"processes {children} outlived their tuner"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def test_a_budget_ends_between_buckets_and_names_what_is_left(workshop: Workshop) -> None:
    workshop.offer("good")
    buckets = small([4, 8])

    def spend(event: events.Event) -> None:
        if isinstance(event, events.BucketDone):
            time.sleep(0.3)

    report = workshop.tune(buckets, spend, budget_s=0.2)
    assert report.remaining == buckets[1:]
    assert not report.complete
    assert workshop.events[-1] == events.Remaining(buckets[1:])


def test_an_unwritable_file_is_said_before_anything_is_measured(workshop: Workshop) -> None:
    workshop.offer("good")
    workshop.output.write_text("")
    workshop.output.chmod(0o444)
    with pytest.raises(file.CacheError, match="read-only"):
        workshop.tune(small())
    assert not any(isinstance(event, events.BucketStarted) for event in workshop.events)


def test_an_unknown_backend_lists_the_known_ones(workshop: Workshop) -> None:
    with pytest.raises(tb.UnknownNameError, match="faulty"):
        workshop.tune(small(), backends=("fualty",))


def test_a_call_inside_autotune_measures_its_bucket_and_uses_the_row(workshop: Workshop) -> None:
    workshop.offer("late", "good")
    q, k, v = (torch.nn.functional.normalize(torch.randn(1, 12, 1, 8), dim=-1) for _ in range(3))
    beta = torch.rand(1, 12, 1)
    op = tb.get_op("gated_delta_rule")
    before = op.explain(q, k, v, beta).as_dict()
    with tb.autotune(budget_s=5.0):
        op(q, k, v, beta)
    assert user_cache_path(detect("cpu").slug).is_file()
    after = op.explain(q, k, v, beta).as_dict()
    assert "default" in str(before)
    assert "user cache" in str(after)
