"""Every op on calls of more than 2^31 numbers and more than 65,535 blocks, dense and packed: each row and each sequence must be the small call's.

    python benchmarks/large_calls.py [--backend triton] [--ops slow_core,dual_core]

A small call is repeated until one operand has more than 2^31 numbers; the candidate is the one that the large call gets by default. Rows do not
depend on each other, so the numbers must be the same to the last bit. It takes about 50 GB of device memory. Nothing is timed.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

import torch
from torch import Tensor

from titans_backends import registry
from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.case import Case, build
from titans_backends.contracts.contract import Call, Contract
from titans_backends.contracts.validate import validate
from titans_backends.facts import signature_of
from titans_backends.machine import detect

LIMIT = 2**31
ROW = Case("row", B=1, T=1000, G=16, H=16, K=128, V=128, dtype=torch.bfloat16)


def small(contract: Contract, packed: bool) -> Call:
    """One row, or one sequence packed."""
    options = {"output_final_state": True} if "output_final_state" in contract.parameters else {}
    one = replace(ROW, options=options, T=1 if contract.name == "gated_delta_step" else ROW.T)
    return build(contract, replace(one, lengths=(one.T,), given=("cu_seqlens",)) if packed else one, "cuda")


def repeated(call: Call, times: int, packed: bool) -> Call:
    """The call `times` times: along the batch, or along the tokens with cu_seqlens grown."""
    tokens, made = 0, {}
    for name, value in vars_of(call).items():
        if not isinstance(value, Tensor):
            continue
        if name == "cu_seqlens":
            tokens = int(value[-1])
            made[name] = torch.arange(times + 1, dtype=value.dtype, device=value.device) * tokens
        elif packed and name not in ("initial_state", "initial_fast_state"):
            made[name] = value.repeat(1, times, *[1] * (value.dim() - 2))
        else:
            made[name] = value.repeat(times, *[1] * (value.dim() - 1))
    return replace(call, **made)


def vars_of(call: Call) -> dict[str, object]:
    """A call's arguments by name."""
    return {name: getattr(call, name) for name in call.__dataclass_fields__}


def same(large: Tensor, one: Tensor, times: int, along: int) -> bool:
    """Whether each repetition holds the small call's bits."""
    parts = large.unflatten(along, (times, one.shape[along]))
    return all(bool((part == one).all()) for part in parts.unbind(along))


def examine(op: str, backend: str, packed: bool) -> str:
    """What is wrong with an op on a large call, or nothing."""
    contract, (module, reason) = CONTRACTS[op], registry.module(registry.get(backend), op)
    if module is None:
        return f"{op}: {reason}"
    one = small(contract, packed)
    most = max(value.numel() for value in vars_of(one).values() if isinstance(value, Tensor))
    times = LIMIT // most + 2
    call = repeated(one, times, packed)
    signature = signature_of(contract, call, validate(contract, call))
    verdict = module.supports(signature, detect("cuda"))
    if not verdict:
        return f"{op}: refused: {verdict}"
    candidate = module.candidates(signature, detect("cuda"))[0]
    want = module.run(one, candidate)
    got = module.run(call, candidate)
    torch.cuda.synchronize()
    for spec, a, b in zip(contract.outputs, got, want, strict=True):
        if a is None or b is None:
            continue
        along = 1 if packed and not spec.name.startswith("final") else 0
        if not same(a, b, times, along):
            return f"{op}: {candidate.label}: {spec.name} differs between the repetitions"
    largest = max(value.numel() for value in (*vars_of(call).values(), *got) if isinstance(value, Tensor))
    print(
        f"{op:<18} {'packed' if packed else 'dense':<6} {times} x {tuple(one_shape(one))}, {largest:,} numbers: {candidate.label}: the same bits",
        flush=True,
    )
    return ""


def one_shape(call: Call) -> torch.Size:
    """The shape of the small call's largest operand."""
    return max((value for value in vars_of(call).values() if isinstance(value, Tensor)), key=lambda value: value.numel()).shape


def main() -> int:
    """0 where every repetition is right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--ops", help=f"comma-separated, of {', '.join(CONTRACTS)} (default: all that the backend has)")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no CUDA device; this check is for one", file=sys.stderr)
        return 2
    wrong = []
    for op in asked.ops.split(",") if asked.ops else sorted(registry.get(asked.backend).ops):
        for packed in (False, True):
            if packed and "cu_seqlens" not in CONTRACTS[op].parameters:
                continue
            wrong.append(examine(op, asked.backend, packed))
            torch.cuda.empty_cache()
    wrong = [line for line in wrong if line]
    print("\n".join(wrong) if wrong else "every repetition is right")
    return 1 if wrong else 0


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(main())
