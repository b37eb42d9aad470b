"""The inductor backend: it compiles once for every size, says why it cannot be used, and its forward may serve a mixed training pair."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from torch import Tensor

import titans_backends as tb
from tests import fresh
from titans_backends import registry
from titans_backends.contracts import contract
from titans_backends.contracts.case import Case, build
from titans_backends.contracts.contract import Call
from titans_backends.contracts.tolerance import compare, tolerance
from titans_backends.contracts.validate import validate
from titans_backends.facts import signature_of
from titans_backends.machine import Machine, detect
from titans_backends.offers import offer
from titans_backends.signature import Signature
from titans_backends.tuning.gate import check_forward
from titans_backends.tuning.ledger import Ledger
from titans_backends.tuning.suite import exam_of

compiled = import_module("titans_backends.backends.inductor.compiled")
fast_core = import_module("titans_backends.backends.inductor.fast_core")
probe = import_module("titans_backends.backends.inductor.probe")
toolchain = import_module("titans_backends.backends.inductor.toolchain")

CPU = detect("cpu")
GPU = Machine(kind="cuda", name="A GPU", slug="a_gpu", sm=90)
needs_compiler = pytest.mark.skipif(not toolchain.requirements(CPU), reason=str(toolchain.requirements(CPU)))


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    toolchain.forget()
    tb.reset()
    yield
    toolchain.forget()
    tb.reset()


def rule_call(**changes: object) -> Call:
    base = Case("sizes", T=64, options={"output_final_state": True}, given=("g", "gate", "initial_state"))
    return build(contract("gated_delta_rule"), replace(base, **changes))  # type: ignore[arg-type]


def signature(op: str = "fast_core", **changes: object) -> Signature:
    made = contract(op)
    call = build(made, replace(Case("facts", T=64, given=("g",)), **changes))  # type: ignore[arg-type]
    return signature_of(made, call, validate(made, call))


def run(call: Call) -> tuple[Tensor | None, ...]:
    made = contract("gated_delta_rule")
    return tb.get_op(made.name)(**{name: getattr(call, name) for name in made.parameters}, backend="inductor")


def assert_right(call: Call) -> None:
    made = contract("gated_delta_rule")
    for spec, got, want in zip(made.outputs, run(call), made.reference(made.to(call, torch.float64)), strict=True):
        assert got is not None
        assert want is not None
        difference = compare(spec.name, got, want)
        assert difference.within(tolerance(torch.float32).outputs), difference


@needs_compiler
def test_one_compilation_serves_every_length_batch_and_width() -> None:
    assert_right(rule_call(T=64))
    before = compiled.compiled_count()
    with torch.compiler.set_stance("fail_on_recompile"):
        for sizes in (
            {"T": 64},
            {"T": 200},
            {"T": 33, "B": 1},
            {"T": 130, "B": 3, "G": 1, "H": 3},
            {"K": 32, "V": 8},
            {"K": 20, "V": 36},
            {"K": 32, "V": 32},
        ):
            assert_right(rule_call(**sizes))
        assert_right(rule_call(T=100, B=1, lengths=(33, 0, 1, 66)))
    assert compiled.compiled_count() == before


@needs_compiler
def test_a_single_chunk_of_a_single_head_needs_no_other_compilation() -> None:
    assert_right(rule_call())
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_right(rule_call(T=16, B=1, G=1, H=1))


@needs_compiler
def test_no_mode_of_autograd_compiles_again() -> None:
    call = rule_call()
    run(call)
    with torch.compiler.set_stance("fail_on_recompile"):
        with torch.inference_mode():
            first = run(call)
        with torch.no_grad():
            second = run(call)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
            third = run(call)
    for results in zip(first, second, third, strict=True):
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


@needs_compiler
@pytest.mark.parametrize("op", ["slow_core", "gated_delta_rule"])
def test_forward_saves_states_for_another_backends_backward(op: str) -> None:
    made = contract(op)
    variant = made.variants[0]
    case = Case("training", T=130, options=variant.options, given=variant.given)
    call = build(made, case)
    exam = exam_of(made, case, call, training=True)
    facts = signature_of(made, call, validate(made, call), regime="training")
    given = offer(registry.get("inductor"), facts, CPU)
    assert given.backward == ()
    assert {candidate.saves_states for candidate in given.forward} == {True, False}
    assert given.module is not None
    for candidate in given.forward:
        check_forward(made, candidate, given.module, exam, tolerance(torch.float32), Ledger(), candidate.label)


@needs_compiler
def test_forced_in_training_it_says_that_it_has_no_backward() -> None:
    call = rule_call()
    call.q.requires_grad_()  # type: ignore[attr-defined]
    with pytest.raises(tb.BackendRefusedError, match="it has only forward"):
        run(call)


@needs_compiler
def test_probe_accepts_what_compiles_and_is_right() -> None:
    assert probe.probe(CPU), probe.probe(CPU)


@needs_compiler
def test_what_the_probe_found_binds_later_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(call: object, candidate: object) -> tuple[Tensor | None, ...]:
        raise RuntimeError("the compiler crashed\nand said more")

    monkeypatch.setattr(probe, "run", broken)
    verdict = probe.probe(CPU)
    assert str(verdict) == "the smallest case failed: RuntimeError: the compiler crashed"
    assert fast_core.supports(signature(), CPU) == verdict
    assert fast_core.supports(signature(), GPU) != verdict
    monkeypatch.undo()
    assert probe.probe(CPU)
    assert fast_core.supports(signature(), CPU)


@needs_compiler
def test_a_wrong_result_is_refused_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "run", lambda call, candidate: (torch.zeros_like(call.v), None))
    assert str(probe.probe(CPU)).startswith("the smallest case is wrong: o: 1.0e+00")


def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, *rest: None)


def test_without_a_compiler_it_refuses_and_names_what_it_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    facts, name = signature(), toolchain.compiler_name()
    without_compiler(monkeypatch)
    verdict = fast_core.supports(facts, CPU)
    assert not verdict
    assert str(verdict) == f"torch.compile needs a C++ compiler, and {name!r} is not on the PATH; install g++, or name a compiler in CXX"
    assert probe.probe(CPU) == verdict


def test_forced_without_a_compiler_the_call_says_so_and_what_is_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    call = rule_call()
    without_compiler(monkeypatch)
    with pytest.raises(tb.BackendRefusedError, match=r"needs a C\+\+ compiler.*Usable here: .*eager"):
        run(call)


def test_cxx_names_the_compiler_before_torch_has_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch._inductor.config", raising=False)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert toolchain.compiler_name() == "no-such-compiler"
    assert "'no-such-compiler' is not on the PATH" in str(toolchain.requirements(CPU))


def test_on_a_gpu_it_needs_triton_and_a_recent_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "_installed", lambda package: False)
    old = replace(GPU, sm=60)
    assert "the package triton is not installed" in str(toolchain.requirements(GPU))
    assert len(toolchain.requirements(old).reasons) == 2
    monkeypatch.setattr(toolchain, "_installed", lambda package: True)
    assert toolchain.requirements(GPU)
    assert str(toolchain.requirements(old)) == "torch.compile needs compute capability 7.0, and A GPU has 6.0"


@pytest.mark.parametrize("switch", ["TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"])
def test_it_refuses_where_torch_compile_is_switched_off(monkeypatch: pytest.MonkeyPatch, switch: str) -> None:
    monkeypatch.setenv(switch, "1")
    assert str(toolchain.requirements(CPU)).startswith(f"torch.compile is switched off by {switch}=1")


@needs_compiler
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"T": 15}, "T=15 is below 16"),
        ({"B": 0}, "an empty call"),
        ({"K": 4}, "both must be at least 8"),
        ({"T": 300, "options": {"chunk_size": 300}}, "at most 256 tokens"),
        ({"options": {"chunk_size": 4}}, "chunk_size=4 is below 8"),
    ],
)
def test_sizes_without_anything_to_compile_are_refused(changes: dict[str, object], reason: str) -> None:
    facts = signature(**changes)
    assert reason in str(fast_core.supports(facts, CPU))


def test_manifest_and_supports_load_no_compiler() -> None:
    code = """
import sys, torch, titans_backends as tb
x = torch.randn(1, 64, 2, 16)
tb.get_op("fast_core").explain(x, x, x)
assert "titans_backends.backends.inductor.fast_core" in sys.modules
heavy = [name for name in ("torch._inductor", "torch._dynamo.convert_frame", "triton") if name in sys.modules]
assert not heavy, heavy
"""
    done = fresh.run(code)
    assert done.returncode == 0, done.stderr
