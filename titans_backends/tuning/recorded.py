"""From the problems that a model met to a tune: which buckets, the most expensive first, and afterwards how much of the model's time the rows cover.

Nothing is timed here. What no table knows counts at its floor, times what rows that are known take over theirs; a direction of a training call counts half of
its pair's time.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from titans_backends.buckets import Bucket, defaults_of, field
from titans_backends.cache.lookup import Hit, lookup
from titans_backends.cache.problems import Met
from titans_backends.contracts import contract
from titans_backends.contracts.case import build
from titans_backends.contracts.validate import check_option, validate
from titans_backends.contracts.work import work_of
from titans_backends.machine import Machine
from titans_backends.tables import sources
from titans_backends.tuning.ceilings import Ceilings
from titans_backends.tuning.problem import case_of, signature_of_bucket
from titans_backends.tuning.report import Row

__all__ = ["Cost", "Coverage", "Demand", "covered", "demands", "ordered", "table_us"]

_TRAINING = 3.0
"""Forward and backward over the forward's floor."""


@dataclass(frozen=True, slots=True)
class Demand:
    """One bucket of a recording: how often each direction ran, over every size that it speaks for, and the v heads of the commonest."""

    bucket: Bucket
    forward: int
    backward: int
    heads: int | None

    @property
    def runs(self) -> float:
        """How many times a row's time counts."""
        return (self.forward + self.backward) / 2 if field(self.bucket, "regime") == "training" else float(self.forward)


@dataclass(frozen=True, slots=True)
class Cost:
    """A demand with the microseconds of one run. `known`: a table has measured it, or a neighbour of its; else it is an estimate from its floor."""

    demand: Demand
    us: float
    known: bool

    @property
    def total_us(self) -> float:
        """What the recording spent there."""
        return self.demand.runs * self.us


@dataclass(frozen=True, slots=True)
class Coverage:
    """One op's part. `share`: of the recording's time in all our ops; `covered`: the part of this op's time that rows speak for.

    `before_us`, `after_us`: the covered calls' time by the untuned default and by the winners, None where no default passed.
    `estimated`: how many of the buckets have no time but the estimate.
    """

    op: str
    calls: int
    buckets: int
    rows: int
    total_us: float
    share: float
    covered: float
    before_us: float | None
    after_us: float | None
    estimated: int


def demands(lines: Iterable[Met], kind: str) -> tuple[Demand, ...]:
    """The buckets of the lines of one kind of device, in their order; those under batch invariance, which no row serves, are left out.

    SchemaError with the line of one that cannot be measured.
    """
    found: dict[Bucket, list[Met]] = {}
    for met in lines:
        if met.problem.device == kind and not met.problem.batch_invariant:
            _check(met, kind)
            found.setdefault(met.problem.bucket, []).append(met)
    return tuple(_demand(bucket, group) for bucket, group in found.items())


def _check(met: Met, kind: str) -> None:
    bucket = met.problem.bucket
    if kind != "cuda" and field(bucket, "launch") == "graph":
        raise met.error(f"launch: graph needs a CUDA device, this line's is {kind}")
    made = contract(bucket.op)
    try:
        for option in made.options:
            if option.in_key:
                check_option(made, option, field(bucket, option.name))
        signature_of_bucket(bucket, kind, _heads(met))
    except (ValueError, TypeError) as error:
        raise met.error(f"no inputs can be made for it: {error}") from error


def _heads(met: Met) -> int | None:
    return dict(met.problem.sizes).get("H")


def _demand(bucket: Bucket, group: Sequence[Met]) -> Demand:
    commonest = max(group, key=lambda met: met.count.forward + met.count.backward)
    return Demand(bucket, sum(met.count.forward for met in group), sum(met.count.backward for met in group), _heads(commonest))


def ordered(wanted: Sequence[Demand], machine: Machine, ceilings: Callable[[torch.dtype], Ceilings]) -> tuple[Cost, ...]:
    """The demands with what they cost, the most expensive first; `ceilings` is asked for those alone that no table knows."""
    known = {demand: us for demand in wanted if (us := table_us(demand.bucket, machine)) is not None}
    unknown = [demand for demand in wanted if demand not in known]
    over: dict[str, list[float]] = {}
    if unknown:
        for demand, us in known.items():
            over.setdefault(demand.bucket.op, []).append(us / _floor_us(demand, ceilings))
    everyone = [factor for factors in over.values() for factor in factors]
    costs = [Cost(demand, us, True) for demand, us in known.items()]
    for demand in unknown:
        factor = statistics.median(over.get(demand.bucket.op) or everyone or [1.0])
        costs.append(Cost(demand, _floor_us(demand, ceilings) * factor, False))
    return tuple(sorted(costs, key=lambda cost: -cost.total_us))


def table_us(bucket: Bucket, machine: Machine) -> float | None:
    """What the tables say that a bucket takes, scaled from the nearest row where it has none of its own; None where no row is near."""
    for source in sources(machine):
        if source.table is None:
            continue
        found = lookup(source.table, bucket.op, bucket.when, bucket.seq_len, defaults_of(bucket.op))
        if isinstance(found, Hit):
            return found.entry.us * bucket.seq_len / found.seq_len * _streams(bucket) / max(1, found.streams)
    return None


def _streams(bucket: Bucket) -> int:
    value = field(bucket, "streams")
    return value if isinstance(value, int) else 1


def _floor_us(demand: Demand, ceilings: Callable[[torch.dtype], Ceilings]) -> float:
    made, case = contract(demand.bucket.op), case_of(demand.bucket, demand.heads)
    call = build(made, replace(case, view="contiguous"), "meta")
    limits = ceilings(case.dtype)
    floor = work_of(made, call, validate(made, call)).floor_us(limits.flop_per_s, limits.bytes_per_s)
    return max(floor, 1e-3) * (_TRAINING if field(demand.bucket, "regime") == "training" else 1.0)


def covered(costs: Sequence[Cost], rows: Mapping[Bucket, Row]) -> tuple[Coverage, ...]:
    """What rows there are for each op, the op with the most time first; a bucket that has a row counts at the row's time."""
    by_op: dict[str, list[Cost]] = {}
    for cost in costs:
        by_op.setdefault(cost.demand.bucket.op, []).append(_updated(cost, rows.get(cost.demand.bucket)))
    whole = math.fsum(cost.total_us for group in by_op.values() for cost in group)
    found = [_coverage(op, group, rows, whole) for op, group in by_op.items()]
    return tuple(sorted(found, key=lambda one: -one.total_us))


def _updated(cost: Cost, row: Row | None) -> Cost:
    return cost if row is None or row.entry is None else replace(cost, us=row.entry.us, known=True)


def _coverage(op: str, group: Sequence[Cost], rows: Mapping[Bucket, Row], whole_us: float) -> Coverage:
    total = math.fsum(cost.total_us for cost in group)
    tuned = [(cost, row) for cost in group if (row := rows.get(cost.demand.bucket)) is not None and row.entry is not None]
    compared = [(cost, row.default_us) for cost, row in tuned if row.default_us is not None]
    return Coverage(
        op=op,
        calls=sum(cost.demand.forward + cost.demand.backward for cost in group),
        buckets=len(group),
        rows=len(tuned),
        total_us=total,
        share=total / whole_us if whole_us else 0.0,
        covered=math.fsum(cost.total_us for cost, _ in tuned) / total if total else 0.0,
        before_us=math.fsum(cost.demand.runs * us for cost, us in compared) if compared else None,
        after_us=math.fsum(cost.total_us for cost, _ in compared) if compared else None,
        estimated=sum(not cost.known for cost in group),
    )
