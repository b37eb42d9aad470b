"""The rows of one tune: what a bucket's measurements choose, written at once, up to where each speaks, and what is told of them."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from titans_backends.buckets import Bucket
from titans_backends.cache.schema import Entry
from titans_backends.cache.timings import Measurement
from titans_backends.machine import Machine
from titans_backends.offers import offers
from titans_backends.tuning.doubt import doubt_of
from titans_backends.tuning.events import BucketFailed, OnEvent, Skipped
from titans_backends.tuning.problem import signature_of_bucket
from titans_backends.tuning.report import Row
from titans_backends.tuning.request import TuneRequest
from titans_backends.tuning.standing import REFERENCE, Standing, entry_of, is_training, without_states
from titans_backends.tuning.store import Store
from titans_backends.tuning.switches import switches

__all__ = ["Rows"]


@dataclass(slots=True)
class Rows:
    """What one tune reads and writes of its table. `told`: what the report will say of each bucket; `wrote`: whether the file is another one than before."""

    request: TuneRequest
    say: OnEvent
    machine: Machine
    store: Store
    told: dict[Bucket, Row] = field(default_factory=dict)
    wrote: bool = False

    def standing(self, bucket: Bucket) -> Standing:
        """What is known about a bucket; ValueError where no call is such a bucket's."""
        signature = signature_of_bucket(bucket, self.request.device, self.request.heads_of(bucket))
        return Standing.of(bucket, signature, offers(signature, self.machine), self.store.measurements(bucket))

    def possible(self, bucket: Bucket) -> Standing | None:
        """What is offered there; None where no call is such a bucket's."""
        try:
            return self.standing(bucket)
        except ValueError:
            return None

    def outdated(self, standing: Standing) -> bool:
        """Whether the row is not what the current measurements say, or was chosen by another objective or limit."""
        chosen = standing.select(self.request.objective, self.request.max_memory_mib)
        entry = self.store.entry(standing.bucket)
        if chosen.winner is None:
            return False
        if entry is not None and (entry.objective, entry.max_memory_mib) != (self.request.objective, self.request.max_memory_mib):
            return True
        named = None if entry is None else standing.named_by(entry)
        return named != chosen.winner.pair or not self.store.fresh(standing.bucket, standing.source(named))

    def settle(self, standing: Standing) -> None:
        """A bucket whose measurements are all current: its row is chosen from them, and written where it is another one."""
        bucket = standing.bucket
        entries = self.chosen(standing) if self.outdated(standing) else {}
        if entries:
            self.write(bucket, (), entries)
        chosen = standing.select(self.request.objective, self.request.max_memory_mib)
        entry = self.store.entry(bucket) if chosen.winner is not None else None
        reference_us = self._reference_us(bucket)
        if entry is None:
            self.fail(bucket, chosen.reason, time.monotonic())
            return
        self.told[bucket] = Row(bucket, entry, standing.default_us(), reference_us, choices=len(standing.contenders()))
        self.say(Skipped(bucket, entry, standing.default_us(), reference_us))

    def chosen(self, standing: Standing) -> dict[Bucket, Entry]:
        """The bucket's row, and in training the one for calls that may save no states."""
        found: dict[Bucket, Entry] = {}
        for bucket, plain in ((standing.bucket, False), (without_states(standing.bucket), True)):
            if plain and not is_training(standing.bucket):
                continue
            chosen = standing.select(self.request.objective, self.request.max_memory_mib, without_states=plain)
            if chosen.winner is not None:
                doubt = doubt_of(standing, self.request.objective, self.request.max_memory_mib, without_states=plain)
                share = None if doubt is None else doubt.share
                source = standing.source(chosen.winner.pair) or ""
                found[bucket] = entry_of(chosen, source, share, self.request.objective, self.request.max_memory_mib)
        return found

    def write(self, bucket: Bucket, measurements: Sequence[Measurement], entries: dict[Bucket, Entry]) -> None:
        """Writes what was measured, then the rows."""
        self.store.write(bucket, measurements, entries)
        self.wrote = True

    def fail(self, bucket: Bucket, reason: str, begun: float) -> None:
        """Tells that a bucket has no row, and why; `begun`: when it was begun, in seconds of `time.monotonic`."""
        self.told[bucket] = Row(bucket, None, reason=reason)
        self.say(BucketFailed(bucket, reason, time.monotonic() - begun))

    def switch(self) -> None:
        """Says up to where each row of the keys that were asked for speaks towards its longer neighbour; of rows that an earlier tune wrote too, which may
        have been killed before it came to this. A table that cannot be written and is current otherwise is left as it is."""
        if self.store.table is None:
            return
        keys = {bucket._replace(seq_len=0) for bucket in self.request.buckets}
        plain = {key: key for key in keys} | {without_states(key): key for key in keys if is_training(key)}
        possible = functools.cache(self.possible)  # most rows have two neighbours, and in training two rows one standing
        changes = switches(
            self.store.table.rows,
            lambda bucket: bucket._replace(seq_len=0) in plain,
            lambda bucket: possible(plain[bucket._replace(seq_len=0)]._replace(seq_len=bucket.seq_len)),
        )
        if changes and (self.wrote or self.store.is_writable()):
            self.store.switch(changes)
            self.wrote = True

    def _reference_us(self, bucket: Bucket) -> float | None:
        return next((one.us for one in self.store.measurements(bucket) if one.candidate == REFERENCE), None)
