"""One job of many ranks chooses alike: rank 0 measures, the others receive its tables in place of their own.

`share` hands out rank 0's tables, `tune` has rank 0 measure first, `tune_call` is what a call inside `autotune()` does. Ranks on another device, with other
versions or switches are named before anything is measured, and afterwards every rank says what it would choose.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from titans_backends import switches, tables
from titans_backends.buckets import Bucket, bucket_of, defaults_of, field
from titans_backends.cache import file
from titans_backends.cache.paths import user_cache_path
from titans_backends.cache.schema import Table, device_of, merge
from titans_backends.cache.table_text import dump_table, parse_table
from titans_backends.contracts.contract import Call, Contract
from titans_backends.dispatch import consult, pair_source
from titans_backends.errors import RanksError
from titans_backends.machine import Machine, detect
from titans_backends.offers import offers, pairs
from titans_backends.plans import invalidate
from titans_backends.signature import Signature
from titans_backends.tables import Source
from titans_backends.tuning import run, wire
from titans_backends.tuning.events import BucketDone, Event, OnEvent, ignore
from titans_backends.tuning.meeting import Meeting, Patience, Ranks
from titans_backends.tuning.problem import signature_of_bucket

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]  # torch exports it by `import *`

__all__ = ["Ranks", "first_share", "group", "launched", "launched_device", "launched_rank", "share", "tune", "tune_call"]

_KEPT_APART = ("date", "driver", "python")
"""Of the versions: what changes no choice."""
_PREFIX = "titans_backends"
_known: dict[int, tuple[object, Ranks]] = {}
"""The ranks of each process group's store, by its identity; they count their steps."""


@dataclass(frozen=True, slots=True)
class _Facts:
    """What must be the same on every rank, and where this one runs."""

    host: str
    facts: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, machine: Machine) -> _Facts:
        """This process's."""
        environment = tables.current_environment(machine.kind)
        versions = [(f.name, str(getattr(environment, f.name) or "absent")) for f in fields(environment) if f.name not in _KEPT_APART]
        found, set_here = switches.current(), [("force", "FORCE"), ("disable", "DISABLE"), ("plugins", "PLUGINS")]
        asked = [(f"{switches.PREFIX}{name}", str(getattr(found, attribute) or "unset")) for attribute, name in set_here]
        return cls(f"{socket.gethostname()}, process {os.getpid()}", (("device", f"{machine.name} ({machine.slug})"), *versions, *asked))

    def text(self) -> str:
        """For the store."""
        return json.dumps([self.host, self.facts])

    @classmethod
    def parse(cls, text: str) -> _Facts:
        """Of `text`."""
        host, facts = json.loads(text)
        return cls(host, tuple((name, value) for name, value in facts))


def group() -> Ranks | None:
    """The ranks of the initialised default process group; None where there is none, or one rank alone."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() < 2:
        return None
    store = distributed.distributed_c10d._get_default_store()
    if id(store) not in _known:
        _known.clear()
        _known[id(store)] = store, _ranks(store, distributed.get_rank(), distributed.get_world_size())
    return _known[id(store)][1]


def _ranks(store: Store, rank: int, size: int) -> Ranks:
    return Ranks(torch.distributed.PrefixStore(_PREFIX, store), rank, size)  # type: ignore[attr-defined]  # as above


def launched_rank() -> int | None:
    """This process's rank among several that torchrun has started, by the environment; None where it is alone."""
    size, rank = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK", "")
    return int(rank) if size.isdecimal() and int(size) > 1 and rank.isdecimal() else None


def launched_device() -> str | None:
    """The GPU that torchrun's LOCAL_RANK means; None where it started nothing, or there is no such GPU."""
    local = os.environ.get("LOCAL_RANK", "")
    there = launched_rank() is not None and local.isdecimal() and torch.cuda.is_available() and int(local) < torch.cuda.device_count()
    return f"cuda:{local}" if there else None


@contextlib.contextmanager
def launched(patience: Patience | None = None) -> Iterator[Ranks | None]:
    """The ranks that torchrun has started this process as one of, by its environment; None where there is one process alone."""
    if launched_rank() is None:
        yield None
        return
    waited = timedelta(seconds=(patience or Patience()).join_s)
    try:
        store, rank, size = next(torch.distributed.rendezvous("env://", timeout=waited))  # type: ignore[attr-defined]  # torch exports it by `import *`
    except (RuntimeError, ValueError, OSError) as error:
        said = str(error).strip().splitlines()[0]
        raise RanksError(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} (from the environment) does not reach the ranks' store: {said}. Start it by torchrun, "
            "or unset RANK and WORLD_SIZE"
        ) from error
    yield _ranks(store, rank, size)


def share(device: str = "cpu", *, ranks: Ranks | None = None, patience: Patience | None = None) -> None:
    """Every rank of the job chooses from rank 0's tables from here on, until `titans_backends.reset()`. To be called by every rank.

    RanksError names the rank that differs, fails, dies or does not come. Without `ranks` it is the default process group's; alone it does nothing.
    """
    ranks = ranks or group()
    if ranks is None:
        return
    machine = detect(device)
    with Meeting(ranks, ranks.step("share"), patience or Patience()) as meeting:
        _agree(meeting, machine)
        _hand_out(meeting, machine)


def tune(
    request: run.TuneRequest, on_event: OnEvent = ignore, *, ranks: Ranks | None = None, patience: Patience | None = None, keep: bool = False
) -> run.TuneReport | None:
    """Rank 0 tunes, and every rank receives its tables; the report is rank 0's, None on the others. To be called by every rank, for the same buckets.

    `keep`: the other ranks write the rows to their files too, as a command does that ends here. RanksError names the rank that differs, fails, dies or
    does not come; alone it is `run.tune`.
    """
    ranks = ranks or group()
    if ranks is None:
        return run.tune(request, on_event)
    measured: list[Event] = []

    def heard(event: Event) -> None:
        if isinstance(event, BucketDone) and event.bucket in request.buckets:
            measured.append(event)
        meeting.check()
        on_event(event)

    meeting = Meeting(ranks, ranks.step("tune"), patience or Patience())
    try:
        return _tuned(meeting, request, heard, keep)
    except RanksError as error:
        if not measured:
            raise
        told = f"{error}. What rank 0 measured until then ({len(measured)} of {len(request.buckets)}) is kept in its file; the same command goes on with it"
        raise RanksError(told) from error


def _tuned(meeting: Meeting, request: run.TuneRequest, heard: OnEvent, keep: bool) -> run.TuneReport | None:
    """The step itself; rank 0 hears of what it measures."""
    machine, report = detect(request.device), None
    with meeting:
        _agree(meeting, machine, request.buckets)
        if meeting.ranks.rank == 0:
            report = run.tune(request, heard)
            table = _read(report.path, machine)
            meeting.tell("rows", "" if table is None else dump_table(table, defaults_of))
        else:
            text = meeting.heard("rows", "the end of its tune")
            table = parse_table(text, "rank 0's rows", defaults_of, device_of(machine)) if text else None
            if keep and table is not None:
                _keep(request.output or user_cache_path(machine.slug), table)
        _expect_alike(meeting, machine, request, table)
        _hand_out(meeting, machine)
    return report


def tune_call(ranks: Ranks, call: Call, made: Contract, signature: Signature, budget_s: float) -> None:
    """`run.tune_call` of many ranks: rank 0 measures, the others wait for what it says, whenever they come.

    RanksError where rank 0 never meets this problem, and on rank 0 where one that has come dies before it is told.
    """
    bucket, machine = bucket_of(signature), detect(signature.device)
    key = hashlib.sha256(json.dumps(wire.bucket_to(bucket)).encode()).hexdigest()[:16]
    patience = Patience(join_s=max(Patience().join_s, 3 * budget_s))
    with Meeting(ranks, ranks.step(f"call/{key}"), patience, together=False) as meeting:
        if ranks.rank == 0:
            run.tune_call(made, call, signature, budget_s, lambda event: meeting.check())
        try:
            _hand_out(meeting, machine, f"{bucket.op} at seq_len {bucket.seq_len}, streams {field(bucket, 'streams')}")
        except RanksError as error:
            if meeting.failure:  # somebody died or failed; what follows is for a rank 0 that does not come
                raise
            advice = "Ranks that meet different problems tune before the job: titans_backends.record, then titans-backends tune --from"
            raise RanksError(f"{error}. {advice}") from error


def first_share(device: str) -> bool:
    """`share` in a process group whose ranks have not shared for this device yet; whether there was anything to do."""
    ranks, slug = group(), detect(device).slug
    if ranks is None or f"shared {slug}" in ranks.steps:
        return False
    share(device, ranks=ranks)
    ranks.step(f"shared {slug}")
    return True


def _agree(meeting: Meeting, machine: Machine, buckets: Sequence[Bucket] = ()) -> None:
    """The roll call: everybody is here, on the same device, with the same versions, switches and buckets."""
    asked = hashlib.sha256(json.dumps([wire.bucket_to(bucket) for bucket in buckets]).encode()).hexdigest()[:8]
    mine = _Facts.of(machine)
    mine = replace(mine, facts=(*mine.facts, ("problems to tune", f"{len(buckets)} ({asked})")))
    everyone = [_Facts.parse(text) for text in meeting.gather("facts", mine.text(), f"the start of {meeting.name.partition('/')[0]}")]
    first, told = dict(everyone[0].facts), []
    for rank, one in enumerate(everyone):
        differing = [f"{name} {value}, rank 0 has {first.get(name, 'none')}" for name, value in one.facts if first.get(name) != value]
        if differing:
            told.append(f"rank {rank} ({one.host}) differs: {'; '.join(differing)}")
    if told:
        raise RanksError(f"the ranks cannot choose alike: {'. '.join(told)}")


def _hand_out(meeting: Meeting, machine: Machine, what: str = "hand out its tables") -> None:
    """Rank 0's own tables in place of everybody's own."""
    if meeting.ranks.rank == 0:
        told = [(source.path, source.kind, dump_table(source.table, defaults_of)) for source in tables.own(machine) if source.table is not None]
        text = json.dumps([(str(path), kind, rows) for path, kind, rows in told])
        meeting.tell("tables", text)
    else:
        text = meeting.heard("tables", what)
    given = cast("list[tuple[str, str, str]]", json.loads(text))
    tables.receive(
        machine,
        [Source("received", Path(path), parse_table(rows, f"rank 0's {kind} table", defaults_of, device_of(machine))) for path, kind, rows in given],
    )
    invalidate()


def _read(path: Path, machine: Machine) -> Table | None:
    return file.read(path, defaults_of, device_of(machine)).table


def _keep(path: Path, table: Table) -> None:
    """Merges rank 0's rows into this rank's file, unless it holds them already: ranks of one host share it."""
    if file.read(path, defaults_of, table.device).table != table:
        file.edit(path, lambda older: merge(older, table), device=table.device, defaults_of=defaults_of)


def _expect_alike(meeting: Meeting, machine: Machine, request: run.TuneRequest, table: Table | None) -> None:
    """What each rank would choose by these rows; RanksError names who would choose otherwise than rank 0, and for what."""
    mine = [_chosen(Source("received", Path("rows"), table), bucket, machine, request) for bucket in request.buckets] if table is not None else []
    everyone = [cast("list[str]", json.loads(text)) for text in meeting.gather("choices", json.dumps(mine), "compare their choices")]
    for rank, choices in enumerate(everyone):
        for bucket, here, there in zip(request.buckets, choices, everyone[0], strict=False):
            if here != there:
                raise RanksError(f"rank {rank} would choose otherwise at {bucket.op}, seq_len {bucket.seq_len}: {here}; rank 0: {there}")


def _chosen(source: Source, bucket: Bucket, machine: Machine, request: run.TuneRequest) -> str:
    signature = signature_of_bucket(bucket, request.device, request.heads_of(bucket))
    answer, pair = consult(source, bucket, pairs(offers(signature, machine), signature), machine.kind)
    return f"{pair.label}, source {pair_source(pair, bucket.op)}" if pair is not None else f"none: {answer.answer}"
