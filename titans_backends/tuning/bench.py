"""Measures the candidates of one bucket through the child: each is checked, those that pass are raced, what fails is written down.

Forward and backward race apart: a training pair's time is the sum, so a pair need not be timed to be known.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

from titans_backends.backend import Candidate
from titans_backends.buckets import Bucket
from titans_backends.cache.timings import Measurement
from titans_backends.tuning import wire
from titans_backends.tuning.host import ChildAnswerError, ChildDied, Host
from titans_backends.tuning.standing import REFERENCE, measurement_of
from titans_backends.tuning.timing import RaceRules, Withdrawn, race

__all__ = ["Bench"]

_REFERENCE_S = 2.0

Told = Callable[[Candidate, Measurement], None]


@dataclass(slots=True)
class Bench:
    """One bucket, open in the child. `savers` are forwards that passed and save what backwards may need."""

    host: Host
    bucket: Bucket
    rules: RaceRules
    timeout_s: float
    savers: list[Candidate] = field(default_factory=list)

    def open(self, heads: int | None, *, references: bool = True) -> None:
        """Makes the inputs and, where there is something to check, the references; OpenFailed where that cannot be."""
        self.host.open({"do": "open", "bucket": wire.bucket_to(self.bucket), "heads": heads, "references": references})

    def measure(self, candidates: Sequence[Candidate], hashes: Mapping[Candidate, str], told: Told) -> dict[Candidate, Measurement]:
        """What came of each candidate; `told` hears each result once."""
        forward = [candidate for candidate in candidates if candidate.direction == "forward"]
        backward = [candidate for candidate in candidates if candidate.direction == "backward"]
        found: dict[Candidate, Measurement] = {}
        for group in (forward, backward):
            checked = self.check(group, hashes)
            for candidate, one in checked.items():
                if one.status != "ok":
                    told(candidate, one)
            timed = self._race([candidate for candidate, one in checked.items() if one.status == "ok"], checked, self.rules)
            for candidate, one in timed.items():
                told(candidate, one)
            found |= checked | timed
        return found

    def check(self, candidates: Sequence[Candidate], hashes: Mapping[Candidate, str]) -> dict[Candidate, Measurement]:
        """What came of each candidate's check, without times."""
        return {candidate: replace(self._check(candidate), source=hashes[candidate]) for candidate in candidates}

    def again(self, runners: Sequence[Candidate], measured: Mapping[Candidate, Measurement], rules: RaceRules) -> dict[Candidate, Measurement]:
        """New times for candidates of one direction that have passed their check; by rules of their own."""
        return self._race(runners, measured, rules)

    def reference(self) -> Measurement | None:
        """One run of the contract's reference, where it is not too slow for a comparison."""
        try:
            answer = self.host.ask({"do": "reference", "most_s": _REFERENCE_S}, self.timeout_s)
        except (ChildDied, ChildAnswerError):  # a comparison that cannot be had is left out
            return None
        us = answer["us"]
        return Measurement(REFERENCE, us=us, samples=1) if isinstance(us, float) else None

    def _request(self, kind: str, candidate: Candidate) -> wire.Message:
        states_from = next((one for one in self.savers if one.agrees(candidate)), None) if candidate.direction == "backward" else None
        return {"do": kind, "candidate": wire.candidate_to(candidate), "states_from": None if states_from is None else wire.candidate_to(states_from)}

    def _check(self, candidate: Candidate) -> Measurement:
        base = measurement_of(candidate)
        try:
            answer = self.host.ask(self._request("check", candidate), self.timeout_s)
        except (ChildDied, ChildAnswerError) as error:
            return replace(base, status="failed", reason=str(error))
        errors = tuple((str(name), float(error)) for name, error in cast("list[tuple[str, float]]", answer["errors"]))
        reason, peak, compile_s = str(answer["reason"]), cast("float | None", answer["peak_mib"]), cast("float | None", answer["compile_s"])
        if reason:
            return replace(base, status="failed", reason=reason, errors=errors, compile_s=compile_s)
        if candidate.direction == "forward" and candidate.saves_states:
            self.savers.append(candidate)
        return replace(base, errors=errors, peak_mib=peak, compile_s=compile_s)

    def _race(self, runners: Sequence[Candidate], checked: Mapping[Candidate, Measurement], rules: RaceRules) -> dict[Candidate, Measurement]:
        def sample(candidate: Candidate) -> float:
            try:
                return float(cast(float, self.host.ask(self._request("sample", candidate), self.timeout_s)["us"]))
            except (ChildDied, ChildAnswerError) as error:
                raise Withdrawn(f"{error} (while it was timed)") from error

        outcome = race(runners, sample, time.monotonic, rules)
        timed = {
            candidate: replace(checked[candidate], us=timing.us, spread=timing.spread, samples=timing.samples)
            for candidate, timing in outcome.timings.items()
        }
        lost = {
            candidate: replace(checked[candidate], status="failed", reason=reason, peak_mib=None) for candidate, reason in outcome.withdrawn.items()
        }
        return timed | lost
