"""The race on made-up kernels and a made-up clock."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import pytest

from titans_backends.tuning.timing import RaceRules, Withdrawn, median_interval, race, timing_of

RULES = RaceRules(budget_s=1.0, min_rounds=5, max_rounds=20, final_rounds=5, target_spread=0.0)


class Track:
    """A clock that moves by what each runner takes, in microseconds; `order` is who ran."""

    def __init__(self, times: Mapping[str, Callable[[int], float]]) -> None:
        self.times, self.now, self.order = times, 0.0, list[str]()

    def sample(self, runner: str) -> float:
        us = self.times[runner](self.order.count(runner))
        self.order.append(runner)
        self.now += us / 1e6
        return us

    def clock(self) -> float:
        return self.now


def constant(us: float) -> Callable[[int], float]:
    return lambda _: us


@pytest.mark.parametrize("count", range(1, 60))
def test_the_interval_of_the_median_covers_95_percent_and_no_narrower_one_does(count: int) -> None:
    low, high = median_interval(count)
    choose = [1]
    for k in range(count):
        choose.append(choose[-1] * (count - k) // (k + 1))

    def coverage(rank: int) -> float:
        return 1 - 2 * sum(choose[: rank + 1]) / 2**count

    assert (low, high) == (low, count - 1 - low)
    assert low == 0 or coverage(low) >= 0.95
    assert low + 1 > (count - 1) / 2 or coverage(low + 1) < 0.95


def test_the_timing_of_a_series_is_its_median_and_relative_half_width() -> None:
    timing = timing_of([10, 11, 9, 12, 8])
    assert (timing.us, timing.samples) == (10, 5)
    assert timing.spread == pytest.approx((12 - 8) / 2 / 10)
    assert timing_of([7.0]) == timing_of([7.0, 7.0, 7.0]).__class__(7.0, 0.0, 1)


def test_rounds_are_interleaved_and_start_with_another_runner_each_time() -> None:
    track = Track({"a": constant(100), "b": constant(100), "c": constant(100)})
    race(["a", "b", "c"], track.sample, track.clock, RULES)
    rounds = [track.order[i : i + 3] for i in range(0, 9, 3)]
    assert rounds == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]]


def test_losers_are_dropped_after_three_rounds_and_keep_their_timing() -> None:
    track = Track({"fast": constant(100), "slow": constant(250)})
    outcome = race(["fast", "slow"], track.sample, track.clock, RULES)
    assert track.order.count("slow") == 3
    assert outcome.timings["slow"].us == 250
    assert outcome.timings["fast"].samples > 3


def test_a_hopeless_runner_runs_once_where_it_is_slow_and_else_twice() -> None:
    track = Track({"fast": constant(100), "hopeless": constant(5000), "slow": constant(50_000)})
    race(["fast", "hopeless", "slow"], track.sample, track.clock, RULES)
    assert (track.order.count("hopeless"), track.order.count("slow")) == (2, 1)


def test_an_interruption_in_the_first_round_loses_nobody() -> None:
    track = Track({"fast": constant(166), "struck": lambda index: 150 if index else 4335})
    outcome = race(["fast", "struck"], track.sample, track.clock, RULES)
    assert outcome.timings["struck"].us == 150
    assert outcome.timings["struck"].samples > 3


def test_the_last_rounds_are_run_by_finalists_only() -> None:
    track = Track({"best": constant(100), "close": constant(105), "far": constant(150)})
    outcome = race(["best", "close", "far"], track.sample, track.clock, RULES)
    assert outcome.timings["best"].samples == outcome.timings["close"].samples == outcome.timings["far"].samples + RULES.final_rounds
    assert "far" not in track.order[-2 * RULES.final_rounds :]


def test_the_budget_ends_a_race_after_its_least_rounds() -> None:
    track = Track({"a": constant(1e6), "b": constant(1.05e6)})
    outcome = race(["a", "b"], track.sample, track.clock, RULES)
    assert outcome.timings["a"].samples == outcome.timings["b"].samples == RULES.least_rounds


def test_a_race_ends_once_its_finalists_are_certain() -> None:
    track = Track({"a": constant(100), "b": constant(150)})
    outcome = race(["a", "b"], track.sample, track.clock, RaceRules(budget_s=1e9, min_rounds=5, target_spread=0.01))
    assert outcome.timings["a"].samples == 5
    asked = RaceRules(budget_s=1e9, min_rounds=5, settle_every=4)
    assert race(["a", "b"], (again := Track(track.times)).sample, again.clock, asked).timings["a"].samples == 8
    noisy = Track({"a": lambda i: 100 + 40 * (i % 3)})
    assert race(["a"], noisy.sample, noisy.clock, RaceRules(budget_s=1e9, max_rounds=17)).timings["a"].samples == 17


def test_a_runner_that_fails_is_withdrawn_with_its_reason_and_the_others_go_on() -> None:
    track = Track({"good": constant(100), "dies": constant(90)})

    def sample(runner: str) -> float:
        if runner == "dies" and track.order.count("dies") == 2:
            raise Withdrawn("killed")
        return track.sample(runner)

    outcome = race(["good", "dies"], sample, track.clock, RULES)
    assert outcome.withdrawn == {"dies": "killed"}
    assert list(outcome.timings) == ["good"]
    assert outcome.timings["good"].samples == RULES.min_rounds


def test_a_race_of_nobody_and_one_that_everybody_leaves_end() -> None:
    assert race([], lambda _: 0.0, lambda: 0.0, RULES).timings == {}

    def fail(_: str) -> float:
        raise Withdrawn("no")

    assert race(["a", "b"], fail, itertools.count().__next__, RULES).withdrawn == {"a": "no", "b": "no"}
