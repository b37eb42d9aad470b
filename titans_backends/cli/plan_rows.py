"""What `tune --dry-run` shows: every bucket of the grid with the candidates that would race in it. Asks the backends, runs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from titans_backends.backend import Candidate
from titans_backends.buckets import Bucket
from titans_backends.cli.keys import by_key, key_json, key_title
from titans_backends.cli.show import Column, Group, Json, heading, table
from titans_backends.machine import Machine
from titans_backends.offers import Offer, offers, pairs, unpaired
from titans_backends.tuning.midpoints import midpoints
from titans_backends.tuning.problem import signature_of_bucket
from titans_backends.tuning.request import TuneRequest

__all__ = ["plan_json", "show_plan"]


@dataclass(frozen=True, slots=True)
class _Planned:
    """One bucket with what the backends say to it; `choices` are the pairs that may win."""

    bucket: Bucket
    offers: tuple[Offer, ...]
    choices: int
    problem: str = ""

    @property
    def candidates(self) -> list[str]:
        """Every label of a candidate that would race, the directions told apart in training."""
        forward = [c.label for o in self.offers for c in o.forward if c not in self.unpaired]
        return forward + [f"{c.label} (backward)" for o in self.offers for c in o.backward if c not in self.unpaired]

    @property
    def refusals(self) -> list[tuple[str, str]]:
        """Backend and reason; of a backend that accepts too, where one of its candidates is in no pair."""
        refused = [(o.backend.name, str(o.verdict)) for o in self.offers if not o.verdict]
        return refused + [(c.backend, f"{c.label} ({c.direction}): {reason}") for c, reason in self.unpaired.items()]

    @property
    def unpaired(self) -> dict[Candidate, str]:
        """Candidates that no pair has, with the reason."""
        return dict(unpaired(self.offers))

    def count(self, given: Offer) -> int:
        """How many candidates of a backend would race."""
        return sum(c not in self.unpaired for c in (*given.forward, *given.backward))


def _planned(request: TuneRequest, machine: Machine, racing: Sequence[str]) -> list[_Planned]:
    found = []
    for bucket in request.buckets:
        try:
            signature = signature_of_bucket(bucket, request.device, request.heads_of(bucket))
        except ValueError as error:
            found.append(_Planned(bucket, (), 0, str(error)))
            continue
        given = offers(signature, machine, racing)
        found.append(_Planned(bucket, tuple(given), len(pairs(given, signature))))
    return found


def plan_json(request: TuneRequest, machine: Machine, racing: Sequence[str]) -> list[Json]:
    """One object per bucket. `midpoint`: the length between it and the next longer one, which is measured too where the two choose differently."""
    possible = midpoints(request.buckets) if request.midpoints and not request.doubtful else ()
    above = {bucket._replace(seq_len=shorter): bucket.seq_len for bucket, (shorter, _) in possible}
    return [
        {
            **key_json(row.bucket),
            "candidates": list(row.candidates),
            "choices": row.choices,
            "refusals": [{"backend": name, "reason": reason} for name, reason in row.refusals],
            "problem": row.problem,
            "midpoint": above.get(row.bucket),
        }
        for row in _planned(request, machine, racing)
    ]


def show_plan(to: Console, request: TuneRequest, machine: Machine, racing: Sequence[str]) -> None:
    """The grid as a table, then every refusal once."""
    rows = _planned(request, machine, racing)
    columns = (Column("seq_len", "right"), Column("candidates", "right"), Column("choices", "right"), Column("from", flexible=True))
    groups = [Group(key_title(first), [_cells(row) for _, row in found]) for first, found in by_key((row.bucket, row) for row in rows)]
    table(to, columns, groups)
    refusals = dict.fromkeys((name, row.bucket.op, reason) for row in rows for name, reason in row.refusals)
    if refusals:
        heading(to, "refused")
        table(to, (Column("backend"), Column("op"), Column("reason", flexible=True)), [Group("", list(refusals))])


def _cells(row: _Planned) -> list[str | Text]:
    counts = [f"{o.backend.name} {row.count(o)}" for o in row.offers if o.verdict]
    said: str | Text = ", ".join(counts) if counts else Text(row.problem or "no backend accepts it", "red")
    return [str(row.bucket.seq_len), str(len(row.candidates)), str(row.choices), said]
