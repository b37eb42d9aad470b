"""The answer to "which kernel, and why": a choice, every refusal, every table asked, every timing known, as text or as data.

Nothing is run and nothing is decided here: it prints what `dispatch` decided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from titans_backends.backend import Candidate
from titans_backends.buckets import bucket_of, defaults_of
from titans_backends.cache import file
from titans_backends.cache.paths import timings_path
from titans_backends.cache.schema import Bucket, device_of, full_when
from titans_backends.cache.timings import Measurement
from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.contract import Call, Work
from titans_backends.contracts.validate import check_indices, validate
from titans_backends.contracts.work import work_of
from titans_backends.dispatch import Choice, Consulted, Forced, choose
from titans_backends.errors import BackendRefusedError
from titans_backends.machine import Machine, detect
from titans_backends.offers import Offer, offers, pairs
from titans_backends.plans import Planner
from titans_backends.request import Request
from titans_backends.signature import Signature
from titans_backends.tables import Source, sources

__all__ = ["Explanation", "explain", "explain_signature"]

Json = str | int | float | bool | None | list["Json"] | dict[str, "Json"]


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a call would run and why. `refusal` is set, and `choice` None, where nothing would run."""

    signature: Signature
    machine: Machine
    bucket: Bucket
    offers: tuple[Offer, ...]
    choice: Choice | None
    refusal: str
    consulted: tuple[Consulted, ...]
    timings: tuple[tuple[Source, tuple[Measurement, ...]], ...]
    work: Work

    @property
    def kernel(self) -> str:
        """The label of what would run; empty where nothing would."""
        return "" if self.choice is None else self.choice.pair.label

    @property
    def stale(self) -> str:
        """Why the row that decided is stale, with the command that renews it; empty where it is not."""
        answered = None if self.choice is None else self.choice.answered
        return str(answered.staleness) if answered and answered.staleness and answered.staleness.kind != "fresh" else ""

    def as_dict(self) -> dict[str, Json]:
        """The same as plain data: strings, numbers, lists and dictionaries."""
        choice = self.choice
        return {
            "op": self.signature.op,
            "device": self.signature.device,
            "machine": self.machine.name,
            "kernel": self.kernel,
            "origin": "refused" if choice is None else choice.origin,
            "reason": self.refusal if choice is None else choice.reason,
            "stale": self.stale,
            "key": {
                name: list(value) if isinstance(value, tuple) else value for name, value in full_when(self.bucket.when, defaults_of(self.bucket.op))
            },
            "seq_len": self.bucket.seq_len,
            "work": {"flop": self.work.flop, "bytes": self.work.bytes},
            "backends": [_offer_row(entry, self.signature) for entry in self.offers],
            "tables": [_table_row(entry) for entry in self.consulted],
            "timings": [_timing_row(source, m) for source, measurements in self.timings for m in measurements],
        }

    def __str__(self) -> str:
        data = self.as_dict()
        lines = [
            f"{self.signature.op} on {self.machine.name} ({self.signature.device})",
            f"  runs     {self.kernel or 'nothing'}",
            f"  because  {data['reason']}",
        ]
        if self.stale:
            lines.append(f"  stale    {self.stale}")
        written = ", ".join(f"{name}={value}" for name, value in self.bucket.when)
        lines += [f"  key      seq_len={self.bucket.seq_len}, {written}", f"  work     {self.work.flop:.3g} FLOP, {self.work.bytes:.3g} bytes"]
        lines.append("  backends")
        lines += [f"    {entry.backend.name:<11} {_offer_line(entry, self.signature)}" for entry in self.offers]
        lines.append("  tables asked" if self.consulted else "  tables asked: none (a forced or batch-invariant choice may need none)")
        for asked in self.consulted:
            lines.append(f"    {asked.source.described}: {asked.answer}")
            if asked.miss is not None:
                for near in asked.miss.closest:
                    told = ", ".join(f"{d.field} {d.tuned!r} there, {d.asked!r} here" for d in near.differences) or "the same key"
                    lines.append(f"      closest: lengths {', '.join(map(str, near.seq_lens))}; {told}")
        for source, measurements in self.timings:
            lines.append(f"  timings in {timings_path(source.path)}")
            lines += [f"    {_timing_line(m)}" for m in measurements]
        return "\n".join(lines)


def _offer_line(entry: Offer, signature: Signature) -> str:
    if not entry.verdict:
        return f"refuses: {entry.verdict}"
    told = [_listed("forward" if signature.regime == "training" else "candidate", entry.forward)]
    if signature.regime == "training":
        told.append(_listed("backward", entry.backward))
    lacking = "" if pairs([entry], signature, mixed=False) else " (no forward and backward of its own that fit together)"
    return f"accepts{lacking}: {'. '.join(told)}"


def _listed(what: str, found: Sequence[Candidate]) -> str:
    names = [c.label + (" saving states" if c.saves_states else "") for c in found]
    return f"{len(names)} {what}{'s' * (what == 'candidate' and len(names) != 1)}: {'; '.join(names)}" if names else f"no {what}"


def _offer_row(entry: Offer, signature: Signature) -> dict[str, Json]:
    return {
        "backend": entry.backend.name,
        "accepted": entry.verdict.accepted,
        "reasons": list(entry.verdict.reasons),
        "forward": [c.label for c in entry.forward],
        "backward": [c.label for c in entry.backward],
    }


def _table_row(asked: Consulted) -> dict[str, Json]:
    closest: list[Json] = []
    if asked.miss is not None:
        for near in asked.miss.closest:
            closest.append(
                {
                    "seq_lens": list(near.seq_lens),
                    "differences": [{"field": d.field, "here": _plain(d.asked), "there": _plain(d.tuned)} for d in near.differences],
                }
            )
    return {"source": asked.source.kind, "path": str(asked.source.path), "answer": asked.answer, "closest": closest}


def _plain(value: object) -> Json:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)


def _timing_row(source: Source, m: Measurement) -> dict[str, Json]:
    return {
        "path": str(timings_path(source.path)),
        "candidate": m.candidate,
        "params": {**dict(m.params)},
        "direction": m.direction,
        "saves_states": m.saves_states,
        "status": m.status,
        "reason": m.reason,
        "us": m.us,
        "spread": m.spread,
        "peak_mib": m.peak_mib,
        "compile_s": m.compile_s,
    }


def _timing_line(m: Measurement) -> str:
    label = " ".join([m.candidate, *(f"{name}={value}" for name, value in m.params), *(["saves states"] if m.saves_states else [])])
    told = f"{m.us:.4g} us ± {100 * (m.spread or 0):.1f} %" if m.us is not None and m.status == "ok" else f"{m.status}: {m.reason}"
    return f"{m.direction:<8} {label}: {told}"


def _timings(machine: Machine, bucket: Bucket) -> tuple[tuple[Source, tuple[Measurement, ...]], ...]:
    found = []
    for source in sources(machine):
        table = file.read_timings(timings_path(source.path), defaults_of, None if source.kind == "borrowed" else device_of(machine)).table
        if table is not None and bucket in table.rows:
            found.append((source, table.rows[bucket]))
    return tuple(found)


def explain_signature(signature: Signature, machine: Machine, forced: Forced | None, work: Work) -> Explanation:
    """The explanation of a signature, however it came about."""
    bucket = bucket_of(signature)
    everyone: Sequence[Offer] = offers(signature, machine)
    choice, refusal = None, ""
    try:
        choice = choose(signature, machine, forced)
    except BackendRefusedError as error:
        refusal = str(error)
    consulted = () if choice is None else choice.consulted
    return Explanation(signature, machine, bucket, tuple(everyone), choice, refusal, consulted, _timings(machine, bucket), work)


def explain(planner: Planner, call: Call, asked: Request) -> Explanation:
    """The explanation of a call."""
    contract = CONTRACTS[planner.contract.name]
    dims = validate(contract, call)
    if all(t.device.type == "cpu" for n, t in contract.tensors(call).items() if contract.argument_by_name[n].role == "index"):
        check_indices(contract, call)
    signature = planner.signature(call, dims, asked)
    return explain_signature(signature, detect(signature.device), asked.forced, work_of(contract, call, dims))
