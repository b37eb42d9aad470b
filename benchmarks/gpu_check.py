"""Checks every backend on a CUDA device: conformance, both launch regimes, two devices in one process; prints one line per finding.

    python benchmarks/gpu_check.py [--json FILE]

Nothing is timed here. It exits 1 if anything fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path

import torch

import titans_backends as tb
from titans_backends import registry
from titans_backends.conformance import examine, items
from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.case import build, cases
from titans_backends.contracts.tolerance import compare, tolerance


def conformance(failures: list[str]) -> dict[str, dict[str, int]]:
    """Every case of every backend that serves this device."""
    told: dict[str, dict[str, int]] = {}
    machine = tb.detect("cuda")
    for backend in registry.order("cuda"):
        if not registry.availability(backend, machine):
            continue
        for op in CONTRACTS:
            if op not in backend.ops:
                continue
            start, counts = time.perf_counter(), Counter[str]()
            for item in items(backend.name, ops=[op], dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16), device="cuda"):
                result = examine(item)
                counts[result.status] += 1
                if result.status == "failed":
                    failures.append(result.detail)
            told[f"{backend.name}/{op}"] = dict(counts)
            print(f"{backend.name:<10} {op:<18} {dict(counts)} {time.perf_counter() - start:.1f} s", flush=True)
    return told


def graphs(failures: list[str]) -> None:
    """A captured call replays to the same numbers on new inputs; a call that was never warmed up refuses with a sentence."""
    for op, made in CONTRACTS.items():
        call = build(made, next(iter(cases(made))), "cuda")
        arguments = {name: getattr(call, name) for name in made.parameters}
        run = tb.get_op(op)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), tb.policy(launch="graph"):
            run(**arguments)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(**arguments)
        first = made.operands[-1]
        arguments[first].mul_(0.5)
        graph.replay()
        want = run(**arguments)
        for output, a, b in zip(made.outputs, captured, want, strict=True):
            if a is not None and b is not None and not compare(output.name, a, b).within(tolerance(a.dtype).outputs):
                failures.append(f"{op}: a replayed graph differs in {output.name}")
        print(f"graph      {op:<18} replayed", flush=True)


def two_devices(failures: list[str]) -> None:
    """A CPU call and a CUDA call of the same shape alternate, each on its own choice."""
    op = tb.get_op("gated_delta_rule")
    made = CONTRACTS["gated_delta_rule"]
    call = build(made, next(iter(cases(made))))
    here = {name: getattr(call, name) for name in made.parameters}
    there = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in here.items()}
    for _ in range(2):
        a, b = op(**here)[0], op(**there)[0]
        if a.device.type != "cpu" or b.device.type != "cuda" or not compare("o", b, a).within(1e-5):
            failures.append("two devices in one process disagree")
    try:
        op(**{**here, "k": there["k"]})
        failures.append("mixed devices were accepted")
    except ValueError as error:
        print(f"mixed      {error}")


def main() -> int:
    """Runs everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the counts here")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no CUDA device; this check is for one", file=sys.stderr)
        return 2
    failures: list[str] = []
    print(f"{torch.cuda.get_device_name()} | torch {torch.__version__} | python {sys.version.split()[0]}", flush=True)
    counts = conformance(failures)
    graphs(failures)
    two_devices(failures)
    if options.json:
        facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "conformance": counts, "failures": failures}
        options.json.write_text(json.dumps(facts, indent=1) + "\n")
    for failure in failures:
        print(f"FAILED {failure}")
    print(f"{sum(sum(c.values()) for c in counts.values())} items, {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
