"""How candidates are raced: interleaved rounds, losers dropped early, a fair last round; and what a series of samples says.

The clock and the sampler are given, so that tests race made-up kernels without waiting. Nothing here touches a device.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["RaceRules", "Timing", "Withdrawn", "median_interval", "race", "timing_of"]

Runner = TypeVar("Runner")


@dataclass(frozen=True, slots=True)
class Timing:
    """The median of a series in microseconds; `spread` is the half-width of its 95 % confidence interval over the median."""

    us: float
    spread: float
    samples: int


@dataclass(frozen=True, slots=True)
class RaceRules:
    """`budget_s` bounds a race beyond `least_rounds`; whose every sample is `drop_factor` times the best's median loses after `rounds_before_drop`,
    `hopeless_factor` after two rounds; after one where it took `at_once_us` or more, which no interruption does.

    A race ends early once every finalist's spread is at most `target_spread`, but not before `min_rounds`; finalists are within
    `final_band` of the best, and run `final_rounds` more while twice the budget lasts. Whether it is settled is asked every `settle_every` rounds.
    """

    budget_s: float = 2.0
    least_rounds: int = 3
    min_rounds: int = 5
    max_rounds: int = 40
    rounds_before_drop: int = 3
    drop_factor: float = 2.0
    hopeless_factor: float = 8.0
    at_once_us: float = 20_000.0
    target_spread: float = 0.01
    final_band: float = 0.10
    final_rounds: int = 5
    settle_every: int = 1


class Withdrawn(Exception):
    """A runner failed while it was being timed; the race goes on without it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(slots=True)
class Outcome(Generic[Runner]):
    """A race's timings and failures; whoever was dropped early keeps the timing that it had."""

    timings: dict[Runner, Timing]
    withdrawn: dict[Runner, str]


def median_interval(count: int) -> tuple[int, int]:
    """The ranks (from 0) of the order statistics that hold the median with 95 % confidence; below six samples, the extremes."""
    tail, rank = 0.5**count, 0
    term = tail
    while rank < count // 2:
        term *= (count - rank) / (rank + 1)
        if tail + term > 0.025:
            break
        tail += term
        rank += 1
    low = rank if 0.5**count <= 0.025 else 0
    return low, count - 1 - low


def timing_of(samples_us: Sequence[float]) -> Timing:
    """The statistics of a series of at least one sample."""
    ordered = sorted(samples_us)
    low, high = median_interval(len(ordered))
    median = statistics.median(ordered)
    return Timing(median, (ordered[high] - ordered[low]) / 2 / median if median > 0 else 0.0, len(ordered))


def race(runners: Sequence[Runner], sample: Callable[[Runner], float], clock: Callable[[], float], rules: RaceRules) -> Outcome[Runner]:
    """Times the runners against each other; `sample` runs one once and gives microseconds, or raises `Withdrawn`."""
    series: dict[Runner, list[float]] = {runner: [] for runner in runners}
    withdrawn: dict[Runner, str] = {}
    running = list(runners)
    start = clock()

    def one_round(order: Sequence[Runner]) -> None:
        for runner in order:
            try:
                series[runner].append(sample(runner))
            except Withdrawn as failure:
                withdrawn[runner] = failure.reason
                running.remove(runner)

    for number in range(rules.max_rounds):
        one_round(_rotated(running, number))
        factor = rules.drop_factor if number + 1 >= rules.rounds_before_drop else rules.hopeless_factor
        running[:] = _hopeful(running, series, factor, 0.0 if number else rules.at_once_us)
        spent = number + 1 >= rules.least_rounds and clock() - start >= rules.budget_s
        asked = number + 1 >= rules.min_rounds and (number + 1) % rules.settle_every == 0
        if not running or spent or (asked and _settled(running, series, rules)):
            break
    finalists = _kept(running, series, 1 + rules.final_band)
    if len(finalists) > 1:
        for number in range(rules.final_rounds):
            if clock() - start >= 2 * rules.budget_s:
                break
            one_round(_rotated([runner for runner in finalists if runner not in withdrawn], number))
    timings = {runner: timing_of(found) for runner, found in series.items() if found and runner not in withdrawn}
    return Outcome(timings, withdrawn)


def _rotated(runners: Sequence[Runner], number: int) -> list[Runner]:
    """Another one first in every round: whoever follows a heavy neighbour does not always follow the same."""
    shift = number % len(runners) if runners else 0
    return [*runners[shift:], *runners[:shift]]


def _kept(runners: Sequence[Runner], series: Mapping[Runner, Sequence[float]], factor: float) -> list[Runner]:
    medians = {runner: statistics.median(series[runner]) for runner in runners}
    best = min(medians.values(), default=math.inf)
    return [runner for runner in runners if medians[runner] <= factor * best]


def _hopeful(runners: Sequence[Runner], series: Mapping[Runner, Sequence[float]], factor: float, spared_us: float) -> list[Runner]:
    """Those whose best sample is no more than the factor over the best median, or below `spared_us`: a few interrupted samples lose nobody."""
    best = min((statistics.median(series[runner]) for runner in runners), default=math.inf)
    return [runner for runner in runners if min(series[runner]) <= factor * best or min(series[runner]) < spared_us]


def _settled(runners: Sequence[Runner], series: Mapping[Runner, Sequence[float]], rules: RaceRules) -> bool:
    """Whether nobody who could still win is uncertain."""
    return all(timing_of(series[runner]).spread <= rules.target_spread for runner in _kept(runners, series, 1 + rules.final_band))
