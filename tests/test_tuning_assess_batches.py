"""An assessment's budget: what a batch holds, that every bucket that is tuned is measured fully too, and that what does not fit is said. By a made-up clock."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.test_tuning_doubt import BUCKET, standing_of
from titans_backends.backend import Candidate
from titans_backends.buckets import Bucket
from titans_backends.cache.schema import Entry
from titans_backends.cache.timings import Measurement
from titans_backends.tuning import assess as assessing
from titans_backends.tuning import assess_tunes, run
from titans_backends.tuning.assess import Assessment, assess
from titans_backends.tuning.assess_full import NotMeasured, finals, rules
from titans_backends.tuning.assess_order import in_order
from titans_backends.tuning.assess_plan import Costs, Piece, Rate, chosen
from titans_backends.tuning.events import BucketStarted
from titans_backends.tuning.first_use import FirstUse
from titans_backends.tuning.host import Host
from titans_backends.tuning.plan import plan
from titans_backends.tuning.regret import Assessed, Choice
from titans_backends.tuning.report import Row, TuneInterrupted, TuneReport
from titans_backends.tuning.request import TuneRequest
from titans_backends.tuning.standing import measurement_of
from titans_backends.tuning.timing import RaceRules, race

ENTRY = Entry("eager/x", 1.0, 0.01, 1.0)


def planned(*ops: str, seq_lens: tuple[int, ...] = (64, 256, 1024)) -> tuple[Bucket, ...]:
    return tuple(
        bucket
        for op in ops
        for bucket in plan("cpu", ops=[op], seq_lens=seq_lens, heads=[(1, 1)], head_dims=[(8, 8)], dtypes=["float32"], regimes=["inference"])
    )


EVERY = planned("short_conv", "fused_uw", "dual_core", "gated_delta_rule")


def unit(*lengths: int) -> tuple[Piece, ...]:
    (one,) = planned("gated_delta_rule", seq_lens=(1,))
    return tuple(Piece(one._replace(seq_len=length), 1, 1) for length in lengths)


def test_a_rate_is_what_was_seen_and_before_that_what_was_expected() -> None:
    rate = Rate(3.0)
    assert rate.each == 3.0
    rate.saw(10.0, 2)
    rate.saw(-1.0, 2)  # a clock that stood still counts as no time
    assert rate.each == 2.5


def test_a_batch_holds_the_units_that_fit_in_their_order() -> None:
    costs = Costs(Rate(10.0), Rate(1.0), Rate(2.0), Rate(1.0))  # 10 s, and 4 s for each bucket
    first, wide, last = unit(1, 2), unit(3, 4), unit(5)
    assert (costs.of([first, last]), costs.tuning([first, last]), costs.again([first, last])) == (22.0, 9.0, 6.0)
    assert chosen([first, wide, last], costs.of, 30.0, 30.0, some=False) == ([first, wide, last], [])
    assert chosen([first, wide, last], costs.of, 29.9, 29.9, some=False) == ([first, wide], [last])
    assert chosen([first, wide, last], costs.of, 22.0, 22.0, some=False) == ([first, last], [wide])  # a smaller one behind it still fits
    assert chosen([first, wide, last], costs.of, 10.0, 18.0, some=False) == ([first], [wide, last])  # the first has more room
    assert chosen([first, wide], costs.of, 10.0, 17.9, some=False) == ([first[:1]], [first[1:], wide])
    assert chosen([first, wide], costs.of, 10.0, 13.9, some=False) == ([], [first, wide])
    assert chosen([first, wide], costs.of, 0.0, 0.0, some=True) == ([first[:1]], [first[1:], wide])


@dataclass
class World:
    """A machine on which each process takes 4 s to come, a bucket 2 s in a tune and 3 s to be measured fully."""

    now: float = 0.0
    tunes: list[tuple[str, tuple[Bucket, ...], Host]] = field(default_factory=list)
    measured: list[Bucket] = field(default_factory=list)
    reach: dict[str, int] = field(default_factory=dict)
    interrupt_at: int = -1
    full_s: float = 3.0
    start_s: float = 4.0
    caps: set[float] = field(default_factory=set)
    refine: dict[str, dict[Bucket, tuple[int, int]]] = field(default_factory=dict)

    def tune(self, request: TuneRequest, on_event: object, host: Host) -> TuneReport:
        assert request.output is not None
        name, begun = request.output.stem, self.now
        self.tunes.append((name, request.buckets, host))
        done: list[Row] = []
        for bucket in request.buckets[: self.reach.pop(name, None)]:
            if request.budget_s is not None and self.now - begun >= request.budget_s:
                break
            on_event(BucketStarted(bucket, len(done), ()))  # type: ignore[operator]
            self.now += 2.0
            done.append(Row(bucket, None, reason="all failed") if bucket.op == "short_conv" and bucket.seq_len == 64 else Row(bucket, ENTRY))
        left = tuple(bucket for bucket in request.buckets if bucket not in {row.bucket for row in done})
        rows = {*request.beside, *(row.bucket for row in done)}
        between = [(one, ends) for one, ends in self.refine.get(name, {}).items() if all(one._replace(seq_len=length) in rows for length in ends)]
        self.now += len(between)
        midpoints = tuple(Row(one, ENTRY, between=ends) for one, ends in between)
        report = TuneReport(request.output, tuple(done), left, self.now - begun, midpoints)
        if self.interrupt_at == len(self.tunes):
            raise TuneInterrupted(report)
        return report

    def full(self, bucket: Bucket, between: tuple[int, int] | None, cap_s: float) -> Assessed:
        if len(self.measured) == -self.interrupt_at - 2:
            raise KeyboardInterrupt
        self.now += self.full_s
        self.caps.add(cap_s)
        self.measured.append(bucket)
        if bucket.op == "dual_core" and bucket.seq_len == 1024:
            raise NotMeasured("no")
        choice = Choice("eager/x", 1.0, 0.0, 0.0, False)
        return Assessed(bucket, "eager/x", 1.0, 0.0, 2, (choice,) if between else (choice, choice), None, between)

    def first_use(self, bucket: Bucket, *given: object) -> FirstUse:
        self.now += 9.0
        return FirstUse(bucket, 1.0, 0.1, "tuned")

    def ready(self) -> None:
        self.now += self.start_s


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World()
    for module in (assessing, assess_tunes):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: made.now))
    monkeypatch.setattr(assess_tunes, "tune", made.tune)
    monkeypatch.setattr(assessing, "first_use", made.first_use)
    monkeypatch.setattr(assessing, "processes", lambda: 0)
    monkeypatch.setattr(assessing.Full, "measured", lambda full, *given: made.full(*given))
    monkeypatch.setattr(assessing.Host, "begin", lambda host: None)
    monkeypatch.setattr(assessing.Host, "ready", lambda host: made.ready())
    return made


@pytest.mark.parametrize(("budget_s", "least"), [(60.0, 2), (106.0, 3), (200.0, 7), (400.0, 10), (None, 10)])
def test_every_budget_gives_complete_buckets_and_says_what_it_did_not_reach(world: World, budget_s: float | None, least: int) -> None:
    found = assess(TuneRequest(EVERY), budget_s)
    assert len(found.tuned) >= least
    assert world.now <= (budget_s or 1000.0)
    tuned = [one.bucket for one in found.tuned]
    assert all(len(one.choices) == 2 for one in found.tuned)
    twice = [[bucket for name, buckets, _ in world.tunes if name == which for bucket in buckets] for which in ("first", "second")]
    wanted = {*tuned, *(bucket for bucket in twice[0] if (bucket.op, bucket.seq_len) in (("short_conv", 64), ("dual_core", 1024)))}
    assert {*twice[0]} == wanted  # depth before breadth: nothing is tuned that is not measured, but for what has no winner or fails
    assert all(len(names) == len({*names}) for names in twice)
    plans = [bucket for bucket, _ in in_order(EVERY)]
    assert {*tuned, *(one.bucket for one in found.midpoints), *(bucket for bucket, _ in found.left)} == {*plans}
    assert len(found.tuned) + len(found.midpoints) + len(found.left) == len(plans)
    assert found.planned == (len(EVERY), len(plans) - len(EVERY))
    hosts = [host for _, _, host in world.tunes]
    assert len({id(host) for host in hosts}) == len(hosts) == 2 * found.batches  # each tune of each batch in a process of its own
    if budget_s is None or budget_s >= 400:
        reasons = {(bucket.op, bucket.seq_len): reason for bucket, reason in found.left}
        assert reasons["short_conv", 64] == "the first tune found no winner: all failed"
        assert reasons["dual_core", 1024] == "no"
        assert set(reasons.values()) == {
            "the first tune found no winner: all failed", "no", "its neighbour of seq_len 64 has no figures", "its neighbour of seq_len 1024 has no figures",
        }  # fmt: skip


def test_a_larger_budget_reaches_more_and_all_of_it_has_midpoints(world: World) -> None:
    counts = []
    for budget_s in (60.0, 120.0, 240.0, 400.0):
        world.now, world.tunes, world.measured = 0.0, [], []
        found = assess(TuneRequest(EVERY), budget_s)
        counts.append((len(found.tuned), len(found.midpoints)))
    assert counts == sorted(counts)
    assert counts[0] >= (2, 1)
    assert counts[-1] == (10, 6)  # of 12 and 8: one has no winner, another fails, and between them and others nothing is looked up


def test_a_full_measurement_for_which_no_time_is_left_is_not_begun(world: World) -> None:
    world.full_s = 20.0
    found = assess(TuneRequest(planned("gated_delta_rule", seq_lens=(64, 256, 1024, 4096))), 106.0)
    assert world.now - 9.0 <= 7 / 8 * 106.0  # an eighth is the first use's
    assert len(found.tuned) >= 2
    assert "the budget ended before its turn" in {reason for _, reason in found.left}


@pytest.mark.parametrize(
    ("budget_s", "start_s", "spare"), [(90.0, 20.0, 0), (100.0, 20.0, 2), (110.0, 20.0, 1), (120.0, 12.0, 0), (130.0, 12.0, 0), (150.0, 4.0, 0)]
)
def test_nothing_is_tuned_twice_that_is_not_measured_however_long_processes_take_to_come(
    world: World, budget_s: float, start_s: float, spare: int
) -> None:
    """Nor much tuned once: `spare` buckets at most."""
    world.start_s = start_s
    found = assess(TuneRequest(planned("gated_delta_rule", "dual_core", seq_lens=(64, 256, 512))), budget_s)
    first, second = ({bucket for name, buckets, _ in world.tunes for bucket in buckets if name == which} for which in ("first", "second"))
    assert second == {one.bucket for one in found.tuned}
    assert len(first - second) <= spare
    assert len(found.tuned) >= 2
    assert world.now <= budget_s + 1


@pytest.mark.parametrize(("budget_s", "cap_s"), [(18.0, 0.4), (120.0, 2.0), (600.0, 6.0), (None, 6.0)])
def test_the_cap_of_a_full_measurement_depends_on_the_budget(world: World, budget_s: float | None, cap_s: float) -> None:
    world.start_s = 1.0
    assess(TuneRequest(planned("gated_delta_rule")), budget_s)
    assert world.caps == {cap_s}


@dataclass
class Track:
    """Kernels with noise behind a bench: a run takes what it says, and 150 µs for the flush, the events and the way there."""

    best_us: float
    noise: float
    now: float = 0.0
    rules: RaceRules = field(default_factory=lambda: rules(1.0))
    rng: random.Random = field(default_factory=lambda: random.Random(5))

    def again(self, group: list[Candidate], current: object, rules: RaceRules) -> dict[Candidate, Measurement]:
        def sample(candidate: Candidate) -> float:
            us = self.best_us * (1 + 0.002 * int(candidate.variant[1:])) * (1 + abs(self.rng.gauss(0.0, self.noise)))
            self.now += (us + 150) / 1e6
            return us

        found = race(group, sample, lambda: self.now, rules).timings
        return {candidate: replace(measurement_of(candidate), us=one.us, spread=one.spread, samples=one.samples) for candidate, one in found.items()}


@pytest.mark.parametrize(("best_us", "noise", "most_s", "spread"), [(20.0, 0.01, 0.6, 0.002), (300.0, 0.01, 0.9, 0.002), (100.0, 0.2, 1.04, 0.1)])
def test_a_full_measurement_ends_when_it_knows_enough_and_at_its_cap(best_us: float, noise: float, most_s: float, spread: float) -> None:
    track = Track(best_us, noise)
    standing = standing_of(BUCKET, [(0.0, 0.0)] * 20)
    standing = standing.with_measured(track.again(list(standing.candidates), {}, track.rules))
    assert track.now <= 0.4 * 1.0 + 0.02  # the race of all, and the round that it was in
    raced = track.now
    found = finals(track, standing, standing.pairs[3:4], 1.0)  # type: ignore[arg-type]
    assert track.now <= most_s
    assert track.now - raced <= 0.6 * 1.0 + 0.01
    assert 2 <= len(found) <= 7
    assert all((one.samples or 0) >= 30 for one in found.values())
    assert min(one.spread or 0.0 for one in found.values()) <= spread


def test_the_first_batch_mixes_the_ops_and_holds_neighbours(world: World) -> None:
    found = assess(TuneRequest(EVERY), 240.0)
    _, first, _ = world.tunes[0]
    assert [(bucket.op, bucket.seq_len) for bucket in first[:4]] == [
        ("gated_delta_rule", 64), ("gated_delta_rule", 256), ("dual_core", 64), ("dual_core", 256),
    ]  # fmt: skip
    order = [(bucket.op, bucket.seq_len) for bucket in world.measured]
    assert order[:3] == [("gated_delta_rule", 64), ("gated_delta_rule", 256), ("gated_delta_rule", 128)]  # then its midpoint, before the next key
    assert found.first_uses


def test_what_a_tune_does_not_reach_is_taken_on_once_more(world: World) -> None:
    world.reach = {"first": 3, "second": 2}
    found = assess(TuneRequest(planned("gated_delta_rule", "dual_core", seq_lens=(64, 256))), 400.0)
    assert len(found.tuned) == 4
    assert [[len(buckets) for name, buckets, _ in world.tunes if name == which] for which in ("first", "second")] == [[4, 2], [3, 2]]
    assert found.left == ()


def test_what_is_not_reached_twice_is_left_with_the_reason(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def tune(request: TuneRequest, on_event: object, host: Host) -> TuneReport:
        assert request.output is not None
        rows = tuple(Row(bucket, ENTRY) for bucket in request.buckets if request.output.stem == "first" or bucket.seq_len == 64)
        return TuneReport(request.output, rows, (), 1.0)

    monkeypatch.setattr(assess_tunes, "tune", tune)
    found = assess(TuneRequest(planned("gated_delta_rule", seq_lens=(64, 256))), 400.0)
    assert [one.bucket.seq_len for one in found.tuned] == [64]
    assert [(bucket.seq_len, reason) for bucket, reason in found.left] == [
        (256, "the second tune did not reach it"),
        (128, "its neighbour of seq_len 256 has no figures"),
    ]


@pytest.mark.parametrize(("interrupt_at", "tuned"), [(1, 0), (-2, 0), (-4, 2)])
def test_an_interrupt_keeps_what_was_finished(world: World, interrupt_at: int, tuned: int) -> None:
    world.interrupt_at = interrupt_at
    found = assess(TuneRequest(planned("gated_delta_rule")))
    assert len(found.tuned) == tuned
    assert found.tune_s[0] > 0
    assert {reason for _, reason in found.left} == {"it was interrupted"}
    assert found.first_uses == ()


def test_what_is_kept_after_each_bucket_grows_and_names_the_rest(world: World) -> None:
    kept: list[Assessment] = []
    found = assess(TuneRequest(planned("gated_delta_rule")), 400.0, keep=kept.append)
    assert [len(one.tuned) + len(one.midpoints) for one in kept] == [1, 2, 3, 4, 5]
    assert [len(one.left) for one in kept] == [4, 3, 2, 1, 0]
    assert kept[1].summary.buckets == 2
    assert kept[-1].tuned == found.tuned


def test_a_child_that_began_early_is_the_one_that_is_used_and_is_gone_afterwards(tmp_path: Path) -> None:
    (bucket,) = planned("fused_uw", seq_lens=(64,))
    with Host("cpu") as host:
        host.begin()
        host.begin()
        child = host._child
        assert child is not None
        host.ready()
        assert host._child is child
        report = run.tune(TuneRequest((bucket,), backends=("eager",), bucket_s=0.01, output=tmp_path / "a.yaml", ahead=False), host=host)
        assert not child.alive
        assert host._child is None
    assert report.complete


def test_a_midpoint_lies_between_two_rows_that_there_are_and_a_row_that_a_tune_made_between_is_none(world: World) -> None:
    asked = planned("dual_core")
    inner, outer = asked[0]._replace(seq_len=128), asked[0]._replace(seq_len=512)
    assert inner not in asked
    world.refine = {"first": {inner: (64, 256)}, "second": {outer: (256, 1024)}}
    found = assess(TuneRequest(asked), 1000.0)
    assert [(one.bucket.seq_len, one.between) for one in found.refined] == [(128, (64, 256))]
    assert sorted((one.bucket.seq_len, one.between) for one in found.midpoints) == [(91, (64, 128)), (181, (128, 256))]
    assert found.planned == (3, 3), "the second tune's rows choose nowhere"
    assert found.planned_refined == found.summary.refined == 1
    assert {bucket.seq_len for bucket, _ in found.left} == {1024, 512}  # it cannot be measured, nor what lies below it
    assert found.summary.buckets == 2


def test_a_row_between_for_which_no_time_is_left_is_told(world: World) -> None:
    asked = planned("gated_delta_rule", seq_lens=(64, 256))
    world.refine, world.interrupt_at = {"first": {asked[0]._replace(seq_len=128): (64, 256)}}, -2 - 4
    found = assess(TuneRequest(asked))
    assert [one.bucket.seq_len for one in (*found.tuned, *found.midpoints)] == [64, 256, 91, 181]
    assert (found.refined, found.planned_refined) == ((), 1)
    assert [bucket.seq_len for bucket, _ in found.left] == [128]


def test_neighbours_of_two_batches_are_named_to_the_later_tune(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    beside: list[tuple[str, int, tuple[Bucket, ...]]] = []
    tune = assess_tunes.tune

    def seen(request: TuneRequest, *given: object) -> TuneReport:
        assert request.output is not None
        beside.append((request.output.stem, len(request.buckets), request.beside))
        return tune(request, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(assess_tunes, "tune", seen)
    assess(TuneRequest(planned("gated_delta_rule", "dual_core", "fused_uw", seq_lens=(64, 256, 1024, 4096))), 150.0)
    assert len(beside) > 2
    assert beside[:2] == [("first", beside[0][1], ()), ("second", beside[1][1], ())]
    assert all(len(one) == sum(count for name, count, _ in beside[:index] if name == beside[index][0]) for index, (_, _, one) in enumerate(beside))
