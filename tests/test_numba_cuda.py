"""The Numba CUDA backend without a GPU: right in the simulator, compiled for real to PTX, refused with a cure where it cannot run.

The simulator is chosen when Numba is imported, so `numba_simulated.py` runs in processes of its own; that its kernels do the work is said there. PTX
wants NVVM and NVRTC, which come with the extra `test`. On a GPU the last test sees that our kernels ran and no other backend.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest
import torch

import titans_backends as tb
from tests import fresh
from tests.triton_machines import H100
from titans_backends import registry
from titans_backends.backend import OpModule, TrainableOpModule
from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.case import Case, build
from titans_backends.contracts.contract import Call
from titans_backends.contracts.tolerance import compare, tolerance
from titans_backends.contracts.validate import validate
from titans_backends.facts import signature_of
from titans_backends.offers import offer
from titans_backends.signature import Signature

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "titans_backends.backends.numba"
OPS = tuple(import_module(PACKAGE).BACKEND.ops)
KERNELS = (
    "chunk_read", "state_scan", "state_reverse", "uw_chunks", "token_step", "log_gradient", "tiled_product", "log_decay", "frobenius", "unit_rows",
    "dot_rows",
)  # fmt: skip
"""Every kernel, the longest to compile first."""
SHARED_BYTES = 48 * 1024
ABSENT = [name for name in ("numba", "numba_cuda") if find_spec(name) is None]
installed = pytest.mark.skipif(bool(ABSENT), reason=f"not installed: {', '.join(ABSENT)}: pip install -c constraints.txt -e '.[test]'")


@installed
@pytest.mark.slow
def test_every_op_is_right_in_the_simulator() -> None:
    done = fresh.run_pytest("tests/numba_simulated.py", cwd=ROOT, NUMBA_ENABLE_CUDASIM="1", OMP_NUM_THREADS="1")
    if done.returncode:
        pytest.fail(f"NUMBA_ENABLE_CUDASIM=1 pytest tests/numba_simulated.py\n{done.stdout}\n{done.stderr}", pytrace=False)
    assert " passed" in done.stdout


def call_of(op: str, size: int = 16, device: str = "cpu", **changes: Any) -> Call:
    """The op's first variant, two heads of `size`, in float32."""
    made = CONTRACTS[op]
    first = made.variants[0]
    base = Case("numba", B=1, T=3 if op == "gated_delta_step" else 130, G=1, H=2, K=size, V=size, options=first.options, given=first.given)
    return build(made, replace(base, **changes), device)


def signature(op: str, call: Call | None = None) -> Signature:
    made, call = CONTRACTS[op], call or call_of(op)
    return replace(signature_of(made, call, validate(made, call)), device="cuda")


def module_of(op: str) -> OpModule:
    return cast(OpModule, import_module(f"{PACKAGE}.{op}"))


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel as it is launched: constants, and types of its arguments."""

    make: Callable[..., Callable[..., None]]
    constants: tuple[int, ...]
    types: tuple[Any, ...]


def every_call() -> list[tuple[str, Call]]:
    """Every variant of every op of ours in its largest chunks, with the widest heads and with those whose state fits a block."""
    found = []
    for op in OPS:
        made = CONTRACTS[op]
        for variant in made.variants:
            options = dict(variant.options)
            if "chunk_size" in made.option_by_name:
                options["chunk_size"] = 128
            found += [(op, call_of(op, size, options=options, given=variant.given)) for size in (256, 64)]
    return found


@pytest.fixture(scope="module")
def launches() -> dict[str, Launch]:
    """What all ops launch forward and backward, by the kernel's name, its largest form; nothing is started."""
    launch = import_module(f"{PACKAGE}.launch")
    found: dict[str, Launch] = {}

    def written_down(kernel: Any, blocks: object, threads: int, constants: tuple[int, ...], *args: Any) -> None:
        one = Launch(kernel.make, constants, tuple(launch.numba_type(arg) for arg in args))
        known = found.setdefault(kernel.name, one)
        assert known.types == one.types, f"{kernel.name} is launched with arguments of several types, and compiled for the first"
        if constants > known.constants:
            found[kernel.name] = one

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch.Kernel, "__call__", written_down)
        for op, call in every_call():
            module, facts = module_of(op), signature(op, call)
            if module.supports(facts, H100):
                for candidate in module.candidates(facts, H100):
                    module.run(call, candidate)
            needs = frozenset(name for name in CONTRACTS[op].differentiable if name in CONTRACTS[op].tensors(call))
            training = replace(facts, regime="training", needs=needs)
            if hasattr(module, "run_backward") and module.supports(training, H100):
                arriving = CONTRACTS[op].reference(call)
                for candidate in cast(TrainableOpModule, module).backward_candidates(training, H100):
                    module.run_backward(call, arriving, None, needs, candidate)
    return found


def compiled(one: Launch) -> str:
    """The PTX for Hopper, which Numba's compiler gives without a GPU; a skip where NVVM or NVRTC is not found."""
    from cuda.pathfinder import DynamicLibNotFoundError
    from numba import cuda

    class Hopper:
        compute_capability = (9, 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("numba.cuda.dispatcher.get_current_device", Hopper)  # functions that kernels call ask the device what it is
        try:
            return cast(str, cuda.compile_ptx(one.make(*one.constants), one.types, cc=(9, 0))[0])
        except DynamicLibNotFoundError as absent:
            pytest.skip(f"NVVM or NVRTC is not found ({str(absent).splitlines()[0]}): pip install -c constraints.txt -e '.[test]'")


@installed
def test_the_list_of_kernels_is_that_of_the_backend(launches: dict[str, Launch]) -> None:
    kernel = import_module(f"{PACKAGE}.launch").Kernel
    modules = [import_module(f"{PACKAGE}.{file.stem}") for file in (ROOT / "backends" / "numba").glob("*.py") if file.stem != "__init__"]
    assert {value.name for module in modules for value in vars(module).values() if isinstance(value, kernel)} == set(KERNELS) == set(launches)


@installed
@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_compiles_for_hopper_and_fits_a_block(name: str, launches: dict[str, Launch]) -> None:
    ptx = compiled(launches[name])
    assert ".target sm_90" in ptx
    assert sum(int(size) for size in re.findall(r"\.shared .*?\[(\d+)\]", ptx)) <= SHARED_BYTES
    if name not in {"log_decay", "log_gradient"}:  # their sums of logarithms are float64
        assert not re.findall(r"\b(?:fma|mul|add)\.(?:rn\.)?f64", ptx), "a number in the kernel is a float64, and makes its products float64"


@installed
@pytest.mark.parametrize(
    ("op", "changes", "reason"),
    [
        ("gated_delta_rule", {"dtype": torch.float64}, "dtype float64 is not in {bfloat16, float16, float32}"),
        ("gated_delta_rule", {"size": 264}, "head_dim K=264 is not in 1 to 256"),
        ("uw_transform", {"options": {"chunk_size": 256}, "T": 300}, "pass chunk_size=128 or less"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_does(op: str, changes: dict[str, Any], reason: str) -> None:
    verdict = module_of(op).supports(signature(op, call_of(op, **changes)), H100)
    assert not verdict
    assert reason in str(verdict)
    assert "backend='eager'" in str(verdict)


@installed
def test_old_cards_and_the_simulator_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    supports = module_of("gated_delta_rule").supports
    assert "compute capability 7.0" in str(supports(signature("gated_delta_rule"), replace(H100, sm=61)))
    monkeypatch.setattr(f"{PACKAGE}.serving.SIMULATED", True)
    assert "unset it, or pass backend='eager'" in str(supports(signature("gated_delta_rule"), H100))


@installed
def test_a_processor_is_refused() -> None:
    assert "does not run on cpu" in str(offer(registry.get("numba"), signature("gated_delta_rule"), replace(H100, kind="cpu")).verdict)


@pytest.mark.parametrize("package", ["numba", "numba_cuda"])
def test_a_missing_package_is_named_with_the_command(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    said = str(offer(registry.get("numba"), signature("gated_delta_rule"), H100).verdict)
    assert f"the package {package} is not installed: pip install 'titans-backends[cuda13]'" in said


@installed
def test_a_numba_that_cannot_be_imported_is_a_refusal_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == "numba" or name.startswith(("numba.", f"{PACKAGE}."))]:
        monkeypatch.delitem(sys.modules, name)
    broken = ModuleType("numba")
    broken.__spec__ = cast(Any, find_spec("os"))
    monkeypatch.setitem(sys.modules, "numba", broken)
    tb.reset()
    said = str(offer(registry.get("numba"), signature("gated_delta_rule"), H100).verdict)
    tb.reset()
    assert "numba.cuda cannot be imported" in said
    assert "pip install numba==0.68.1 numba-cuda==0.30.4 'numpy<2.5'" in said


@installed
def test_a_numpy_without_row_stack_will_do_and_stays_as_it_is() -> None:
    program = f"import numpy; vars(numpy).pop('row_stack', None); import {PACKAGE}.target; assert not hasattr(numpy, 'row_stack')"
    done = fresh.run(program)
    assert done.returncode == 0, done.stderr


@installed
def test_the_constraints_hold_what_the_cure_names() -> None:
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    cure = (ROOT / "backends" / "numba" / "target.py").read_text()
    assert [line for line in pinned if line.startswith(("numba==", "numba-cuda==")) and line not in cure] == []


@installed
@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("op", OPS)
def test_our_kernels_run_on_the_gpu_and_no_other_backend(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("eager ran")

    made, started, launch = CONTRACTS[op], set[str](), import_module(f"{PACKAGE}.launch")
    monkeypatch.setattr(import_module(f"titans_backends.backends.eager.{op}"), "run", refuse)
    start = launch.Kernel.__call__

    def spy(kernel: Any, *args: Any) -> None:
        start(kernel, *args)
        assert kernel._compiled
        started.add(kernel.name)

    monkeypatch.setattr(launch.Kernel, "__call__", spy)
    call = call_of(op, device="cuda")
    found = tb.get_op(op)(**{name: getattr(call, name) for name in made.parameters}, backend="numba")
    assert started
    assert started <= set(KERNELS)
    for spec, got, want in zip(made.outputs, found, made.reference(made.to(call, torch.float64)), strict=True):
        if got is not None and want is not None:
            difference = compare(spec.name, got, want)
            assert difference.within(tolerance(torch.float32).outputs), difference
