"""What it costs a call to take the winner of the other launch instead of the untuned default, from timings that lie in benchmarks/results. Measures nothing.

    python benchmarks/neighbours.py [TIMINGS.yaml ...] [--launch eager] [--regime training] [--least-us N]
    python benchmarks/neighbours.py --lengths [TIMINGS.yaml ...]

For every bucket of a regime with timings of both launches: the time in `--launch` (a graph, or an eager call) of the other one's winner over that of the
default, and over its own winner's. `cache.neighbour.LEAST_US` and the figures of docs/cache.md come from here.

--lengths: what it costs a call between two lengths that chose differently. Every length that has one on both sides is left out in turn; its neighbours' choices
were both timed there, so that the better one is known: what the nearer neighbour's costs over it, and what the one costs that `until` says.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from titans_backends import registry
from titans_backends.buckets import Bucket, defaults_of, field
from titans_backends.cache import file
from titans_backends.cache.neighbour import LEAST_US, other_launch
from titans_backends.cache.timings import Timings
from titans_backends.machine import Machine
from titans_backends.offers import Offer, Pair, pairs
from titans_backends.tuning.problem import signature_of_bucket
from titans_backends.tuning.select import Contender, combined, select
from titans_backends.tuning.standing import measurement_of, members
from titans_backends.tuning.switches import crossing
from titans_backends.verdict import ACCEPTED

__all__ = ["Between", "Neighbour", "between", "neighbours", "told", "told_between"]

RESULTS = Path(__file__).resolve().parent / "results"
_SHARED_MEMORY = 232_448
"""Bytes that a block of Hopper may have, which decides what some backends offer."""


@dataclass(frozen=True, slots=True)
class Neighbour:
    """One bucket: the other launch's winner there, and here that winner's time, the default's and the winner's."""

    bucket: Bucket
    other_us: float
    us: float
    default_us: float
    best_us: float

    @property
    def over_default(self) -> float:
        """How many times the default's time the other launch's winner takes; 1 where it is the default."""
        return self.us / self.default_us


def _contenders(bucket: Bucket, timings: Timings, machine: Machine) -> tuple[Contender, ...]:
    """The candidates that are offered today and have passed, the default first; none where the default has not passed."""
    signature, known = signature_of_bucket(bucket, machine.kind), {one.identity: one for one in timings.rows[bucket]}
    offered: list[Offer] = []
    for backend in registry.order(machine.kind):
        module, _ = registry.module(backend, bucket.op)
        if module is not None and module.supports(signature, machine):
            training = registry.trainable(module) if signature.regime == "training" else None
            backward = () if training is None else tuple(training.backward_candidates(signature, machine))
            offered.append(Offer(backend, ACCEPTED, module, tuple(module.candidates(signature, machine)), backward))
    found: list[Contender] = []
    for order, pair in enumerate(pairs(offered, signature)):
        measured = [known.get(measurement_of(candidate).identity) for candidate in members(pair)]
        if all(one is not None and one.us is not None and one.status == "ok" for one in measured):
            us, spread = combined([(one.us or 0.0, one.spread or 0.0) for one in measured if one is not None])
            simplicity = max(registry.get(candidate.backend).simplicity for candidate in members(pair))
            found.append(Contender(pair, us, spread, 0.0, simplicity, order))
    return tuple(found) if found and found[0].order == 0 else ()


def neighbours(timings: Timings, regime: str = "inference", launch: str = "graph") -> list[Neighbour]:
    """Every bucket of the regime and the launch that was timed in the other one too; in training a time is of a pair."""
    device = timings.device
    machine = Machine(device.kind, device.name, device.slug, device.sm, device.sms, _SHARED_MEMORY)
    found = []
    for bucket in timings.rows:
        other, _ = other_launch(bucket, defaults_of(bucket.op))
        if other not in timings.rows or (field(bucket, "regime"), field(bucket, "launch")) != (regime, launch):
            continue
        there, here = _contenders(other, timings, machine), _contenders(bucket, timings, machine)
        winner, best = select(there).winner, select(here).winner
        again = next((one for one in here if winner is not None and one.pair == winner.pair), None)
        if winner is not None and best is not None and again is not None:
            found.append(Neighbour(bucket, winner.us, again.us, here[0].us, best.us))
    return sorted(found, key=lambda one: one.other_us)


@dataclass(frozen=True, slots=True)
class Between:
    """One length and its neighbours', which chose differently: what the nearer one's choice and the one by crossing cost there over the better of the two."""

    bucket: Bucket
    ends: tuple[int, int]
    nearest: float
    crossing: float


def between(timings: Timings) -> list[Between]:
    """Every length of the timings for which that is known."""
    device = timings.device
    machine = Machine(device.kind, device.name, device.slug, device.sm, device.sms, _SHARED_MEMORY)
    groups: dict[Bucket, list[Bucket]] = {}
    for bucket in sorted(timings.rows, key=lambda bucket: bucket.seq_len):
        groups.setdefault(bucket._replace(seq_len=0), []).append(bucket)
    found = []
    for group in groups.values():
        passed = {bucket: _contenders(bucket, timings, machine) for bucket in group}
        for shorter, bucket, longer in zip(group, group[1:], group[2:], strict=False):
            one, other = select(passed[shorter]).winner, select(passed[longer]).winner
            if one is None or other is None or one.pair == other.pair:
                continue
            times = [(_us(timings, where, one.pair), _us(timings, where, other.pair)) for where in (shorter, bucket, longer)]
            if not all(map(all, times)):
                continue
            at_shorter, here, at_longer = [cast("tuple[float, float]", each) for each in times]
            last = crossing(shorter.seq_len, longer.seq_len, at_shorter, at_longer)
            nearer = bucket.seq_len**2 >= shorter.seq_len * longer.seq_len
            by_times = nearer if last is None else bucket.seq_len > last
            found.append(Between(bucket, (shorter.seq_len, longer.seq_len), here[nearer] / min(here) - 1, here[by_times] / min(here) - 1))
    return found


def _us(timings: Timings, bucket: Bucket, pair: Pair) -> float | None:
    """What a pair took, both directions together; None where one did not pass."""
    known = {one.identity: one for one in timings.rows[bucket]}
    found = [known.get(measurement_of(candidate).identity) for candidate in members(pair)]
    return sum(one.us or 0.0 for one in found if one) if all(one and one.us and one.status == "ok" for one in found) else None


def told_between(found: Sequence[Between]) -> str:
    """The figures in two lines."""
    lines = []
    for name in ("nearest", "crossing"):
        costs = [getattr(one, name) for one in found]
        near, mean = sum(cost <= 0.05 for cost in costs), statistics.fmean(costs)
        lines.append(f"  {name}: {len(costs)} lengths, {near} within 5 %, mean {100 * mean:.1f} %, worst {100 * max(costs):.0f} %")
    return "\n".join(lines) if found else "  no length lies between two that chose differently"


def told(found: Sequence[Neighbour], least_us: float) -> str:
    """The figures in one line."""
    speak = [one for one in found if one.other_us >= least_us]
    if not speak:
        return f"from {least_us:g} us: none of {len(found)} buckets"
    ratios = [one.over_default for one in speak]
    return (
        f"from {least_us:g} us: {len(speak)} of {len(found)} buckets, {sum(ratio != 1 for ratio in ratios)} where the other launch's winner is not the default; "
        f"over the default {_mean(ratios):.3f} (geometric mean), {statistics.fmean(ratios):.3f} (mean), {max(ratios):.3f} (worst); "
        f"over its own winner {_mean([one.us / one.best_us for one in speak]):.3f} and {max(one.us / one.best_us for one in speak):.3f}, "
        f"the default {_mean([one.default_us / one.best_us for one in speak]):.3f} and {max(one.default_us / one.best_us for one in speak):.3f}"
    )


def _mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def main(words: Sequence[str] | None = None) -> int:
    """Prints each bucket where the two differ, then the figures with and without the limit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("timings", nargs="*", type=Path, default=sorted(RESULTS.glob("*.timings.yaml")))
    parser.add_argument("--launch", choices=("graph", "eager"), default="graph", help="of the calls for which the other launch's row speaks")
    parser.add_argument("--regime", choices=("inference", "training"), default="inference")
    parser.add_argument("--lengths", action="store_true", help="what a call between two lengths costs instead")
    parser.add_argument("--least-us", type=float, help=f"default: {LEAST_US:g}, in training twice that")
    given = parser.parse_args(words)
    limit = given.least_us if given.least_us is not None else LEAST_US * (2 if given.regime == "training" else 1)
    for path in given.timings:
        loaded = file.read_timings(path, defaults_of)
        if loaded.table is None:
            print(f"{path}: {loaded.reason or 'there is no such file'}", file=sys.stderr)
            return 1
        if given.lengths:
            print(f"{loaded.table.device.name} ({path.name})\n{told_between(between(loaded.table))}")
            continue
        found = neighbours(loaded.table, given.regime, given.launch)
        print(f"{loaded.table.device.name} ({path.name})")
        for one in found:
            if one.over_default != 1:
                key = ", ".join(f"{name}={value}" for name, value in one.bucket.when if name not in ("launch", "streams"))
                other = "graph" if given.launch == "eager" else "eager"
                print(
                    f"  {one.bucket.op} {one.bucket.seq_len} {key}: {other} {one.other_us:.4g} us; {given.launch} {one.us:.4g}, default {one.default_us:.4g}"
                )
        for least in dict.fromkeys((0.0, limit)):
            print(f"  {told(found, least)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
