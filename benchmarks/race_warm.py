"""Compiles what a race will launch, side by side: ours through the tuner's own compiling ahead, the peers' in processes that each take a share.

Whatever is not done in time, or fails, is left to the race. FlashQLA calls nvcc ten to fifteen times for each combination of heads.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import chain, zip_longest
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from typing import cast

import torch
from against_fla import hurry, problem
from device_timing import arriving, leaves_of
from race_cells import Case, Group
from race_choices import module_of
from race_peers import Function, loaded, takes
from race_reach import Rows, members, racing
from torch import Tensor
from training_peers import compile_share
from training_steps import RULE, Problem, posed, step

from titans_backends import registry
from titans_backends.backend import Candidate, TrainableOpModule
from titans_backends.buckets import Bucket, bucket_of, defaults_of
from titans_backends.cache.problems import Count, dump_problems
from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.gated_delta_rule import GatedDeltaRule
from titans_backends.contracts.validate import validate
from titans_backends.dispatch import choose
from titans_backends.facts import signature_of
from titans_backends.machine import detect
from titans_backends.offers import offers, pairs
from titans_backends.recording import problem_of
from titans_backends.signature import Signature
from titans_backends.tuning.ahead import Limits, Target, compile_ahead, hooked, jobs, processes

__all__ = ["shapes", "warmed"]

_SHARES = {"flash_qla": 4, "fla": 3, "fla_ungated": 2}


@dataclass(frozen=True, slots=True)
class _Job:
    """A share of what a peer compiles for some calls of one combination of heads."""

    name: str
    cases: tuple[Case, ...]
    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.name} {self.cases[0].cell.G}/{self.cases[0].cell.H} D{self.cases[0].cell.D} {self.index + 1} of {self.count}"


def warmed(group: Group, cases: Sequence[Case], limit_s: float, rows: Rows | None) -> str:
    """Compiles for a group's cases, both sides at once; says what came of it."""
    cores = processes() or 1
    todo = _jobs(group, cases)
    theirs = max(1, cores * 3 // 4) if todo else 0
    with ThreadPoolExecutor(1) as pool:
        peers = pool.submit(_peers, todo, theirs, limit_s)
        ours = _ours(group, cases, limit_s, max(1, cores - theirs), rows) if group.whole else "ours: nothing"
        return f"{ours}; {peers.result()}"


def shapes(cases: Sequence[Case]) -> str:
    """The cases as `titans-backends tune --from` reads them, all to be captured in graphs."""
    told = {}
    for case in cases:
        problem_met = problem_of(replace(_signature(_sizes(case), case), device="cuda"))
        if problem_met is not None:
            told[problem_met] = Count(1, int(case.mode == "training"))
    return dump_problems(told, defaults_of)


def _ours(group: Group, cases: Sequence[Case], limit_s: float, most: int, rows: Rows | None) -> str:
    """What will race, as far as its backend compiles ahead."""
    machine = detect("cuda")
    wanted: list[tuple[Bucket, list[Candidate]]] = []
    heads: dict[Bucket, int] = {}
    for case in cases:
        signature = replace(_signature(_sizes(case), case), device=machine.kind)
        bucket, given = bucket_of(signature), offers(signature, machine)
        heads[bucket] = case.cell.H
        available = pairs(given, signature)
        named = [available[0], *(choose(replace(signature, launch=launch), machine).pair for launch in ("graph", "eager"))]  # type: ignore[arg-type]
        forward, backward = racing(given, available, group, {one for pair in named for one in members(pair)}, bucket, rows)
        wanted.append((bucket, hooked(given, [*forward, *backward])))
    done = compile_ahead(jobs(wanted), Target(machine, "cuda", heads.get), Limits(limit_s, 60.0), most)
    return f"ours: {done.candidates} compiled in {done.seconds:.0f} s, {done.failed} not{f' ({done.reason[:160]})' if done.failed else ''}"


def _sizes(case: Case) -> GatedDeltaRule:
    """The call without its numbers."""
    cell = case.cell

    def empty(heads: int, *last: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(cell.B, cell.T, heads, *last, dtype=dtype, device="meta")

    given = {name: empty(heads, cell.D) for name, heads in (("q", cell.G), ("k", cell.G), ("v", cell.H))}
    return GatedDeltaRule(**given, **{name: empty(cell.H, dtype=torch.float32) for name in ("beta", "g")}, output_final_state=case.mode == "forward")


def _signature(call: GatedDeltaRule, case: Case) -> Signature:
    made, regime = CONTRACTS[RULE], "training" if case.mode == "training" else "inference"
    return signature_of(made, call, validate(made, call), regime=regime, launch="graph")  # type: ignore[arg-type]


def _jobs(group: Group, cases: Sequence[Case]) -> list[_Job]:
    """Each combination of heads apart, the peers in turns: what the time cuts off is a part of each."""
    found: dict[str, list[_Job]] = {}
    for name in (name for name in ("flash_qla", "fla", "fla_ungated") if name in group.own and find_spec(name.removesuffix("_ungated"))):
        kinds: dict[tuple[int, int, int], list[Case]] = {}
        for case in (case for case in cases if takes(name, case)):
            kinds.setdefault((case.cell.G, case.cell.H, case.cell.D), []).append(case)
        for some in kinds.values():
            if name != "flash_qla":  # Triton's kernels know neither length nor batch; 2048 tokens are quick
                modes = dict.fromkeys(case.mode for case in some)
                some = [Case(replace(some[0].cell, B=1, T=2048), mode) for mode in modes]
            found.setdefault(name, []).extend(_Job(name, tuple(some), index, _SHARES[name]) for index in range(_SHARES[name]))
    return [job for turn in zip_longest(*found.values()) for job in turn if job is not None]


def _peers(todo: list[_Job], workers: int, limit_s: float) -> str:
    """Starts the jobs, so many at a time; ends what runs over."""
    if not todo:
        return "peers: nothing"
    start, waiting = time.perf_counter(), list(todo)
    running: list[tuple[BaseProcess, _Job]] = []
    while waiting or running:
        running = [(process, job) for process, job in running if process.is_alive()]
        while waiting and len(running) < workers:
            job = waiting.pop(0)
            process = get_context("spawn").Process(target=_compile, args=(job,))
            process.start()
            running.append((process, job))
        if time.perf_counter() - start > limit_s:
            for process, _ in running:
                process.terminate()
            left = ", ".join(str(job) for job in (*(job for _, job in running), *waiting))
            return f"peers: cut off after {limit_s:.0f} s, left to the race: {left}"
        time.sleep(0.1)
    return f"peers: {len(todo)} jobs in {time.perf_counter() - start:.0f} s"


def _compile(job: _Job) -> None:
    """In a process of its own: runs the peer's function, and its backend's candidates where it is one, on the job's calls; builds its share."""
    try:
        functions, absent = loaded([job.name])
        if job.name in absent:
            raise ImportError(absent[job.name])
        hurry((job.index, job.count))
        if job.name == "flash_qla":
            compile_share(job.index, job.count)
        for case in job.cases:
            call = problem(case.cell)
            call.output_final_state = case.mode == "forward"
            subject = posed(RULE, str(case), call)
            for run in chain(_own(functions[job.name], subject, case), _backend(job.name, subject, case)):
                try:
                    run()
                    torch.cuda.synchronize()
                except Exception as error:
                    print(f"{job}: {case}: {type(error).__name__}: {str(error)[:160]}", file=sys.stderr, flush=True)
            del subject, call
            torch.cuda.empty_cache()
    except Exception as error:  # the race says what it means
        print(f"{job}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr, flush=True)


def _own(function: Function, subject: Problem, case: Case) -> Iterator[Callable[[], object]]:
    """The peer's own function."""
    if case.mode == "training":
        yield step(subject, lambda x: function(x, False), leaves_of(RULE, subject.call))
    else:
        yield torch.no_grad()(lambda: function(CONTRACTS[RULE].tensors(subject.call), True))


def _backend(name: str, subject: Problem, case: Case) -> Iterator[Callable[[], object]]:
    """The candidates of the backend of that name, where there is one."""
    if name not in registry.known():
        return
    for one in offers(_signature(cast(GatedDeltaRule, subject.call), case), detect("cuda"), [name]):
        for candidate in one.forward[:1]:
            yield torch.no_grad()(partial(module_of(candidate).run, subject.call, candidate))
        for candidate in [candidate for candidate in one.backward if not candidate.saves_states][:1]:
            backward = cast(TrainableOpModule, module_of(candidate)).run_backward
            yield torch.no_grad()(partial(backward, subject.call, subject.grads, None, arriving(RULE, subject.call)[2], candidate))
