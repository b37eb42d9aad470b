"""deep_core and deep_core_step on a GPU: every candidate checked, then timed in a graph and called eagerly, beside the floor of the contract's work.

`PYTHONPATH=. python benchmarks/deep_cores.py [--budget 0.2] [--json FILE]`; one line a candidate, microseconds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from device_timing import Race, ahead, arriving, bound, ceilings, eager, forced, module_of, offered, offered_in_training, precision_of, work

from titans_backends.backend import Candidate, TrainableOpModule
from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.case import Case, build
from titans_backends.contracts.contract import Call
from titans_backends.contracts.tolerance import tolerance
from titans_backends.tuning.gate import check_backward, check_forward
from titans_backends.tuning.ledger import Ledger
from titans_backends.tuning.suite import exam_of

LARGE = Case("1x8192 16/32x128", B=1, T=8192, G=16, H=32, K=128, V=128, dtype=torch.bfloat16, given=("g", "gate"))
SMALL = replace(LARGE, G=12, H=12, K=32, V=32)
CARRIED = {"output_final_state": True}


def cases() -> Iterator[tuple[str, Case, str]]:
    """(op, case, direction)."""
    yield "deep_core", LARGE, "forward"
    yield "deep_core", LARGE, "backward"
    yield "deep_core", replace(LARGE, name="1x512 16/32x128", T=512), "forward"
    yield "deep_core", replace(SMALL, name="1x8192 12x32"), "forward"
    yield "deep_core", replace(SMALL, name="1x8192 12x32"), "backward"
    yield "deep_core", replace(SMALL, name="1x128 12x32, carried", T=128, options=CARRIED), "forward"
    yield "deep_core", replace(SMALL, name="1x65536 12x32", T=65536), "forward"
    yield "deep_core", replace(SMALL, name="1x8192 12x32 float32", dtype=torch.float32), "forward"
    step = replace(LARGE, T=1, given=("g",))
    yield "deep_core_step", replace(step, name="64 rows of 32x128", B=64), "forward"
    yield "deep_core_step", replace(step, name="1 row of 32x128 in place", options={"inplace": True}), "forward"
    yield "deep_core_step", replace(SMALL, name="1 row of 12x32 in place", T=1, given=("g",), options={"inplace": True}), "forward"


def candidates(op: str, call: Call, direction: str) -> list[Candidate]:
    """What Triton offers."""
    return list(offered(op, call)) if direction == "forward" else list(offered_in_training(op, call).backward)


def checked(op: str, case: Case, direction: str, candidate: Candidate) -> str:
    """`right`, or what is wrong, on a call of at most 600 tokens."""
    made, small = CONTRACTS[op], replace(case, T=min(case.T, 600), B=min(case.B, 4))
    call = build(made, small, "cuda")
    with torch.enable_grad():
        exam = exam_of(made, small, call, training=direction == "backward")
    check = check_forward if direction == "forward" else check_backward
    try:
        check(made, candidate, module_of(op), exam, tolerance(small.dtype, "highest"), Ledger(), candidate.label)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "right"


def tell(rows: list[dict[str, object]], row: dict[str, object], path: Path | None) -> None:
    """Prints a line, and writes all so far: a later kernel may end the process."""
    rows.append(row)
    print(" | ".join(f"{value}" for value in row.values()), flush=True)
    if path is not None:
        path.write_text(json.dumps(rows, indent=1) + "\n")


def _kernels(made: list[tuple[str, Case, str, Call]]) -> None:
    """Prints what each kernel of the first candidates takes, by torch's profiler."""
    for op, case, direction, call in made:
        for candidate in candidates(op, call, direction)[:2]:
            module = cast(TrainableOpModule, module_of(op))
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
                for _ in range(5):
                    if direction == "forward":
                        module.run(call, candidate)
                    else:
                        grads, states, needs = arriving(op, call, candidate)
                        module.run_backward(call, grads, states, needs, candidate)
                torch.cuda.synchronize()
            times = {row.key: row.self_device_time_total / 5 for row in found.key_averages() if row.key.startswith("_")}
            print(op, case.name, direction, candidate.variant, {name: round(value, 1) for name, value in times.items()}, flush=True)


def main() -> None:
    """Prints the lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=float, default=0.2)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    made = [(op, case, direction, build(CONTRACTS[op], case, "cuda")) for op, case, direction in cases()]
    print(f"compiled in {ahead([(op, call, candidates(op, call, direction)) for op, _, direction, call in made]):.0f} s", flush=True)
    limits, rows = ceilings(), list[dict[str, object]]()
    for op, case, direction, call in made:
        floor = limits.floor_us(work(op, call), case.dtype, "highest")
        if not (raced := candidates(op, call, direction)):
            tell(rows, {"op": op, "case": case.name, "direction": direction, "check": f"not timed: Triton has no {direction} for it"}, asked.json)
        for candidate in raced:
            verdict, race = checked(op, case, direction, candidate), Race()
            module = module_of(op)

            def one(candidate: Candidate = candidate, call: Call = call, op: str = op, direction: str = direction, module: object = module) -> object:
                if direction == "forward":
                    return cast(TrainableOpModule, module).run(call, candidate)
                grads, states, needs = arriving(op, call, candidate)
                return cast(TrainableOpModule, module).run_backward(call, grads, states, needs, candidate)

            race.add("one", one)
            found: dict[str, object] = {"op": op, "case": case.name, "direction": direction, "candidate": candidate.label, "check": verdict}
            found["floor_us"] = round(floor, 1)
            found["graph_us"] = round(race.times(asked.budget)["one"], 1)
            if direction == "forward":
                with forced(op, candidate):
                    found["eager_us"] = round(eager(bound(op, call), asked.budget).wall_us, 1)
            tell(rows, found, asked.json)
    _kernels(made)


if __name__ == "__main__":
    with torch.no_grad(), precision_of("highest"):
        main()
