"""Times one problem in this process, side by side: what dispatch chooses, the untuned default, a candidate of each backend, the plain reference.

Everything is checked first, and what is wrong has no time. Nothing is written, so that nothing that is measured here changes a choice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from titans_backends.backend import Candidate
from titans_backends.buckets import Bucket, bucket_of, defaults_of
from titans_backends.cache import file
from titans_backends.cache.paths import timings_path
from titans_backends.cache.schema import device_of
from titans_backends.contracts import contract
from titans_backends.contracts.case import build
from titans_backends.contracts.validate import validate
from titans_backends.contracts.work import work_of
from titans_backends.dispatch import Forced, choose
from titans_backends.machine import Machine, detect
from titans_backends.offers import Offer, Pair, first_pair, offers, pairs
from titans_backends.signature import Signature
from titans_backends.tables import sources
from titans_backends.tuning.ceilings import Ceilings
from titans_backends.tuning.problem import case_of
from titans_backends.tuning.select import combined
from titans_backends.tuning.session import Checked, Session
from titans_backends.tuning.standing import Standing, members
from titans_backends.tuning.timing import RaceRules, Withdrawn, race

__all__ = ["Timed", "each_backend", "floor_us", "timed"]

What = Literal["chosen", "default", "backend", "reference"]


@dataclass(frozen=True, slots=True)
class Timed:
    """One line. `problem`: why it has no time. `error`: the largest that its check found; `compile_s`: seconds to its first result, compilation included."""

    bucket: Bucket
    what: What
    label: str
    us: float | None
    spread: float | None
    peak_mib: float | None
    floor_us: float | None
    problem: str = ""
    wrong: bool = False
    compile_s: float | None = None
    error: float | None = None

    @property
    def share_of_floor(self) -> float | None:
        """How near it comes to what this machine could reach."""
        return self.floor_us / self.us if self.floor_us and self.us else None


def floor_us(bucket: Bucket, heads: int | None, ceilings: Ceilings) -> float:
    """The least time that an inference call of a bucket could take on a machine with these ceilings."""
    made, case = contract(bucket.op), case_of(bucket, heads)
    call = build(made, replace(case, view="contiguous"), "meta")
    return work_of(made, call, validate(made, call)).floor_us(ceilings.flop_per_s, ceilings.bytes_per_s)


def each_backend(signature: Signature, machine: Machine) -> dict[str, Pair]:
    """One choice of every backend that can do the whole call: the fastest by the timings beside the tables where they have it, else its first."""
    given, found = offers(signature, machine), dict[str, Pair]()
    for offer in given:
        possible = pairs([offer], signature, mixed=False)
        if possible:
            found[offer.backend.name] = _fastest(offer, signature, machine) or possible[0]
    return found


def _fastest(offer: Offer, signature: Signature, machine: Machine) -> Pair | None:
    bucket = bucket_of(signature)
    for source in sources(machine):
        table = file.read_timings(timings_path(source.path), defaults_of, device_of(machine)).table
        stored = () if table is None else table.rows.get(bucket, ())
        passed = [one for one in Standing.of(bucket, signature, [offer], stored).contenders() if _unmixed(one.pair)]
        if passed:
            return min(passed, key=lambda one: (one.us, one.order)).pair
    return None


def _unmixed(pair: Pair) -> bool:
    return pair.backward is None or pair.backward.backend == pair.forward.backend


def timed(
    signature: Signature,
    heads: int | None,
    ceilings: Ceilings,
    budget_s: float,
    *,
    forced: Forced | None = None,
    backends: bool = False,
    reference_s: float = 10.0,
) -> list[Timed]:
    """The lines of one problem; `backends`: a line for each of them too, or why it refuses. BackendRefusedError where nothing serves the call.

    `budget_s` bounds the rounds, `reference_s` the reference's one run. In training the floor is not known.
    """
    machine, bucket = detect(signature.device), bucket_of(signature)
    chosen = choose(signature, machine, forced)
    default = first_pair(offers(signature, machine), signature)
    runners: dict[Pair, list[What]] = {chosen.pair: ["chosen"]}
    if default is not None:
        runners.setdefault(default, []).append("default")
    for pair in each_backend(signature, machine).values() if backends else ():
        runners.setdefault(pair, []).append("backend")
    session = Session(bucket, signature.device, heads)
    floor = None if signature.regime == "training" else floor_us(bucket, heads, ceilings)
    maker = {pair.backward: pair.forward for pair in runners}
    checked = {candidate: session.check(candidate, maker.get(candidate)) for pair in runners for candidate in members(pair)}

    def sample(candidate: Candidate) -> float:
        try:
            return session.sample(candidate, maker.get(candidate))
        except RuntimeError as error:
            raise Withdrawn(str(error)) from error

    fine = [candidate for candidate, found in checked.items() if found.result.ok]
    outcome = race(fine, sample, time.monotonic, RaceRules(budget_s=budget_s, drop_factor=math.inf, hopeless_factor=math.inf))
    lines: list[Timed] = []
    for pair, roles in runners.items():
        missing = [c for c in members(pair) if c not in outcome.timings]
        line = Timed(bucket, roles[0], pair.label, None, None, None, floor, error=_largest(checked[c] for c in members(pair)))
        if missing:
            problem = "; ".join(f"{c.label}: {checked[c].result.reason or outcome.withdrawn.get(c, '')}" for c in missing)
            line = replace(line, problem=problem, wrong=True)
        else:
            us, spread = combined([(outcome.timings[c].us, outcome.timings[c].spread) for c in members(pair)])
            peak = max((checked[c].peak_mib or 0.0 for c in members(pair)), default=0.0)
            line = replace(line, us=us, spread=spread, peak_mib=peak, compile_s=_total(checked[c] for c in members(pair)))
        lines += [replace(line, what=role) for role in roles]
    if backends:
        lines += [
            Timed(bucket, "backend", entry.backend.name, None, None, None, floor, f"refuses: {entry.verdict}")
            for entry in offers(signature, machine)
            if not entry.verdict
        ]
    reference_us = session.reference(reference_s)
    problem = "" if reference_us is not None else f"it would take over {reference_s:g} s"
    lines.append(Timed(bucket, "reference", "the plain formula", reference_us, None, None, floor, problem))
    session.close()
    order: Sequence[What] = ("chosen", "default", "backend", "reference")
    return sorted(lines, key=lambda one: order.index(one.what))


def _largest(checked: Iterable[Checked]) -> float | None:
    return max((error for one in checked for _, error in one.result.errors), default=None)


def _total(checked: Iterable[Checked]) -> float | None:
    seconds = [one.compile_s for one in checked if one.compile_s is not None]
    return sum(seconds) if seconds else None
