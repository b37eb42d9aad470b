"""The documents' table: the encoder stack in every mode against the same stack in plain eager torch, and the second document's seven steps as rows.

    python benchmarks/layer_times.py [--json FILE] [--seconds 240] [--quick] [--modes flat,loop] [--lengths 128,512] [--precisions bfloat16] [--device cpu]

Six layers of width 384, 12 heads of 32, feed-forward 1536, batch 1, no gradients. `plain` is benchmarks/plain_layer.py, some sixty launches a layer and a
Python loop over chunks; in bfloat16 under autocast, as the original runs. `ours` is titans_backends.nn.TitansEncoder on what dispatch chooses here, called
eagerly and replayed from a CUDA graph; in bfloat16 a model of bfloat16. Both load one state dict, and every output is compared with the plain stack in
float64 before it is timed: what is wrong has no time, and where it is ours the exit status is 1. A time is no failure.

Kernels are compiled first, by a process for each mode and precision. The figures are written to --json as they come; what does not fit into --seconds is
said, not left out. Tables and picture from a file: python benchmarks/layer_report.py.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from ladder import op_core
from layer_report import Report, Row, machine_facts, show
from plain_layer import LADDER, PLANS, PlainEncoder, Plan
from torch import Tensor, nn

import titans_backends as tb
from titans_backends.nn import TitansEncoder, TitansEncoderConfig
from titans_backends.nn.forms import Coupling, Mode

LENGTHS = (128, 512, 2048, 8192, 65536, 256, 1024, 4096, 16384, 32768)
"""In the order of measuring: should the time run out, the table is thin and not short."""
LADDER_LENGTHS = (128, 512, 2048, 8192)
QUICK = (128, 512, 2048)
PRECISIONS = ("highest", "high", "bfloat16")
LIMITS = {"highest": 2e-4, "high": 4e-2, "bfloat16": 2e-1}
"""Of the relative root mean square error of the stack's output. The lam transform of flat and loop amplifies rounding some ten times (bfloat16, flat: 0.09)."""
LONG_S = 0.5
"""A call that takes longer is timed once; one that takes four times as long is timed by its first run, all shorter lengths being its warm-up."""
Run = Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the stack."""

    d_model: int = 384
    num_heads: int = 12
    num_layers: int = 6
    d_ff: int = 1536


@dataclass(frozen=True, slots=True)
class Cell:
    """One line of the table, or one of the ladder's."""

    part: str
    mode: str
    tokens: int

    def __str__(self) -> str:
        return f"{self.part} {self.mode} {self.tokens}"


@contextlib.contextmanager
def precision_of(name: str) -> Iterator[None]:
    """torch's float32 matmul precision, for a while; cuDNN's with it. bfloat16 leaves float32's at highest."""
    before, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if name == "high" else "highest")
    torch.backends.cudnn.allow_tf32 = name == "high"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = convolutions


class Bench:
    """The stacks of one device and one size, and how they are timed."""

    def __init__(self, device: str, sizes: Sizes, stop_at: float) -> None:
        self.device, self.sizes, self.stop_at = torch.device(device), sizes, stop_at
        self.cuda = self.device.type == "cuda"

    def encoder(self, mode: str) -> nn.Module:
        """Ours, float32, seed 0: TitansEncoder without a vocabulary."""
        torch.manual_seed(0)
        s, coupling = self.sizes, "batch" if mode == "loop" else None
        config = TitansEncoderConfig(0, s.d_model, s.num_layers, s.num_heads, s.d_ff, mode=cast(Mode, mode), coupling=cast(Coupling | None, coupling))
        encoder: nn.Module = TitansEncoder(config).to(self.device).eval().requires_grad_(False)
        return encoder

    def plain(self, plan: Plan, state_dict: dict[str, Tensor] | None = None, *, ops: bool = False) -> PlainEncoder:
        """The plain stack, with the parameters of ours or, for the ladder, of seed 0; its memory by the ops where asked for."""
        torch.manual_seed(0)
        s = self.sizes
        encoder = PlainEncoder(s.d_model, s.num_heads, s.num_layers, s.d_ff, plan, core=op_core if ops else None)
        if state_dict is not None:
            encoder.load_state_dict(state_dict, strict=True)
        return encoder.to(self.device).eval().requires_grad_(False)

    def inputs(self, tokens: int) -> Tensor:
        """x `[1, T, d_model]`, normal numbers."""
        source = torch.Generator().manual_seed(1)
        return torch.randn(1, tokens, self.sizes.d_model, generator=source).to(self.device)

    def measure(self, row: Row, run: Run, want: Tensor, *, graph: bool, budget_s: float) -> None:
        """Checks one way to compute a cell, then times it; a failure is noted in the row."""
        try:
            if row.who == "ours":
                run()  # compiles what has not been compiled yet
            start, before = self.clock(), self.allocated()
            got = run()
            first_s = self.clock() - start
            row.peak_mib = self.peak_mib(before)
            if not self.right(row, got, want):
                return
            del got
            if first_s < LONG_S:  # without what a first call leaves behind: a matrix product's workspace, a kernel's tables
                before = self.allocated()
                run()
                row.peak_mib = self.peak_mib(before)
            row.eager_ms = 1e3 * first_s if first_s > 4 * LONG_S else self.eager_ms(run, budget_s)
            if graph and self.cuda:
                self.in_a_graph(row, run, want, budget_s)
        except Exception as error:
            if isinstance(error, torch.AcceleratorError):
                torch.cuda.synchronize()  # a capture that failed harms nothing; a device that has faulted says so again
            row.failed = f"{type(error).__name__}: {str(error)[:300]}"
        finally:
            if self.cuda:
                torch.cuda.empty_cache()

    def right(self, row: Row, got: Tensor, want: Tensor) -> bool:
        """Whether an output is within its precision's limit; the row keeps the largest error, and what is wrong."""
        error = relative_error(got, want)
        row.error = error if not row.error >= error else row.error
        if error <= LIMITS[row.precision]:
            return True
        row.failed = f"wrong: relative error {error:.1e}, where {LIMITS[row.precision]:.0e} is allowed"
        return False

    def warmed_up(self) -> float:
        """What an eager `torch.add` costs here in microseconds, after half a second of work: the host's clock and caches are then those of later cells."""
        x = torch.zeros(16, device=self.device)
        plain, given, start = self.plain(PLANS["flat"]), self.inputs(128), self.clock()
        while time.perf_counter() - start < 0.5:
            plain(given)
        start = self.clock()
        for _ in range(10_000):
            torch.add(x, x)
        return 100 * (self.clock() - start)

    def clock(self) -> float:
        """Seconds, with the device idle."""
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def allocated(self) -> int:
        """Bytes in use now; the peak is counted from here."""
        if not self.cuda:
            return 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak_mib(self, before: int) -> float:
        """MiB above what there was before the call: parameters and x do not count, the output does. NaN on a CPU."""
        if not self.cuda:
            return math.nan
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def eager_ms(self, run: Run, budget_s: float) -> float:
        """The wall time of a call, several in a row without waiting in between; the median of five series."""
        start = self.clock()
        run()
        once = self.clock() - start
        if once > LONG_S:
            return 1e3 * once
        count, series = max(1, min(50, int(budget_s / 5 / once))), []
        for _ in range(5 if once < LONG_S / 5 else 3):
            start = self.clock()
            for _ in range(count):
                run()
            series.append((self.clock() - start) / count)
        return 1e3 * statistics.median(series)

    def in_a_graph(self, row: Row, run: Run, want: Tensor, budget_s: float) -> None:
        """Captures, checks what a replay leaves, and takes the median of replays, each between two events; what stands in the cache stays there, as in a loop."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with tb.policy(launch="graph"):
            with torch.cuda.stream(side):
                run()
                run()
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                got = run()
        got.fill_(math.nan)
        graph.replay()
        if not self.right(row, got, want):
            return
        start = self.clock()
        graph.replay()
        once = self.clock() - start
        times = []
        for _ in range(max(3, min(40, int(budget_s / max(once, 1e-5))))):
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            graph.replay()
            last.record()
            last.synchronize()
            times.append(first.elapsed_time(last))
        row.graph_ms = float(statistics.median(times))

    def table_cell(self, cell: Cell, precisions: Sequence[str], budget_s: float) -> Iterator[Row]:
        """A mode at a length: plain and ours in every precision."""
        ours = self.encoder(cell.mode)
        state_dict = ours.state_dict()
        plain = self.plain(PLANS[cell.mode], state_dict)
        x = self.inputs(cell.tokens)
        with precision_of("highest"):
            want = self.plain(PLANS[cell.mode], state_dict).double()(x.double())
        slow = ""
        for precision in precisions:
            with precision_of(precision):
                row = Row(cell.part, cell.mode, cell.tokens, precision, "plain")
                if time.perf_counter() > self.stop_at:
                    row.failed = "not measured: out of time"
                elif slow:
                    row.note = f"not measured: a call takes seconds, and was measured in {slow}"
                else:
                    self.measure(row, self.forward(plain, x, precision), want, graph=False, budget_s=budget_s)
                    slow = precision if row.eager_ms > 4e3 * LONG_S else ""
                yield row
                row = Row(cell.part, cell.mode, cell.tokens, precision, "ours")
                model, given = (copy.deepcopy(ours).bfloat16(), x.bfloat16()) if precision == "bfloat16" else (ours, x)
                self.measure(row, lambda model=model, given=given: model(inputs_embeds=given, pool=False).tokens, want, graph=True, budget_s=budget_s)  # type: ignore[misc]
                yield row

    def forward(self, plain: PlainEncoder, x: Tensor, precision: str) -> Run:
        """The plain stack in a precision."""

        def run() -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                return cast(Tensor, plain(x))

        return run

    def ladder_cell(self, cell: Cell, budget_s: float) -> Iterator[Row]:
        """The documents' steps at a length, float32 highest: the memory in plain torch, and by the registry's ops."""
        x = self.inputs(cell.tokens)
        for index, step in enumerate(LADDER):
            with precision_of("highest"):
                plain = self.plain(step.plan)
                want = self.plain(step.plan).double()(x.double())
                for who, stack in (("plain", plain), ("ours", self.plain(step.plan, ops=True))):
                    row = Row(cell.part, step.name, cell.tokens, "highest", who, step=index, note=step.note)
                    self.measure(row, lambda stack=stack: stack(x), want, graph=who == "ours", budget_s=budget_s)  # type: ignore[misc]
                    yield row


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||; NaN where got is not finite."""
    error = float((got.double() - want).norm() / want.norm())
    return error if math.isfinite(error) else math.nan


def cells(modes: Sequence[str], lengths: Sequence[int], ladder: Sequence[int]) -> Iterator[Cell]:
    """In the order of measuring: the lengths of the first half, the ladder, the others."""
    first = [tokens for tokens in lengths if tokens in LENGTHS[:5]]
    for tokens in first:
        yield from (Cell("table", mode, tokens) for mode in modes)
    yield from (Cell("ladder", "steps", tokens) for tokens in ladder)
    for tokens in lengths:
        if tokens not in first:
            yield from (Cell("table", mode, tokens) for mode in modes)


def warm(asked: argparse.Namespace, modes: Sequence[str], precisions: Sequence[str]) -> float:
    """Has processes of their own run every cell once, so that the kernels lie compiled on disk; returns the seconds. A failure is said here and measured later."""
    start = time.perf_counter()
    jobs = [["--worker", f"{mode}/{precision}"] for mode in modes for precision in precisions] + [["--worker", "ladder"]] * asked.ladder
    common = [sys.executable, __file__, "--device", asked.device, "--lengths", ",".join(map(str, asked.lengths)), "--stack", asked.stack]
    running = [(job[1], subprocess.Popen([*common, *job], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)) for job in jobs]
    for name, process in running:
        try:
            _, told = process.communicate(timeout=max(1.0, start + asked.warm_seconds - time.perf_counter()))
        except subprocess.TimeoutExpired:
            process.kill()
            _, told = process.communicate()
            told = f"killed after {asked.warm_seconds:.0f} s; what it has compiled is kept\n{told}"
        if process.returncode:
            print(f"compiling ahead, {name}: {(told.strip().splitlines() or ['no message'])[-1][:300]}", file=sys.stderr, flush=True)
    return time.perf_counter() - start


def worker(bench: Bench, what: str, lengths: Sequence[int]) -> int:
    """Runs what `warm` asks for: every length once, eagerly and as a graph would."""
    runs: list[tuple[Callable[[Tensor], object], Tensor, str]] = []
    if what == "ladder":
        stacks = [bench.plain(step.plan, ops=True) for step in LADDER]
        runs += [(stack, bench.inputs(tokens), "highest") for tokens in LADDER_LENGTHS if tokens in lengths for stack in stacks]
    else:
        mode, precision = what.split("/")
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        model = bench.encoder(mode).to(dtype)
        runs += [(lambda x: model(inputs_embeds=x, pool=False), bench.inputs(tokens).to(dtype), precision) for tokens in sorted(lengths)]
    for run, x, precision in runs:
        with precision_of(precision):
            run(x)
            with tb.policy(launch="graph"):
                run(x)
            bench.clock()
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes; 1 where ours is wrong or raises, 2 where there is no device."""
    asked = options(arguments)
    begin = time.perf_counter()
    if asked.device == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA device; for a small run on the CPU type: --device cpu --lengths 64 --stack 64,2,1,128", file=sys.stderr)
        return 2
    sizes = Sizes(*(int(part) for part in asked.stack.split(",")))
    bench = Bench(asked.device, sizes, begin + asked.seconds)
    with torch.no_grad():
        if asked.worker:
            return worker(bench, asked.worker, asked.lengths)
        compiled_s = warm(asked, asked.modes, asked.precisions) if asked.device == "cuda" and asked.warm_seconds > 0 else 0.0
        print(f"kernels compiled in {compiled_s:.0f} s", file=sys.stderr, flush=True)
        report = Report({**machine_facts(asked.device), "stack": asdict(sizes), "compiled_s": compiled_s, "add_us": bench.warmed_up()})
        ladder = [tokens for tokens in LADDER_LENGTHS if tokens in asked.lengths] if asked.ladder else []
        for cell in cells(asked.modes, asked.lengths, ladder):
            if time.perf_counter() > bench.stop_at:
                report.not_measured.append(str(cell))
                continue
            rows = bench.ladder_cell(cell, asked.budget) if cell.part == "ladder" else bench.table_cell(cell, asked.precisions, asked.budget)
            for row in rows:
                report.rows.append(row)
                print(f"[{time.perf_counter() - begin:4.0f} s] {row}", file=sys.stderr, flush=True)
                if asked.json is not None:
                    report.write(asked.json)
    report.facts["seconds"] = time.perf_counter() - begin
    if asked.json is not None:
        report.write(asked.json)
    show(report)
    return 1 if any(row.failed and row.who == "ours" for row in report.rows) else 0


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", default=",".join(PLANS), help=f"comma-separated, of {', '.join(PLANS)} (default: all)")
    parser.add_argument("--lengths", default="", metavar="N,N", help="tokens (default 128 to 65536, doubling)")
    parser.add_argument("--precisions", default=",".join(PRECISIONS), help=f"of {', '.join(PRECISIONS)} (default: all)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--stack", default="384,12,6,1536", metavar="D,H,L,F", help="width, heads, layers, feed-forward (default 384,12,6,1536)")
    parser.add_argument("--seconds", type=float, default=240.0, metavar="S", help="for everything, compiling included (default 240)")
    parser.add_argument(
        "--warm-seconds", type=float, default=90.0, metavar="S", help="for compiling ahead at most (default 90); 0: compile as it runs"
    )
    parser.add_argument("--budget", type=float, default=0.15, metavar="S", help="for the timing of one way to compute one cell (default 0.15)")
    parser.add_argument("--quick", action="store_true", help=f"lengths {', '.join(map(str, QUICK))} only")
    parser.add_argument("--no-ladder", dest="ladder", action="store_false", help="leave out the seven steps")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    asked.modes, asked.precisions = asked.modes.split(","), asked.precisions.split(",")
    for name, given, known in (("--modes", asked.modes, tuple(PLANS)), ("--precisions", asked.precisions, PRECISIONS)):
        if set(given) - set(known):
            parser.error(f"{name} {','.join(given)}: known are {', '.join(known)}")
    asked.lengths = [int(part) for part in asked.lengths.split(",")] if asked.lengths else list(QUICK if asked.quick else LENGTHS)
    return asked


if __name__ == "__main__":
    sys.exit(main())
