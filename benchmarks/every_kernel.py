"""Runs every variant of every op of a backend once, on small calls of every kind of option, one of them packed: for compute-sanitizer, which is slow.

    compute-sanitizer --tool memcheck python benchmarks/every_kernel.py [--backend triton] [--ops slow_core,dual_core] [--dtype bfloat16] [--backward]
    compute-sanitizer --tool racecheck python benchmarks/every_kernel.py

Nothing is timed. Results are compared with the float64 reference afterwards; exit status 1 where one is wrong.
"""

from __future__ import annotations

import argparse
import sys

import torch

from titans_backends import registry
from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.case import build, cases
from titans_backends.contracts.tolerance import compare, tolerance
from titans_backends.contracts.validate import validate
from titans_backends.facts import signature_of
from titans_backends.machine import detect
from titans_backends.tuning.gate import check_backward
from titans_backends.tuning.ledger import Ledger, Rejected
from titans_backends.tuning.suite import exam_of


def examine(op: str, backend: str, dtype: torch.dtype, device: str) -> list[str]:
    """Runs each variant of an op once for each of its kinds of call, and for the first of them packed; the lines of what went wrong."""
    contract, (module, reason) = CONTRACTS[op], registry.module(registry.get(backend), op)
    if module is None:
        return [f"{op}: {reason}"]
    wrong: list[str] = []
    kinds = {variant.name for variant in contract.variants} | {f"{contract.variants[0].name}, packed with empty sequences"}
    for case in cases(contract, dtype):
        if case.name not in kinds:
            continue
        call = build(contract, case, device)
        signature, seen = signature_of(contract, call, validate(contract, call)), set[str]()
        if not module.supports(signature, detect(device)):
            continue
        wanted = contract.reference(contract.to(call, torch.float64))
        for candidate in module.candidates(signature, detect(device)):
            if candidate.variant in seen:
                continue
            seen.add(candidate.variant)
            found = module.run(call, candidate)
            torch.cuda.synchronize()
            print(f"ran {op} {case.name}: {candidate.label}", flush=True)
            for spec, got, want in zip(contract.outputs, found, wanted, strict=True):
                if got is not None and want is not None:
                    difference = compare(spec.name, got, want)
                    if not difference.within(tolerance(dtype).outputs):
                        wrong.append(f"{op} {case.name}: {candidate.label}: {difference}")
    return wrong


def examine_backward(op: str, backend: str, dtype: torch.dtype, device: str) -> list[str]:
    """The same for the variants of the backward, with the gradients that the tuner would compare, twice each for the same bits."""
    contract, (module, reason) = CONTRACTS[op], registry.module(registry.get(backend), op)
    if module is None or not hasattr(module, "backward_candidates"):
        return [f"{op}: {reason or 'it has no backward'}"]
    wrong: list[str] = []
    kinds = {variant.name for variant in contract.variants} | {f"{contract.variants[0].name}, packed with empty sequences"}
    for case in cases(contract, dtype):
        if case.name not in kinds:
            continue
        call, seen = build(contract, case, device), set[tuple[str, bool]]()
        signature = signature_of(contract, call, validate(contract, call), regime="training")
        if not module.supports(signature, detect(device)):
            continue
        exam = exam_of(contract, case, call, training=True)
        for candidate in module.backward_candidates(signature, detect(device)):
            if (candidate.variant, "segment" in dict(candidate.params)) in seen:
                continue
            seen.add((candidate.variant, "segment" in dict(candidate.params)))
            try:
                check_backward(contract, candidate, module, exam, tolerance(dtype), Ledger(), case.name)
            except Rejected as error:
                wrong.append(f"{op}: {candidate.label}: {error}")
            torch.cuda.synchronize()
            print(f"ran {op} {case.name}: {candidate.label}", flush=True)
    return wrong


def main() -> int:
    """0 where every result is right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--ops", help=f"comma-separated, of {', '.join(CONTRACTS)} (default: all that the backend has)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--backward", action="store_true", help="the backward's variants instead of the forward's")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("it needs a CUDA device")
    ops = asked.ops.split(",") if asked.ops else sorted(registry.get(asked.backend).ops)
    examination = examine_backward if asked.backward else examine
    wrong = [line for op in ops for line in examination(op, asked.backend, getattr(torch, asked.dtype), "cuda")]
    print("\n".join(wrong) if wrong else "every result is right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
