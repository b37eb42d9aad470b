"""The Triton backend op by op on a GPU: each against its floor, its peers and its own plain form; outputs checked before anything is timed.

    python benchmarks/seeds.py [--parts seeds,dual,short,step,memory,cold] [--candidates default|all] [--json FILE]

    seeds    fast_core, fused_uw, uw_transform, slow_core at 1x8192, 16/32 heads of 128 and 12 heads of 32, bf16: the share of the floor
    dual     dual_core, 12 heads of 32, float32: flat with lam, recurrent and exact, over lengths and matmul precisions
    short    gated_delta_rule at 1x512, 16/32 heads of 128: what a call costs its caller, bound and through get_op
    step     gated_delta_step and dual_core_step: 64 sequences of 32 heads of 128 against the copy, one sequence in a graph
    memory   the peak of every schedule of gated_delta_rule over inputs plus outputs
    cold     from the first call to the first result with nothing compiled, a fresh process for each op

The floor is the contract's work over ceilings measured at the start; a copy that moves as many bytes shows what a launch and a cold cache cost.
A time is the median of graph replays from a cold cache unless it says eager. Exit status 1 where something is wrong; a time is never a failure.
With fla in PYTHONPATH slow_core is raced against FLA's two kernels.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from against_fla import CELLS, PATH, Cell, exact, fla_ahead, hurry, problem, theirs
from device_timing import Ceilings, Race, ahead, bound, ceilings, default, eager, forced, memory, module_of, offered, precision_of, shortened, work
from torch import Tensor

import titans_backends as tb
from titans_backends.backend import Candidate
from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.case import Case, build
from titans_backends.contracts.contract import Call
from titans_backends.contracts.dual_core_step import DualCoreStep
from titans_backends.contracts.slow_core import SlowCore
from titans_backends.contracts.tolerance import compare, tolerance
from titans_backends.contracts.validate import validate
from titans_backends.tuning.slices import heads_part

COPY = "a copy of as many bytes, for comparison"
PARTS = ("seeds", "dual", "short", "step", "memory", "cold")
Outputs = tuple[Tensor | None, ...]
Run = Callable[[], object]
_MOST_TOKENS = 4096
_PLACE = 17
"""Where in its chunk every row of dual_core_step stands."""

LARGE = Case("1x8192 16/32 D128", B=1, T=8192, G=16, H=32, K=128, V=128, dtype=torch.bfloat16)
SMALL = replace(LARGE, name="1x8192 12/12 D32", G=12, H=12, K=32, V=32)
LAM = Case("1x65536 12/12 D32", B=1, T=65536, G=12, H=12, K=32, V=32, dtype=torch.float32)
STATE = {"output_final_state": True}


@dataclass(slots=True)
class Line:
    """One candidate, or one peer, on one problem. Microseconds; `share` is floor over time; `error` the largest over its limit's measure."""

    part: str
    op: str
    what: str
    who: str
    graph_us: float = math.nan
    wall_us: float = math.nan
    host_us: float = math.nan
    floor_us: float = math.nan
    error: float = math.nan
    memory: float = math.nan
    failed: str = ""
    notes: dict[str, float] = field(default_factory=dict)
    is_default: bool = False

    @property
    def share(self) -> float:
        """Of the floor."""
        return self.floor_us / self.graph_us


@dataclass(frozen=True, slots=True)
class Task:
    """One problem: an op's case, a matmul precision, and what is measured beside graph replays."""

    part: str
    op: str
    case: Case
    float32: str = "highest"
    eager: bool = False

    @property
    def what(self) -> str:
        """For people."""
        precision = f" {self.float32}" if self.case.dtype == torch.float32 else ""
        return f"{self.case.name}{precision}"


def tasks(parts: list[str]) -> Iterator[Task]:
    """What is asked for, in order."""
    if "seeds" in parts:
        for case in (LARGE, SMALL):
            yield Task("seeds", "fast_core", replace(case, given=("gate",)))
            yield Task("seeds", "fused_uw", case)
            yield Task("seeds", "uw_transform", replace(case, given=("g",)))
            yield Task("seeds", "uw_transform", replace(case, name=f"{case.name} lam", given=("g",), options={"transform": "lam"}))
            yield Task("seeds", "slow_core", replace(case, given=("g",), options=STATE))
    if "dual" in parts:
        gates = ("fast_gate", "slow_gate")
        flat = replace(LAM, given=gates, options={"memory": "flat", "transform": "lam"})
        recurrent = replace(LAM, given=(*gates, "g"), options=STATE)
        for float32 in ("high", "highest"):
            yield Task("dual", "dual_core", replace(flat, name="flat lam 1x128", T=128), float32, eager=True)
            yield Task("dual", "dual_core", replace(flat, name="flat lam 1x65536"), float32)
            for tokens in (1024, 2048, 4096, 8192, 16384, 32768, 65536):
                yield Task("dual", "dual_core", replace(recurrent, name=f"recurrent exact 1x{tokens}", T=tokens), float32)
    if "short" in parts:
        for tokens, keys, values in ((512, 16, 32), (512, 2, 8), (128, 16, 32)):
            case = replace(LARGE, name=f"1x{tokens} {keys}/{values} D128", T=tokens, G=keys, H=values, given=("g",), options=STATE)
            yield Task("short", "gated_delta_rule", case, eager=True)
    if "step" in parts:
        step = Case("", T=1, G=16, H=32, K=128, V=128, dtype=torch.bfloat16, given=("g",))
        for sequences in (64, 1):
            yield Task("step", "gated_delta_step", replace(step, name=f"{sequences} sequences", B=sequences), eager=True)
            pool = replace(step, name=f"{sequences} sequences, in place", B=sequences, options={"inplace": True})
            yield Task("step", "gated_delta_step", pool, eager=True)
        gated = ("g", "fast_gate", "slow_gate")
        for case in (replace(step, B=64), replace(step, B=1), replace(LAM, T=1)):
            for options in ({}, {"inplace": True}):
                name = f"{case.B} sequences of {case.H} heads of {case.K}{', in place' if options else ''}"
                yield Task("step", "dual_core_step", replace(case, name=name, given=gated, options=options), eager=True)


def call_of(task: Task) -> Call:
    """The task's inputs on the GPU; those of the gated delta rule as the peers' table has them."""
    made, case = CONTRACTS[task.op], task.case
    if task.op == "gated_delta_rule":
        return problem(Cell(case.B, case.T, case.G, case.H, case.K))
    if task.op == "slow_core" and not case.name.startswith("cold"):
        rule = problem(Cell(case.B, case.T, case.G, case.H, case.K))
        u, w = tb.get_op("uw_transform")(rule.k, rule.v, rule.beta, rule.g, backend="eager")
        assert u is not None
        assert w is not None
        return SlowCore(rule.q, rule.k, u, w, g=rule.g, scale=case.K**-0.5, output_final_state=True)
    call = drawn(task) if case.T * case.H * case.K > 1 << 20 else build(made, case, "cuda")
    if isinstance(call, DualCoreStep):
        call.position.fill_(_PLACE)
    return call


def drawn(task: Task) -> Call:
    """Large inputs drawn on the GPU: the case's shapes, normal numbers, unit keys, gates in (0, 1), decays in (-0.1, 0)."""
    made = CONTRACTS[task.op]
    source = torch.Generator(device="cuda").manual_seed(0)
    sizes = build(made, task.case, "meta")
    filled: dict[str, Tensor] = {}
    for name, like in made.tensors(sizes).items():
        kind = made.argument_by_name[name].fill
        if kind in ("beta", "gate", "mixing", "log_decay"):
            x = torch.rand(like.shape, generator=source, device="cuda")
            x = -0.1 * x if kind == "log_decay" else x
        else:
            x = torch.randn(like.shape, generator=source, device="cuda")
            if kind in ("query", "key"):
                x = torch.nn.functional.normalize(x, dim=-1)
            if kind == "lower_triangular":
                x = (x / math.sqrt(like.shape[-1])).tril()
            if kind == "state":
                x = 0.3 * x
        filled[name] = x.to(like.dtype)
    return made.with_tensors(sizes, filled)


class Truth:
    """What a part of the outputs must be, in float64: the first and the last head, at most 4096 tokens."""

    def __init__(self, op: str, call: Call) -> None:
        self.contract = CONTRACTS[op]
        self._part = heads_part(self.contract, call, validate(self.contract, call), 8192 if op == "slow_core" else _MOST_TOKENS)
        part = self._part.call
        if op == "gated_delta_rule":
            self._wanted: Outputs = exact(part)  # type: ignore[arg-type]
        else:
            self._wanted = self.contract.reference(self.contract.to(part, torch.float64))

    def error(self, outputs: Outputs, limit: float) -> tuple[float, str]:
        """The largest error, and a sentence where one is over the limit."""
        worst, said = 0.0, ""
        for index, (spec, got, want) in enumerate(zip(self.contract.outputs, outputs, self._wanted, strict=True)):
            cut = None if got is None else self._part.output(index, got)
            if cut is None or want is None:
                continue
            difference = compare(spec.name, cut, want.reshape(cut.shape))
            worst = max(worst, difference.maximum, difference.rms)
            if not difference.within(limit):
                said = f"wrong: {difference}, where {limit:.0e} is allowed"
        return worst, said


def fresh(op: str, call: Call) -> Call:
    """The call with states of its own where they are changed in place."""
    made = CONTRACTS[op]
    return made.with_tensors(call, {name: made.tensors(call)[name].clone() for name in made.rewritten}) if getattr(call, "inplace", False) else call


def peers(task: Task, call: Call) -> Iterator[tuple[str, Callable[[], Outputs]]]:
    """Who else can do it, with the same outputs."""
    given = CONTRACTS[task.op].tensors(call)
    if task.op == "fused_uw":
        a, v, k = (given[name].flatten(0, -3) for name in ("attn_const", "v_beta", "k_beta"))
        both, width = torch.cat([v, k], -1), given["v_beta"].shape[-1]
        yield "two torch.bmm", lambda: (torch.bmm(a, v).view(given["v_beta"].shape), torch.bmm(a, k).view(given["k_beta"].shape))

        def one() -> Outputs:
            uw = torch.bmm(a, both).view(*given["v_beta"].shape[:-1], -1)
            return uw[..., :width], uw[..., width:]

        yield "one torch.bmm on a concatenation made before", one
    if isinstance(call, DualCoreStep) and not call.inplace:
        given = {name: getattr(call, name) for name in ("q", "k", "v", "beta", "g", "fast_gate", "slow_gate", "alpha", "chunk_size", "scale")}
        given |= {"initial_state": call.state, "initial_fast_state": call.fast_state, "chunk_offset": _PLACE, "output_final_state": True}
        core = tb.get_op("dual_core").bind(**given, backend="triton")
        yield "dual_core of one token", lambda: core(**given)
    if task.op == "slow_core":
        run = fla_slow(call)
        if run is not None:
            yield "fla's state and output kernels", run


def fla_slow(call: Call) -> Callable[[], Outputs] | None:
    """FLA's chunk_gated_delta_rule_fwd_h and chunk_fwd_o on our u and w, its running decay made before; None without FLA."""
    os.environ.update(PATH)
    try:
        from fla.ops.common.chunk_delta_h import chunk_gated_delta_rule_fwd_h
        from fla.ops.common.chunk_o import chunk_fwd_o
        from fla.ops.utils import chunk_local_cumsum
        from fla.ops.utils.constant import RCP_LN2
    except ImportError as error:
        print(f"fla is not importable, so slow_core runs alone ({error})", file=sys.stderr)
        return None
    hurry()
    assert isinstance(call, SlowCore)
    g = chunk_local_cumsum(call.g, chunk_size=call.chunk_size, scale=RCP_LN2)

    def run() -> Outputs:
        h, v_new, state = chunk_gated_delta_rule_fwd_h(k=call.k, w=call.w, u=call.u, g=g, output_final_state=True, chunk_size=call.chunk_size)
        return chunk_fwd_o(q=call.q, k=call.k, v=v_new, h=h, g=g, scale=call.scale, chunk_size=call.chunk_size), state

    return run


def measure(task: Task, asked: str, top: Ceilings, budget_s: float) -> list[Line]:
    """One problem: every runner checked, raced in graphs, and the default, where asked for, called eagerly."""
    call, module = call_of(task), module_of(task.op)
    with precision_of(task.float32):
        chosen, truth, race = default(task.op, call), Truth(task.op, call), Race()
        limit = tolerance(task.case.dtype, task.float32).outputs
        floor = top.floor_us(work(task.op, call), task.case.dtype, task.float32)
        candidates = {one.label: one for one in (chosen, *(offered(task.op, call) if asked == "all" else ()))}
        runs: dict[str, tuple[Callable[[], Outputs], Run]] = {}
        for label, candidate in candidates.items():
            own = fresh(task.op, call)
            runs[label] = (
                lambda candidate=candidate: module.run(fresh(task.op, call), candidate),  # type: ignore[misc]
                lambda candidate=candidate, own=own: module.run(own, candidate),  # type: ignore[misc]
            )
        runs.update({name: (run, run) for name, run in peers(task, call)})
        lines = []
        for name, (once, again) in runs.items():
            line = Line(task.part, task.op, task.what, name, floor_us=floor, is_default=name == chosen.label)
            lines.append(line)
            try:
                line.error, line.failed = truth.error(once(), limit)
                if not line.failed:
                    line.memory = memory(again, call, task.op)
                    race.add(name, again)
            except torch.AcceleratorError:
                raise
            except Exception as error:
                line.failed = f"{type(error).__name__}: {str(error)[:200]}"
        if task.part == "seeds":
            source = torch.zeros(int(work(task.op, call).bytes) // 2, dtype=torch.int8, device="cuda")
            target = torch.empty_like(source)
            race.add(COPY, lambda: target.copy_(source))
            lines.append(Line(task.part, task.op, task.what, COPY, floor_us=floor))
        times = race.times(budget_s)
        for line in lines:
            line.graph_us = times.get(line.who, math.nan)
            if line.is_default and not line.failed and task.eager:
                told = eager(bound(task.op, fresh(task.op, call)))
                line.wall_us, line.host_us = told.wall_us, told.host_us
                line.notes["get_op_wall_us"] = eager(plain(task.op, fresh(task.op, call))).wall_us
            if line.who in candidates and task.op.endswith("_step") and not line.failed:
                line.notes["chained_us"] = chained(runs[line.who][1])
                line.notes["share_of_copy"] = work(task.op, call).bytes / (line.graph_us * 1e-6) / top.copy
    best = min((one for one in lines if one.who in candidates and not math.isnan(one.graph_us)), key=lambda one: one.graph_us, default=None)
    for line in lines:
        if best is not None and line.who not in candidates and line.who != COPY:
            line.notes["best_of_ours_is_faster_by"] = line.graph_us / best.graph_us
    return lines


def plain(op: str, call: Call) -> Run:
    """The op called as anyone would, with the Triton backend asked for around it."""
    function, arguments = tb.get_op(op), {name: getattr(call, name) for name in CONTRACTS[op].parameters}

    def run() -> Outputs:
        with tb.use_backend("triton"):
            return function(**arguments)

    return run


def chained(run: Run, count: int = 32) -> float:
    """One of many in one graph, the cache left warm: a decode loop's share of the device, in microseconds."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [run() for _ in range(count)]
    times = []
    for _ in range(9):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        first.record()
        graph.replay()
        last.record()
        last.synchronize()
        times.append(1e3 * first.elapsed_time(last) / count)
    del kept
    return sorted(times)[len(times) // 2]


def memories() -> list[Line]:
    """Every candidate of gated_delta_rule at two head sizes and two lengths."""
    lines = []
    for cell in (cell for cell in CELLS if str(cell) in ("1x8192 16/32 D128", "1x8192 12/12 D32", "1x512 16/32 D128", "1x8192 2/8 D128")):
        call = problem(cell)
        chosen = default("gated_delta_rule", call).label
        for candidate in offered("gated_delta_rule", call):
            line = Line("memory", "gated_delta_rule", str(cell), candidate.label, is_default=candidate.label == chosen)
            lines.append(line)
            try:
                with forced("gated_delta_rule", candidate):
                    line.memory = memory(bound("gated_delta_rule", call), call, "gated_delta_rule")
            except torch.AcceleratorError:
                raise
            except Exception as error:
                line.failed = f"{type(error).__name__}: {str(error)[:200]}"
    return lines


def cold_case(op: str) -> Task:
    """What a first call is measured on."""
    return Task(
        "cold", op, replace(LARGE, name="cold", T=1 if op == "gated_delta_step" else 512, given=() if op in ("fused_uw", "fast_core") else ("g",))
    )


def cold_worker(op: str) -> int:
    """In a fresh process: prints the seconds of the first call and of the second."""
    task = cold_case(op)
    call = problem(Cell(1, 512, 16, 32, 128)) if op == "gated_delta_rule" else drawn(task)
    torch.cuda.synchronize()
    spent = []
    for _ in range(2):
        start = time.perf_counter()
        plain(op, call)()
        torch.cuda.synchronize()
        spent.append(time.perf_counter() - start)
    print(json.dumps({"first_s": spent[0], "second_s": spent[1]}))
    return 0


def cold() -> list[Line]:
    """A process and an empty cache for each op, all at once: each compiles on one core."""

    def one(op: str) -> Line:
        line = Line("cold", op, "first call, nothing compiled", "default")
        with tempfile.TemporaryDirectory() as folder:
            environment = {**os.environ, "TRITON_CACHE_DIR": folder, "TRITON_HOME": folder}
            done = subprocess.run([sys.executable, __file__, "--cold-worker", op], env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            line.failed = (done.stderr.strip().splitlines() or ["no message"])[-1]
        else:
            line.notes.update(json.loads(done.stdout.strip().splitlines()[-1]))
        return line

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(one, [op for op, made in CONTRACTS.items() if not made.experimental]))


def shown(line: Line, name: str) -> str:
    """A line for people."""

    def number(value: float, form: str, name: str) -> str:
        return "" if math.isnan(value) else f"  {name} {value:{form}}"

    parts = [
        number(line.graph_us, ".2f", "graph"), number(line.share if not math.isnan(line.graph_us) else math.nan, ".0%", "of floor"),
        number(line.wall_us, ".1f", "eager"), number(line.host_us, ".1f", "host"), number(line.error, ".1e", "error"),
        number(line.memory, ".2f", "memory"), *(f"  {name} {value:.3g}" for name, value in line.notes.items()),
    ]  # fmt: skip
    mark = " (default)" if line.is_default else ""
    return f"    {name}{mark}:{''.join(parts)}{'  FAILED ' + line.failed if line.failed else ''}"


def linear(lines: list[Line]) -> Iterator[str]:
    """How the recurrent dual_core grows with the length: microseconds per 1024 tokens at each."""
    for float32 in ("high", "highest"):
        found = {
            line.what: line.graph_us for line in lines if line.is_default and line.what.startswith("recurrent") and line.what.endswith(f" {float32}")
        }
        if found:
            per = {name.split("1x")[1].split()[0]: us for name, us in found.items()}
            yield f"recurrent exact, {float32}, us per 1024 tokens: " + ", ".join(f"{t}: {us * 1024 / int(t):.1f}" for t, us in per.items())


def main() -> int:
    """Measures the parts; 1 where something fails or is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"comma-separated, of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only problems whose op and name contain this")
    parser.add_argument("--candidates", choices=("default", "all"), default="default")
    parser.add_argument("--budget", type=float, default=1.0, metavar="S", help="seconds of graph replays a problem (default 1)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--cold-worker", metavar="OP", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    parts = asked.parts.split(",")
    if set(parts) - set(PARTS):
        parser.error(f"--parts {asked.parts}: known are {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        print("error: no CUDA device; this benchmark is for one", file=sys.stderr)
        return 2
    with torch.no_grad():
        if asked.cold_worker:
            return cold_worker(asked.cold_worker)
        return run(asked, parts)


def run(asked: argparse.Namespace, parts: list[str]) -> int:
    """The parts, one after the other; the figures are written as they come."""
    begin, lines = time.perf_counter(), list[Line]()
    todo = [task for task in tasks(parts) if asked.only in f"{task.op} {task.what}"]
    told: Mapping[str, object] = {}

    def add(more: list[Line]) -> None:
        lines.extend(more)
        for (op, what), group in grouped(more).items():
            ours = shortened(line.who for line in group if line.who.startswith("triton/"))
            names = {line.who: ours.get(line.who, line.who) for line in group}
            floor = f", floor {group[0].floor_us:.2f} us" if not math.isnan(group[0].floor_us) else ""
            print(
                f"[{time.perf_counter() - begin:4.0f} s] {op}: {what}{floor}", *(shown(line, names[line.who]) for line in group), sep="\n", flush=True
            )
        if asked.json is not None:
            asked.json.write_text(json.dumps({**told, "lines": [asdict(line) for line in lines]}, indent=1) + "\n", encoding="utf-8")

    def wanted() -> Iterator[tuple[str, Call, list[Candidate]]]:
        for task in todo:
            call = call_of(task)
            with precision_of(task.float32):
                yield task.op, call, [default(task.op, call), *(offered(task.op, call) if asked.candidates == "all" else ())]
        if "memory" in parts:
            for cell in CELLS:
                if cell.T <= 8192:
                    call = problem(cell)
                    yield "gated_delta_rule", call, offered("gated_delta_rule", call)

    slow = [task.case for task in todo if task.op == "slow_core"]
    if slow and theirs() is not None:
        fla_ahead([Cell(case.B, case.T, case.G, case.H, case.K) for case in slow])
    compiled_s = ahead(wanted())
    top = ceilings()
    told = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": __import__("triton").__version__,
        "titans_backends": tb.__version__, "ceilings": asdict(top), "compiled_s": compiled_s,
    }  # fmt: skip
    print(json.dumps(told), flush=True)
    for task in todo:
        add(measure(task, asked.candidates, top, asked.budget))
        torch.cuda.empty_cache()
    if "memory" in parts:
        add(memories())
    if "cold" in parts:
        add(cold())
    print(*linear(lines), sep="\n")
    for line in lines:
        if line.failed:
            print(f"FAILED {line.op} {line.what}: {line.who}: {line.failed}")
    return 1 if any(line.failed for line in lines) else 0


def grouped(lines: list[Line]) -> dict[tuple[str, str], list[Line]]:
    """By problem, the fastest first."""
    found: dict[tuple[str, str], list[Line]] = {}
    for line in sorted(lines, key=lambda line: line.graph_us if not math.isnan(line.graph_us) else math.inf):
        found.setdefault((line.op, line.what), []).append(line)
    return found


if __name__ == "__main__":
    sys.exit(main())
