"""Every op as its user calls it, on what dispatch chooses and on eager, in inference and in training; checked before it is timed.

Outputs, and in training gradients, are compared with the contract's float64 reference, within the contract's tolerance; a kernel
that is wrong is not timed. Sizes are options: pytest benchmarks/ --seq-lens 512,2048 --heads 16/32 --head-dim 128
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import titans_backends as tb
from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.case import Case, build, cotangents
from titans_backends.contracts.contract import Call, Contract
from titans_backends.contracts.tolerance import compare, tolerance

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
REGIMES = ("inference", "training")
BACKENDS = (None, "eager")
Results = tuple[tuple[str, Tensor], ...]


@dataclass(frozen=True, slots=True)
class Sizes:
    """One problem's sizes, as the options give them."""

    batch: int
    seq_len: int
    heads: tuple[int, int]
    head_dim: tuple[int, int]
    dtype: torch.dtype

    def __str__(self) -> str:
        (keys, values), (k, v) = self.heads, self.head_dim
        return f"{self.batch}x{self.seq_len} {keys}/{values} {k}x{v} {str(self.dtype).removeprefix('torch.')}"


def _two(text: str, separator: str) -> tuple[int, int]:
    """`16/32` as (16, 32), `16` as (16, 16)."""
    left, _, right = text.partition(separator)
    return int(left), int(right or left)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "sizes" in metafunc.fixturenames:
        option = metafunc.config.getoption
        heads, head_dim = _two(option("--heads"), "/"), _two(option("--head-dim"), "x")
        lengths = [int(length) for length in option("--seq-lens").split(",")]
        made = [Sizes(option("--batch"), length, heads, head_dim, DTYPES[option("--dtype")]) for length in lengths]
        metafunc.parametrize("sizes", made, ids=str, scope="session")


@functools.lru_cache(maxsize=2)
def problem(op: str, sizes: Sizes) -> Call:
    """The inputs: the contract's first variant, at one token in decode; alpha per token, as one number's gradient is a sum that may cancel."""
    contract = CONTRACTS[op]
    variant = contract.variants[0]
    (groups, heads), (keys, values) = sizes.heads, sizes.head_dim
    tokens = 1 if contract.max_tokens else sizes.seq_len
    case = Case("benchmark", sizes.batch, tokens, groups, heads, keys, values, sizes.dtype, variant.options, variant.given, seed=2)
    return build(contract, case)


def named(contract: Contract, call: Call, outputs: tuple[Tensor | None, ...], *, training: bool, leaves: dict[str, Tensor]) -> Results:
    """What is compared: the outputs, and in training the leaves' gradients."""
    found = [(spec.name, o.detach()) for spec, o in zip(contract.outputs, outputs, strict=True) if o is not None]
    if training:
        arriving = cotangents(contract, call, outputs)
        reached = [(o, g) for o, g in zip(outputs, arriving, strict=True) if o is not None and g is not None]
        gradients = torch.autograd.grad([o for o, _ in reached], list(leaves.values()), [g for _, g in reached], allow_unused=True)
        found += [(f"d{name}", torch.zeros_like(leaf) if g is None else g) for (name, leaf), g in zip(leaves.items(), gradients, strict=True)]
    return tuple(found)


@functools.lru_cache(maxsize=2)
def reference(op: str, sizes: Sizes, training: bool) -> Results:
    """The float64 reference on the same, already rounded, inputs."""
    contract = CONTRACTS[op]
    call = contract.to(problem(op, sizes), torch.float64)
    leaves = leaves_of(contract, call, training)
    with torch.set_grad_enabled(training):
        return named(contract, call, contract.reference(contract.with_tensors(call, leaves)), training=training, leaves=leaves)


def leaves_of(contract: Contract, call: Call, training: bool) -> dict[str, Tensor]:
    """The call's differentiable tensors, as leaves of their own."""
    return {n: t.detach().requires_grad_(training) for n, t in contract.tensors(call).items() if n in contract.differentiable}


@pytest.fixture
def checked(op: str, regime: str, backend: str | None, sizes: Sizes, benchmark: BenchmarkFixture) -> Callable[[], object]:
    """The call to time, after its results were found right."""
    contract, training = CONTRACTS[op], regime == "training"
    leaves = leaves_of(contract, problem(op, sizes), training)
    call = contract.with_tensors(problem(op, sizes), leaves)
    arguments = {name: getattr(call, name) for name in contract.parameters}
    run = tb.get_op(op, backend=backend)
    with torch.set_grad_enabled(training):
        benchmark.extra_info["kernel"] = run.explain(**arguments).kernel
        outputs = run(**arguments)
        results = named(contract, call, outputs, training=training, leaves=leaves)
    limits = tolerance(sizes.dtype)
    differences = [compare(name, got, want) for (name, got), (_, want) in zip(results, reference(op, sizes, training), strict=True)]
    wrong = [str(d) for d in differences if not d.within(limits.gradients if d.name.startswith("d") else limits.outputs)]
    assert not wrong, f"{benchmark.extra_info['kernel']} is wrong and is not timed: {'; '.join(wrong)}"
    benchmark.extra_info["worst_error"] = max((d.maximum for d in differences), default=0.0)
    benchmark.extra_info["device"] = tb.detect("cpu").slug
    arriving = [g for g in cotangents(contract, call, outputs) if g is not None]

    def inference() -> object:
        with torch.no_grad():
            return run(**arguments)

    def training_step() -> object:
        made = [o for o in run(**arguments) if o is not None]
        return torch.autograd.grad(made, list(leaves.values()), arriving, allow_unused=True)

    return training_step if training else inference


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda name: name or "chosen")
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("op", CONTRACTS)
@pytest.mark.benchmark(min_rounds=5, max_time=0.5, warmup=True, warmup_iterations=3, disable_gc=True)
def test_time_of_op(op: str, regime: str, backend: str | None, sizes: Sizes, checked: Callable[[], object], benchmark: BenchmarkFixture) -> None:
    benchmark.group = f"{op} {regime} {sizes}"
    benchmark(checked)
