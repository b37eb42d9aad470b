"""Compiling ahead of a tune: what is compiled and where, and that nothing of it decides: not a failure, not a hang, not Ctrl-C."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

import titans_backends as tb
from titans_backends.backend import Candidate
from titans_backends.buckets import Bucket
from titans_backends.machine import detect
from titans_backends.offers import offers
from titans_backends.tuning import ahead, events, run
from titans_backends.tuning.plan import plan
from titans_backends.tuning.problem import signature_of_bucket
from titans_backends.tuning.run import TuneInterrupted, TuneReport, TuneRequest, tune

PLUGINS = Path(__file__).parent / "plugins"
OP = "gated_delta_rule"


@dataclass
class Workshop:
    """The backend whose hook leaves marks, a folder for them, and a cache beside it."""

    folder: Path
    patch: pytest.MonkeyPatch
    events: list[events.Event] = field(default_factory=list)

    def offer(self, *variants: str) -> None:
        """Says which of the backend's candidates there are; "blind": a module without the hook."""
        self.patch.setenv("FORESIGHT_VARIANTS", ",".join(variants))
        for name in [name for name in sys.modules if name.split(".")[0] == "foresight"]:
            del sys.modules[name]
        tb.reset()

    def tune(self, buckets: Sequence[Bucket], **request: object) -> TuneReport:
        self.events.clear()
        given = {"backends": ("foresight",), "bucket_s": 0.02, "output": self.folder / "tuned.yaml", **request}
        return tune(TuneRequest(tuple(buckets), **given), self.events.append)  # type: ignore[arg-type]

    def marks(self) -> list[dict[str, object]]:
        """What the hook was called with, since the last look."""
        found = [json.loads(path.read_text()) for path in (self.folder / "marks").glob("*.json")]
        for path in (self.folder / "marks").glob("*.json"):
            path.unlink()
        return found

    def said(self) -> list[events.CompiledAhead]:
        return [event for event in self.events if isinstance(event, events.CompiledAhead)]


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forked_children: None) -> Iterator[Workshop]:
    (tmp_path / "marks").mkdir()
    monkeypatch.syspath_prepend(PLUGINS)
    monkeypatch.setenv("TITANS_BACKENDS_PLUGINS", "foresight")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setenv("FORESIGHT_MARKS", str(tmp_path / "marks"))
    monkeypatch.setattr(run, "processes", lambda: 2)
    importlib.invalidate_caches()
    made = Workshop(tmp_path, monkeypatch)
    made.offer("good")
    yield made
    monkeypatch.undo()
    for name in [name for name in sys.modules if name.split(".")[0] == "foresight"]:
        del sys.modules[name]
    tb.reset()


def small(*seq_lens: int, regime: str = "inference") -> tuple[Bucket, ...]:
    return plan("cpu", ops=[OP], seq_lens=seq_lens or (16,), heads=[(1, 1)], head_dims=[(8, 8)], regimes=[regime])  # type: ignore[list-item]


def todo(buckets: Sequence[Bucket]) -> list[ahead.Job]:
    """The jobs of all that the backend offers for the buckets."""
    found = []
    for bucket in buckets:
        given = offers(signature_of_bucket(bucket), detect("cpu"), ["foresight"])
        found.append((bucket, ahead.hooked(given, [c for entry in given for c in (*entry.forward, *entry.backward)])))
    return ahead.jobs(found)


def compiled(jobs: Sequence[ahead.Job], whole_s: float = 100.0, each_s: float = 60.0, most: int = 2) -> events.CompiledAhead:
    return ahead.compile_ahead(jobs, ahead.Target(detect("cpu"), "cpu"), ahead.Limits(whole_s, each_s), most)


def runs(pid: object) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_what_will_be_measured_is_compiled_before_in_processes_without_a_gpu(workshop: Workshop) -> None:
    workshop.offer("good", "other")
    report = workshop.tune(small(16, 32))
    assert report.complete
    order = [type(event) for event in workshop.events]
    assert order.index(events.CompiledAhead) < order.index(events.BucketStarted)
    (said,) = workshop.said()
    assert (said.candidates, said.processes, said.failed, said.reason) == (4, 2, 0, "")
    marks = workshop.marks()
    timed = sorted((mark["variant"], mark["tokens"]) for mark in marks if mark["device"] == "meta")
    assert timed == [("good", 16), ("good", 32), ("other", 16), ("other", 32)]
    gated = {(mark["variant"], mark["tokens"], mark["contiguous"]) for mark in marks if mark["device"] == "cpu"}
    assert {("good", 16, False), ("good", 16, True), ("other", 32, False), ("other", 32, True)} <= gated  # the gate's own cases, strides and all
    assert {(mark["gpus"], mark["threads"], mark["machine"]) for mark in marks} == {("", "1", detect("cpu").name)}
    assert os.getpid() not in {mark["pid"] for mark in marks}
    assert not any(runs(mark["pid"]) for mark in marks)


def test_both_directions_are_compiled_in_training(workshop: Workshop) -> None:
    jobs = todo(small(regime="training"))
    assert compiled(jobs, most=1).failed == 0
    assert {mark["direction"] for mark in workshop.marks()} == {"forward", "backward"}


def test_what_fails_or_dies_is_counted_and_decides_nothing(workshop: Workshop) -> None:
    workshop.offer("good", "raises", "dies", "other")
    report = workshop.tune(small(16))
    (said,) = workshop.said()
    assert (said.candidates, said.failed) == (2, 2)
    assert "status 3" in said.reason or "foresight/raises: ValueError: no such instruction" in said.reason
    assert "second line" not in said.reason
    assert report.complete
    assert {event.status for event in workshop.events if isinstance(event, events.CandidateDone)} == {"ok"}


def test_a_candidate_that_hangs_is_killed_and_another_process_does_the_rest(workshop: Workshop) -> None:
    workshop.offer("hangs", "good")
    said = compiled(todo(small(16)), each_s=2.0, most=1)
    assert (said.candidates, said.failed, said.processes) == (1, 1, 1)
    assert "foresight/hangs: no answer in time" in said.reason
    marks = workshop.marks()
    assert {mark["variant"] for mark in marks} == {"hangs", "good"}
    assert not any(runs(mark["pid"]) for mark in marks)


def test_the_whole_ends_at_its_limit_and_a_budget_is_not_spent_on_it(workshop: Workshop) -> None:
    workshop.offer("hangs")
    report = workshop.tune(small(16), budget_s=8.0)
    (said,) = workshop.said()
    assert (said.candidates, said.failed) == (0, 1)
    assert "not done within" in said.reason
    assert report.complete  # the other half of the budget was for measuring
    assert not any(runs(mark["pid"]) for mark in workshop.marks())


def test_ctrl_c_leaves_no_process(workshop: Workshop) -> None:
    workshop.offer("hangs")
    seen: list[object] = []

    def interrupt() -> None:
        while not seen:
            seen.extend(mark["pid"] for mark in workshop.marks())
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    with pytest.raises(TuneInterrupted) as caught:
        workshop.tune(small(16))
    thread.join()
    assert caught.value.report.remaining == small(16)
    assert seen
    assert not any(runs(pid) for pid in seen)


def test_what_is_current_is_not_compiled(workshop: Workshop) -> None:
    workshop.tune(small(16))
    workshop.marks()
    assert workshop.tune(small(16)).nothing_to_do
    assert not workshop.said()
    assert not workshop.marks()
    workshop.tune(small(16, 32))
    assert {mark["tokens"] for mark in workshop.marks() if mark["device"] == "meta"} == {32}


def forbidden(*_: object) -> None:
    raise AssertionError("a process was started")


@pytest.mark.parametrize(("variants", "most"), [(("good", "blind"), 2), (("good",), 0)], ids=["no module has the hook", "there is one core"])
def test_no_process_is_started_where(workshop: Workshop, variants: tuple[str, ...], most: int) -> None:
    workshop.offer(*variants)
    workshop.patch.setattr(ahead, "Child", forbidden)
    workshop.patch.setattr(run, "processes", lambda: most)
    assert workshop.tune(small(16)).complete
    assert not workshop.said()


def test_a_call_inside_autotune_is_compiled_ahead(workshop: Workshop) -> None:
    q, k, v = (torch.nn.functional.normalize(torch.randn(1, 12, 1, 8), dim=-1) for _ in range(3))
    with tb.autotune(budget_s=20.0):
        tb.get_op(OP)(q, k, v, torch.rand(1, 12, 1))
    assert {mark["variant"] for mark in workshop.marks()} == {"good"}


def test_processes_that_do_not_start_are_a_reason(workshop: Workshop) -> None:
    workshop.patch.setattr(ahead, "_WORKER", "titans_backends.no_such_module")
    said = compiled(todo(small(16, 32)))
    assert (said.candidates, said.failed) == (0, 2)
    assert "a process did not start" in said.reason
    assert "no_such_module" in said.reason


def cores(count: int) -> Callable[[int], set[int]]:
    return lambda _: set(range(count))


@pytest.mark.parametrize(("count", "most"), [(1, 0), (2, 1), (8, 7), (64, 14)])
def test_one_core_is_left_free(monkeypatch: pytest.MonkeyPatch, count: int, most: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", cores(count), raising=False)
    assert ahead.processes() == most


def test_jobs_join_lengths_and_launches_and_keep_the_candidates_of_a_key_apart() -> None:
    a, b = Candidate("one", "a"), Candidate("one", "b")
    short, long = small(16, 32)
    graph = Bucket(OP, (*short.when, ("launch", "graph")), 16)
    wide = Bucket(OP, (*short.when, ("packed", True)), 16)
    jobs = ahead.jobs([(short, [a, b]), (long, [a]), (graph, [b]), (wide, [a, b])])
    assert jobs == [ahead.Job(a, (short, long)), ahead.Job(a, (wide,)), ahead.Job(b, (short, graph)), ahead.Job(b, (wide,))]
