"""What the library itself costs on the host: dispatch over the bound op, the bound op over the bare kernel, and its import beyond torch's.

The kernel does nothing and returns tensors made beforehand, so that the differences are the library's. Blocks of calls of each way are
interleaved; a figure is the median over blocks of the time per call, beside the least. Imports are timed in fresh processes.

    python benchmarks/dispatch.py [--blocks 200] [--calls 200] [--imports 9] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import torch

import titans_backends as tb
from titans_backends.cli.show import Column, Group, console, facts, table
from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.case import Case, build

AIM_US, AIM_IMPORT_S = 5.0, 0.3
OPS = ("fused_uw", "gated_delta_rule", "dual_core")
NAME = "does_nothing"
IMPORT = "import time; a = time.perf_counter(); import torch; b = time.perf_counter(); import titans_backends; c = time.perf_counter(); print(b - a, c - b)"


@dataclass(frozen=True, slots=True)
class Way:
    """One way of calling, in microseconds per call."""

    op: str
    way: str
    median_us: float
    least_us: float


@dataclass(frozen=True, slots=True)
class Cost:
    """What one way costs over another, in microseconds per call: the median of the differences within a block, and that of the least times."""

    median_us: float
    least_us: float

    @staticmethod
    def between(more: list[float], less: list[float]) -> Cost:
        """From the same blocks' times."""
        return Cost(statistics.median(a - b for a, b in zip(more, less, strict=True)), min(more) - min(less))

    def __str__(self) -> str:
        return f"{self.median_us:.2f} µs, {self.least_us:.2f} between the least"


@dataclass(frozen=True, slots=True)
class Imports:
    """Seconds in fresh processes, medians; `library_s` is what `import titans_backends` adds after `import torch`."""

    processes: int
    torch_s: float
    library_s: float
    library_least_s: float


def register_idle_backend() -> None:
    """A backend whose kernels return the same tensors every time, registered as a third party's is, forced by name below."""
    modules = {}
    for op in OPS:
        contract = CONTRACTS[op]
        module = ModuleType(f"benchmark_{NAME}.{op}")
        answer = contract.reference(call_of(op))
        functions: Mapping[str, Callable[..., object]] = {
            "supports": lambda signature, machine: tb.ACCEPTED,
            "candidates": lambda signature, machine: [tb.Candidate(NAME, "idle")],
            "run": lambda call, candidate, answer=answer: answer,
        }
        for name, function in functions.items():
            setattr(module, name, function)
        sys.modules[module.__name__] = module
        modules[op] = module.__name__
    package = ModuleType(f"benchmark_{NAME}")
    backend = tb.Backend(NAME, "returns what was made beforehand", tb.CONTRACT_VERSION, modules, simplicity=99, rank={"cpu": -1})
    setattr(package, "BACKEND", backend)  # noqa: B010  (a module has no such field)
    sys.modules[package.__name__] = package
    os.environ["TITANS_BACKENDS_PLUGINS"] = package.__name__
    tb.reset()


def call_of(op: str) -> object:
    """The smallest call of an op's first variant: one token, one head."""
    variant = CONTRACTS[op].variants[0]
    return build(CONTRACTS[op], Case("dispatch", 1, 1, 1, 1, 8, 8, options=variant.options, given=variant.given))


def ways(op: str) -> dict[str, Callable[[], object]]:
    """The same call by the op, by its bound form, and by the kernel's own function."""
    contract, call = CONTRACTS[op], call_of(op)
    required = [getattr(call, a.name) for a in contract.arguments if not a.optional]
    optional = {a.name: getattr(call, a.name) for a in contract.arguments if a.optional}
    options = {o.name: getattr(call, o.name) for o in contract.options if getattr(call, o.name) != o.default}
    given = {**{name: value for name, value in optional.items() if value is not None}, **options}
    chosen = tb.get_op(op)
    bound = chosen.bind(*required, **given)
    if bound.choice.pair.forward.backend != NAME:
        raise SystemExit(f"{op}: {bound.choice.pair.label} was chosen in place of the idle kernel; is a switch or a tuned table in force?")
    run, candidate = sys.modules[f"benchmark_{NAME}.{op}"].run, bound.choice.pair.forward
    return {
        "get_op(name)(...)": lambda: tb.get_op(op)(*required, **given),
        "op(...)": lambda: chosen(*required, **given),
        "bound(...)": lambda: bound(*required, **given),
        "kernel(call)": lambda: run(call, candidate),
    }


def timed(functions: Mapping[str, Callable[[], object]], blocks: int, calls: int) -> dict[str, list[float]]:
    """Microseconds per call of each block; the order of the ways turns around from block to block."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for block in range(blocks + 2):  # the first two warm up
        for name in list(functions)[:: 1 if block % 2 else -1]:
            function = functions[name]
            start = time.perf_counter()
            for _ in range(calls):
                function()
            if block >= 2:
                times[name].append(1e6 * (time.perf_counter() - start) / calls)
    return times


def imports(processes: int) -> Imports:
    """`import torch`, then `import titans_backends`, in fresh processes; one more before them, which writes the byte code."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path[1:]))}
    env.pop("TITANS_BACKENDS_PLUGINS", None)
    pairs = []
    for _ in range(processes + 1):
        done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True, env=env)
        pairs.append([float(seconds) for seconds in done.stdout.split()])
    of_torch, of_library = zip(*pairs[1:], strict=True)
    return Imports(processes, statistics.median(of_torch), statistics.median(of_library), min(of_library))


def main() -> int:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=200, metavar="N", help="blocks of each way (default 200)")
    parser.add_argument("--calls", type=int, default=200, metavar="N", help="calls in a block (default 200)")
    parser.add_argument("--imports", type=int, default=9, metavar="N", help="processes (default 9)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    asked = parser.parse_args()
    register_idle_backend()
    rows: list[Way] = []
    dispatch: dict[str, Cost] = {}
    binding: dict[str, Cost] = {}
    with torch.no_grad():
        for op in OPS:
            times = timed(ways(op), asked.blocks, asked.calls)
            rows += [Way(op, name, statistics.median(found), min(found)) for name, found in times.items()]
            dispatch[op] = Cost.between(times["get_op(name)(...)"], times["bound(...)"])
            binding[op] = Cost.between(times["bound(...)"], times["kernel(call)"])
    found = imports(asked.imports)

    out = console()
    groups = [Group(op, [[row.way, f"{row.median_us:.2f}", f"{row.least_us:.2f}"] for row in rows if row.op == op]) for op in OPS]
    table(out, [Column("an idle kernel called by", flexible=True), Column("median µs", "right"), Column("least µs", "right")], groups)
    out.print()
    for op in OPS:
        out.print(f"{op}: dispatch over the bound op {dispatch[op]} (the aim is {AIM_US:g}); the bound op over the kernel {binding[op]}")
    out.print(
        f"import titans_backends after torch: {found.library_s:.3f} s, least {found.library_least_s:.3f} s (the aim is at most {AIM_IMPORT_S:g}); "
        f"import torch: {found.torch_s:.2f} s; medians of {found.processes} processes\n"
    )
    told = {"machine": tb.detect("cpu").name, "torch": torch.__version__, "python": sys.version.split()[0], "titans_backends": tb.__version__}
    facts(out, list(told.items()))
    if asked.json is not None:
        costs = {"dispatch_us": {op: asdict(cost) for op, cost in dispatch.items()}, "binding_us": {op: asdict(cost) for op, cost in binding.items()}}
        figures = {**costs, "imports": asdict(found), "ways": [asdict(row) for row in rows]}
        asked.json.write_text(json.dumps({**told, **figures}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
