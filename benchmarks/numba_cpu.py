"""The Numba backend against the eager one on a CPU, float32: every candidate of both, outputs checked first, samples interleaved in one process.

A cell is one op at one size. `bound` is `get_op(...).bind(...)`, as a user who calls often has it; the other rows are single candidates, without the
library around them. A ratio is the fastest eager candidate's time over the row's (for `bound`, eager's bound op), by medians and by least times.

    python benchmarks/numba_cpu.py [--cell OP:BxTxHxKxV]... [--rounds 30] [--threads N] [--json FILE]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import titans_backends as tb
from titans_backends import registry
from titans_backends.cli.show import Column, Group, console, facts, table
from titans_backends.contracts import contract
from titans_backends.contracts.case import Case, build
from titans_backends.contracts.contract import Call, Contract
from titans_backends.contracts.tolerance import compare, tolerance
from titans_backends.contracts.validate import validate
from titans_backends.facts import signature_of
from titans_backends.machine import detect
from titans_backends.offers import offer
from titans_backends.plan import Outputs

BACKENDS = ("eager", "numba_cpu")
DEFAULT_CELLS = (
    "gated_delta_step:1x1x12x32x32", "gated_delta_step:1x1x32x128x128", "gated_delta_rule:1x128x12x32x32", "gated_delta_rule:1x2048x12x32x32",
    "gated_delta_rule:1x2048x16x128x128", "fast_core:1x2048x12x32x32", "slow_core:1x2048x12x32x32", "uw_transform:1x2048x12x32x32",
    "dual_core:1x2048x12x32x32",
)  # fmt: skip
SAMPLE_S = 2e-3
Function = Callable[[], Outputs]


@dataclass(frozen=True, slots=True)
class Row:
    """One way of running one cell. Times in microseconds, `error` the largest relative one over the outputs."""

    cell: str
    way: str
    median_us: float
    least_us: float
    ratio: float
    ratio_of_least: float
    error: float


def call_of(cell: str) -> tuple[Contract, Call]:
    """The call of a cell: the op's first optional tensors, g and a gate where it has them, and no state to start from."""
    try:
        name, sizes = cell.split(":")
        batch, seq_len, heads, keys, values = map(int, sizes.split("x"))
    except ValueError:
        raise SystemExit(f"--cell {cell}: it must be OP:BxTxHxKxV, as in gated_delta_rule:1x2048x12x32x32") from None
    made = contract(name)
    given = tuple(one for one in ("g", "gate") if one in made.argument_by_name)
    return made, build(made, Case("numba_cpu", batch, seq_len, heads, heads, keys, values, given=given))


def ways(made: Contract, call: Call) -> dict[str, Function]:
    """Everything that races, by backend and label."""
    found: dict[str, Function] = {}
    signature = signature_of(made, call, validate(made, call))
    given = {name: getattr(call, name) for name in made.parameters}
    for name in BACKENDS:
        answer = offer(registry.get(name), signature, detect("cpu"))
        if answer.module is None:
            raise SystemExit(f"{made.name}: {name} refuses: {answer.verdict}")
        bound = tb.get_op(made.name, backend=name).bind(**given)
        found[f"{name} bound"] = lambda bound=bound: bound(**given)
        for candidate in answer.forward:
            remembering = registry.remembering(answer.module)
            again = None if remembering is None else remembering.remember(call, candidate)[1]
            if again is None:
                found[candidate.label] = lambda module=answer.module, candidate=candidate: module.run(call, candidate)
            else:
                found[candidate.label] = lambda again=again: again(made.values(call))
    return found


def error_of(made: Contract, got: Outputs, want: Outputs) -> float:
    """The largest relative error over the outputs; infinite where something is not finite."""
    pairs = [(spec.name, a, b) for spec, a, b in zip(made.outputs, got, want, strict=True) if a is not None and b is not None]
    return max(max(d.maximum, d.rms) for d in (compare(*pair) for pair in pairs))


def timed(functions: dict[str, Function], rounds: int) -> dict[str, list[float]]:
    """Microseconds per call of each, in turns; the order turns around from round to round."""
    repeats = {}
    for name, function in functions.items():
        function()
        start = time.perf_counter()
        function()
        repeats[name] = max(1, int(SAMPLE_S / max(time.perf_counter() - start, 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds):
        for name in list(functions)[:: 1 if turn % 2 == 0 else -1]:
            function, count = functions[name], repeats[name]
            start = time.perf_counter()
            for _ in range(count):
                function()
            times[name].append(1e6 * (time.perf_counter() - start) / count)
    return times


def measure(cell: str, rounds: int) -> list[Row]:
    """One cell: checked, then timed."""
    made, call = call_of(cell)
    functions = ways(made, call)
    want = made.reference(made.to(call, torch.float64))
    errors = {name: error_of(made, function(), want) for name, function in functions.items()}
    times = timed(functions, rounds)
    eager = [name for name in functions if name.startswith("eager/")]
    best, least = min(statistics.median(times[name]) for name in eager), min(min(times[name]) for name in eager)
    rows = []
    for name, own in times.items():
        bound = name.endswith(" bound")
        over = statistics.median(times["eager bound"]) if bound else best
        over_least = min(times["eager bound"]) if bound else least
        rows.append(Row(cell, name, statistics.median(own), min(own), over / statistics.median(own), over_least / min(own), errors[name]))
    return rows


def cells(row: Row) -> list[str]:
    """A row for people."""
    return [row.way, f"{row.median_us:.1f}", f"{row.least_us:.1f}", f"{row.ratio:.2f}", f"{row.ratio_of_least:.2f}", f"{row.error:.1e}"]


def main() -> int:
    """Prints the table; 1 where an output is outside the tolerance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", action="append", metavar="OP:BxTxHxKxV", help="may be repeated (default: nine cells)")
    parser.add_argument("--rounds", type=int, default=30, metavar="N", help="samples of each way (default 30)")
    parser.add_argument("--threads", type=int, metavar="N", help="torch's threads (default: torch's own)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    asked = parser.parse_args()
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    with torch.no_grad():
        rows = [row for cell in asked.cell or DEFAULT_CELLS for row in measure(cell, asked.rounds)]
    machine, out = detect("cpu"), console()
    titles = ("median us", "least us", "× eager", "× eager (least)", "error")
    order = list(dict.fromkeys(row.cell for row in rows))
    groups = [Group(cell, [cells(row) for row in rows if row.cell == cell]) for cell in order]
    table(out, [Column("way", "left"), *(Column(title, "right") for title in titles)], groups)
    told = {
        "machine": machine.name, "isa": machine.isa or "", "threads": str(torch.get_num_threads()), "rounds": str(asked.rounds),
        "titans_backends": tb.__version__, "torch": torch.__version__, "numba": importlib.metadata.version("numba"),
    }  # fmt: skip
    facts(out, list(told.items()))
    if asked.json is not None:
        asked.json.write_text(json.dumps({**told, "rows": [asdict(row) for row in rows]}, indent=1) + "\n", encoding="utf-8")
    wrong = sorted({f"{row.cell} {row.way}" for row in rows if not row.error <= tolerance(torch.float32).outputs})
    if wrong:
        print(f"wrong: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
