"""Every backend and every peer in one race on one GPU: gated_delta_rule in bfloat16 on the cells of the peers' table and on 12 heads of 32 and of 64.

    python benchmarks/race.py --warm --seconds 420 --with fla=SITE1 --with flashinfer=SITE2 --json benchmarks/results/race.json
    python benchmarks/race.py --groups flashinfer --with flashinfer=SITE2 --json FILE   # what an earlier run of FILE lacked
    python benchmarks/race.py --ask --json FILE                                         # what get_op runs with the tables of today: asks, times nothing
    python benchmarks/race.py --list
    python benchmarks/race_page.py --draw                                               # tables and picture, from FILE

A case is a call's sizes, forward or forward and backward. Processes one after the other, since the peers' packages may not get along:

    fla         Triton's and CuPy's candidates, FLA and FlashQLA, as backends where they are and by their own functions
    flashinfer  FlashInfer, and of ours what the first run chose or found best
    plain       eager's default on up to 8192 tokens, and the same of ours
    compiled    Inductor's and Numba's on up to 2048; both compile for long, so this comes late
    ungated     FLA's rule without a decay, which computes something else

`--with GROUP=FOLDERS` puts folders in front of a group's module path. What a later process measures is put on the first one's scale by what both have
measured. Inputs are unit q and k (independent, not correlated), beta in (0, 1), and a decay as Mamba's layers begin with; outputs, final state and, in
training, all five gradients are compared with float64 on the first and the last head of q and k before anything is timed, on memory that holds NaN;
what is wrong has no time. Of our backends those candidates race that the shipped timings of the nearest calls have near the best (`--every`: all), of
FlashQLA the default. Times: CUDA graphs replayed in turns, the cache written over before each; and eager calls back to back until the device has done
them. `dispatch` is what `get_op` runs with what is shipped; `tuned here` what the tuner's rule picks from this race's own times.

Cases are measured the most important first until the seconds end, and the file is written after each; run again, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

from against_fla import Cell
from race_cells import CASES, GROUPS, Case, Group
from race_page import compact
from race_reach import Rows
from race_results import Part, Results

ROOT = Path(__file__).resolve().parent.parent
SHARES = {"fla": 0.8, "flashinfer": 0.75, "plain": 0.6, "compiled": 0.6, "ungated": 1.0}
"""Of the seconds that are left when a group begins."""
GRACE_S, STARTS = 25.0, 4


def main(given: list[str] | None = None) -> int:
    """Races; 1 where one of ours is wrong, 2 where there is nothing to race on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", default=",".join(GROUPS), help=f"comma-separated, of {', '.join(GROUPS)} (default: all)")
    parser.add_argument(
        "--with", dest="folders", action="append", default=[], metavar="GROUP=FOLDERS", help="module folders of a group, as in PYTHONPATH"
    )
    parser.add_argument("--cases", default="", help="comma-separated parts of a case's name, as 1x8192,training (default: all); `--list` prints them")
    parser.add_argument("--cell", action="append", default=[], metavar="'1x64 2/4 D16'", help="race these sizes in place of the table's, both ways")
    parser.add_argument("--backends", help="comma-separated: whose candidates race in the first group")
    parser.add_argument("--seconds", type=float, default=420.0, help="begin no case after so many (default 420)")
    parser.add_argument("--warm", action="store_true", help="compile side by side first")
    parser.add_argument("--warm-seconds", type=float, default=170.0, help="the longest that may take (default 170)")
    parser.add_argument("--every", action="store_true", help="race every candidate, not only those within reach by the shipped timings")
    parser.add_argument("--quick", type=float, default=1.0, metavar="FACTOR", help="of the measuring time of each case (default 1)")
    parser.add_argument("--again", action="store_true", help="measure what the file has too")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, default=Path("race.json"), metavar="FILE")
    parser.add_argument("--shapes", type=Path, metavar="FILE", help="write the cases for `titans-backends tune --from FILE`, and stop")
    parser.add_argument("--ask", action="store_true", help="write into the file what `get_op` runs with what is shipped today, and stop")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--process", choices=("warm", "race"), help=argparse.SUPPRESS)
    asked = parser.parse_args(given)
    names = asked.groups.split(",")
    if set(names) - set(GROUPS):
        parser.error(f"--groups {asked.groups}: known are {', '.join(GROUPS)}")
    paths = dict(one.split("=", 1) for one in asked.folders if "=" in one)
    if len(paths) != len(asked.folders) or set(paths) - set(GROUPS):
        parser.error(f"--with takes GROUP=FOLDERS, GROUP one of {', '.join(GROUPS)}; got {', '.join(asked.folders)}")
    cases = chosen(asked)
    if asked.list or not cases:
        print("\n".join(map(str, CASES)))
        return 0 if asked.list else 2
    if asked.shapes is not None:
        from race_warm import shapes

        asked.shapes.write_text(shapes(cases), encoding="utf-8")
        return 0
    if asked.process is not None:
        group = of_group(names[0], asked)
        return warm(group, cases, asked) if asked.process == "warm" else child(group, cases, asked)
    if asked.device == "cuda" and not _cuda():
        print("error: no CUDA device; type --device cpu --cell '1x64 2/4 D16' --backends eager to try it without one", file=sys.stderr)
        return 2
    return ask(cases, asked) if asked.ask else parent(names, paths, cases, asked)


def chosen(asked: argparse.Namespace) -> list[Case]:
    """The cases of the command line."""
    every = CASES
    if asked.cell:
        cells = []
        for text in asked.cell:
            found = re.fullmatch(r"(\d+)x(\d+)[ ,](\d+)/(\d+)[ ,]D(\d+)", text)
            if found is None:
                raise SystemExit(f"error: --cell {text!r} is not like '1x64 2/4 D16': sequences x tokens, heads of q and k / of v, head_dim")
            cells.append(Cell(*map(int, found.groups())))
        every = tuple(Case(cell, mode) for mode in ("forward", "training") for cell in cells)  # type: ignore[arg-type]
    return [case for case in every if any(part in str(case) for part in asked.cases.split(","))]


def of_group(name: str, asked: argparse.Namespace) -> Group:
    """The group, with the command line's backends in the first."""
    group = GROUPS[name]
    return replace(group, backends=tuple(asked.backends.split(","))) if asked.backends and group.whole else group


def parent(names: list[str], paths: dict[str, str], cases: list[Case], asked: argparse.Namespace) -> int:
    """Starts the groups' processes, each for its share of the time; one that dies is started again without the case that it was at."""
    end = time.monotonic() + asked.seconds
    if asked.warm and asked.device == "cuda":
        done = Results.read(asked.json).cases
        for name in (name for name in names if GROUPS[name].whole and (asked.again or any(name not in done.get(str(case), {}) for case in cases))):
            process(name, paths, asked, "warm", min(asked.warm_seconds, end - time.monotonic()))
    for name in names:
        until = time.monotonic() + (end - time.monotonic()) * (SHARES[name] if name != names[-1] else 1.0)
        for _ in range(STARTS):
            left = until - time.monotonic()
            if left <= 0:
                print(f"{name}: no time is left", flush=True)
                break
            status = process(name, paths, asked, "race", left)
            results = Results.read(asked.json)
            at = results.begun.pop(name, "")
            if status == 0 or not at:
                break
            results.cases.setdefault(at, {}).setdefault(name, Part(failed=f"its process ended with status {status}"))
            results.write(asked.json)
            print(f"{name}: {at}: its process ended with status {status}; the others go on", flush=True)
    results = Results.read(asked.json)
    print(compact(results, [str(case) for case in cases]), flush=True)
    measured = [part for parts in results.cases.values() for part in parts.values()]
    called = [entrant.failed for part in measured for entrant in part.entrants if entrant.kind == "backend"]
    return int(any("wrong: " in failed for failed in (*called, *(part.failed for part in measured))))  # as called, and candidate by candidate


def ask(cases: list[Case], asked: argparse.Namespace) -> int:
    """Puts what dispatch runs now in place of what it ran when the cases were measured; 1 where the race has no time of that."""
    from race_measure import dispatched

    results, first, untimed = Results.read(asked.json), next(iter(GROUPS)), 0
    if not results.cases:
        raise SystemExit(f"error: {asked.json} holds no race; type --json FILE with the file of one")
    for case in (case for case in cases if first in results.cases.get(str(case), {})):
        part = results.cases[str(case)][first]
        found = dispatched(case, asked.device)
        for way, now in found.items():
            before = part.dispatch[way].label if way in part.dispatch else "not asked"
            timed = any(one.label == now.label and one.us(way) is not None for one in part.entrants)
            untimed += not timed
            if now.label != before or not timed:
                print(f"{case}, {way}: {before} -> {now.label}{'' if timed else ', which has no time'} ({now.reason})", flush=True)
        results.cases[str(case)][first] = replace(part, dispatch=found)
    results.write(asked.json)
    return int(untimed > 0)


def process(name: str, paths: dict[str, str], asked: argparse.Namespace, what: str, seconds: float) -> int:
    """One process of a group; its status, -9 where it hung."""
    environment = {**os.environ}
    before = [paths[place] for place in (name, GROUPS[name].paths) if place in paths]
    environment["PYTHONPATH"] = os.pathsep.join([*before, str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--process",
        what,
        "--groups",
        name,
        "--json",
        str(asked.json),
        "--device",
        asked.device,
    ]
    command += ["--seconds", f"{seconds:.1f}", "--quick", str(asked.quick), "--cases", asked.cases, *(["--again"] if asked.again else [])]
    command += ["--every"] if asked.every else []
    command += [f"--cell={cell}" for cell in asked.cell] + ([f"--backends={asked.backends}"] if asked.backends else [])
    started = subprocess.Popen(command, env=environment)
    try:
        return started.wait(seconds + GRACE_S)
    except BaseException as error:
        started.kill()
        started.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            return -9
        raise


def warm(group: Group, cases: list[Case], asked: argparse.Namespace) -> int:
    """Compiles, in the group's own process: only there are its packages."""
    from race_warm import warmed

    begin = time.perf_counter()
    said = warmed(group, cases, asked.seconds, None if asked.every else known_rows())
    print(f"[{time.perf_counter() - begin:5.0f} s] {group.name}: compiled ahead: {said}", flush=True)
    return 0


def child(group: Group, cases: list[Case], asked: argparse.Namespace) -> int:
    """Measures a group's cases, one after the other, and writes the file after each."""
    import torch
    from device_timing import ceilings
    from race_measure import Rules, measured, settled
    from race_peers import hurried, loaded, releases, takes

    import titans_backends as tb

    begin = time.perf_counter()
    functions, absent = loaded(group.own) if asked.device == "cuda" else ({}, dict.fromkeys(group.own, "no GPU"))
    for name, why in absent.items():
        print(f"{group.name}: {name} is left out: {why}", flush=True)
    if group.own and not group.whole and not functions and not any(usable(name, asked.device) for name in group.backends):
        print(f"{group.name}: nobody of it is here", flush=True)
        return 0
    if asked.device == "cuda":
        hurried()
    top = ceilings() if asked.device == "cuda" else None
    results = Results.read(asked.json)
    results.runs[group.name] = {
        "device": torch.cuda.get_device_name() if asked.device == "cuda" else "cpu",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "torch": torch.__version__,
        "titans_backends": tb.__version__,
        "versions": releases(),
        "absent": absent,
        "candidates": "all" if asked.every else "those within reach",
        "ceilings": None if top is None else asdict(top),
    }
    results.write(asked.json)
    rows = None if asked.every else known_rows()
    rules, took, kinds = Rules().times(asked.quick), list[float](), set[tuple[object, ...]]()
    for case in cases:
        parts, tokens = results.cases.get(str(case), {}), case.cell.B * case.cell.T
        first = None if group.whole else parts.get(next(iter(GROUPS)))
        if (group.name in parts and not asked.again) or (not group.whole and first is None) or tokens > (group.most_tokens or math.inf):
            continue
        if group.own and not group.whole and not any(takes(name, case) for name in group.own):
            continue
        left = asked.seconds - (time.perf_counter() - begin)
        if left < max(2.0, 1.3 * statistics.median(took) if took else 0.0):
            print(f"[{time.perf_counter() - begin:5.0f} s] {group.name}: {case}: not begun, {left:.0f} s are left", flush=True)
            break
        results.begun[group.name] = str(case)
        results.write(asked.json)
        settled(functions, case, kinds)
        start = time.perf_counter()
        try:
            part = measured(case, group, functions, first, rules, asked.device, top, rows)
        except Exception as error:
            if isinstance(error, torch.AcceleratorError):
                raise
            part = Part(failed=f"{type(error).__name__}: {str(error)[:300]}")
        took.append(time.perf_counter() - start)
        del results.begun[group.name]
        results.cases.setdefault(str(case), {})[group.name] = part
        results.write(asked.json)
        print(f"[{time.perf_counter() - begin:5.0f} s, took {took[-1]:.1f} s] {group.name}: {case}: {said_of(part)}", flush=True)
        if asked.device == "cuda":
            torch.cuda.empty_cache()
    results.begun.pop(group.name, None)
    results.write(asked.json)
    return 0


def known_rows() -> Rows:
    """The shipped timings of the one file that is of this card; without one nothing is known."""
    from titans_backends.buckets import defaults_of
    from titans_backends.cache import file
    from titans_backends.machine import detect

    path = ROOT / "benchmarks/results" / f"{detect('cuda' if _cuda() else 'cpu').slug}.timings.yaml"
    found = file.read_timings(path, defaults_of)
    if found.problem is not None:
        print(f"the shipped timings are not used: {found.problem.message}", file=sys.stderr, flush=True)
    return {} if found.table is None else found.table.rows


def usable(backend: str, device: str) -> bool:
    """Whether there is a backend of that name, with its packages."""
    from titans_backends import registry
    from titans_backends.machine import detect

    return backend in registry.known() and bool(registry.availability(registry.get(backend), detect(device)))


def said_of(part: Part) -> str:
    """A case's entrants in a line, the fastest first, and what failed."""
    timed = sorted((one for one in part.entrants if one.graph_us is not None), key=lambda one: one.graph_us or 0.0)
    told = ", ".join(f"{one.who if one.kind == 'backend' else one.label} {one.graph_us:.1f}/{one.wall_us or math.nan:.1f}" for one in timed)
    failed = "; ".join([f"{one.label[:60]}: {one.failed}" for one in part.entrants if one.failed] + ([part.failed] if part.failed else []))
    return f"{told}{f'; FAILED {failed[:600]}' if failed else ''}"


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
