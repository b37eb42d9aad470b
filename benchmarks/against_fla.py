"""gated_delta_rule's forward on the Triton backend against FLA's Triton path, bf16, on a GPU: the cells of the peers' table, interleaved, checked first.

    python benchmarks/against_fla.py [--cells 1x8192,12/12] [--candidates default|best|all] [--json FILE]

Same inputs: unit q and k, beta in (0, 1), a decay as Mamba's layers begin with. Each cell's outputs and final states are compared with the
float64 chunk form on the first and the last head before anything is timed; exit status 1 where ours is wrong. `default`: what a plain call
gets. `best`: every candidate is raced, the best one and the default are reported. `all`: every candidate is reported. FLA comes from
`pip install fla-core==0.6.0`, or a folder named in PYTHONPATH; without it ours is measured alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import cast

import torch
from device_timing import Ceilings, Eager, Race, ahead, bound, ceilings, default, eager, forced, memory, module_of, offered, shortened, work
from torch import Tensor

import titans_backends as tb
from titans_backends.backend import Candidate
from titans_backends.contracts.gated_delta_rule import GatedDeltaRule
from titans_backends.contracts.slow_core import SlowCore
from titans_backends.contracts.slow_core import reference as slow_reference
from titans_backends.contracts.uw_transform import UWTransform
from titans_backends.contracts.uw_transform import reference as uw_reference

MISSING = "fla is not importable; ours is measured alone. Type: pip install --no-deps fla-core==0.6.0 einops, or put a folder with both in PYTHONPATH"
PATH = {"FLA_FLASH_QLA": "0", "FLA_TILELANG": "0", "FLA_DISABLE_BACKEND_DISPATCH": "1"}
"""What keeps FLA on its Triton kernels; it reads them when it is imported, and at calls."""
AIM = 1.6
CHUNK = 64
LIMIT = 2e-2
Rule = Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Cell:
    """One problem: sequences, tokens of each, heads of q and k, heads of v, head_dim."""

    B: int
    T: int
    G: int
    H: int
    D: int

    def __str__(self) -> str:
        return f"{self.B}x{self.T} {self.G}/{self.H} D{self.D}"


CELLS = tuple(
    Cell(B, T, G, H, D)
    for B, T, G, H, D in (
        (1, 8192, 2, 8, 128), (1, 8192, 16, 32, 128), (1, 8192, 16, 64, 128), (1, 8192, 12, 12, 32), (8, 1024, 16, 32, 128),
        (1, 512, 2, 8, 128), (1, 512, 16, 32, 128), (1, 512, 16, 64, 128),
        (1, 2048, 2, 8, 128), (1, 2048, 16, 32, 128), (1, 2048, 16, 64, 128),
        (1, 32768, 2, 8, 128), (1, 32768, 16, 32, 128), (1, 32768, 16, 64, 128),
    )
)  # fmt: skip
"""8192 tokens first: FLA tunes itself at its first call, and keeps the choice for every length."""


@dataclass(slots=True)
class Timed:
    """One way to run a cell. Microseconds; errors are relative L2 against float64; memory is the peak over inputs plus outputs."""

    name: str
    o_error: float = math.nan
    state_error: float = math.nan
    graph_us: float = math.nan
    wall_us: float = math.nan
    host_us: float = math.nan
    memory: float = math.nan
    failed: str = ""


@dataclass(slots=True)
class Row:
    """One cell's results, ours by candidate."""

    cell: str
    floor_us: float
    default: str
    ours: dict[str, Timed] = field(default_factory=dict)
    fla: Timed | None = None

    @property
    def best(self) -> Timed | None:
        """The fastest of ours in a graph."""
        return min((one for one in self.ours.values() if not math.isnan(one.graph_us)), key=lambda one: one.graph_us, default=None)


def problem(cell: Cell, seed: int = 0, device: str = "cuda") -> GatedDeltaRule:
    """Unit q and k; A ~ U(0, 16), dt ~ logU(1e-3, 1e-1), g = -A softplus(0.5 x + inverse softplus(dt)) with A and dt a head's own."""
    source = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source, device=device)

    def unit(*shape: int) -> Tensor:
        return torch.nn.functional.normalize(normal(*shape), dim=-1).to(torch.bfloat16)

    q, k = unit(cell.B, cell.T, cell.G, cell.D), unit(cell.B, cell.T, cell.G, cell.D)
    v, beta = normal(cell.B, cell.T, cell.H, cell.D).to(torch.bfloat16), normal(cell.B, cell.T, cell.H).sigmoid()
    rate = 16 * torch.rand(cell.H, generator=source, device=device)
    step = torch.exp(math.log(1e-3) + (math.log(1e-1) - math.log(1e-3)) * torch.rand(cell.H, generator=source, device=device))
    shift = torch.log(torch.expm1(step))
    g = -rate * torch.nn.functional.softplus(0.5 * normal(cell.B, cell.T, cell.H) + shift)
    return GatedDeltaRule(q, k, v, beta, g, output_final_state=True)


def exact(call: GatedDeltaRule) -> tuple[Tensor, Tensor]:
    """o and the final state of the first and the last head in float64: the chunk form from the contracts of u, w and the recurrence."""
    heads, keys = [0, call.v.shape[2] - 1], [0, call.q.shape[2] - 1]
    assert call.g is not None
    q, k = (x[:, :, keys].double() for x in (call.q, call.k))
    v, beta, g = (x[:, :, heads].double() for x in (call.v, call.beta, call.g))
    u, w = uw_reference(UWTransform(k, v, beta, g, chunk_size=CHUNK))
    assert u is not None
    assert w is not None
    o, state = slow_reference(SlowCore(q, k, u, w, g=g, chunk_size=CHUNK, scale=q.shape[-1] ** -0.5, output_final_state=True))
    assert o is not None
    assert state is not None
    return o, state


def errors(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Relative L2 errors of o and of the final state on the first and the last head; infinite where something is not finite."""
    heads = [0, got[0].shape[2] - 1]
    o, state = got[0][:, :, heads].double(), got[1][:, heads].double()
    found = [float((a - b).norm() / b.norm()) if bool(torch.isfinite(a).all()) else math.inf for a, b in zip((o, state), want, strict=True)]
    return found[0], found[1]


def theirs() -> Callable[..., tuple[Tensor, Tensor]] | None:
    """FLA's function, its autotuner hurried; None where it is not importable."""
    os.environ.update(PATH)
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError as error:
        print(f"{MISSING}\n({error})", file=sys.stderr)
        return None
    hurry()
    return cast("Callable[..., tuple[Tensor, Tensor]]", chunk_gated_delta_rule)


def hurry(share: tuple[int, int] | None = None) -> None:
    """Triton's autotuner, which FLA uses, measures a configuration for a few ms; with a share it only compiles every n-th one."""
    from triton.runtime.autotuner import Autotuner
    from triton.testing import do_bench

    def measured(run: Callable[[], object], quantiles: object = None) -> object:
        if share is None:
            return do_bench(run, warmup=3, rep=12, quantiles=quantiles)
        run()
        return [1.0, 1.0, 1.0]

    Autotuner.do_bench = property(lambda self: measured)
    if share is not None:
        index, count = share
        pruned = Autotuner.prune_configs

        def mine(self: object, kwargs: Mapping[str, object]) -> list[object]:
            found = pruned(self, kwargs)
            return found[index::count] or found[:1]

        Autotuner.prune_configs = mine


def compile_fla(cell: Cell, index: int, count: int) -> str:
    """In a process of its own: every n-th configuration of FLA's kernels for a cell's heads, into Triton's cache on disk."""
    function = theirs()
    if function is None:
        return "fla is not importable"
    hurry((index, count))
    try:
        x = problem(cell)
        function(x.q, x.k, x.v, x.g, x.beta, output_final_state=True)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{cell}: {type(error).__name__}: {str(error)[:200]}"
    return ""


def fla_ahead(cells: list[Cell], shares: int = 4) -> float:
    """Compiles FLA's kernels for every combination of heads, side by side; returns the seconds."""
    start = time.perf_counter()
    kinds = {(cell.G, cell.H, cell.D): Cell(1, 1024, cell.G, cell.H, cell.D) for cell in cells}
    jobs = [(cell, index) for cell in kinds.values() for index in range(shares)]
    workers = max(1, min(14, (os.cpu_count() or 2) - 1))
    with ProcessPoolExecutor(workers, get_context("spawn"), max_tasks_per_child=1) as pool:
        for line in filter(None, pool.map(compile_fla, [c for c, _ in jobs], [i for _, i in jobs], [shares] * len(jobs))):
            print(f"fla: {line}", file=sys.stderr)
    return time.perf_counter() - start


def measure(cell: Cell, asked: str, fla: Callable[..., tuple[Tensor, Tensor]] | None, top: Ceilings, budget_s: float) -> Row:
    """One cell: checked, raced in graphs, then called eagerly; a candidate that fails or is wrong is a line and no time."""
    call = problem(cell)
    module, chosen = module_of("gated_delta_rule"), default("gated_delta_rule", call)
    candidates = {one.label: one for one in (chosen, *(offered("gated_delta_rule", call) if asked != "default" else ()))}
    row = Row(str(cell), top.floor_us(work("gated_delta_rule", call), torch.bfloat16), chosen.label)
    want, race = exact(call), Race()

    def admit(name: str, run: Rule) -> Timed:
        timed = Timed(name)
        try:
            timed.o_error, timed.state_error = errors(run(), want)
            if max(timed.o_error, timed.state_error) > LIMIT:
                timed.failed = f"wrong: o {timed.o_error:.1e}, state {timed.state_error:.1e}"
            else:
                timed.memory = memory(run, call, "gated_delta_rule")
                race.add(name, run)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            timed.failed = f"{type(error).__name__}: {str(error)[:200]}"
        return timed

    for label, candidate in candidates.items():
        row.ours[label] = admit(label, lambda candidate=candidate: module.run(call, candidate))  # type: ignore[misc]
    if fla is not None:
        row.fla = admit("fla", lambda: fla(call.q, call.k, call.v, call.g, call.beta, output_final_state=True))
    for name, us in race.times(budget_s).items():
        (row.fla if name == "fla" and row.fla is not None else row.ours[name]).graph_us = us
    if asked == "best":
        kept = {chosen.label, *([row.best.name] if row.best is not None else [])}
        row.ours = {label: one for label, one in row.ours.items() if label in kept or one.failed}
    for label, one in row.ours.items():
        if not one.failed and (asked != "all" or one is row.best or label == chosen.label):
            note_eager(one, bound_to(candidates[label], call))
    if row.fla is not None and not row.fla.failed:
        note_eager(row.fla, lambda: fla(call.q, call.k, call.v, call.g, call.beta, output_final_state=True))  # type: ignore[misc]
    return row


def wanted(cells: list[Cell], asked: str) -> Iterator[tuple[str, GatedDeltaRule, list[Candidate]]]:
    """What will run, a cell after the other, so that no more than one cell's inputs are there at once."""
    for cell in cells:
        call = problem(cell)
        yield "gated_delta_rule", call, [default("gated_delta_rule", call), *(offered("gated_delta_rule", call) if asked != "default" else ())]


def bound_to(candidate: Candidate, call: GatedDeltaRule) -> Callable[[], object]:
    """The bound op with one candidate in it."""
    with forced("gated_delta_rule", candidate):
        return bound("gated_delta_rule", call)


def note_eager(timed: Timed, run: Callable[[], object]) -> None:
    """Adds the eager times."""
    found: Eager = eager(run)
    timed.wall_us, timed.host_us = found.wall_us, found.host_us


def report(rows: list[Row]) -> None:
    """The tables for people."""
    print(f"\n{'cell':22s} {'floor':>8s} {'ours':>9s} {'fla':>9s} {'ratio':>6s}  {'eager':>9s} {'fla':>9s} {'ratio':>6s}  {'o err':>8s} {'fla':>8s} "
          f"{'S err':>8s} {'fla':>8s} {'mem':>5s} {'fla':>5s}  best candidate")  # fmt: skip
    ratios: dict[str, list[float]] = {"best, graph": [], "default, graph": [], "best, eager": []}
    for row in rows:
        best, fla = row.best, row.fla or Timed("fla")
        if best is None:
            print(f"{row.cell:22s} nothing of ours ran")
            continue
        graph = f"{best.graph_us:9.1f} {fla.graph_us:9.1f} {fla.graph_us / best.graph_us:6.2f}"
        wall = f"{best.wall_us:9.1f} {fla.wall_us:9.1f} {fla.wall_us / best.wall_us:6.2f}"
        wrong = f"{best.o_error:8.1e} {fla.o_error:8.1e} {best.state_error:8.1e} {fla.state_error:8.1e}"
        mark = "" if best.name == row.default else "  (not the default)"
        print(
            f"{row.cell:22s} {row.floor_us:8.1f} {graph}  {wall}  {wrong} {best.memory:5.2f} {fla.memory:5.2f}  {shortened(row.ours)[best.name]}{mark}"
        )
        ratios["best, graph"].append(fla.graph_us / best.graph_us)
        ratios["best, eager"].append(fla.wall_us / best.wall_us)
        ratios["default, graph"].append(fla.graph_us / row.ours[row.default].graph_us)
    for name, found in ratios.items():
        known = [one for one in found if not math.isnan(one)]
        if known:
            print(
                f"fla / ours, {name}: geometric mean {statistics.geometric_mean(known):.2f}, least {min(known):.2f} (the aim is {AIM}, and 1 in every cell)"
            )
    for row in rows:
        names = shortened(row.ours)
        if len(row.ours) > 2:
            print(f"\n{row.cell}")
            for one in sorted(row.ours.values(), key=lambda one: one.graph_us if not math.isnan(one.graph_us) else math.inf):
                said = one.failed or f"graph {one.graph_us:9.1f}  o {one.o_error:.1e}  state {one.state_error:.1e}  memory {one.memory:.2f}"
                print(f"  {said}  {names[one.name]}{'  <- default' if one.name == row.default else ''}{'  <- best' if one is row.best else ''}")
        for one in (*row.ours.values(), *([row.fla] if row.fla else [])):
            if one.failed:
                print(f"FAILED {row.cell}: {names.get(one.name, one.name)}: {one.failed}")


def main() -> int:
    """Measures the cells; 1 where one of ours fails or is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", help="comma-separated parts of a cell's name, as 1x8192,16/32 (default: all); `--list` prints them")
    parser.add_argument("--list", action="store_true", help="print the cells and stop")
    parser.add_argument("--candidates", choices=("default", "best", "all"), default="best")
    parser.add_argument("--budget", type=float, default=2.0, metavar="S", help="seconds of graph replays a cell (default 2)")
    parser.add_argument("--no-fla", action="store_true", help="ours alone")
    parser.add_argument("--json", type=Path, metavar="FILE")
    asked = parser.parse_args()
    parts = asked.cells.split(",") if asked.cells else [""]
    cells = [cell for cell in CELLS if any(part in str(cell) for part in parts)]
    if asked.list or not cells:
        print("\n".join(map(str, CELLS)))
        return 0 if asked.list else 2
    if not torch.cuda.is_available():
        print("error: no CUDA device; this benchmark is for one", file=sys.stderr)
        return 2
    begin = time.perf_counter()
    rows: list[Row] = []
    with torch.no_grad():
        fla = None if asked.no_fla else theirs()
        fla_s = fla_ahead(cells) if fla is not None else 0.0
        ours_s = ahead(wanted(cells, asked.candidates))
        top = ceilings()
        told = {
            "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": __import__("triton").__version__,
            "titans_backends": tb.__version__, "fla": getattr(sys.modules.get("fla"), "__version__", None), "ceilings": asdict(top),
            "compiled_s": {"ours": ours_s, "fla": fla_s},
        }  # fmt: skip
        print(json.dumps(told), flush=True)
        for cell in cells:
            start = time.perf_counter()
            row = measure(cell, asked.candidates, fla, top, asked.budget)
            rows.append(row)
            torch.cuda.empty_cache()
            ours_us, fla_us = row.best.graph_us if row.best else math.nan, row.fla.graph_us if row.fla else math.nan
            took = f"({time.perf_counter() - start:.1f} s)"
            print(f"[{time.perf_counter() - begin:5.0f} s] {row.cell:22s} ours {ours_us:9.1f} us, fla {fla_us:9.1f} us {took}", flush=True)
            if asked.json is not None:
                asked.json.write_text(json.dumps({**told, "rows": [asdict(one) for one in rows]}, indent=1) + "\n", encoding="utf-8")
    report(rows)
    return 1 if any(one.failed for row in rows for one in row.ours.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
