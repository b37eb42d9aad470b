"""How the GPU benchmarks measure: interleaved graph replays from a cold cache, eager calls back to back, peak memory, ceilings.

Also how they get there quickly: a candidate's kernels are compiled by several processes before it first runs. Imported by the scripts beside it.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from typing import cast

import torch
from torch import Tensor

import titans_backends as tb
from titans_backends.backend import Candidate, OpModule, TrainableOpModule
from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.contract import Call, Work
from titans_backends.contracts.validate import validate
from titans_backends.contracts.work import work_of
from titans_backends.facts import signature_of
from titans_backends.offers import Offer, Pair, offer
from titans_backends.plans import invalidate
from titans_backends.registry import get

__all__ = [
    "Ceilings",
    "Eager",
    "Race",
    "ahead",
    "arriving",
    "bound",
    "ceilings",
    "default",
    "default_pair",
    "eager",
    "forced",
    "leaves_of",
    "memory",
    "module_of",
    "offered",
    "offered_in_training",
    "precision_of",
    "shortened",
    "work",
]

PACKAGE = "titans_backends.backends.triton"
FLUSH_BYTES = 128 << 20
Run = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What this card does at best. FLOP/s of a square product, multiply-adds counted as two; bytes/s of a copy, read and written."""

    copy: float
    bf16: float
    tf32: float
    fp32: float

    def floor_us(self, work: Work, dtype: torch.dtype, float32: str = "high") -> float:
        """The least time of a call: its bytes or its products, whichever takes longer."""
        rate = self.bf16 if dtype != torch.float32 else self.tf32 if float32 == "high" else self.fp32
        return work.floor_us(rate, self.copy)


def ceilings() -> Ceilings:
    """Measured on this card, in a fraction of a second."""
    source = torch.ones(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.numel() / _best_s(lambda: target.copy_(source))
    rates = []
    for dtype, precision in ((torch.bfloat16, "highest"), (torch.float32, "high"), (torch.float32, "highest")):
        a, size = torch.randn(8192, 8192, device="cuda", dtype=dtype), 8192
        with precision_of(precision):
            rates.append(2.0 * size**3 / _best_s(lambda a=a: a @ a))  # type: ignore[misc]
    return Ceilings(copy, *rates)


@contextlib.contextmanager
def precision_of(float32: str) -> Iterator[None]:
    """torch's float32 matmul precision, for a while."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(float32)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _best_s(work: Run, repeats: int = 6) -> float:
    found = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        stop.record()
        stop.synchronize()
        found.append(start.elapsed_time(stop) / 1e3)
    return min(found[1:])


@dataclass(frozen=True, slots=True)
class Eager:
    """Calls one after the other without synchronising: `wall_us` until the device has done them all, `host_us` until the host is free again."""

    wall_us: float
    host_us: float


def eager(run: Run, budget_s: float = 0.15) -> Eager:
    """The median of three series of calls; a series is short enough for the queue to hold."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(5):
        run()
    torch.cuda.synchronize()
    once = (time.perf_counter() - start) / 5
    count = max(5, min(100, int(budget_s / 3 / once)))
    walls, hosts = [], []
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            run()
        free = time.perf_counter()
        torch.cuda.synchronize()
        walls.append((time.perf_counter() - start) / count)
        hosts.append((free - start) / count)
    return Eager(1e6 * statistics.median(walls), 1e6 * statistics.median(hosts))


class Race:
    """Runners captured as graphs and replayed in turns, the cache written over before each replay, outside of the timed events.

    `shared`: the graphs take their memory from one pool and write over each other's results, so that many large ones fit; nobody reads these.
    """

    def __init__(self, *, shared: bool = False) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
        self._graphs: dict[str, torch.cuda.CUDAGraph] = {}
        self._kept: list[object] = []
        self._pool = torch.cuda.graph_pool_handle() if shared else None
        self._side = torch.cuda.Stream()

    def add(self, name: str, run: Run) -> None:
        """Warms a runner up on a side stream and captures it."""
        side = self._side
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
            run()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            results = run()
            if self._pool is None:
                self._kept.append(results)
            del results
        graph.replay()
        torch.cuda.synchronize()
        self._graphs[name] = graph

    def times(self, budget_s: float, least: int = 9, most: int = 60) -> dict[str, float]:
        """The median of each in microseconds; who goes first changes from round to round. A budget that ends early leaves `least` rounds."""
        return {name: statistics.median(found) for name, found in self.samples(list(self._graphs), budget_s, least, most).items()}

    def samples(self, names: Sequence[str], budget_s: float, least: int = 9, most: int = 60) -> dict[str, list[float]]:
        """Some of the runners' times in microseconds, a round after the other without the first, which warms up."""
        series: dict[str, list[float]] = {name: [] for name in names}
        start = time.perf_counter()
        for turn in range(most if names else 0):
            if turn >= least and time.perf_counter() - start > budget_s:
                break
            events = []
            for name in (*names[turn % len(names) :], *names[: turn % len(names)]):
                self._flush.zero_()
                first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                first.record()
                self._graphs[name].replay()
                last.record()
                events.append((name, first, last))
            torch.cuda.synchronize()
            for name, first, last in events:
                series[name].append(1e3 * first.elapsed_time(last))
        return {name: found[1:] for name, found in series.items()}


def memory(run: Run, call: Call, op: str) -> float:
    """The peak of one run, inputs included, over the bytes of inputs and outputs."""
    run()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    given = _bytes(CONTRACTS[op].tensors(call).values())
    made = _bytes(x for x in cast("Iterable[object]", outputs) if isinstance(x, Tensor))
    return (given + peak) / (given + made)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def shortened(labels: Iterable[str]) -> dict[str, str]:
    """Candidates' labels without the parameters in which none of them differs."""
    words = {label: label.split() for label in labels}
    everywhere = set.intersection(*(set(found) for found in words.values())) if len(words) > 1 else set()
    return {label: " ".join(word for word in found if word not in everywhere or "/" in word) for label, found in words.items()}


def module_of(op: str) -> OpModule:
    """The Triton backend's module of an op."""
    return cast(OpModule, import_module(f"{PACKAGE}.{op}"))


def work(op: str, call: Call) -> Work:
    """What a call cannot avoid."""
    return work_of(CONTRACTS[op], call, validate(CONTRACTS[op], call))


def offered(op: str, call: Call) -> list[Candidate]:
    """The Triton backend's candidates for a call on this card; SystemExit with the reasons where it refuses."""
    signature = signature_of(CONTRACTS[op], call, validate(CONTRACTS[op], call))
    machine = tb.detect("cuda")
    verdict = module_of(op).supports(signature, machine)
    if not verdict:
        raise SystemExit(f"{op}: the triton backend refuses: {verdict}")
    return list(module_of(op).candidates(signature, machine))


def bound(op: str, call: Call) -> Callable[[], tuple[Tensor | None, ...]]:
    """The op bound to a call, forced to the Triton backend, as a user would hold it."""
    names = CONTRACTS[op].parameters
    arguments = {name: getattr(call, name) for name in names}
    run = tb.get_op(op).bind(**arguments, backend="triton")
    if run.choice.pair.forward.backend != "triton":
        raise SystemExit(f"{op}: {run.choice.pair.label} was chosen although triton was forced")
    return lambda: run(**arguments)


def default(op: str, call: Call) -> Candidate:
    """What a captured graph gets: the tuned row's candidate, or the backend's first."""
    arguments = {name: getattr(call, name) for name in CONTRACTS[op].parameters}
    with tb.policy(launch="graph"):
        return tb.get_op(op).bind(**arguments, backend="triton").choice.pair.forward


def leaves_of(op: str, call: Call) -> dict[str, Tensor]:
    """The call's tensors that take a gradient, wanting one; no copies."""
    given = CONTRACTS[op].tensors(call)
    return {name: given[name].detach().requires_grad_() for name in CONTRACTS[op].differentiable if name in given}


def default_pair(op: str, call: Call) -> Pair:
    """What a captured training step gets: the tuned row's pair, or the backend's first."""
    arguments: dict[str, object] = {name: getattr(call, name) for name in CONTRACTS[op].parameters}
    with torch.enable_grad(), tb.policy(launch="graph"):
        return tb.get_op(op).bind(**arguments | leaves_of(op, call), backend="triton").choice.pair


def offered_in_training(op: str, call: Call) -> Offer:
    """The Triton backend's candidates of both directions for a captured training step of the call, or its refusal."""
    signature = signature_of(CONTRACTS[op], call, validate(CONTRACTS[op], call), regime="training", launch="graph")
    return offer(get("triton"), signature, tb.detect("cuda"))


@contextlib.contextmanager
def forced(op: str, candidate: Candidate, backward: Candidate | None = None) -> Iterator[None]:
    """The op's module offers this candidate and no other, and this backward where one is given, for a while; what is bound meanwhile keeps it."""
    module = module_of(op)
    only = {"candidates": candidate, **({} if backward is None else {"backward_candidates": backward})}
    before = {name: getattr(module, name) for name in only}
    for name, one in only.items():
        setattr(module, name, lambda signature, machine, one=one: [one])
    invalidate()
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(module, name, function)
        invalidate()


def arriving(op: str, call: Call, candidate: Candidate | None = None) -> tuple[tuple[Tensor | None, ...], Tensor | None, frozenset[str]]:
    """What a layer's backward is handed, of the right sizes and not filled: a gradient of every output but the states, the saved states, every need."""
    from titans_backends.launching.ahead import arriving as handed

    grads, states, needs = handed(op, call, candidate or Candidate("triton", "", direction="backward"))
    return tuple(None if spec.like is None else grad for spec, grad in zip(CONTRACTS[op].outputs, grads, strict=True)), states, needs


def _launching(op: str, candidate: Candidate) -> Callable[[Call, Candidate], object]:
    """What runs a candidate of either direction."""
    module = cast(TrainableOpModule, module_of(op))
    if candidate.direction == "forward":
        return module.run
    return lambda call, candidate: module.run_backward(call, *arriving(op, call, candidate), candidate)


def ahead(wanted: Iterable[tuple[str, Call, Sequence[Candidate]]], workers: int | None = None) -> float:
    """Compiles what these candidates would launch, side by side, into Triton's own cache; returns the seconds. Failures are left to the run.

    Candidates of both directions; a backward as a layer's training step runs it, see `arriving`.
    """
    from titans_backends.backends.triton.ahead import collected
    from titans_backends.backends.triton.launch import Form

    jobs: dict[tuple[str, str, Form], None] = {}
    start = time.perf_counter()
    for op, call, candidates in wanted:
        for candidate in candidates:
            with contextlib.suppress(Exception):
                for kernel, form in collected(_launching(op, candidate), _sizes(call), candidate):
                    jobs[kernel.function.__module__, kernel.name, form] = None  # type: ignore[attr-defined]
    major, minor = torch.cuda.get_device_capability()
    count = workers or max(1, min(14, (os.cpu_count() or 2) - 1))
    with ProcessPoolExecutor(count, get_context("spawn")) as pool:
        done = list(pool.map(_compile, jobs, [10 * major + minor] * len(jobs)))
    for line in filter(None, done):
        print(f"does not compile: {line}", file=sys.stderr, flush=True)
    return time.perf_counter() - start


def _sizes(call: Call) -> Call:
    """The call without its numbers, but for where packed sequences end."""
    found = {
        name: torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        for name in _names(call)
        if isinstance(value := getattr(call, name), Tensor) and name != "cu_seqlens"
    }
    made = {name: getattr(call, name) for name in _names(call)}
    return type(call)(**{**made, **found})


def _names(call: Call) -> list[str]:
    fields: Mapping[str, object] = call.__dataclass_fields__  # type: ignore[attr-defined]
    return [name for name in fields if name != "_"]


def _compile(job: tuple[str, str, object], sm: int) -> str:
    from titans_backends.backends.triton.ahead import _compiled
    from titans_backends.backends.triton.launch import Form, Kernel

    module, name, form = job
    assert isinstance(form, Form)
    kernel = next(value for value in vars(import_module(module)).values() if isinstance(value, Kernel) and value.name == name)
    reason = _compiled(kernel, form, sm)
    return f"{name} {form.constants} warps={form.warps} stages={form.stages}: {reason[:200]}" if reason else ""
