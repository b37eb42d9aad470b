"""The Triton backend's hook: what it finds on sizes alone is what the tensors would give, and its cache entries are those that a launch looks for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

from tests.triton_machines import CARDS
from titans_backends.backend import Candidate
from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.case import Case, build
from titans_backends.contracts.validate import validate
from titans_backends.facts import signature_of
from titans_backends.machine import Machine, detect

pytest.importorskip("triton", reason="the package triton is not installed: pip install -c constraints.txt -e '.[test]'")

import triton
from triton.backends.compiler import GPUTarget

PACKAGE = "titans_backends.backends.triton"
ahead, launch = (import_module(f"{PACKAGE}.{name}") for name in ("ahead", "launch"))
OPS = tuple(import_module(PACKAGE).BACKEND.ops)
HOPPER = CARDS[90]
SMALL = Case("small", B=2, T=65, G=2, H=4, K=32, V=16, dtype=torch.bfloat16)

needs_compiler = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: nothing is compiled")


def offered(op: str, case: Case, machine: Machine = HOPPER) -> list[Candidate]:
    """An op's candidates for a case on a card."""
    call = build(CONTRACTS[op], case, "meta")
    signature = replace(signature_of(CONTRACTS[op], call, validate(CONTRACTS[op], call)), device="cuda")
    return list(import_module(f"{PACKAGE}.{op}").candidates(signature, machine))


def variant(op: str, case: Case) -> Case:
    """The case with the op's first variant."""
    first = CONTRACTS[op].variants[0]
    return replace(case, options=first.options, given=first.given, T=3 if CONTRACTS[op].max_tokens else case.T)


@pytest.mark.parametrize("view", ["contiguous", "transposed", "misaligned"])
@pytest.mark.parametrize("op", OPS)
def test_sizes_alone_give_the_forms_that_the_tensors_give(op: str, view: str) -> None:
    case = variant(op, replace(SMALL, view=view))  # type: ignore[arg-type]
    run = import_module(f"{PACKAGE}.{op}").run
    for candidate in offered(op, case):
        on_meta = ahead.collected(run, build(CONTRACTS[op], case, "meta"), candidate)
        on_cpu = ahead.collected(run, build(CONTRACTS[op], case, "cpu"), candidate)
        assert on_meta == on_cpu
        assert on_meta


@pytest.mark.parametrize("op", OPS)
def test_every_op_can_be_compiled_ahead(op: str) -> None:
    assert callable(import_module(f"{PACKAGE}.{op}").compile_ahead)


def test_a_collected_call_is_not_remembered() -> None:
    case = variant("fused_uw", SMALL)
    call, candidate = build(CONTRACTS["fused_uw"], case, "meta"), offered("fused_uw", case)[0]
    with launch.TAPING.collecting() as forms:
        _, again = import_module(f"{PACKAGE}.fused_uw").remember(call, candidate)
    assert forms
    assert again is None
    assert not launch.TAPING.is_collecting


@pytest.mark.parametrize("machine", [detect("cpu"), Machine("cuda", "a card of unknown capability", "unknown")], ids=["cpu", "unknown"])
def test_a_machine_that_is_no_known_cuda_card_is_refused(machine: Machine) -> None:
    case = variant("fused_uw", SMALL)
    hook = import_module(f"{PACKAGE}.fused_uw").compile_ahead
    with pytest.raises(ValueError, match="capability is known"):
        hook(build(CONTRACTS["fused_uw"], case, "meta"), offered("fused_uw", case)[0], machine)


@dataclass
class Cache:
    """Triton's cache in a folder of its own, and what the compiler did: whether each compilation was found there."""

    folder: Path
    hits: list[bool] = field(default_factory=list)

    def entries(self) -> set[Path]:
        return {path.relative_to(self.folder) for path in self.folder.rglob("*") if path.is_file()}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cache]:
    made = Cache(tmp_path / "triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(made.folder))
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda *, cache_hit, **_: made.hits.append(cache_hit))
    ahead._compiled.cache_clear()
    yield made
    ahead._compiled.cache_clear()


class OnCard:
    """What Triton asks its driver for when a kernel is compiled on the card."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@needs_compiler
def test_a_launch_finds_what_was_compiled_ahead_and_a_second_time_nothing_is_new(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    case = variant("fused_uw", SMALL)
    module = import_module(f"{PACKAGE}.fused_uw")
    call, candidate = build(CONTRACTS["fused_uw"], case, "meta"), offered("fused_uw", case)[0]
    module.compile_ahead(call, candidate, HOPPER)
    assert cache.hits == [False]
    entries = cache.entries()
    assert any(path.suffix == ".cubin" for path in entries)

    module.compile_ahead(call, candidate, HOPPER)
    assert cache.hits == [False]  # this process has it

    ahead._compiled.cache_clear()
    module.compile_ahead(call, candidate, HOPPER)
    assert cache.hits == [False, True]  # another one finds it on disk

    monkeypatch.setattr(triton.runtime.driver, "_active", OnCard())
    ((kernel, form),) = ahead.collected(module.run, build(CONTRACTS["fused_uw"], case, "cpu"), candidate)
    with pytest.raises(AttributeError):  # the driver is made up: it compiles, and cannot load
        kernel._compiled(("on the card",), 0, form)
    assert cache.hits == [False, True, True]
    assert cache.entries() == entries


@needs_compiler
def test_what_does_not_compile_is_an_error_with_the_kernels_name_each_time(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no such instruction")

    case = variant("fused_uw", SMALL)
    module = import_module(f"{PACKAGE}.fused_uw")
    monkeypatch.setattr(triton, "compile", broken)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no such instruction"):
            module.compile_ahead(build(CONTRACTS["fused_uw"], case, "meta"), offered("fused_uw", case)[0], HOPPER)
