"""What Nsight Compute counts for our kernels: device memory moved, instructions per cycle, warps, tensor cores, registers.

    python benchmarks/profiled.py [--only slow_core] [--json FILE]
    python benchmarks/profiled.py --only backward

Triton's, and of `gated_delta_rule`'s backward CuPy's too, which is handed gradients of the right sizes and computes on what happens to lie there. It runs
itself under `ncu`, which must be on the PATH. Traffic is counted in one pass, from a cache written over before the call and left alone between its kernels;
the other figures in further passes. `moved` is device memory read and written over the contract's inputs and outputs; a backward's are the inputs, the
gradient that arrives and those that leave.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import cast

import torch
from device_timing import arriving, work
from seeds import LARGE, SMALL, STATE, Task, call_of
from torch import Tensor

from titans_backends import registry
from titans_backends.backend import Candidate, TrainableOpModule
from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.contract import Call
from titans_backends.contracts.validate import validate
from titans_backends.facts import signature_of
from titans_backends.machine import detect
from titans_backends.offers import Offer, offer
from titans_backends.plan import Handed
from titans_backends.signature import Regime

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


@dataclass(frozen=True, slots=True)
class Looked:
    """A problem, and whose candidate of which variant is looked at ("": its first)."""

    task: Task
    variant: str = ""
    backend: str = "triton"
    backward: bool = False

    def __str__(self) -> str:
        return f"{self.task.op}{' backward' * self.backward} {self.task.what}"

    def candidate(self, call: Call) -> Candidate | None:
        """The first of its variant that the backend offers for a captured call, if any; SystemExit where it refuses."""
        answer = self.offered(call)
        offered = answer.backward if self.backward else answer.forward
        if not offered:
            raise SystemExit(f"{self}: {self.backend} refuses: {answer.verdict}")
        return next((one for one in offered if self.variant in ("", one.variant)), None)

    def offered(self, call: Call) -> Offer:
        """What the backend offers for a captured call."""
        made = CONTRACTS[self.task.op]
        regime: Regime = "training" if self.backward else "inference"
        signature = signature_of(made, call, validate(made, call), regime=regime, launch="graph")
        return offer(registry.get(self.backend), signature, detect("cuda"))

    def runs(self, call: Call, candidate: Candidate) -> Callable[[], object]:
        """What launches it."""
        module, _ = registry.module(registry.get(self.backend), self.task.op)
        assert module is not None
        if not self.backward:
            return lambda: module.run(call, candidate)
        grads, states, needs = arriving(self.task.op, call, candidate)
        given: Handed = states
        if candidate.residual:
            maker = next(one for one in self.offered(call).forward if one.agrees(candidate))
            given = cast("tuple[Tensor, ...]", module.run(call, maker)[len(CONTRACTS[self.task.op].outputs) :])
        return lambda: cast(TrainableOpModule, module).run_backward(call, grads, given, needs, candidate)

    def bytes(self, call: Call) -> float:
        """What the direction cannot avoid to read and write."""
        made = CONTRACTS[self.task.op]
        if not self.backward:
            return work(self.task.op, call).bytes
        tensors, grads = made.tensors(call), arriving(self.task.op, call)[0]
        return float(sum(2 * x.nbytes for name, x in tensors.items() if name in made.differentiable) + sum(x.nbytes for x in grads if x is not None))


def problems() -> Iterator[Looked]:
    """The problems, the backwards last."""
    for case in (LARGE, SMALL):
        for variant in ("scored", "prepared", "scan") if case is LARGE else ("split",):
            yield Looked(Task("seeds", "slow_core", replace(case, given=("g",), options=STATE)), variant)
        yield Looked(Task("seeds", "uw_transform", replace(case, given=("g",))))
        yield Looked(Task("seeds", "uw_transform", replace(case, name=f"{case.name} lam", given=("g",), options={"transform": "lam"})))
        yield Looked(Task("seeds", "fast_core", replace(case, given=("gate",))))
        yield Looked(Task("short", "gated_delta_rule", replace(case, given=("g",), options=STATE)))
    for case in (LARGE, replace(LARGE, name="8x1024 16/32 D128", B=8, T=1024), SMALL):
        rule = Task("short", "gated_delta_rule", replace(case, given=("g",), options=STATE))
        for backend, variant in (
            ("triton", "again"),
            ("triton", "saved"),
            ("cupy", "walks"),
            ("cupy", "wgmma"),
            ("cupy", "kept"),
        ):
            yield Looked(rule, variant, backend, backward=True)


def wanted(only: str) -> list[Looked]:
    """The problems whose name contains a text."""
    return [one for one in problems() if only in str(one)]


def worker(only: str, told: Path) -> None:
    """Each problem once, between the profiler's marks; what ran goes to a file."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    found = []
    for looked in wanted(only):
        call = call_of(looked.task)
        candidate = looked.candidate(call)
        if candidate is None:
            print(f"{looked}: {looked.backend} offers no {looked.variant}", file=sys.stderr)
            continue
        run, launch = looked.runs(call, candidate), importlib.import_module(f"titans_backends.backends.{looked.backend}.launch")
        with launch.TAPING.taping() as tape:
            run()
        run()
        flush.zero_()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        run()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        found.append(
            {
                "op": f"{looked.task.op}{' backward' * looked.backward}",
                "what": looked.task.what,
                "candidate": candidate.label,
                "bytes": looked.bytes(call),
                "launches": len(tape.launches),
            }
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
