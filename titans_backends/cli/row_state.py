"""Whether a stored row still holds here: asks the backends for its candidate and hashes its source as it is today. Changes nothing."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from titans_backends.buckets import Bucket, defaults_of
from titans_backends.cache.schema import Entry, Table, full_when
from titans_backends.cache.staleness import Staleness, grade
from titans_backends.cache.timings import Measurement, Timings
from titans_backends.cli.keys import by_key, key_text
from titans_backends.contracts import CONTRACTS
from titans_backends.machine import Machine
from titans_backends.offers import offers
from titans_backends.reporting import numbers
from titans_backends.reporting.place import dims_text
from titans_backends.tables import current_environment
from titans_backends.tuning.problem import signature_of_bucket
from titans_backends.tuning.standing import REFERENCE, Standing

__all__ = ["Renewal", "measurement_state", "renewals", "row_state", "tune_command"]


@dataclass(frozen=True, slots=True)
class Renewal:
    """Rows of one key that are stale or ignored: what is wrong with them, and the command that measures them again."""

    kind: Literal["fresh", "stale", "ignored"]
    rows: int
    where: str
    reason: str
    command: str

    def __str__(self) -> str:
        return f"{numbers.amount(self.rows, 'row')} {self.kind}: {self.where}: {self.reason}"


def row_state(machine: Machine, table: Table, bucket: Bucket, entry: Entry) -> Staleness:
    """The grade of a winner's row. A row whose inputs cannot be made any more is ignored, with the reason."""
    try:
        standing = _standing(machine, bucket)
    except (KeyError, ValueError) as error:
        return Staleness("ignored", f"this version has no such bucket: {error}")
    source = standing.source(standing.named_by(entry))
    return grade(bucket, entry, table.environment(entry), current_environment(machine.kind), source)


def measurement_state(machine: Machine, timings: Timings, bucket: Bucket, one: Measurement) -> Staleness:
    """The grade of one candidate's measurement; the reference's has no source that could change."""
    try:
        standing = _standing(machine, bucket)
    except (KeyError, ValueError) as error:
        return Staleness("ignored", f"this version has no such bucket: {error}")
    hashes = {(c.name, tuple(sorted(c.params)), c.direction, c.saves_states): digest for c, digest in standing.hashes.items()}
    source = one.source if one.candidate == REFERENCE else hashes.get(one.identity)
    return grade(bucket, one, timings.environment(one), current_environment(machine.kind), source)


def renewals(states: Mapping[Bucket, Staleness]) -> list[Renewal]:
    """What is not fresh, the rows of one key together."""
    found = []
    for kind in ("stale", "ignored"):
        for options in dict.fromkeys(state.options for state in states.values()):
            worn = ((bucket, state) for bucket, state in states.items() if (state.kind, state.options) == (kind, options))
            for first, rows in by_key(worn):
                lengths = [bucket.seq_len for bucket, _ in rows]
                command = tune_command(first, lengths, options) if rows[0][1].command else ""  # a bucket that no call has cannot be measured again
                found.append(Renewal(rows[0][1].kind, len(rows), f"{first.op} {key_text(first)}", rows[0][1].reason, command))
    return found


def tune_command(bucket: Bucket, seq_lens: Sequence[int], options: str = "") -> str:
    """The command that measures buckets of one key, with the options that their rows were tuned with; what `tune` has no word for is left out."""
    when = dict(full_when(bucket.when, defaults_of(bucket.op)))
    streams, group = when.get("streams"), when.get("group")
    heads = f"{streams // group}/{streams}" if isinstance(streams, int) and isinstance(group, int) and group > 1 else str(streams)
    words = ["titans-backends tune --op", bucket.op, "--seq-lens", ",".join(map(str, seq_lens)), "--heads", heads]
    words += ["--head-dim", dims_text(when.get("head_dim")), "--dtype", str(when.get("dtype")), "--regime", str(when.get("regime"))]
    words += ["--launch", str(when["launch"])] if when.get("launch", "eager") != "eager" else []
    return " ".join([*words, *([options] if options else [])])


@functools.lru_cache(maxsize=512)
def _standing(machine: Machine, bucket: Bucket) -> Standing:
    if bucket.op not in CONTRACTS:
        raise ValueError(f"the op {bucket.op} is unknown")
    signature = signature_of_bucket(bucket, machine.kind)
    return Standing.of(bucket, signature, offers(signature, machine), ())
