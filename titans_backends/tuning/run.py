"""Tunes: decides what has to be measured, has it measured in a child process, and writes every bucket as soon as it is done."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from titans_backends import registry
from titans_backends.backend import Candidate
from titans_backends.buckets import Bucket, bucket_of
from titans_backends.cache.file import CacheError
from titans_backends.cache.timings import Measurement
from titans_backends.contracts.contract import Call, Contract
from titans_backends.machine import detect
from titans_backends.offers import unpaired
from titans_backends.plans import invalidate
from titans_backends.signature import Signature
from titans_backends.tuning.ahead import Limits, Target, compile_ahead, hooked, jobs, processes
from titans_backends.tuning.bench import Bench
from titans_backends.tuning.doubt import affordable, contested, deciding
from titans_backends.tuning.events import (
    BackendProbed,
    BucketDone,
    BucketStarted,
    CandidateDone,
    OnEvent,
    Planned,
    Refining,
    Remaining,
    Unpaired,
    Unrefined,
    ignore,
)
from titans_backends.tuning.host import ChildAnswerError, ChildDied, Host, OpenFailed
from titans_backends.tuning.midpoints import Ends, Midpoint, disagreeing, outlived
from titans_backends.tuning.report import Row, TuneInterrupted, TuneReport
from titans_backends.tuning.request import TuneRequest
from titans_backends.tuning.rows import Rows
from titans_backends.tuning.standing import Standing, measurement_of, members, rescaled
from titans_backends.tuning.store import Store
from titans_backends.tuning.timing import RaceRules

__all__ = ["AHEAD_S", "Row", "TuneInterrupted", "TuneReport", "TuneRequest", "tune", "tune_call"]

QUICK_BUCKET_S, FULL_BUCKET_S = 1.5, 4.0
"""How long the rounds of one race may take, beyond the least number of rounds."""
QUICK_S, QUICK_GPU_S = 110.0, 300.0
"""What a quick tune's measurements aim to take as a whole, after what is compiled ahead: on a slow or busy machine races are shorter, none is left out."""
_RACE_SHARE = 0.3
_DECIDING = 2
"""How often a bucket's contested candidates race again at most."""
AHEAD_S = 180.0
"""How long compiling ahead may take; with a budget no more than half of what is left of it."""


def tune(request: TuneRequest, on_event: OnEvent = ignore, host: Host | None = None) -> TuneReport:
    """Measures what is not current and writes it; TuneInterrupted at Ctrl-C. `host`: a child that began earlier and that nobody has used; it is gone afterwards.

    CacheError before anything is measured where the file cannot be written, UnknownNameError for a backend that does not exist.
    """
    for name in request.backends or ():
        registry.get(name)
    machine = detect(request.device)
    rows = Rows(request, on_event, machine, Store.opened(machine, request.output))
    with Host(request.device) if host is None else host as child:
        run = _Run(request, on_event, rows, child)
        try:
            run.all()
            rows.switch()
        except KeyboardInterrupt as error:
            with contextlib.suppress(CacheError):  # what is told is the interruption; the rows stand, and the next tune says up to where they speak
                rows.switch()
            raise TuneInterrupted(run.report()) from error
        finally:
            if rows.wrote:
                invalidate()
    return run.report()


def tune_call(contract: Contract, call: Call, signature: Signature, budget_s: float, on_event: OnEvent = ignore) -> TuneReport:
    """Tunes the one bucket of a call, for `with titans_backends.autotune():`; inputs of its sizes are made for it."""
    bucket = bucket_of(signature)
    dims = dict(signature.dims)
    request = TuneRequest(
        (bucket,), device=signature.device, budget_s=budget_s, bucket_s=min(QUICK_BUCKET_S, budget_s / 4), timeout_s=budget_s, heads=dims.get("H")
    )
    return tune(request, on_event)


@dataclass(slots=True)
class _Run:
    """One tune: the facts, and what has been done so far."""

    request: TuneRequest
    say: OnEvent
    rows: Rows
    host: Host
    remaining: tuple[Bucket, ...] = ()
    refined: dict[Bucket, Ends] = field(default_factory=dict)
    unrefined: tuple[Bucket, ...] = ()
    started: float = field(default_factory=time.monotonic)
    measuring: float = field(default_factory=time.monotonic)
    probed: dict[str, str] = field(default_factory=dict)

    def all(self) -> None:
        """Every bucket in turn, the current ones first: they cost nothing."""
        work: list[tuple[int, Standing, list[Candidate]]] = []
        alone = dict[Unpaired, None]()
        settled: list[Standing] = []
        for index, bucket in enumerate(self.request.buckets):
            standing = self.rows.standing(bucket)
            alone |= dict.fromkeys(Unpaired(bucket.op, c.label, c.direction, reason) for c, reason in unpaired(standing.offers))
            todo = self._todo(standing)
            if todo or not standing.pairs:
                work.append((index, standing, todo))
            else:
                settled.append(standing)
        self.say(Planned(len(self.request.buckets), len(work)))
        for one in alone:
            self.say(one)
        if work or any(self.rows.outdated(standing) for standing in settled):
            self.rows.store.require_writable()
        for standing in settled:
            self.rows.settle(standing)
        self._compile_ahead(work)
        self.measuring = time.monotonic()
        for position, (index, standing, todo) in enumerate(work):
            if self._is_over():
                self.remaining = tuple(entry[1].bucket for entry in work[position:])
                self.say(Remaining(self.remaining))
                return
            self._measure(index, standing, todo, self._race_s(len(work) - position))
        if self.request.midpoints and not self.request.doubtful:
            self._refine()

    def _is_over(self) -> bool:
        """Whether the budget has ended."""
        return self.request.budget_s is not None and time.monotonic() - self.started >= self.request.budget_s

    def _refine(self) -> None:
        """Where two neighbours chose differently, their choices meet in the middle, where a call would get one of them unmeasured."""
        rows = {} if self.rows.store.table is None else self.rows.store.table.rows
        standing_of = functools.cache(self.rows.possible)
        found = (*disagreeing(self.request.buckets, self.request.beside, rows, standing_of), *outlived(self.request.buckets, rows, standing_of))
        standings = [(one, standing) for one in found if (standing := standing_of(one.bucket)) is not None]
        self._restore(standings)
        work = [(one, standing, todo) for one, standing in standings if (todo := self._meeting(one, standing))]
        if not work:
            return
        self.rows.store.require_writable()
        self.say(Refining(tuple(one.bucket for one, _, _ in work)))
        for position, (one, standing, todo) in enumerate(work):
            if self._is_over():
                self.unrefined = tuple(entry[0].bucket for entry in work[position:])
                self.say(Unrefined(self.unrefined))
                return
            self.refined[one.bucket] = one.ends
            self._measure(len(self.request.buckets) + position, standing, todo, self._race_s(len(work) - position))

    def _restore(self, standings: Sequence[tuple[Midpoint, Standing]]) -> None:
        """Writes the rows that are gone, or that a kill kept out, where the measurements of all that was to meet there are current."""
        for one, standing in standings:
            known = all(candidate in standing.current for pair in one.choices for candidate in members(pair))
            if known and not self.request.force and self.rows.store.entry(one.bucket) is None and (entries := self.rows.chosen(standing)):
                self.rows.store.require_writable()
                self.rows.write(one.bucket, (), entries)

    def _meeting(self, one: Midpoint, standing: Standing) -> list[Candidate]:
        """The neighbours' choices, as far as they are offered there and asked for; nobody where all of them have been measured there."""
        meeting = {candidate for pair in standing.pairs if pair in one.choices for candidate in members(pair)}
        if not all(self.request.asks(candidate.backend) for candidate in meeting):
            return []
        missing = self.request.force or any(candidate not in standing.current for candidate in meeting)
        return [candidate for candidate in standing.candidates if candidate in meeting] if missing else []

    def _compile_ahead(self, work: Sequence[tuple[int, Standing, list[Candidate]]]) -> None:
        """Compiles side by side what is about to be measured, where there are cores for it and modules that can."""
        most, request = processes(), self.request
        if not most or not request.ahead:
            return
        able = [(standing.bucket, hooked(standing.offers, todo)) for _, standing, todo in work]
        todo = jobs((bucket, [c for c in candidates if not self._refusal(c.backend)]) for bucket, candidates in able)
        if not todo:
            return
        left = None if request.budget_s is None else max(0.0, request.budget_s - (time.monotonic() - self.started))
        limits = Limits(AHEAD_S if left is None else min(AHEAD_S, left / 2), request.timeout_s)
        self.say(compile_ahead(todo, Target(self.rows.machine, request.device, request.heads_of), limits, most))

    def _race_s(self, left: int) -> float:
        """The rounds' budget in each of the buckets that are left: the asked one, or less where the whole would take too long."""
        request = self.request
        wanted = request.bucket_s or (QUICK_BUCKET_S if request.quick else FULL_BUCKET_S)
        quick = QUICK_S if self.rows.machine.kind == "cpu" else QUICK_GPU_S
        whole = request.budget_s if request.budget_s is not None else quick if request.quick else None
        since = self.measuring if request.budget_s is None else self.started
        if whole is None:
            return wanted
        return min(wanted, max(0.0, whole - (time.monotonic() - since)) / left * _RACE_SHARE)

    def report(self) -> TuneReport:
        """What has been done so far, in the order of the request."""
        done = tuple(self.rows.told[bucket] for bucket in self.request.buckets if bucket in self.rows.told)
        missing = tuple(bucket for bucket in self.request.buckets if bucket not in self.rows.told)
        between = tuple(replace(self.rows.told[bucket], between=ends) for bucket, ends in self.refined.items() if bucket in self.rows.told)
        return TuneReport(self.rows.store.path, done, self.remaining or missing, time.monotonic() - self.started, between, self.unrefined)

    def _todo(self, standing: Standing) -> list[Candidate]:
        """Who must be measured: the asked backends' candidates and the default's that have no current measurement; with them the yardsticks."""
        pairs = standing.pairs
        default = members(pairs[0]) if pairs else ()
        if self.request.doubtful:
            stale = contested(standing, self.request.objective, self.request.max_memory_mib)
        else:
            racing = standing.racing(self.request.asks)
            stale = [c for c in racing if self.request.force or c not in standing.current or self._may_race_now(standing, c)]
            nobody = not stale and standing.select(self.request.objective, None).winner is None
            if nobody:  # none of them passed: those for whom there was no memory race again
                stale = [c for c in racing if standing.current[c].lacked_memory]
        if not stale:
            return []
        entry = self.rows.store.entry(standing.bucket)
        winner = None if entry is None else standing.named_by(entry)
        yardsticks = {*default, *(members(winner) if winner is not None else ())}
        return [c for c in standing.candidates if c in stale or c in yardsticks]

    def _may_race_now(self, standing: Standing, candidate: Candidate) -> bool:
        """Whether a backend that its probe refused when this was written down would be accepted today."""
        return standing.current[candidate].status == "refused" and not self._refusal(candidate.backend)

    def _refusal(self, backend: str) -> str:
        """Why a backend may not race, by its probe in the child; empty where it may. Asked once."""
        if backend not in self.probed:
            self.host.open(None)
            try:
                answer = self.host.ask({"do": "probe", "backend": backend}, self.request.timeout_s)
                state, reason = str(answer["state"]), str(answer["reason"])
            except (ChildDied, ChildAnswerError) as error:
                state, reason = "broken", f"its probe: {error}"
            self.probed[backend] = "" if state in ("usable", "importable") else reason or state
            self.say(BackendProbed(backend, state, reason))  # type: ignore[arg-type]
        return self.probed[backend]

    def _measure(self, index: int, standing: Standing, todo: Sequence[Candidate], race_s: float) -> None:
        bucket, begun = standing.bucket, time.monotonic()
        refusals = tuple((entry.backend.name, str(entry.verdict)) for entry in standing.offers if not entry.verdict)
        refused = {c: _refused(standing, c, reason) for c in todo if (reason := self._refusal(c.backend))}
        self.say(BucketStarted(bucket, index, tuple(c.label for c in todo if c not in refused), refusals))
        for candidate, one in refused.items():
            self._tell(bucket, candidate, one)
        bench = Bench(self.host, bucket, RaceRules(budget_s=race_s), self.request.timeout_s, self._known_savers(standing))
        older, measured = dict(standing.current), dict(refused)
        try:
            wanted = [candidate for candidate in todo if candidate not in refused]
            if wanted:
                bench.open(self.request.heads_of(bucket))
            while wanted:
                measured |= bench.measure(wanted, standing.hashes, lambda candidate, one: self._tell(bucket, candidate, one))
                measured |= self._decide(bench, standing.with_measured(rescaled(older, measured) | measured), measured)
                standing = standing.with_measured(rescaled(older, measured) | measured)
                chosen = standing.select(self.request.objective, self.request.max_memory_mib).winner
                wanted = [] if chosen is None else [c for c in members(chosen.pair) if c not in measured]  # a winner was timed today
            reference = bench.reference() if measured != refused and bucket not in self.refined else None
        except OpenFailed as error:
            self.rows.fail(bucket, f"its inputs could not be made: {error}", begun)
            return
        standing = standing.with_measured(measured)
        kept = [*standing.current.values(), *([reference] if reference is not None else [])]
        entries = self.rows.chosen(standing)
        self.rows.write(bucket, kept, entries)
        reference_us = None if reference is None else reference.us
        if bucket not in entries:
            self.rows.fail(bucket, standing.select(self.request.objective, self.request.max_memory_mib).reason, begun)
            return
        default_us = standing.default_us()
        self.rows.told[bucket] = Row(bucket, entries[bucket], default_us, reference_us, measured=True, choices=len(standing.contenders()))
        self.say(BucketDone(bucket, entries[bucket], default_us, reference_us, time.monotonic() - begun))

    def _decide(self, bench: Bench, standing: Standing, measured: Mapping[Candidate, Measurement]) -> dict[Candidate, Measurement]:
        """New times of those whom the race left open; where that makes another the choice, with that one once more."""
        found: dict[Candidate, Measurement] = {}
        for _ in range(_DECIDING):
            open_still = contested(standing, self.request.objective, self.request.max_memory_mib)
            if not set(open_still) - set(found):
                break
            unseen = [c for c in open_still if c not in measured and c not in found]
            found |= bench.measure(unseen, standing.hashes, lambda candidate, one: self._tell(bench.bucket, candidate, one))
            standing = standing.with_measured(found)
            for direction in ("forward", "backward"):
                meeting = [c for c in open_still if c.direction == direction and standing.current[c].status == "ok"]
                group = affordable(standing, meeting, bench.rules.budget_s)
                found |= bench.again(group, standing.current, deciding(bench.rules)) if group else {}
            standing = standing.with_measured(found)
        return found

    def _known_savers(self, standing: Standing) -> list[Candidate]:
        """Forwards that passed earlier and save what backwards may need."""
        return [c for c, one in standing.current.items() if c.direction == "forward" and c.saves_states and one.status == "ok"]

    def _tell(self, bucket: Bucket, candidate: Candidate, one: Measurement) -> None:
        self.say(CandidateDone(bucket, candidate.label, candidate.direction, one.status, one.reason, one.us, one.spread))


def _refused(standing: Standing, candidate: Candidate, reason: str) -> Measurement:
    return replace(measurement_of(candidate, standing.hashes[candidate]), status="refused", reason=reason)
