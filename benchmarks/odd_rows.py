"""Triton's and CuPy's candidates on rows of 16 bits that no asynchronous copy takes, each job in processes that may die.

    python benchmarks/odd_rows.py [--device cuda] [--seconds 600] [--workers N] [--output FILE]

Head dimensions that 16 does not divide, operands on odd addresses and strides; forward and backward at 15, 111, 500 and 1024 tokens, dense and packed,
against float64. A candidate runs at the lengths where its op offers it, as a tune would find it. Jobs stand in order of importance, as many at a time
as there are workers; a candidate that kills its process is DIED, and the job goes on behind it in a new one. The first four jobs run the tiles that
ptxas 12.8 compiles wrong on Hopper and that no call is offered any more, with Triton's own ptxas and with the 12.9 that it brings for Blackwell:
DIED or BAD there and OK here is what docs/triton.md says. LEFT is what the time did not reach. Exit status 1 where another candidate is BAD or DIED.
On a CPU one small job for each view runs in Triton's interpreter (TRITON_INTERPRET=1 is set), as the H100's candidates.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

from odd_rows_job import ALLOWED, Job, run

KINDS = ("OK", "BAD", "DIED", "FAILED", "NONE", "LEFT")
RESTARTS = 40
"""Candidates of one job that may kill their process."""


def jobs() -> Iterator[Job]:
    """The most wanted first."""
    both = ("forward", "backward")
    for heads in ((60, 60), (100, 100)):
        for ptxas in ("own", "12.9"):
            yield Job("triton", "gated_delta_rule", "float16", *heads, most=1, wrong_tiles=ptxas)
    for way in both:
        for heads in ((60, 60), (100, 100)):
            for packed in (False, True):
                yield Job("triton", "gated_delta_rule", "float16", *heads, packed=packed, direction=way, most=9 if way == "forward" else 4)
                yield Job("cupy", "gated_delta_rule", "float16", *heads, packed=packed, direction=way, most=3)
    for view in ("misaligned", "sliced"):
        for way in both:
            yield Job("triton", "gated_delta_rule", "bfloat16", 64, 64, view=view, direction=way)
    for op in ("dual_core", "slow_core"):
        for heads in ((60, 60), (100, 100)):
            for way in both:
                yield Job("triton", op, "bfloat16", *heads, direction=way)
    for heads in ((96, 96), (80, 112), (112, 80), (48, 48)):
        for dtype in ("bfloat16", "float16"):
            for way in both:
                yield Job("triton", "gated_delta_rule", dtype, *heads, direction=way)
    for heads in ((20, 36), (60, 100)):
        for way in both:
            yield Job("triton", "gated_delta_rule", "bfloat16", *heads, packed=True, direction=way, most=6)
    for heads in ((60, 60), (100, 100)):
        for way in both:
            yield Job("triton", "gated_delta_rule", "bfloat16", *heads, direction=way)
            yield Job("triton", "gated_delta_rule", "float32", *heads, direction=way, most=2)
            yield Job("cupy", "gated_delta_rule", "bfloat16", *heads, direction=way, most=2)
            for op in ("deep_core", "fast_core", "uw_transform"):
                yield Job("triton", op, "bfloat16", *heads, direction=way, most=2)


def small_jobs() -> Iterator[Job]:
    """What a CPU can bear."""
    for view, packed in (("contiguous", False), ("sliced", False), ("contiguous", True)):
        for way in ("forward", "backward"):
            yield Job("triton", "gated_delta_rule", "float32", 20, 20, view=view, packed=packed, direction=way, most=2)


def environment(job: Job, cache: str) -> dict[str, str]:
    """A process's: the wrong tiles are compiled afresh, by one ptxas or the other."""
    env = dict(os.environ)
    if job.wrong_tiles:
        env["TRITON_CACHE_DIR"] = cache
    if job.wrong_tiles == "12.9":
        import triton

        env["TRITON_PTXAS_PATH"] = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas-blackwell")
    return env


def drive(job: Job, device: str, end: float) -> list[str]:
    """A job's lines, from its processes, one behind the other while candidates kill them."""
    first, lines = 0, []
    with tempfile.TemporaryDirectory() as cache:
        while True:
            left = end - time.monotonic()
            if left < 8:
                return [*lines, f"LEFT {job.name} from candidate {first}"]
            command = [sys.executable, __file__, "--job", json.dumps(asdict(job)), "--first", str(first), "--device", device]
            try:
                done = subprocess.run(command, env=environment(job, cache), capture_output=True, text=True, timeout=left)
                rows, late, last = done.stdout.splitlines(), False, (done.stderr.strip().splitlines() or [""])[-1][:160]
            except subprocess.TimeoutExpired as error:
                rows, late, last = (error.stdout or b"").decode().splitlines(), True, "out of time"
            lines += [f"{kind} {job.name} | {rest}" for kind, _, rest in (row.partition(" ") for row in rows) if kind in ("OK", "BAD", "NONE")]
            if not late and done.returncode == 0:
                return lines
            begun = [row for row in rows if row.startswith("AT ")]
            if late or not begun or first > RESTARTS:
                return [*lines, f"{'LEFT' if late else 'FAILED'} {job.name} | {last}"]
            _, number, label = begun[-1].split(" ", 2)
            lines.append(f"DIED {job.name} | {label} | {last}")
            first = int(number) + 1


def main() -> int:
    """Drives the jobs, or is one job's process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--output", type=Path, help="a file that gets every line as it comes")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    if asked.job:
        run(Job(**json.loads(asked.job)), asked.first, asked.device)
        return 0
    end, found = time.monotonic() + asked.seconds, []
    every = list(small_jobs() if asked.device == "cpu" else jobs())
    output = asked.output.open("w", encoding="utf-8") if asked.output is not None else None
    with ThreadPoolExecutor(asked.workers) as pool:
        for lines in pool.map(partial(drive, device=asked.device, end=end), every):
            for line in lines:
                found.append(line)
                print(line, flush=True)
                if output is not None:
                    print(line, file=output, flush=True)
    if output is not None:
        output.close()
    print(", ".join(f"{kind} {sum(line.startswith(kind + ' ') for line in found)}" for kind in KINDS), f"(allowed: {ALLOWED})")
    return 1 if any(line.startswith(("BAD", "DIED", "FAILED")) and "wrong-tiles" not in line for line in found) else 0


if __name__ == "__main__":
    raise SystemExit(main())
