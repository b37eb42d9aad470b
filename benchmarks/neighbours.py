"""What it costs a call in a graph to take the eager row's winner instead of the untuned default, from timings that lie in benchmarks/results. Measures nothing.

    python benchmarks/neighbours.py [TIMINGS.yaml ...] [--least-us N]

For every bucket of inference with timings of both launches: the graph time of eager's winner over that of the default, and over the graph's own winner's.
`cache.neighbour.LEAST_US` and the figures of docs/cache.md come from here.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from titans_backends import registry
from titans_backends.buckets import Bucket, defaults_of, field
from titans_backends.cache import file
from titans_backends.cache.neighbour import LEAST_US, eager_bucket
from titans_backends.cache.timings import Timings
from titans_backends.machine import Machine
from titans_backends.offers import Pair
from titans_backends.tuning.problem import signature_of_bucket
from titans_backends.tuning.select import Contender, select
from titans_backends.tuning.standing import measurement_of

__all__ = ["Neighbour", "neighbours", "told"]

RESULTS = Path(__file__).resolve().parent / "results"
_SHARED_MEMORY = 232_448
"""Bytes that a block of Hopper may have, which decides what some backends offer."""


@dataclass(frozen=True, slots=True)
class Neighbour:
    """One bucket of a graph: the eager winner's eager time, and the times in the graph of that winner, of the default and of the graph's winner."""

    bucket: Bucket
    eager_us: float
    us: float
    default_us: float
    best_us: float

    @property
    def over_default(self) -> float:
        """How many times the default's time the eager winner takes; 1 where it is the default."""
        return self.us / self.default_us


def _contenders(bucket: Bucket, timings: Timings, machine: Machine) -> tuple[Contender, ...]:
    """The candidates that are offered today and have passed, the default first; none where the default has not passed."""
    signature, known = signature_of_bucket(bucket, machine.kind), {one.identity: one for one in timings.rows[bucket]}
    found: list[Contender] = []
    order = 0
    for backend in registry.order(machine.kind):
        module, _ = registry.module(backend, bucket.op)
        for candidate in module.candidates(signature, machine) if module is not None and module.supports(signature, machine) else ():
            one = known.get(measurement_of(candidate).identity)
            if one is not None and one.us is not None and one.status == "ok":
                found.append(Contender(Pair(candidate), one.us, one.spread or 0.0, 0.0, backend.simplicity, order))
            order += 1
    return tuple(found) if found and found[0].order == 0 else ()


def neighbours(timings: Timings) -> list[Neighbour]:
    """Every bucket of inference that has both launches."""
    device = timings.device
    machine = Machine(device.kind, device.name, device.slug, device.sm, device.sms, _SHARED_MEMORY)
    found = []
    for bucket in timings.rows:
        eager = eager_bucket(bucket, defaults_of(bucket.op))
        if eager is None or eager not in timings.rows or field(bucket, "regime") != "inference":
            continue
        eagerly, captured = _contenders(eager, timings, machine), _contenders(bucket, timings, machine)
        winner, best = select(eagerly).winner, select(captured).winner
        again = next((one for one in captured if winner is not None and one.pair == winner.pair), None)
        if winner is not None and best is not None and again is not None:
            found.append(Neighbour(bucket, winner.us, again.us, captured[0].us, best.us))
    return sorted(found, key=lambda one: one.eager_us)


def told(found: Sequence[Neighbour], least_us: float) -> str:
    """The figures in one line."""
    speak = [one for one in found if one.eager_us >= least_us]
    if not speak:
        return f"from {least_us:g} us: none of {len(found)} buckets"
    ratios = [one.over_default for one in speak]
    return (
        f"from {least_us:g} us: {len(speak)} of {len(found)} buckets, {sum(ratio != 1 for ratio in ratios)} where eager's winner is not the default; "
        f"over the default {_mean(ratios):.3f} (geometric mean), {statistics.fmean(ratios):.3f} (mean), {max(ratios):.3f} (worst); "
        f"over the graph's winner {_mean([one.us / one.best_us for one in speak]):.3f} and {max(one.us / one.best_us for one in speak):.3f}, "
        f"the default {_mean([one.default_us / one.best_us for one in speak]):.3f} and {max(one.default_us / one.best_us for one in speak):.3f}"
    )


def _mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def main(words: Sequence[str] | None = None) -> int:
    """Prints each bucket where the two differ, then the figures with and without the limit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("timings", nargs="*", type=Path, default=sorted(RESULTS.glob("*.timings.yaml")))
    parser.add_argument("--least-us", type=float, default=LEAST_US)
    given = parser.parse_args(words)
    for path in given.timings:
        loaded = file.read_timings(path, defaults_of)
        if loaded.table is None:
            print(f"{path}: {loaded.reason or 'there is no such file'}", file=sys.stderr)
            return 1
        found = neighbours(loaded.table)
        print(f"{loaded.table.device.name} ({path.name})")
        for one in found:
            if one.over_default != 1:
                key = ", ".join(f"{name}={value}" for name, value in one.bucket.when if name not in ("launch", "streams"))
                print(f"  {one.bucket.op} {one.bucket.seq_len} {key}: eager {one.eager_us:.4g} us; graph {one.us:.4g}, default {one.default_us:.4g}")
        for least in dict.fromkeys((0.0, given.least_us)):
            print(f"  {told(found, least)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
