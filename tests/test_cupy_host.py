"""The CuPy backend where it cannot run, and what it refuses: a sentence with what to type, never an import error and never another kernel."""

from __future__ import annotations

import importlib.util
from importlib import import_module
from importlib.machinery import ModuleSpec

import pytest
import torch
from titans_backends.backends.cupy import dual_core, launch, uw_transform
from titans_backends.backends.cupy.ahead import ahead_of, collected

import titans_backends as tb
from tests import fresh
from tests.triton_machines import H100
from titans_backends import registry
from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.case import Case, build
from titans_backends.contracts.validate import validate
from titans_backends.errors import BackendRefusedError
from titans_backends.facts import signature_of
from titans_backends.machine import Machine, detect
from titans_backends.verdict import Verdict

BACKEND = import_module("titans_backends.backends.cupy").BACKEND


def verdict(op: str, machine: Machine = H100, **changes: object) -> Verdict:
    """What an op's module says to its first variant, changed."""
    made = CONTRACTS[op]
    first = made.variants[0]
    case = Case("", T=8, **{"K": 32, "V": 32, "options": first.options, "given": first.given, **changes})  # type: ignore[arg-type]
    call = build(made, case, "meta")
    module = import_module(BACKEND.ops[op])
    return module.supports(signature_of(made, call, validate(made, call)), machine)  # type: ignore[no-any-return]


def test_without_cupy_the_refusal_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec

    def absent(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name == "cupy" else found(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", absent)
    reason = str(registry.availability(BACKEND, H100))
    assert "the package cupy is not installed: pip install 'titans-backends[cuda13]'" in reason
    assert registry.probe(BACKEND, H100).state == "refused"


def test_on_a_cpu_a_forced_call_is_refused_and_nothing_else_answers() -> None:
    k = torch.zeros(1, 4, 1, 16)
    with pytest.raises(BackendRefusedError, match=r"cupy.*(does not run on cpu|not installed)"):
        tb.get_op("uw_transform")(k, k, torch.zeros(1, 4, 1), backend="cupy")
    assert "it does not run on cpu (it runs on cuda)" in str(registry.availability(BACKEND, detect("cpu")))


def test_every_module_is_imported_without_cupy() -> None:
    code = (
        "import sys, importlib; sys.modules['cupy'] = None; sys.modules['cupy_backends'] = None\n"
        "backend = importlib.import_module('titans_backends.backends.cupy').BACKEND\n"
        "for name in (*backend.ops.values(), backend.probe): importlib.import_module(name)"
    )
    done = fresh.run(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dtype": torch.float64}, "dtype float64 is not in {bfloat16, float16, float32}; use backend='eager'"),
        ({"K": 129}, "head_dim K=129 is not in 1 to 128; use backend='triton' or backend='eager'"),
        ({"V": 300}, "head_dim V=300 is not in 1 to 128; use backend='triton' or backend='eager'"),
        ({"machine": Machine("cuda", "Tesla V100", "v100", sm=70)}, "it needs compute capability 8.0, and Tesla V100 has 7.0; use backend='eager'"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(*value),
)
def test_a_refusal_says_what_would_do(changes: dict[str, object], sentence: str) -> None:
    assert sentence in str(verdict("uw_transform", **changes))  # type: ignore[arg-type]


def test_every_reason_is_given_at_once() -> None:
    assert len(verdict("fast_core", dtype=torch.float64, K=200, V=200).reasons) == 3


def test_chunks_longer_than_a_tile_are_refused_by_their_number() -> None:
    options = {"chunk_size": 200}
    made, case = CONTRACTS["uw_transform"], Case("", T=300, K=32, V=32, options=options)
    call = build(made, case, "meta")
    assert "chunk_size=200 is above 128 tokens; use backend='triton'" in str(
        uw_transform.supports(signature_of(made, call, validate(made, call)), H100)
    )


def test_compiling_ahead_for_what_is_no_card_is_an_error() -> None:
    with pytest.raises(ValueError, match="compiles ahead for CUDA cards"):
        ahead_of(uw_transform.run)(None, None, detect("cpu"))  # type: ignore[arg-type]


def test_a_call_that_is_collected_launches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> launch.Engine:
        raise AssertionError("an engine was asked for")

    monkeypatch.setattr(launch, "current", none)
    made = CONTRACTS["uw_transform"]
    call = build(made, Case("", T=8, K=32, V=32), "meta")
    candidate = uw_transform.candidates(signature_of(made, call, validate(made, call)), H100)[0]
    with launch.TAPING.collecting() as forms:
        uw_transform.run(call, candidate)  # type: ignore[arg-type]
    assert [form.kernel for form in forms] == ["uw_transform"]


@pytest.mark.parametrize(("setting", "once"), [("ieee", False), ("tf32", True)])
def test_dual_flat_rounds_as_torchs_newer_setting_says(setting: str, once: bool) -> None:
    """torch refuses its older question once `fp32_precision` was set: in a process of its own, since no setting takes that back."""
    code = (
        "import torch; from tests.test_cupy_host import flat_forms; "
        f"torch.backends.fp32_precision = torch.backends.cuda.matmul.fp32_precision = {setting!r}; "
        "print(sorted({('TF32_ONCE', True) in form.macros for form in flat_forms()}))"
    )
    done = fresh.run(code)
    assert done.stdout.strip() == f"[{once}]", done.stderr


def flat_forms() -> list[launch.Form]:
    """What the candidates of a flat call in float32 launch: by blocks and by prefix sums."""
    made = CONTRACTS["dual_core"]
    variant = next(one for one in made.variants if one.options.get("memory") == "flat" and one.options.get("transform") == "lam")
    call = build(made, Case("", B=1, T=128, K=32, V=32, options=variant.options, given=variant.given), "meta")
    ways = dual_core.candidates(signature_of(made, call, validate(made, call)), H100)
    assert {way.variant for way in ways} == {"flat", "prefix"}
    return [form for way in ways for form in collected(dual_core.run, call, way)]
