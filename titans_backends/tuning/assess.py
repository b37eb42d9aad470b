"""How good the tuner is, measured: two fresh tunes of the same buckets, then every candidate of each timed fully, there and between the buckets.

Nothing that a call reads is written: the tunes write files of their own, which are gone afterwards. Within a budget; what it does not reach is said.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from titans_backends.backend import Candidate
from titans_backends.buckets import Bucket, defaults_of
from titans_backends.cache import file
from titans_backends.cache.paths import timings_path
from titans_backends.cache.timings import Measurement
from titans_backends.dispatch import consult
from titans_backends.machine import Machine, detect
from titans_backends.offers import Pair, offers
from titans_backends.tables import Source, sources
from titans_backends.tuning.ahead import Limits, Target, compile_ahead, hooked, jobs, processes
from titans_backends.tuning.assess_order import in_order
from titans_backends.tuning.bench import Bench
from titans_backends.tuning.doubt import deciding, room
from titans_backends.tuning.events import CompiledAhead
from titans_backends.tuning.first_use import FirstUse, first_use
from titans_backends.tuning.host import Host, OpenFailed
from titans_backends.tuning.problem import signature_of_bucket
from titans_backends.tuning.regret import Assessed, Summary, flip_of, judged, summary
from titans_backends.tuning.report import TuneInterrupted, TuneReport
from titans_backends.tuning.request import TuneRequest
from titans_backends.tuning.run import AHEAD_S, tune
from titans_backends.tuning.standing import Standing, measurement_of, members
from titans_backends.tuning.timing import RaceRules

__all__ = ["Assessment", "FirstUse", "Progress", "assess"]

Progress = Callable[[str], None]
_AHEAD_SHARE, _TUNE_SHARE, _AGAIN_SHARE = 0.35, 0.4, 0.5
"""Of what is left of the budget compiling ahead may take so much, then the first tune, then the second at most."""
_LEAST_S, _MOST_S = 0.3, 8.0
_ROOM, _FINALISTS = 0.005, 6
"""Who may save more than this share of a choice's time is timed again with it, so many at most."""


@dataclass(frozen=True, slots=True)
class Assessment:
    """What came of it. `tune_s`: seconds of each of the two tunes, of `tuned_buckets` each; `left`: buckets and midpoints that were not assessed, with reasons.

    `compiled`: what was compiled side by side before them, midpoints too; None where nothing was, and the first tune compiled what it measured.
    """

    tuned: tuple[Assessed, ...]
    midpoints: tuple[Assessed, ...]
    tune_s: tuple[float, float]
    tuned_buckets: tuple[int, int]
    first_uses: tuple[FirstUse, ...]
    left: tuple[tuple[Bucket, str], ...]
    seconds: float
    compiled: CompiledAhead | None = None
    interrupted: bool = False

    @property
    def summary(self) -> Summary:
        """Its figures."""
        return summary(self.tuned, self.midpoints)


def assess(request: TuneRequest, budget_s: float | None = None, progress: Progress = lambda said: None) -> Assessment:
    """Assesses the tuner on the request's buckets; `progress` hears what is done next. The request's own file is left alone. Ctrl-C ends it with what there is."""
    with tempfile.TemporaryDirectory(prefix="titans_backends_assess_") as folder:
        return _Run(request, budget_s, progress, Path(folder), detect(request.device)).all()


@dataclass(slots=True)
class _Run:
    """One assessment."""

    request: TuneRequest
    budget_s: float | None
    progress: Progress
    folder: Path
    machine: Machine
    begun: float = field(default_factory=time.monotonic)
    left: list[tuple[Bucket, str]] = field(default_factory=list)
    interrupted: bool = False

    def all(self) -> Assessment:
        compiled = self._compile_ahead()
        first = self._tune("first", self.request.buckets, _TUNE_SHARE)
        reached = tuple(row.bucket for row in first.rows if row.entry is not None)
        self.left += [(row.bucket, f"the first tune found no winner: {row.reason}") for row in first.rows if row.entry is None]
        met = {row.bucket for row in first.rows}
        why = "it was interrupted" if self.interrupted else "the first tune did not reach it"
        self.left += [(bucket, why) for bucket in self.request.buckets if bucket not in met]
        second = self._tune("second", reached, _AGAIN_SHARE)
        uses = tuple(self._first_uses(reached))
        tuned: list[Assessed] = []
        between: list[Assessed] = []
        again = frozenset(row.bucket for row in second.rows if row.entry is not None)
        work = in_order(reached)
        with Host(self.request.device) as host:
            for position, (bucket, neighbours) in enumerate(work):
                if self._left_s() <= 0:
                    why = "it was interrupted" if self.interrupted else "the budget ended"
                    self.left += [(other, why) for other, _ in work[position:]]
                    break
                try:
                    done = self._exhaustive(host, bucket, neighbours, bucket in again, len(work) - position)
                except KeyboardInterrupt:
                    self.interrupted, done = True, None
                    self.left.append((bucket, "it was interrupted"))
                if done is not None:
                    (tuned if neighbours is None else between).append(done)
        seconds, counts = (first.seconds, second.seconds), (len(reached), len(again))
        return Assessment(
            tuple(tuned), tuple(between), seconds, counts, uses, tuple(self.left), time.monotonic() - self.begun, compiled, self.interrupted
        )

    def _left_s(self) -> float:
        if self.interrupted:
            return 0.0
        return math.inf if self.budget_s is None else self.budget_s - (time.monotonic() - self.begun)

    def _compile_ahead(self) -> CompiledAhead | None:
        """What the tunes and the full measurements are going to run, in one go; what is refused later was compiled for nothing."""
        most = processes()
        work: list[tuple[Bucket, list[Candidate]]] = []
        for bucket, _ in in_order(self.request.buckets) if most else ():
            signature = signature_of_bucket(bucket, self.request.device, self._heads(bucket))
            standing = Standing.of(bucket, signature, offers(signature, self.machine), ())
            work.append((bucket, hooked(standing.offers, standing.racing(self.request.asks))))
        todo = jobs(work)
        if not todo:
            return None
        self.progress(f"compiling ahead, {len(todo)} candidates")
        limits = Limits(min(AHEAD_S, self._left_s() * _AHEAD_SHARE), self.request.timeout_s)
        try:
            return compile_ahead(todo, Target(self.machine, self.request.device, self._heads), limits, most)
        except KeyboardInterrupt:
            self.interrupted = True
            return None

    def _heads(self, bucket: Bucket) -> int | None:
        """The v heads of a bucket, and of a midpoint as of its neighbours."""
        known = self.request.heads_by_bucket
        return self.request.heads_of(bucket) if bucket in known else next((h for b, h in known.items() if b[:2] == bucket[:2]), self.request.heads)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.yaml"

    def _tune(self, name: str, buckets: tuple[Bucket, ...], share: float) -> TuneReport:
        """A tune that knows nothing of any other; of nothing once it was interrupted."""
        buckets = () if self.interrupted else buckets
        if buckets:
            self.progress(f"the {name} tune, of {len(buckets)} buckets")
        left = self._left_s()
        budget = None if left == math.inf else max(1.0, left * share)
        try:
            return tune(replace(self.request, buckets=buckets, output=self._path(name), force=False, budget_s=budget, ahead=False))
        except TuneInterrupted as stop:
            self.interrupted = True
            return stop.report

    def _source(self, name: str) -> Source:
        return Source("named", self._path(name), file.read(self._path(name), defaults_of).table)

    def _chosen(self, name: str, bucket: Bucket, standing: Standing) -> Pair | None:
        """What a call of the bucket would run by that tune's file: a row's pair, or the default."""
        _, pair = consult(self._source(name), bucket, standing.pairs, self.machine.kind)
        return pair if pair is not None else next(iter(standing.pairs), None)

    def _exhaustive(self, host: Host, bucket: Bucket, between: tuple[int, int] | None, twice: bool, left: int) -> Assessed | None:
        """Every candidate of a bucket timed fully, but for those that take twice the best in each of seven rounds, and what the tunes' choices cost there.

        `twice`: the second tune has a row for it too.
        """
        self.progress(f"every candidate of {bucket.op} at seq_len {bucket.seq_len}, {left} to go")
        heads = self._heads(bucket)
        signature = signature_of_bucket(bucket, self.request.device, heads)
        standing = Standing.of(bucket, signature, offers(signature, self.machine), ())
        race_s = min(_MOST_S, max(_LEAST_S, self._left_s() / left / 5))
        full = RaceRules(
            race_s,
            least_rounds=7,
            min_rounds=30,
            max_rounds=200,
            rounds_before_drop=7,
            hopeless_factor=math.inf,
            target_spread=0.004,
            final_rounds=20,
        )
        bench = Bench(host, bucket, full, self.request.timeout_s)
        try:
            bench.open(heads, references=False)
            standing = standing.with_measured(self._timed(bench, standing, between))
            chosen = [self._chosen(name, bucket, standing) for name in (("first", "second") if twice else ("first",))]
            pairs = [pair for pair in chosen if pair is not None]
            standing = standing.with_measured(_finals(bench, standing, pairs))
        except OpenFailed as error:
            self.left.append((bucket, f"its inputs could not be made: {error}"))
            return None
        contenders = {one.pair: one for one in standing.contenders()}
        choices = [judged(pair, contenders) for pair in pairs]
        if not contenders or None in choices or not choices:
            self.left.append((bucket, "what was chosen did not pass when it was measured again"))
            return None
        best = min(contenders.values(), key=lambda one: (one.us, one.order))
        flip = flip_of(pairs[0], pairs[1], contenders) if len(pairs) == 2 else None
        kept = tuple(choice for choice in choices if choice is not None)
        return Assessed(bucket, best.pair.label, best.us, best.spread, len(contenders), kept, flip, between)

    def _timed(self, bench: Bench, standing: Standing, between: tuple[int, int] | None) -> dict[Candidate, Measurement]:
        """Everyone who raced in the first tune and passed, timed; at a midpoint who passed at its neighbours, and who was not offered there is checked now."""
        timings = file.read_timings(timings_path(self._path("first")), defaults_of).table
        rows = {} if timings is None else timings.rows
        places = [bench.bucket] if between is None else [bench.bucket._replace(seq_len=length) for length in between]
        known = [one for place in places for one in rows.get(place, ())]
        lost = {one.identity for one in known if one.status != "ok"}
        passed = {one.identity: one for one in known if one.status == "ok"}
        refused = {one.candidate.partition("/")[0] for found in rows.values() for one in found if one.status == "refused"}
        racing = [c for c in standing.racing(self.request.asks) if measurement_of(c).identity not in lost and c.backend not in refused]
        measured = {c: replace(passed[measurement_of(c).identity], env="") for c in racing if measurement_of(c).identity in passed}
        bench.savers = [c for c in measured if c.direction == "forward" and c.saves_states]
        measured |= bench.check([c for c in racing if c not in measured], standing.hashes)
        for direction in ("forward", "backward"):
            measured |= bench.again([c for c in racing if c.direction == direction and measured[c].status == "ok"], measured, bench.rules)
        return measured

    def _first_uses(self, reached: Sequence[Bucket]) -> Iterator[FirstUse]:
        """A bucket in a fresh process that has the shipped tables alone; where they know none of them, that finds the first tune's file."""
        shipped = next((bucket for bucket in reversed(reached) if self._ships(bucket)), None)
        made = [(shipped, None)] if shipped is not None else [(bucket, self._path("first")) for bucket in reached[-1:]]
        for bucket, table in made:
            if self._left_s() <= 0:
                return
            self.progress(f"the first call of {bucket.op} in a fresh process")
            try:
                found = first_use(bucket, self.request.device, self.request.heads_of(bucket), table)
            except KeyboardInterrupt:
                self.interrupted = True
                return
            if isinstance(found, FirstUse):
                yield found
            else:
                self.left.append((bucket, f"its first use in a fresh process failed: {found}"))

    def _ships(self, bucket: Bucket) -> bool:
        return any(source.kind == "shipped" and source.table is not None and bucket in source.table.rows for source in sources(self.machine))


def _finals(bench: Bench, standing: Standing, chosen: Sequence[Pair]) -> dict[Candidate, Measurement]:
    """New times of what was chosen and of the fastest of those that may be faster, in many more rounds: the best of many noisy medians is too good to be true."""
    contenders = {one.pair: one for one in standing.contenders()}
    known = [contenders[pair] for pair in chosen if pair in contenders]
    faster = [one for one in contenders.values() if any(room(mine, one) > _ROOM for mine in known)]
    pairs = [*(one.pair for one in known), *(one.pair for one in sorted(faster, key=lambda one: one.us)[:_FINALISTS])]
    meeting = {candidate for pair in pairs for candidate in members(pair)}
    found: dict[Candidate, Measurement] = {}
    for direction in ("forward", "backward"):
        group = [candidate for candidate in standing.candidates if candidate in meeting and candidate.direction == direction]
        if len(group) > 1:
            rules = replace(deciding(bench.rules), target_spread=bench.rules.target_spread)
            found |= bench.again(group, standing.current, rules)
    return found
