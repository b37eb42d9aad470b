"""The ops around the memory on a GPU: every candidate checked, then timed in a graph and called eagerly, beside the floor of the bytes that it must move.

`PYTHONPATH=. python benchmarks/around_memory.py [--quick] [--op qkv_prepare ...] [--budget 0.08] [--json FILE]`; one line a candidate as it comes, microseconds.
Short calls come first; --quick measures no others, and of each op the defaults. The floor of a backward: the inputs and the arriving gradients read, the
inputs' gradients written.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from device_timing import Ceilings, Race, ahead, arriving, bound, ceilings, eager, forced, module_of, offered, offered_in_training, precision_of, work

from titans_backends.backend import Candidate, TrainableOpModule
from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.case import Case, build
from titans_backends.contracts.contract import Call, Work
from titans_backends.contracts.tolerance import tolerance
from titans_backends.tuning.gate import check_backward, check_forward
from titans_backends.tuning.ledger import Ledger
from titans_backends.tuning.problem import BESIDE
from titans_backends.tuning.suite import exam_of

OPS = ("qkv_prepare", "gated_rms_norm", "short_conv", "token_flux", "chunk_flux")
LARGE = Case("1x8192 16/32x128", B=1, T=8192, G=16, H=32, K=128, V=128, dtype=torch.bfloat16)
SMALL = replace(LARGE, name="1x8192 12x32", G=12, H=12, K=32, V=32)
SHORT = replace(SMALL, name="1x128 12x32 float32", T=128, dtype=torch.float32)
Entry = tuple[str, Case, str, Call, list[Candidate]]
"""Op, case, direction, the call, what is raced."""
SIZES = (SHORT, SMALL, LARGE)
"""The host draws a large call's numbers for seconds, so those come last."""


def cases(ops: Iterable[str]) -> Iterator[tuple[str, Case, str]]:
    """(op, case, direction), what is made and compiled fastest first."""
    for case in SIZES:
        yield from ((op, replace(case, given=BESIDE.get(op, ())), direction) for op in ops for direction in ("forward", "backward"))


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


def measured(op: str, case: Case, direction: str, call: Call, candidate: Candidate, limits: Ceilings, budget_s: float) -> dict[str, object]:
    """A candidate's line."""
    floor = limits.floor_us(work(op, call) if direction == "forward" else backward_work(op, call), case.dtype, "highest")
    verdict, race, module = checked(op, case, direction, candidate), Race(), cast(TrainableOpModule, module_of(op))

    def one() -> object:
        if direction == "forward":
            return module.run(call, candidate)
        grads, states, needs = arriving(op, call, candidate)
        return module.run_backward(call, grads, states, needs, candidate)

    race.add("one", one)
    found: dict[str, object] = {"op": op, "case": case.name, "direction": direction, "candidate": candidate.label, "check": verdict}
    found |= {"floor_us": round(floor, 1), "graph_us": round(race.times(budget_s)["one"], 1)}
    if direction == "forward":
        with forced(op, candidate):
            found["eager_us"] = round(eager(bound(op, call), budget_s).wall_us, 1)
    return found


def groups(ops: Sequence[str], quick: bool) -> Iterator[list[Entry]]:
    """What is compiled together, a size at a time; a call is made once for both directions, when its turn has come. `quick`: short calls, their defaults."""
    for name, wanted in itertools.groupby(cases(ops), key=lambda one: one[1].name):
        if quick and name != SHORT.name:
            return
        calls: dict[str, Call] = {}
        found = []
        for op, case, direction in wanted:
            if op not in calls:
                calls[op] = build(CONTRACTS[op], case, "cuda")
            known = candidates(op, calls[op], direction)
            found.append((op, case, direction, calls[op], known[:1] if quick else known))
        yield found


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the lines, and writes them, as they come: whoever is stopped has what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", action="append", choices=OPS)
    parser.add_argument("--quick", action="store_true", help="short calls and each op's defaults alone")
    parser.add_argument("--budget", type=float, default=0.08)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args(argv)
    limits, rows = ceilings(), list[dict[str, object]]()
    for group in groups(asked.op or OPS, asked.quick):
        seconds = ahead([(op, call, raced) for op, _, _, call, raced in group])
        print(f"{group[0][1].name}: compiled in {seconds:.0f} s", flush=True)
        for op, case, direction, call, raced in group:
            for candidate in raced:
                rows.append(measured(op, case, direction, call, candidate, limits, asked.budget))
                print(" | ".join(f"{value}" for value in rows[-1].values()), flush=True)
                if asked.json:
                    asked.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    with torch.no_grad(), precision_of("highest"):
        main()
