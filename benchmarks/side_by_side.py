"""The GPU backends side by side on one card, and FLA beside them: which is fastest where, in a graph and called eagerly; outputs checked first.

    python benchmarks/side_by_side.py [--parts rule,flat,step,numba] [--seconds 6] [--json FILE]

    rule   gated_delta_rule, bfloat16, 12 heads of 32 and 16/32 heads of 128, forward: every candidate of every backend in one race, with FLA
    flat   dual_core with flat memory, lam, float32, 12 heads of 32, 1x128: the graph, and the wall time of the bound op and of get_op
    step   gated_delta_step, bfloat16, in place, one sequence of 32 heads of 128 and of 12 heads of 32: likewise
    numba  gated_delta_rule, float32, 1x2048, 12 heads of 32: every backend's default in a graph

A graph holds one call and is replayed from a cold cache, backends in turns; `wall` is the time of a call among many made back to back without
synchronising, until the card has done them all; `host` until the host is free; beside them torch's own cheapest launch, since hosts differ. A candidate
whose outputs are wrong has no time, and makes the exit status 1. Numba's kernels are compiled at their first call, CuPy's and Triton's ahead by several
processes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import cast

import torch
from against_fla import Cell, fla_ahead, problem, theirs
from device_timing import Eager, Race, eager
from torch import Tensor

import titans_backends as tb
from titans_backends import registry
from titans_backends.backend import AheadOpModule, Candidate, OpModule
from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.case import Case, build
from titans_backends.contracts.contract import Call
from titans_backends.contracts.tolerance import compare, tolerance
from titans_backends.contracts.validate import validate
from titans_backends.facts import signature_of
from titans_backends.machine import Machine
from titans_backends.offers import offer

PARTS = ("rule", "flat", "step", "numba")
BACKENDS = ("cupy", "triton", "numba")
SMALL = tuple(Cell(1, tokens, 12, 12, 32) for tokens in (8192, 2048, 512, 128))
WIDE = tuple(Cell(1, tokens, 16, 32, 128) for tokens in (8192, 512))
CHECKED_TOKENS = 2048
"""The float64 recurrence runs over so many tokens at most; longer calls are checked on a prefix of their own, which is causal."""


@dataclass(slots=True)
class Line:
    """One candidate on one problem. Microseconds; `error`: the largest over the outputs, as a share of what is allowed."""

    problem: str
    name: str
    default: bool = False
    error: float = math.nan
    graph_us: float = math.nan
    wall_us: float = math.nan
    host_us: float = math.nan
    failed: str = ""


@dataclass(frozen=True, slots=True)
class Entrant:
    """A candidate with its module."""

    module: OpModule
    candidate: Candidate
    first: bool

    def run(self, call: Call) -> tuple[Tensor | None, ...]:
        return self.module.run(call, self.candidate)


def entrants(op: str, call: Call, names: Sequence[str], *, launch: str = "graph", first: bool = False) -> Iterator[Entrant]:
    """Every candidate, or each backend's default, that the backends offer this card for a call."""
    contract = CONTRACTS[op]
    signature = dataclasses.replace(signature_of(contract, call, validate(contract, call), launch=launch), device="cuda")  # type: ignore[arg-type]
    for name in names:
        if name not in registry.known():
            continue
        answer = offer(registry.get(name), signature, tb.detect("cuda"))
        if answer.module is None or not answer.forward:
            print(f"{op}: {name} refuses: {answer.verdict}", file=sys.stderr)
            continue
        for index, candidate in enumerate(answer.forward[: 1 if first else None]):
            yield Entrant(answer.module, candidate, index == 0)


def compiled(wanted: Sequence[tuple[str, Call, Sequence[str]]]) -> float:
    """Compiles what the candidates launch, in processes; returns the seconds. What fails is left to the run."""
    start = time.perf_counter()
    machine = tb.detect("cuda")
    jobs = [
        (op, meta(op, call), one.candidate, machine)
        for op, call, names in wanted
        for one in entrants(op, call, names)
        if hasattr(one.module, "compile_ahead")
    ]
    with ProcessPoolExecutor(14, get_context("spawn")) as pool:
        for said in filter(None, pool.map(_compile, jobs)):
            print(said, file=sys.stderr)
    return time.perf_counter() - start


def _compile(job: tuple[str, Call, Candidate, Machine]) -> str:
    op, call, candidate, machine = job
    try:
        module, _ = registry.module(registry.get(candidate.backend), op)
        cast(AheadOpModule, module).compile_ahead(call, candidate, machine)
    except Exception as error:
        return f"{candidate.label}: {type(error).__name__}: {str(error)[:200]}"
    return ""


def meta(op: str, call: Call) -> Call:
    """The call's sizes alone."""
    contract = CONTRACTS[op]
    return contract.with_tensors(call, {name: tensor.to("meta") for name, tensor in contract.tensors(call).items()})


@dataclass(frozen=True, slots=True)
class Truth:
    """What is checked of a call, its first tokens where it is long (every op is causal), and the float64 outputs of that."""

    op: str
    call: Call
    want: tuple[Tensor | None, ...]

    @staticmethod
    def of(op: str, call: Call) -> Truth:
        contract, given = CONTRACTS[op], CONTRACTS[op].tensors(call)
        tokens = given["v"].shape[1]
        if tokens > CHECKED_TOKENS:
            call = contract.with_tensors(call, {name: x[:, :CHECKED_TOKENS] for name, x in given.items() if x.shape[1:2] == (tokens,)})
        if "state" in given:  # what is timed changes it in place
            call = contract.with_tensors(call, {"state": given["state"].clone()})
        return Truth(op, call, contract.reference(contract.to(call, torch.float64)))

    def error(self, run: Callable[[Call], tuple[Tensor | None, ...]]) -> float:
        """The largest error over the outputs, as a share of the golden table's limit; infinite where something is not finite."""
        contract, given = CONTRACTS[self.op], CONTRACTS[self.op].tensors(self.call)
        call = contract.with_tensors(self.call, {"state": given["state"].clone()}) if "state" in given else self.call
        limit = tolerance(given[contract.operands[0]].dtype).outputs
        got = run(call)
        if not all(bool(torch.isfinite(x).all()) for x in got if x is not None):
            return math.inf
        pairs = [(spec.name, a, b) for spec, a, b in zip(contract.outputs, got, self.want, strict=False) if a is not None and b is not None]
        return max(compare(*pair).maximum / limit for pair in pairs)


def race(op: str, name: str, call: Call, those: Sequence[Entrant], others: dict[str, Callable[[], object]], seconds: float) -> list[Line]:
    """Each checked, then all in turns."""
    made, lines, truth = Race(), [], Truth.of(op, call)
    for one in those:
        line = Line(name, one.candidate.label, one.first)
        lines.append(line)
        try:
            line.error = truth.error(one.run)
            if line.error > 1:
                line.failed = f"wrong: {line.error:.2g} of what is allowed"
            else:
                made.add(line.name, lambda one=one: one.run(call))  # type: ignore[misc]
        except torch.AcceleratorError:
            raise
        except Exception as error:
            line.failed = f"{type(error).__name__}: {str(error)[:200]}"
    for other, run in others.items():
        made.add(other, run)
        lines.append(Line(name, other, True))
    times = made.times(seconds)
    for line in lines:
        line.graph_us = times.get(line.name, math.nan)
    return lines


def walls(run: Callable[[], object]) -> Eager:
    """The median of seven measurements."""
    found = [eager(run) for _ in range(7)]
    return Eager(statistics.median(one.wall_us for one in found), statistics.median(one.host_us for one in found))


def held(op: str, name: str, call: Call, names: Sequence[str]) -> Iterator[Line]:
    """A call as users make it, by the bound op and by get_op, of each backend."""
    names_of = CONTRACTS[op].parameters
    values, truth = {parameter: getattr(call, parameter) for parameter in names_of}, Truth.of(op, call)
    for backend in names:
        forced = tb.get_op(op, backend=backend)
        try:
            bound = forced.bind(**values)
        except tb.BackendRefusedError as error:
            yield Line(name, f"{backend} bound", failed=str(error)[:200])
            continue
        if bound.choice.pair.forward.backend != backend:
            raise SystemExit(f"{op}: {bound.choice.pair.label} was chosen although {backend} was forced")
        for way, run in (("bound", bound), ("get_op", forced)):
            error = truth.error(lambda other, run=run: run(**{p: getattr(other, p) for p in names_of}))  # type: ignore[misc]
            measured = walls(lambda run=run: run(**values))  # type: ignore[misc]
            yield Line(name, f"{backend} {way}", error=error, wall_us=measured.wall_us, host_us=measured.host_us, failed="wrong" if error > 1 else "")


def yardstick() -> Line:
    """What torch's own cheapest launch costs on this host."""
    x = torch.zeros(256, device="cuda")
    measured = walls(lambda: torch.add(x, 1.0, out=x))
    return Line("this host", "torch.add, out= given", wall_us=measured.wall_us, host_us=measured.host_us)


def rule_of(cell: Cell, dtype: torch.dtype = torch.bfloat16) -> Call:
    """against_fla's problem, in a dtype."""
    call = problem(cell)
    made = CONTRACTS["gated_delta_rule"]
    return made.with_tensors(call, {name: x.to(dtype) for name, x in made.tensors(call).items() if x.dtype == torch.bfloat16})


def flat() -> Call:
    case = Case(
        "flat",
        B=1,
        T=128,
        G=12,
        H=12,
        K=32,
        V=32,
        dtype=torch.float32,
        options={"memory": "flat", "transform": "lam"},
        given=("fast_gate", "slow_gate"),
    )
    return build(CONTRACTS["dual_core"], case, "cuda")


def step(heads: int, size: int) -> Call:
    case = Case("step", B=1, T=1, G=heads, H=heads, K=size, V=size, dtype=torch.bfloat16, options={"inplace": True}, given=("g",))
    return build(CONTRACTS["gated_delta_step"], case, "cuda")


def shown(lines: Sequence[Line]) -> None:
    """A line a backend's default and best, and every failure."""
    for name in dict.fromkeys(line.problem for line in lines):
        print(f"\n{name}")
        here = [line for line in lines if line.problem == name]
        timed = sorted((line for line in here if not math.isnan(line.graph_us)), key=lambda line: line.graph_us)
        best = {line.name.split("/")[0]: line.name for line in reversed(timed)}
        for line in timed:
            if line.default or line.name in best.values():
                print(f"  {line.graph_us:9.1f} us graph  {line.error:5.2f} of the limit  {line.name}{'  (default)' if line.default else ''}")
        for line in here:
            if not math.isnan(line.wall_us):
                print(f"  {line.wall_us:9.1f} us wall   {line.host_us:9.1f} us host  {line.name}")
            if line.failed:
                print(f"  FAILED {line.name}: {line.failed}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--seconds", type=float, default=1.5, help="of racing, each problem")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    parts = asked.parts.split(",")
    if set(parts) - set(PARTS):
        parser.error(f"--parts takes {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        parser.error("it needs a CUDA device")
    both = [name for name in BACKENDS if name != "numba"]
    problems: list[tuple[str, str, Call, list[str]]] = []
    if "flat" in parts:
        problems.append(("dual_core", "dual_core flat lam, float32, 1x128 12/12 D32", flat(), both))
    if "step" in parts:
        problems += [("gated_delta_step", f"gated_delta_step in place, bf16, 1x1 {h}/{h} D{d}", step(h, d), both) for h, d in ((32, 128), (12, 32))]
    if "rule" in parts:
        problems += [("gated_delta_rule", f"gated_delta_rule, bf16, {cell}", rule_of(cell), both) for cell in (*SMALL, *WIDE)]
    print(f"compiled ahead in {compiled([(op, call, names) for op, _, call, names in problems]):.0f} s", flush=True)
    fla = theirs() if "rule" in parts else None
    if fla is not None:
        print(f"FLA compiled in {fla_ahead([*SMALL[:1], *WIDE[:1]]):.0f} s", flush=True)
    lines: list[Line] = [yardstick()]
    for op, name, call, names in problems:
        if op != "gated_delta_rule":  # the host first, while nothing else runs
            lines += held(op, name, call, names)
        others: dict[str, Callable[[], object]] = {}
        if op == "gated_delta_rule" and fla is not None:
            x = call
            others["fla"] = lambda x=x: fla(x.q, x.k, x.v, x.g, x.beta, output_final_state=True)  # type: ignore[misc]
        lines += race(op, name, call, list(entrants(op, call, names)), others, asked.seconds)
        torch.cuda.empty_cache()
    if "numba" in parts:
        call = rule_of(Cell(1, 2048, 12, 12, 32), torch.float32)
        those = list(entrants("gated_delta_rule", call, BACKENDS, first=True))
        lines += race("gated_delta_rule", "gated_delta_rule, float32, 1x2048 12/12 D32, defaults", call, those, {}, asked.seconds)
    shown(lines)
    if asked.json:
        told = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": version("triton"),
            "lines": [asdict(line) for line in lines],
        }
        asked.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return int(any(line.failed for line in lines))


if __name__ == "__main__":
    raise SystemExit(main())
