"""What is known about a bucket's candidates today, and what follows: who must be measured, who is a yardstick, who wins.

Pure but for reading the sources' hashes: the measurements come from `store`, new ones from `bench`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from titans_backends import registry
from titans_backends.backend import Candidate
from titans_backends.buckets import Bucket, defaults_of, field
from titans_backends.cache.schema import Entry, canonical_when
from titans_backends.cache.source_hash import join_hashes, source_hash
from titans_backends.cache.timings import Measurement
from titans_backends.offers import Offer, Pair, pairs, source_modules
from titans_backends.signature import Signature
from titans_backends.tuning.select import Contender, Objective, Selection, combined, select

__all__ = ["REFERENCE", "Standing", "entry_of", "is_training", "measurement_of", "members", "rescaled", "same_choice", "without_states"]

REFERENCE = "reference/contract"
"""The name under which the contract's plain reference stands among the timings; no backend offers it."""
_YARDSTICK_SAMPLES = 3


def measurement_of(candidate: Candidate, source: str = "") -> Measurement:
    """A measurement of a candidate, without its numbers yet."""
    return Measurement(candidate.name, candidate.params, candidate.direction, candidate.saves_states, source=source, residual=candidate.residual)


@dataclass(frozen=True, slots=True)
class Standing:
    """A bucket's offers with the measurements that are current: of the code and versions of today."""

    bucket: Bucket
    signature: Signature
    offers: tuple[Offer, ...]
    hashes: Mapping[Candidate, str]
    current: Mapping[Candidate, Measurement]

    @classmethod
    def of(cls, bucket: Bucket, signature: Signature, given: Sequence[Offer], stored: Sequence[Measurement]) -> Standing:
        """The standing that stored measurements give; those of changed code are left out."""
        candidates = [candidate for entry in given for candidate in (*entry.forward, *entry.backward)]
        hashes = {candidate: _hash(candidate, bucket.op) for candidate in candidates}
        known = {one.identity: one for one in stored}
        found = {candidate: known.get(measurement_of(candidate).identity) for candidate in candidates}
        current = {candidate: one for candidate, one in found.items() if one is not None and one.source == hashes[candidate]}
        return cls(bucket, signature, tuple(given), hashes, current)

    def with_measured(self, measured: Mapping[Candidate, Measurement]) -> Standing:
        """The standing after new measurements."""
        return replace(self, current={**self.current, **measured})

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """Everything that is offered, forward before backward, the default first."""
        forward = [candidate for entry in self.offers for candidate in entry.forward]
        return (*forward, *(candidate for entry in self.offers for candidate in entry.backward))

    @property
    def pairs(self) -> list[Pair]:
        """Every admissible choice, the default first."""
        return pairs(self.offers, self.signature)

    def ok(self, pair: Pair) -> bool:
        """Whether a pair's candidates have both passed."""
        return all(candidate in self.current and self.current[candidate].status == "ok" for candidate in members(pair))

    def racing(self, asked: Callable[[str], bool]) -> list[Candidate]:
        """Who may race: the default, and the candidates of asked backends that some pair can use."""
        pairs = self.pairs
        default = members(pairs[0]) if pairs else ()
        paired = {candidate for pair in pairs for candidate in members(pair)}
        return [c for c in self.candidates if c in paired and (c in default or asked(c.backend))]

    def contenders(self) -> list[Contender]:
        """The pairs that passed, with their numbers, the default first where it did."""
        return [self._contender(pair, order) for order, pair in enumerate(self.pairs) if self.ok(pair)]

    def select(self, objective: Objective, max_memory_mib: float | None, *, without_states: bool = False) -> Selection:
        """The rule of `select` over the pairs that passed."""
        found = [one for one in self.contenders() if not (without_states and one.pair.forward.saves_states)]
        chosen = select(found, objective, max_memory_mib)
        return chosen if chosen.winner is not None or found else replace(chosen, reason=self._why_none())

    def default_us(self) -> float | None:
        """What the untuned default takes, where it passed."""
        pair = next(iter(self.pairs), None)
        return self._contender(pair, 0).us if pair is not None and self.ok(pair) else None

    def named_by(self, entry: Entry) -> Pair | None:
        """The pair that a row names, if it is still offered."""
        return next((pair for pair in self.pairs if _names(entry, pair)), None)

    def source(self, pair: Pair | None) -> str | None:
        """A pair's source hash as a row stores it."""
        if pair is None:
            return None
        forward = self.hashes[pair.forward]
        return forward if pair.backward is None else join_hashes(forward, self.hashes[pair.backward])

    def _contender(self, pair: Pair, order: int) -> Contender:
        found = [self.current[candidate] for candidate in members(pair)]
        us, spread = combined([(one.us or 0.0, one.spread or 0.0) for one in found])
        simplicity = max(registry.get(candidate.backend).simplicity for candidate in members(pair))
        return Contender(pair, us, spread, max(one.peak_mib or 0.0 for one in found), simplicity, order)

    def _why_none(self) -> str:
        if not self.pairs:
            said = [f"{entry.backend.name}: {entry.verdict}" for entry in self.offers if not entry.verdict]
            return f"no backend offers a candidate{': ' if said else ''}{'; '.join(said)}"
        failed = [f"{one.label} ({one.direction}): {one.reason}" for one in self.current.values() if one.status != "ok"]
        return f"no candidate passed: {'; '.join(failed) or 'none was measured'}"


def members(pair: Pair) -> tuple[Candidate, ...]:
    """A pair's candidates."""
    return (pair.forward,) if pair.backward is None else (pair.forward, pair.backward)


def _hash(candidate: Candidate, op: str) -> str:
    try:
        return source_hash(source_modules(candidate, op))
    except (ModuleNotFoundError, SyntaxError, OSError):  # code without a file: it counts as unchanged
        return ""


def _names(entry: Entry, pair: Pair) -> bool:
    forward = (entry.use, tuple(sorted(entry.params)), entry.saves_states)
    if forward != (pair.forward.name, tuple(sorted(pair.forward.params)), pair.forward.saves_states):
        return False
    if pair.backward is None or entry.backward is None:
        return pair.backward is None and entry.backward is None
    return (entry.backward, tuple(sorted(entry.backward_params))) == (pair.backward.name, tuple(sorted(pair.backward.params)))


def entry_of(
    selection: Selection, source: str, doubt: float | None = None, objective: Objective = "time", max_memory_mib: float | None = None
) -> Entry:
    """The row of a selection that has a winner, and what it was asked for; `doubt`: the share of its time that another may save, where that is more
    than noise may decide."""
    assert selection.winner is not None
    pair, second = selection.winner.pair, selection.runner_up
    return Entry(
        use=pair.forward.name,
        us=selection.winner.us,
        spread=selection.winner.spread,
        peak_mib=selection.winner.peak_mib,
        params=pair.forward.params,
        backward=None if pair.backward is None else pair.backward.name,
        backward_params=() if pair.backward is None else pair.backward.params,
        saves_states=pair.forward.saves_states,
        next=None if second is None else second.pair.label,
        next_us=None if second is None else second.us,
        doubt=doubt,
        objective=objective,
        max_memory_mib=max_memory_mib,
        source=source,
    )


def rescaled(older: Mapping[Candidate, Measurement], newer: Mapping[Candidate, Measurement]) -> dict[Candidate, Measurement]:
    """The older timings that were not renewed, on the scale of today: times what the yardsticks, measured twice, have changed by. Who was dropped after a
    sample or two is a yardstick only where there is no other: one interrupted sample would move every time."""
    twice = [
        (one, older[candidate])
        for candidate, one in newer.items()
        if one.us and candidate in older and older[candidate].us and one.status == older[candidate].status == "ok"
    ]
    steady = [pair for pair in twice if all((one.samples or 0) >= _YARDSTICK_SAMPLES for one in pair)]
    ratios = [math.log(now.us / then.us) for now, then in steady or twice]  # type: ignore[operator]
    scale = math.exp(sum(ratios) / len(ratios)) if ratios else 1.0
    return {candidate: replace(one, us=one.us * scale if one.us is not None else None) for candidate, one in older.items() if candidate not in newer}


def same_choice(one: Entry, other: Entry) -> bool:
    """Whether two rows name one choice."""
    return _choice(one) == _choice(other)


def _choice(entry: Entry) -> tuple[object, ...]:
    return entry.use, tuple(sorted(entry.params)), entry.saves_states, entry.backward, tuple(sorted(entry.backward_params))


def without_states(bucket: Bucket) -> Bucket:
    """The bucket of the same call where no chunk-start states may be saved, as in a traced graph."""
    values = {**dict(bucket.when), "saves": "inputs"}
    return Bucket(bucket.op, canonical_when(values, defaults_of(bucket.op)), bucket.seq_len)


def is_training(bucket: Bucket) -> bool:
    """Whether its candidates are pairs."""
    return field(bucket, "regime") == "training"
