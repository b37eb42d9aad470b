"""Compiles what is going to be measured beforehand, side by side in processes that see no GPU, by the hook `compile_ahead` of op modules.

Nothing is decided here: a candidate that could not be compiled, in time or at all, is compiled again and judged where it is measured.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import selectors
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import cast

from titans_backends import registry
from titans_backends.backend import Candidate
from titans_backends.buckets import Bucket
from titans_backends.machine import Machine
from titans_backends.offers import Offer
from titans_backends.tuning import wire
from titans_backends.tuning.child import START_TIMEOUT_S, Child, ChildDied
from titans_backends.tuning.events import CompiledAhead

__all__ = ["Job", "Limits", "Target", "compile_ahead", "hooked", "jobs", "processes"]

_WORKER = "titans_backends.tuning.ahead_worker"
_ENVIRONMENT: Mapping[str, str] = MappingProxyType({"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
_MOST_PROCESSES = 14


@dataclass(frozen=True, slots=True)
class Job:
    """One candidate in the buckets that differ in nothing but length and launch, where most of what it compiles is the same."""

    candidate: Candidate
    buckets: tuple[Bucket, ...]


@dataclass(frozen=True, slots=True)
class Target:
    """What is compiled for; `heads` as the tuner's request has them, for each bucket."""

    machine: Machine
    device: str
    heads: Callable[[Bucket], int | None] = lambda bucket: None


@dataclass(frozen=True, slots=True)
class Limits:
    """How long the whole may take, and one candidate in one bucket, in seconds."""

    whole_s: float
    each_s: float


def processes() -> int:
    """How many run side by side: all cores but one, 14 at most; 0 on a single core, where nothing would be gained."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores - 1, _MOST_PROCESSES)


def hooked(offers: Iterable[Offer], candidates: Iterable[Candidate]) -> list[Candidate]:
    """Those of the candidates, forward and backward, whose module has the hook."""
    able = {
        candidate
        for offer in offers
        if offer.module is not None and registry.compiling_ahead(offer.module) is not None
        for candidate in (*offer.forward, *offer.backward)
    }
    return [candidate for candidate in candidates if candidate in able]


def jobs(wanted: Iterable[tuple[Bucket, Sequence[Candidate]]]) -> list[Job]:
    """The jobs, those of one op and key far apart: its candidates share kernels, which two processes would otherwise compile at the same time."""
    groups: dict[object, dict[Candidate, list[Bucket]]] = {}
    for bucket, candidates in wanted:
        key = (bucket.op, tuple(entry for entry in bucket.when if entry[0] != "launch"))
        for candidate in candidates:
            groups.setdefault(key, {}).setdefault(candidate, []).append(bucket)
    rows = [[Job(candidate, tuple(buckets)) for candidate, buckets in group.items()] for group in groups.values()]
    return [job for rank in itertools.zip_longest(*rows) for job in rank if job is not None]


def compile_ahead(todo: Sequence[Job], target: Target, limits: Limits, most: int) -> CompiledAhead:
    """Does the jobs in up to `most` processes, which are all gone when it returns or raises."""
    pool = _Pool(deque(todo), target, limits, min(most, len(todo)))
    with contextlib.closing(pool):
        return pool.run()


@dataclass(slots=True, eq=False)
class _Worker:
    """A process, the job that it is at (None: it is starting), and when it must be done with that."""

    child: Child
    until: float
    job: Job | None = None


@dataclass(slots=True)
class _Pool:
    """The processes and the jobs that are left."""

    todo: deque[Job]
    target: Target
    limits: Limits
    size: int
    compiled: int = 0
    failed: int = 0
    reason: str = ""
    workers: list[_Worker] = field(default_factory=list)
    selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)

    def run(self) -> CompiledAhead:
        """Hands out the jobs until there are none, or until the limit."""
        begun = time.monotonic()
        end = begun + self.limits.whole_s
        for _ in range(self.size):
            self._start()
        while self.workers and (now := time.monotonic()) < end:
            for worker in self._answering(min(end, *(worker.until for worker in self.workers)) - now):
                try:
                    self._hear(worker)
                except ChildDied as error:
                    self._lose(worker, str(error))
            for worker in [worker for worker in self.workers if worker.until <= time.monotonic()]:
                self._lose(worker, "no answer in time: it was killed")
        unfinished = [*(worker.job for worker in self.workers if worker.job is not None), *self.todo]
        for job in unfinished:
            self._fail(len(job.buckets), f"not done within {self.limits.whole_s:.0f} s")
        return CompiledAhead(self.compiled, self.size, time.monotonic() - begun, self.failed, self.reason)

    def close(self) -> None:
        """Kills every process."""
        while self.workers:
            self.workers.pop().child.kill()
        self.selector.close()

    def _start(self) -> None:
        worker = _Worker(Child(_WORKER, (), _ENVIRONMENT), time.monotonic() + START_TIMEOUT_S)
        self.workers.append(worker)
        self.selector.register(worker.child, selectors.EVENT_READ, worker)

    def _answering(self, wait_s: float) -> Iterator[_Worker]:
        for key, _ in self.selector.select(max(0.0, wait_s)):
            yield cast(_Worker, key.data)

    def _hear(self, worker: _Worker) -> None:
        """Takes an answer, and gives the next job."""
        answer = worker.child.take()
        if answer is None:
            return
        if worker.job is not None:
            failed = cast(int, answer["failed"])
            self.compiled += len(worker.job.buckets) - failed
            self._fail(failed, str(answer["reason"]))
            worker.job = None
        if not self.todo:
            self._dismiss(worker)
            return
        worker.job = self.todo.popleft()
        worker.until = time.monotonic() + self.limits.each_s * len(worker.job.buckets)
        worker.child.send(
            {
                "candidate": wire.candidate_to(worker.job.candidate),
                "buckets": [wire.bucket_to(bucket) for bucket in worker.job.buckets],
                "machine": wire.machine_to(self.target.machine),
                "device": self.target.device,
                "heads": [self.target.heads(bucket) for bucket in worker.job.buckets],
            }
        )

    def _lose(self, worker: _Worker, reason: str) -> None:
        """A process that died or hung has failed its job; another goes on with the rest, unless it never came to one."""
        self._dismiss(worker)
        if worker.job is None:
            self.reason = self.reason or f"a process did not start: {reason}"
            if not self.workers:
                self._abandon()
            return
        self._fail(len(worker.job.buckets), f"{worker.job.candidate.label}: {reason}")
        if self.todo:
            self._start()

    def _abandon(self) -> None:
        while self.todo:
            self._fail(len(self.todo.popleft().buckets), self.reason)

    def _dismiss(self, worker: _Worker) -> None:
        self.workers.remove(worker)
        self.selector.unregister(worker.child)
        worker.child.kill()

    def _fail(self, count: int, reason: str) -> None:
        self.failed += count
        if count:
            self.reason = self.reason or reason
