"""What Nsight Compute counts for the Triton backend's kernels: device memory moved, instructions per cycle, warps, tensor cores, registers.

    python benchmarks/profiled.py [--only slow_core] [--json FILE]

It runs itself under `ncu`, which must be on the PATH. Traffic is counted in one pass, from a cache written over before the call and left alone
between its kernels; the other figures in further passes. `moved` is device memory read and written over the contract's inputs and outputs.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from device_timing import default, module_of, offered, work
from seeds import LARGE, SMALL, STATE, Task, call_of

TRAFFIC = {"read": "dram__bytes_read.sum", "written": "dram__bytes_write.sum"}
LIMITS = {
    "us": "gpu__time_duration.sum",
    "ipc": "sm__inst_executed.avg.per_cycle_active",
    "warps %": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "tensor %": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "dram %": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "registers": "launch__registers_per_thread",
}


@dataclass(slots=True)
class Profile:
    """One candidate on one problem: bytes of the contract and of device memory, and for each kernel its figures."""

    op: str
    what: str
    candidate: str
    bytes: float
    kernels: list[dict[str, float | str]] = field(default_factory=list)

    @property
    def moved(self) -> float:
        """Device memory over inputs and outputs."""
        return sum(float(kernel[side]) for kernel in self.kernels for side in TRAFFIC) / self.bytes


def problems() -> Iterator[tuple[Task, str]]:
    """The problems, each with the variant that is looked at ("": the default)."""
    for case in (LARGE, SMALL):
        for variant in ("scored", "prepared", "scan") if case is LARGE else ("split",):
            yield Task("seeds", "slow_core", replace(case, given=("g",), options=STATE)), variant
        yield Task("seeds", "uw_transform", replace(case, given=("g",))), ""
        yield Task("seeds", "uw_transform", replace(case, name=f"{case.name} lam", given=("g",), options={"transform": "lam"})), ""
        yield Task("seeds", "fast_core", replace(case, given=("gate",))), ""
        yield Task("short", "gated_delta_rule", replace(case, given=("g",), options=STATE)), ""


def wanted(only: str) -> list[tuple[Task, str]]:
    """The problems whose op and name contain a text."""
    return [(task, variant) for task, variant in problems() if only in f"{task.op} {task.what}"]


def worker(only: str, told: Path) -> None:
    """Each problem once, between the profiler's marks; what ran goes to a file."""
    from titans_backends.backends.triton import launch

    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    found = []
    for task, variant in wanted(only):
        call = call_of(task)
        candidate = next((one for one in offered(task.op, call) if one.variant == variant), default(task.op, call))
        run = module_of(task.op).run
        with launch.TAPING.taping() as tape:
            run(call, candidate)
        run(call, candidate)
        flush.zero_()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        run(call, candidate)
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        found.append(
            {"op": task.op, "what": task.what, "candidate": candidate.label, "bytes": work(task.op, call).bytes, "launches": len(tape.launches)}
        )
        told.write_text(json.dumps(found), encoding="utf-8")


def counted(only: str, metrics: dict[str, str], folder: Path) -> tuple[list[dict[str, object]], list[dict[str, float | str]]]:
    """What the worker ran, and the figures of each of its kernels in order."""
    told, log = folder / "told.json", folder / "ncu.csv"
    command = ["ncu", "--csv", "--log-file", str(log), "--print-units", "base", "--profile-from-start", "off", "--cache-control", "none"]
    command += ["--metrics", ",".join(metrics.values()), sys.executable, __file__, "--worker", str(told), "--only", only]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(f"ncu failed; its log says: {log.read_text(encoding='utf-8')[-500:] if log.exists() else 'nothing'}")
    lines = log.read_text(encoding="utf-8").splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith('"ID"'))
    names = {metric: name for name, metric in metrics.items()}
    kernels: dict[str, dict[str, float | str]] = {}
    for row in csv.DictReader(lines[start:]):
        kernel = kernels.setdefault(row["ID"], {"kernel": row["Kernel Name"]})
        if row["Metric Name"] in names:
            value = row["Metric Value"].replace(",", "")
            kernel[names[row["Metric Name"]]] = float(value) if value not in ("", "n/a") else float("nan")
    return json.loads(told.read_text(encoding="utf-8")), list(kernels.values())


def profiles(only: str) -> list[Profile]:
    """Every problem's figures."""
    with tempfile.TemporaryDirectory() as folder:
        ran, traffic = counted(only, TRAFFIC, Path(folder))
        again, limits = counted(only, LIMITS, Path(folder))
    if ran != again or len(traffic) != len(limits) or len(traffic) != sum(int(str(one["launches"])) for one in ran):
        raise SystemExit(f"the runs do not agree: {len(traffic)} and {len(limits)} kernels, {ran}")
    found, at = [], 0
    for one in ran:
        count = int(str(one["launches"]))
        made = Profile(str(one["op"]), str(one["what"]), str(one["candidate"]), float(str(one["bytes"])))
        made.kernels = [{**a, **b} for a, b in zip(traffic[at : at + count], limits[at : at + count], strict=True)]
        at += count
        found.append(made)
    return found


def main() -> int:
    """Prints a line for each kernel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="only problems whose op and name contain this")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        with torch.no_grad():
            worker(asked.only, asked.worker)
        return 0
    if not torch.cuda.is_available():
        print("error: no CUDA device; this is for one", file=sys.stderr)
        return 2
    if shutil.which("ncu") is None:
        print("error: ncu (Nsight Compute) is not on the PATH; it comes with the CUDA toolkit", file=sys.stderr)
        return 2
    found = profiles(asked.only)
    for one in found:
        print(f"{one.op}: {one.what}: {one.candidate}: moved {one.moved:.2f} times its inputs and outputs ({one.bytes / 1e6:.1f} MB)")
        for kernel in one.kernels:
            kernel["us"] = float(kernel["us"]) / 1e3
            figures = "  ".join(f"{name} {kernel[name]:.3g}" for name in LIMITS)
            print(
                f"    {kernel['kernel']:<16} read {float(kernel['read']) / 1e6:6.1f} MB  written {float(kernel['written']) / 1e6:6.1f} MB  {figures}"
            )
    if asked.json is not None:
        told = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "profiles": [{**asdict(one), "moved": one.moved} for one in found],
        }
        asked.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
