"""What the page shows of everything and of each machine, as plain values that a template can write down: sentences, cells, drawn charts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from titans_backends.cache.schema import Environment
from titans_backends.reporting import numbers, overviews
from titans_backends.reporting.facts import Ceilings, Facts, FileFacts, MachineFacts
from titans_backends.reporting.op_view import Bar, OpView, bars, drawn, op_view
from titans_backends.reporting.palette import key_of
from titans_backends.reporting.race_view import RaceView, race_view
from titans_backends.reporting.rows import Row, rows_of
from titans_backends.reporting.summary import Failure, Renewal, Summary, by_op, failures, noisy, refusals, renewals, summarize

__all__ = ["MachineView", "PageView", "page_view", "sentences"]

_VERSIONS = ("titans_backends", "torch", "triton", "cupy", "numba", "numba_cuda", "cuda", "driver", "python", "date")


@dataclass(frozen=True, slots=True)
class MachineView:
    """One machine. `here`: it is this one."""

    name: str
    here: bool
    anchor: str
    about: str
    headline: tuple[str, ...]
    bars: tuple[Bar, ...]
    ops: tuple[OpView, ...]
    gains: str
    shares: str
    graphs: bool
    ceilings: str
    renewals: tuple[Renewal, ...]
    noisy: tuple[Renewal, ...]
    unchecked: tuple[Failure, ...]
    failures: tuple[Failure, ...]
    refusals: tuple[tuple[str, str, str, int], ...]
    unknown_defaults: tuple[tuple[str, int], ...]
    environments: tuple[tuple[str, ...], ...]
    files: tuple[FileFacts, ...]


@dataclass(frozen=True, slots=True)
class PageView:
    """The whole page. `backends`: name, role and the marker's sign of everything that is drawn of the machines."""

    made: str
    version: str
    machines: tuple[MachineView, ...]
    problems: tuple[FileFacts, ...]
    backends: tuple[tuple[str, str, str], ...]
    races: tuple[RaceView, ...] = ()


def page_view(facts: Facts) -> PageView:
    """The page of these facts."""
    rows = {index: rows_of(machine) for index, machine in enumerate(facts.machines)}
    machines = tuple(_machine(machine, f"m{index}", rows[index]) for index, machine in enumerate(facts.machines))
    seen = dict.fromkeys(one.backends[0] for found in rows.values() for row in found for one in row.best)
    races = tuple(view for one in facts.races if (view := race_view(one.race, one.path)) is not None)
    return PageView(facts.made, facts.version, machines, facts.problems, key_of(seen), races)


def sentences(found: Summary, decided: bool) -> list[str]:
    """Who wins and how much, in words; `decided`: by a table."""
    most = [f"{who} in {count}" for who, count in found.wins.items()]
    listed = most[0] if len(most) == 1 else f"{', '.join(most[:-1])} and {most[-1]}" if most else "nothing"
    verb = "The tuned choice is" if decided else "No table is kept for it; the fastest that was timed is"
    told = [f"{numbers.amount(found.rows, 'bucket')} measured. {verb} {listed}."]
    if found.ignored:
        told.append(
            f"Of these rows {found.ignored} no longer decide a call: the source of their candidates has changed or is gone. See “Rows to renew”."
        )
    if found.stale:
        told.append(f"Of these rows {found.stale} were measured with other versions, and are still used. See “Rows to renew”.")
    gained = []
    if found.over_default is not None:
        gained.append(f"{numbers.factor(found.over_default)} as fast as the untuned default, which it keeps in {found.kept} of {found.compared}")
    if found.over_rival is not None:
        gained.append(f"{numbers.factor(found.over_rival)} as fast as the next backend{_where_known(found.rivals, found.rows)}")
    if found.over_eager is not None:
        gained.append(f"{numbers.factor(found.over_eager)} as fast as plain torch (eager){_where_known(found.eagers, found.rows)}")
    if gained:
        told.append(f"{'It' if decided else 'That'} is {'; '.join(gained)}. These are geometric means.")
    if found.behind and found.most_behind is not None:
        many, worst = numbers.amount(found.behind, "bucket"), numbers.factor(found.most_behind)
        told.append(f"In {many} a candidate’s median is lower by over 5 % (at most {worst}), within the noise of the race.")
    top = found.most_over_default
    if top is not None and not top.kept_default and top.over_default is not None:
        place = top.place
        told.append(f"Tuning bought most in {place.op} ({place.setting}, {place.size}, {place.seq_len} tokens): {numbers.factor(top.over_default)}.")
    return told


def _where_known(known: int, rows: int) -> str:
    """Over which buckets a mean is, unless over all: a table alone names one other candidate, and mostly where it came close."""
    return "" if known == rows else f" in the {known} where that time is known"


def _machine(machine: MachineFacts, anchor: str, rows: Sequence[Row]) -> MachineView:
    found = summarize(rows)
    replaced = any(row.over_default and not row.kept_default for row in rows)
    shared, graphs = any(row.share for row in rows), any(row.place.launch == "graph" for row in rows)
    device = machine.device
    about = [device.kind, f"compute capability {device.sm / 10:.1f}" if device.sm else "", f"{device.sms} multiprocessors" if device.sms else ""]
    about += [numbers.amount(device.threads, "thread") if device.threads else "", device.isa or "", "this machine" if machine.here else ""]
    headline = sentences(found, any(row.decided for row in rows)) if rows else ["No rows."]
    if machine.repeated:
        headline.append(f"{numbers.amount(machine.repeated, 'row')} for traced graphs repeat the choice beside them and are not counted.")
    return MachineView(
        name=device.name,
        here=machine.here,
        anchor=anchor,
        about=" · ".join(word for word in about if word),
        headline=tuple(headline),
        bars=bars(found.wins),
        ops=tuple(op_view(op, of, f"{anchor}-{op}") for op, of in by_op(rows).items()),
        gains=drawn(overviews.gains(rows), f"{anchor}g") if replaced else "",
        shares=drawn(overviews.shares(rows), f"{anchor}s") if shared else "",
        graphs=graphs,
        ceilings=_ceilings(machine.ceilings),
        renewals=tuple(renewals(rows)),
        noisy=tuple(noisy(rows)),
        unchecked=_unchecked(rows),
        failures=tuple(failures(rows)),
        refusals=_refusals(rows),
        unknown_defaults=_unknown_defaults(rows),
        environments=_environments(machine.environments),
        files=machine.files,
    )


def _ceilings(found: Ceilings | None) -> str:
    if found is None:
        return ""
    names = {"bf16": "products in 16 bits", "tf32": "in TF32", "fp32": "in float32"}
    told = [f"copying {numbers.rate(found.copy, 'B')}"] if found.copy else []
    told += [f"{words} {numbers.rate(found.rates[kind], 'FLOP')}" for kind, words in names.items() if kind in found.rates]
    return f"{', '.join(told)}. {found.origin}"


def _unchecked(rows: Sequence[Row]) -> tuple[Failure, ...]:
    counts: dict[str, int] = {}
    for row in rows:
        if row.state.kind == "unchecked" and row.state.reason:
            counts[row.state.reason] = counts.get(row.state.reason, 0) + 1
    return tuple(Failure("", "", "", reason, count) for reason, count in counts.items())


def _refusals(rows: Sequence[Row]) -> tuple[tuple[str, str, str, int], ...]:
    """Backend, reason, ops, buckets: one line for a reason that a backend gives for several ops."""
    found: dict[tuple[str, str], list[Failure]] = {}
    for one in refusals(rows):
        found.setdefault((one.who, one.reason), []).append(one)
    return tuple(
        (who, reason, ", ".join(dict.fromkeys(one.op for one in of)), sum(one.buckets for one in of)) for (who, reason), of in sorted(found.items())
    )


def _unknown_defaults(rows: Sequence[Row]) -> tuple[tuple[str, int], ...]:
    counts: dict[str, int] = {}
    for row in rows:
        if row.default is None and row.default_reason:
            counts[row.default_reason] = counts.get(row.default_reason, 0) + 1
    return tuple(counts.items())


def _environments(found: Sequence[Environment]) -> tuple[tuple[str, ...], ...]:
    """A header of the versions that any of them has, then a line for each."""
    used = [name for name in _VERSIONS if any(getattr(one, name) for one in found)]
    return (tuple(used), *(tuple(getattr(one, name) or "–" for name in used) for one in found)) if found else ()
