"""The ops around the memory on a GPU: every candidate checked, then timed in a graph and called eagerly, beside the floor of the bytes that it must move.

`PYTHONPATH=. python benchmarks/around_memory.py [--op qkv_prepare ...] [--budget 0.08] [--json FILE]`; one line a candidate, microseconds. The floor of a
backward: the inputs and the arriving gradients read, the inputs' gradients written.
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
from titans_backends.contracts.contract import Call, Work
from titans_backends.contracts.tolerance import tolerance
from titans_backends.tuning.gate import Ledger, check_backward, check_forward
from titans_backends.tuning.problem import BESIDE
from titans_backends.tuning.suite import exam_of

OPS = ("qkv_prepare", "gated_rms_norm", "short_conv", "token_flux", "chunk_flux")
LARGE = Case("1x8192 16/32x128", B=1, T=8192, G=16, H=32, K=128, V=128, dtype=torch.bfloat16)
SMALL = replace(LARGE, name="1x8192 12x32", G=12, H=12, K=32, V=32)
SHORT = replace(SMALL, name="1x128 12x32 float32", T=128, dtype=torch.float32)


def cases(ops: list[str]) -> Iterator[tuple[str, Case, str]]:
    """(op, case, direction)."""
    for op in ops:
        for case in (LARGE, SMALL, SHORT):
            for direction in ("forward", "backward"):
                yield op, replace(case, given=BESIDE.get(op, ())), direction


def candidates(op: str, call: Call, direction: str) -> list[Candidate]:
    """What Triton offers."""
    return list(offered(op, call)) if direction == "forward" else list(offered_in_training(op, call).backward)


def checked(op: str, case: Case, direction: str, candidate: Candidate) -> str:
    """`right`, or what is wrong, on a call of at most 300 tokens."""
    made, small = CONTRACTS[op], replace(case, T=min(case.T, 300))
    call = build(made, small, "cuda")
    with torch.enable_grad():  # the reference's gradients are autograd's
        exam = exam_of(made, small, call, training=direction == "backward")
    check = check_forward if direction == "forward" else check_backward
    try:
        check(made, candidate, module_of(op), exam, tolerance(small.dtype, "highest"), Ledger(), candidate.label)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "right"


def backward_work(op: str, call: Call) -> Work:
    """Twice the inputs and once the outputs, as the forward's work counts them."""
    forward = work(op, call)
    given = sum(x.numel() * x.element_size() for x in CONTRACTS[op].tensors(call).values())
    return Work(2 * forward.flop, forward.bytes + given)


def main() -> None:
    """Prints the lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", action="append", choices=OPS)
    parser.add_argument("--budget", type=float, default=0.08)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    made = [(op, case, direction, build(CONTRACTS[op], case, "cuda")) for op, case, direction in cases(asked.op or list(OPS))]
    print(f"compiled in {ahead([(op, call, candidates(op, call, direction)) for op, _, direction, call in made]):.0f} s", flush=True)
    limits, rows = ceilings(), []
    for op, case, direction, call in made:
        floor = limits.floor_us(work(op, call) if direction == "forward" else backward_work(op, call), case.dtype, "highest")
        for candidate in candidates(op, call, direction):
            verdict, race, module = checked(op, case, direction, candidate), Race(), module_of(op)

            def one(candidate: Candidate = candidate, call: Call = call, op: str = op, direction: str = direction, module: object = module) -> object:
                if direction == "forward":
                    return cast(TrainableOpModule, module).run(call, candidate)
                grads, states, needs = arriving(op, call, candidate)
                return cast(TrainableOpModule, module).run_backward(call, grads, states, needs, candidate)

            race.add("one", one)
            found = {"op": op, "case": case.name, "direction": direction, "candidate": candidate.label, "check": verdict, "floor_us": round(floor, 1)}
            found["graph_us"] = round(race.times(asked.budget)["one"], 1)
            if direction == "forward":
                with forced(op, candidate):
                    found["eager_us"] = round(eager(bound(op, call), asked.budget).wall_us, 1)
            rows.append(found)
            print(" | ".join(f"{value}" for value in found.values()), flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    with torch.no_grad(), precision_of("highest"):
        main()
