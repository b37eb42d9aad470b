"""Which compiled forms a candidate of the Triton backend launches, and what each takes of a card, found without a GPU.

A call on sizes alone (device "meta") runs with every launch written down; each form is then compiled ahead of time for an architecture, and
`cuobjdump` reads registers and spills from the cubin. As a command it prints them: `python tests/triton_forms.py slow_core --sm 90 --all`, of the
backward with `--backward`.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.triton_machines import CARDS
from titans_backends.backend import Candidate, OpModule, TrainableOpModule
from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.case import Case, build
from titans_backends.contracts.contract import Call
from titans_backends.contracts.validate import validate
from titans_backends.facts import signature_of
from titans_backends.machine import Machine
from titans_backends.signature import Regime, Signature

if TYPE_CHECKING:
    from titans_backends.backends.triton.launch import Form

__all__ = [
    "AROUND",
    "PRODUCTION",
    "TRAINED",
    "TRAINING",
    "Compilation",
    "Usage",
    "compilations",
    "compiled",
    "compiler_pool",
    "module_of",
    "offered",
    "production",
    "signature",
]

PACKAGE = "titans_backends.backends.triton"
_CUOBJDUMP = "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True, slots=True)
class Compilation:
    """One kernel in one form for one architecture, by name, so that another process can do it."""

    module: str
    kernel: str
    form: Form
    sm: int

    def __str__(self) -> str:
        return f"{self.kernel} {self.form.constants} warps={self.form.warps} stages={self.form.stages} for sm_{self.sm}"


@dataclass(frozen=True, slots=True)
class Usage:
    """What a compiled kernel takes: bytes of shared memory a block, registers a thread, bytes a thread spilled to local memory, wrong pairs of lanes."""

    shared: int
    registers: int
    spilled: int
    wrong_lanes: int


_LONG = Case("long", B=1, T=8192, G=16, H=32, K=128, V=128, dtype=torch.bfloat16)
_SMALL_HEADS = replace(_LONG, name="small heads", G=12, H=12, K=32, V=32)
PRODUCTION: tuple[Case, ...] = (_LONG, _SMALL_HEADS, replace(_LONG, name="short", T=512), replace(_SMALL_HEADS, name="float32", dtype=torch.float32))
"""The calls whose defaults are compiled; `production` fits them to an op."""
TRAINING: tuple[Case, ...] = (_LONG, replace(_LONG, name="medium heads", G=16, H=16, K=64, V=64), _SMALL_HEADS)
"""The same of the backward."""
AROUND = ("short_conv", "qkv_prepare", "gated_rms_norm", "token_flux", "chunk_flux")
"""The ops around the memory, whose kernels depend on little: they are compiled and interpreted for fewer calls."""
TRAINED = ("fused_uw", "fast_core", "uw_transform", "slow_core", "gated_delta_rule", "dual_core", "coupled_core", "deep_core", *AROUND)
"""The ops that have one."""


def production(op: str, case: Case) -> Case:
    """One of the cases with the op's first variant, as layers call it: gates where they are outside of the op left out."""
    made = CONTRACTS[op]
    if op == "fused_uw":
        return case
    if made.max_tokens:
        return replace(case, B=64, T=1, given=("g", "fast_gate", "slow_gate") if op == "dual_core_step" else ("g",))
    if op == "dual_core" and case.dtype == torch.float32:
        return replace(case, options={"memory": "flat", "transform": "lam"}, given=("fast_gate", "slow_gate"))
    if op == "coupled_core":
        case = replace(case, K=min(case.K, 32), V=min(case.V, 64)) if max(case.K, case.V) <= 128 else case  # no card has examined wider heads
        return replace(case, options={"transform": "lam", "output_final_state": True}, given=made.variants[1].given)
    kept = {"fast_core": ("gate", "g"), "deep_core": ("gate", "g"), "dual_core": ("g", "fast_gate", "slow_gate", "alpha")}.get(op, ("g",))
    options = {"output_final_state": True} if "output_final_state" in made.option_by_name else {}
    return replace(case, options=options, given=kept)


def module_of(op: str) -> OpModule:
    """The op's module."""
    return cast(OpModule, import_module(f"{PACKAGE}.{op}"))


def signature(op: str, case: Case, float32: str = "highest", regime: Regime = "inference") -> tuple[Call, Signature]:
    """A case's call on sizes alone, and its signature on a GPU."""
    made = CONTRACTS[op]
    call = build(made, case, "meta")
    return call, replace(signature_of(made, call, validate(made, call), regime=regime), device="cuda", float32=float32)


def offered(op: str, facts: Signature, machine: Machine) -> list[Candidate]:
    """The candidates of the signature's regime: in training those of the backward."""
    module = module_of(op)
    if facts.regime == "training":
        return list(cast(TrainableOpModule, module).backward_candidates(facts, machine))
    return list(module.candidates(facts, machine))


def compilations(op: str, call: Call, candidate: Candidate, sm: int) -> list[Compilation]:
    """What a candidate launches for a call, each form once, in the order of the launches; of a backward where every input wants its gradient."""
    from titans_backends.backends.triton.ahead import arriving, collected

    module = module_of(op)

    def either(call: object, candidate: Candidate) -> object:
        if candidate.direction == "forward":
            return module.run(call, candidate)
        return cast(TrainableOpModule, module).run_backward(call, *arriving(op, call, candidate), candidate)

    return [
        Compilation(kernel.function.__module__, kernel.name, form, sm)  # type: ignore[attr-defined]
        for kernel, form in collected(either, call, candidate)
    ]


def compiled(one: Compilation) -> Usage:
    """Compiles; raises what the compiler raises."""
    import triton
    from titans_backends.backends.triton import lanes
    from titans_backends.backends.triton.launch import Kernel, options_of, source_of
    from triton.backends.compiler import GPUTarget

    module = import_module(one.module)
    kernel = next(value for value in vars(module).values() if isinstance(value, Kernel) and value.name == one.kernel)
    made = lanes.compiled(source_of(kernel, one.form), options_of(one.form), GPUTarget("cuda", one.sm, 32))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / _CUOBJDUMP
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    facts = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}
    return Usage(int(made.metadata.shared), facts["REG"], facts["STACK"] + facts["LOCAL"], len(lanes.spilling(str(made.asm["ptx"]))))


def _start(cache: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = cache
    torch.set_num_threads(1)


def compiler_pool(cache: Path, workers: int | None = None) -> ProcessPoolExecutor:
    """Processes that compile what is not yet in this cache folder; in a fresh one that is everything."""
    return ProcessPoolExecutor(workers or os.cpu_count(), get_context("spawn"), _start, (str(cache),))


def _asked(
    ops: Iterable[str], machine: Machine, everything: bool, cases: Iterable[Case], regime: Regime
) -> Iterator[tuple[str, str, Candidate, list[Compilation]]]:
    for op in ops:
        for case in cases:
            precisions = ("highest", "high") if case.dtype == torch.float32 else ("highest",)
            for float32 in precisions:
                call, facts = signature(op, production(op, case), float32, regime)
                verdict = module_of(op).supports(facts, machine)
                if not verdict:
                    print(f"{op} {case.name}: refused: {verdict}")
                    continue
                found = offered(op, facts, machine)
                for candidate in found if everything else found[:1]:
                    yield op, f"{case.name} {float32}", candidate, compilations(op, call, candidate, machine.sm or 0)


def main() -> int:
    """Prints what the candidates of ops take; 1 where one does not compile or does not fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", nargs="*", help="ops (default: all)")
    parser.add_argument("--sm", type=int, action="append", choices=sorted(CARDS), help="architectures (default 90); may be repeated")
    parser.add_argument("--all", action="store_true", help="every candidate, not the default alone")
    parser.add_argument("--backward", action="store_true", help="the kernels of the backward, not of the forward")
    parser.add_argument("--case", action="append", choices=[*dict.fromkeys(case.name for case in (*PRODUCTION, *TRAINING))], help="(default: all)")
    given = parser.parse_args()
    cases = [case for case in (TRAINING if given.backward else PRODUCTION) if not given.case or case.name in given.case]
    every = TRAINED if given.backward else tuple(import_module(PACKAGE).BACKEND.ops)
    ops, regime = given.op or every, "training" if given.backward else "inference"
    failed = False
    with tempfile.TemporaryDirectory() as cache, compiler_pool(Path(cache)) as pool:
        running: dict[Compilation, Future[Usage]] = {}
        for sm in given.sm or [90]:
            rows = list(_asked(ops, CARDS[sm], given.all, cases, regime))
            for *_, jobs in rows:
                running.update({job: pool.submit(compiled, job) for job in jobs if job not in running})
            for op, name, candidate, jobs in rows:
                print(f"{op} | {name} | {candidate.label} | sm_{sm}")
                for job in jobs:
                    failed |= _told(job, running, CARDS)
    return 1 if failed else 0


def _told(job: Compilation, running: Mapping[Compilation, Future[Usage]], cards: Mapping[int, Machine]) -> bool:
    try:
        usage = running[job].result()
    except Exception as error:
        print(f"    {job.kernel}: {type(error).__name__}: {error}")
        return True
    limit = cards[job.sm].shared_memory_bytes or 0
    wrong = usage.shared > limit
    print(
        f"    {job.kernel:<24} shared {usage.shared:>7}{' TOO MUCH' if wrong else ''}  registers {usage.registers:>3}  spilled {usage.spilled:>4}  "
        f"warps {job.form.warps} stages {job.form.stages}  {job.form.constants}",
        flush=True,
    )
    return wrong


if __name__ == "__main__":
    sys.exit(main())
