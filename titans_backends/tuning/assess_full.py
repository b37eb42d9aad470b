"""Every candidate of one bucket timed fully, and what the tunes' choices cost there: interleaved rounds for all, then finals for those that matter.

Both end when they know enough, and at a cap in seconds. What was chosen is read from the tunes' own files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from titans_backends.backend import Candidate
from titans_backends.buckets import Bucket, defaults_of
from titans_backends.cache import file
from titans_backends.cache.paths import timings_path
from titans_backends.cache.timings import Measurement
from titans_backends.dispatch import consult
from titans_backends.machine import Machine
from titans_backends.offers import Pair, offers
from titans_backends.tables import Source
from titans_backends.tuning.bench import Bench
from titans_backends.tuning.doubt import deciding, room
from titans_backends.tuning.host import Host, OpenFailed
from titans_backends.tuning.problem import signature_of_bucket
from titans_backends.tuning.regret import Assessed, flip_of, judged
from titans_backends.tuning.request import TuneRequest
from titans_backends.tuning.standing import Standing, measurement_of, members
from titans_backends.tuning.timing import RaceRules

__all__ = ["Full", "NotMeasured"]

_RACE_SHARE = 0.4
"""Of the cap the race of all may take so much, the finals the rest."""
_SPREAD = 0.002
"""A final's medians are known to so much, so that the difference of two is to 0.3 % with 95 % confidence: a regret that matters is larger."""
_ROOM, _FINALISTS, _NEAR = 0.005, 6, 0.05
"""Who may save more than this share of a choice's time is timed again with it, so many at most; who is farther than the last from the best holds nobody up."""


class NotMeasured(Exception):
    """A bucket has no figures; the message says why."""


@dataclass(slots=True)
class Full:
    """The process in which everything is measured fully, and the folder with the tunes' files."""

    host: Host
    request: TuneRequest
    machine: Machine
    folder: Path
    _standings: dict[Bucket, Standing] = field(default_factory=dict)

    def path(self, name: str) -> Path:
        """A tune's file."""
        return self.folder / f"{name}.yaml"

    def standing(self, bucket: Bucket) -> Standing:
        """What is offered for a bucket, nothing measured yet."""
        if bucket not in self._standings:
            signature = signature_of_bucket(bucket, self.request.device, self.request.heads_of(bucket))
            self._standings[bucket] = Standing.of(bucket, signature, offers(signature, self.machine), ())
        return self._standings[bucket]

    def racing(self, bucket: Bucket) -> list[Candidate]:
        """Who may race there."""
        return self.standing(bucket).racing(self.request.asks)

    def measured(self, bucket: Bucket, between: tuple[int, int] | None, cap_s: float) -> Assessed:
        """Everybody timed, but for those that take twice the best in each of seven rounds; NotMeasured where that cannot be.

        `between`: a midpoint's neighbours, whose rows in the first tune's file choose there. `cap_s` bounds the timing beyond its least rounds.
        """
        standing = self.standing(bucket)
        bench = Bench(self.host, bucket, rules(cap_s), self.request.timeout_s)
        try:
            bench.open(self.request.heads_of(bucket), references=False)
            standing = standing.with_measured(self._timed(bench, standing, between))
            chosen = [self._chosen(name, bucket, standing) for name in (("first", "second") if between is None else ("first",))]
            pairs = [pair for pair in chosen if pair is not None]
            standing = standing.with_measured(finals(bench, standing, pairs, cap_s))
        except OpenFailed as error:
            raise NotMeasured(f"its inputs could not be made: {error}") from error
        contenders = {one.pair: one for one in standing.contenders()}
        choices = [judged(pair, contenders) for pair in pairs]
        if not contenders or None in choices or not choices:
            raise NotMeasured("what was chosen did not pass when it was measured again")
        best = min(contenders.values(), key=lambda one: (one.us, one.order))
        flip = flip_of(pairs[0], pairs[1], contenders) if len(pairs) == 2 else None
        kept = tuple(choice for choice in choices if choice is not None)
        return Assessed(bucket, best.pair.label, best.us, best.spread, len(contenders), kept, flip, between)

    def _chosen(self, name: str, bucket: Bucket, standing: Standing) -> Pair | None:
        """What a call of the bucket would run by that tune's file: a row's pair, or the default."""
        source = Source("named", self.path(name), file.read(self.path(name), defaults_of).table)
        _, pair = consult(source, bucket, standing.pairs, self.machine.kind)
        return pair if pair is not None else next(iter(standing.pairs), None)

    def _timed(self, bench: Bench, standing: Standing, between: tuple[int, int] | None) -> dict[Candidate, Measurement]:
        """Everyone who raced in the first tune and passed, timed; at a midpoint who passed at its neighbours, and who was not offered there is checked now."""
        timings = file.read_timings(timings_path(self.path("first")), defaults_of).table
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


def rules(cap_s: float) -> RaceRules:
    """Of the race of all: who cannot win is known after few rounds, and those who may meet again in the finals."""
    return RaceRules(
        _RACE_SHARE * cap_s,
        least_rounds=7,
        min_rounds=30,
        max_rounds=100,
        rounds_before_drop=7,
        hopeless_factor=math.inf,
        target_spread=0.004,
        final_rounds=0,
        settle_every=10,
    )


def finals(bench: Bench, standing: Standing, chosen: Sequence[Pair], cap_s: float) -> dict[Candidate, Measurement]:
    """New times of what was chosen and of the fastest of those that may be faster, in up to 1000 rounds: the best of many noisy medians is too good to be true."""
    contenders = {one.pair: one for one in standing.contenders()}
    known = [contenders[pair] for pair in chosen if pair in contenders]
    faster = [one for one in contenders.values() if any(room(mine, one) > _ROOM for mine in known)]
    pairs = [*(one.pair for one in known), *(one.pair for one in sorted(faster, key=lambda one: one.us)[:_FINALISTS])]
    meeting = {candidate for pair in pairs for candidate in members(pair)}
    found: dict[Candidate, Measurement] = {}
    for direction in ("forward", "backward"):
        group = [candidate for candidate in standing.candidates if candidate in meeting and candidate.direction == direction]
        if len(group) > 1:
            enough = replace(deciding(bench.rules), budget_s=(1 - _RACE_SHARE) * cap_s, target_spread=_SPREAD, final_band=_NEAR)
            found |= bench.again(group, standing.current, enough)
    return found
