"""The adapters of FLA, FlashQLA and FlashInfer, on likenesses of those packages (`tests/peer_likenesses/`) that compute on the eager backend in float64.

So what is tested is ours: arguments, layouts, refusals, switches, versions, and that an import happens when it is wanted and no earlier. What the real
packages compute is seen on a GPU alone; where FLA is installed, its real signatures are asked.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

import titans_backends as tb
from tests import fresh
from tests.scripts import script
from titans_backends import dispatch, plans, registry
from titans_backends.backend import Candidate
from titans_backends.buckets import bucket_of, defaults_of
from titans_backends.cache import file, paths
from titans_backends.cache.schema import Entry, device_of
from titans_backends.conformance import Item, examine
from titans_backends.contracts import contract
from titans_backends.contracts.case import Case, build, cases
from titans_backends.contracts.validate import validate
from titans_backends.facts import signature_of
from titans_backends.integrations.fla import register_with_fla
from titans_backends.library import planner
from titans_backends.machine import Machine
from titans_backends.offers import offer, offers, source_modules
from titans_backends.request import request
from titans_backends.signature import Signature
from titans_backends.tables import current_environment

pytest.importorskip("triton", reason="FLA needs Triton, and its adapter looks for it")

LIKENESSES = Path(__file__).with_name("peer_likenesses")
PEERS = {"fla": ("fla", "einops"), "flash_qla": ("flash_qla", "tilelang"), "flashinfer": ("flashinfer", "cutlass")}
ROOTS = {root for roots in PEERS.values() for root in roots} | {"peer_math"}
H100 = Machine("cuda", "NVIDIA H100", "nvidia_h100", sm=90, sms=132)
A100 = Machine("cuda", "NVIDIA A100", "nvidia_a100", sm=80, sms=108)


def adapter(name: str) -> Any:
    return importlib.import_module(f"titans_backends.backends.{name}")


def shared() -> Any:
    return importlib.import_module("titans_backends.backends.peers")


def forget() -> None:
    shared().version_of.cache_clear()
    shared()._FAILED.clear()
    tb.reset()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The likenesses in a folder of their own, first on the path; an nvcc; no shipped table, an empty user's cache."""
    folder = tmp_path / "site"
    shutil.copytree(LIKENESSES, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "cuda" / "bin").mkdir(parents=True)
    (tmp_path / "cuda" / "bin" / "nvcc").touch()
    for name in [name for name in sys.modules if name.partition(".")[0] in ROOTS]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("FLA_FLASH_QLA", "FLA_INTRACARD_CP", "FLA_TILELANG", "FLA_DISABLE_BACKEND_DISPATCH", "TITANS_BACKENDS_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(paths, "shipped_paths", tuple)
    monkeypatch.syspath_prepend(str(folder))
    forget()
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] in ROOTS]:
        del sys.modules[name]
    monkeypatch.undo()
    forget()


@pytest.fixture
def on_cpu(site: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The site, and adapters that serve the CPU too, last of all as on a GPU: so calls go the whole way."""
    found = registry._found()
    ranked = {name: replace(one, rank={"cuda": 9, "cpu": 9}) if name in PEERS else one for name, one in found.backends.items()}
    answer = replace(found, backends=MappingProxyType(ranked))
    monkeypatch.setattr(registry, "_found", functools.lru_cache(maxsize=1)(lambda: answer))
    plans.invalidate()
    return site


def seen() -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = importlib.import_module("peer_math").SEEN
    return calls


def ran() -> list[str]:
    return [call["function"] for call in seen()]


def case(**changes: Any) -> Case:
    base = Case("a", B=1, T=70, G=1, H=2, K=128, V=128, dtype=torch.bfloat16, options={"output_final_state": True}, given=("g",))
    return replace(base, **changes)


def signature(op: str = "gated_delta_rule", *, regime: str = "inference", launch: str = "eager", **changes: Any) -> Signature:
    made = contract(op)
    call = build(made, case(**changes), "cpu")
    return signature_of(made, call, validate(made, call), regime=regime, launch=launch)  # type: ignore[arg-type]


def refusal(name: str, machine: Machine = H100, op: str = "gated_delta_rule", **changes: Any) -> str:
    return str(offer(registry.get(name), signature(op, **changes), machine).verdict)


def labels(name: str, machine: Machine = H100, **changes: Any) -> tuple[list[str], list[str]]:
    found = offer(registry.get(name), signature(**changes), machine)
    assert found.verdict, found.verdict
    return [one.label for one in found.forward], [one.label for one in found.backward]


# what runs, and whether it is right

WORTH = (
    "gated, transposed", "gated, expanded", "gated, misaligned", "gated, grouped heads", "gated, correlated keys, beta 0 1 2", "gated, g 0 and -20", "gated, T=1",
    "plain", "normalized keys", "given chunk", "gated, packed with empty sequences", "plain, packed with empty sequences",
    "normalized keys, packed with empty sequences",
)  # fmt: skip


def worth(op: str, dtype: torch.dtype) -> list[Case]:
    """Cases of the contract in which an adapter can go wrong."""
    return [one for one in cases(contract(op), dtype) if one.name in WORTH or one.name.startswith(WORTH[0])]


TRAINED = ("gated, grouped heads", "gated, correlated keys, beta 0 1 2", "plain", "normalized keys", "gated, packed with empty sequences")


@pytest.mark.parametrize("name", PEERS)
def test_what_it_serves_is_right_through_get_op_and_through_every_candidate(name: str, on_cpu: Path) -> None:
    passed: set[str] = set()
    for one in worth("gated_delta_rule", torch.bfloat16):
        sized = one if name == "fla" else replace(one, K=128, V=128, B=1, T=min(one.T, 66), H=min(one.H, 2), G=1)
        for regime in ("inference", "training") if name != "flashinfer" and one.name in TRAINED else ("inference",):
            result = examine(Item(name, "gated_delta_rule", sized, regime))  # type: ignore[arg-type]
            assert result.status == "passed", (one.name, regime, result.detail)
            assert {part.partition("/")[0] for kernel in result.kernels for part in kernel.split() if "/" in part} == {name}
            passed |= {f"{kernel.split()[0]} {regime}" for kernel in result.kernels} | {one.name}
    assert passed >= {one.rstrip("*") for one in WORTH}
    assert set(ran())


def test_flas_decode_is_right(on_cpu: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for one in worth("gated_delta_step", dtype):
            options = {**one.options, "inplace": one.name.endswith("grouped heads")}
            result = examine(Item("fla", "gated_delta_step", replace(one, options=options, given=("g",)), "inference"))
            assert result.status == "passed", (one.name, result.detail)
    assert set(ran()) == {"fused_recurrent_gated_delta_rule_fwd"}


def test_which_of_flas_functions_runs(on_cpu: Path) -> None:
    op = tb.get_op("gated_delta_rule")
    made = contract("gated_delta_rule")
    expected = {
        (1, ("g",)): "chunk_gated_delta_rule_fwd",
        (1, ()): "chunk_gated_delta_rule_fwd",  # grouped heads: the plain rule has none, and the gated one stands in
        (2, ()): "chunk_delta_rule_fwd",
    }
    for (groups, given), function in expected.items():
        seen().clear()
        call = build(made, case(G=groups, given=given), "cpu")
        op(**{name: getattr(call, name) for name in made.parameters}, backend="fla")
        assert ran() == [function], (groups, given)
    given = {name: getattr(build(made, case(dtype=torch.bfloat16), "cpu"), name) for name in made.parameters}
    for backend, function in (("flash_qla", "chunk_gated_delta_rule_fwd"), ("flashinfer", "chunk_gated_delta_rule")):
        seen().clear()
        op(**given, backend=backend)
        assert ran() == [function]


def test_the_backward_makes_nothing_again_that_the_peers_autograd_would_keep(on_cpu: Path) -> None:
    op, made = tb.get_op("gated_delta_rule"), contract("gated_delta_rule")
    expected = {
        ("fla", ()): [],  # its forward hands on what FLA's autograd keeps
        ("fla", ("gate",)): ["chunk_gated_delta_rule_fwd"],
        ("flash_qla", ()): [],
        ("flash_qla", ("gate",)): ["chunk_gated_delta_rule_fwd"],
    }
    for (backend, gates), again in expected.items():
        call = build(made, case(given=("g", *gates)), "cpu", requires_grad=True)
        o, _ = op(**{name: getattr(call, name) for name in made.parameters}, backend=backend)
        seen().clear()
        o.sum().backward()
        assert ran() == [*again, "chunk_gated_delta_rule_bwd"], (backend, gates)
        assert backend == "fla" or seen()[-1]["cached"] is True


def test_the_race_hands_a_backward_all_that_its_forward_keeps(on_cpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells, measure = script("benchmarks/race_cells.py"), script("benchmarks/race_measure.py")
    monkeypatch.setattr(measure, "takes", lambda name, case: True)
    group = replace(cells.GROUPS["fla"], backends=("eager", "flash_qla"))
    seen().clear()
    part = measure.measured(cells.Case(cells.Cell(1, 70, 1, 2, 128), "training"), group, {}, None, measure.Rules(0.0, 0.0, 0.0, 2), "cpu", None)
    assert not part.failed
    assert all(one["cached"] for one in seen() if one["function"] == "chunk_gated_delta_rule_bwd")
    stored = [one for one in part.entrants if one.who == "flash_qla" and "flash_qla/kept" in one.label]
    assert stored
    assert all(one.wall_us > 0 and not one.failed for one in stored)


_WANTS = "backward fla/gated_delta_rule_kept gradients=triton: ValueError: it wants fla/gated_delta_rule, but no forward that saves them was right"


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("right", ()),
        ("backward wrong", ("backward fla/gated_delta_rule_kept gradients=triton: ValueError: wrong: dq is off by",)),
        ("forward raises", ("forward fla/gated_delta_rule_kept: RuntimeError: out of shared memory", _WANTS)),
    ],
)
def test_the_race_checks_and_times_what_fla_keeps_and_chooses_nothing_of_it_that_fails(
    what: str, told: tuple[str, ...], on_cpu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells, measure, results = (script(f"benchmarks/race_{name}.py") for name in ("cells", "measure", "results"))
    rule = adapter("fla.gated_delta_rule")
    run, run_backward = rule.run, rule.run_backward

    def bent(found: Any, candidate: Candidate) -> Any:
        if candidate.saves_states and what == f"{candidate.direction} raises":
            raise RuntimeError("out of shared memory")
        wrong = candidate.saves_states and what == f"{candidate.direction} wrong"
        return tuple(None if x is None else x * 1.2 for x in found) if wrong else found

    monkeypatch.setattr(rule, "run", lambda call, candidate: bent(run(call, candidate), candidate))
    monkeypatch.setattr(rule, "run_backward", lambda *given: bent(run_backward(*given), given[-1]))
    plain = "fla/gated_delta_rule + fla/gated_delta_rule gradients=triton"
    kept = "fla/gated_delta_rule_kept + fla/gated_delta_rule_kept gradients=triton (states stored)"
    anchors = results.Part(tuple(results.Entrant(label, "fla", graph_us=1.0) for label in (plain, kept)))  # which is the faster, a CPU says by chance
    group = replace(cells.GROUPS["fla"], backends=("eager", "fla"))
    part = measure.measured(cells.Case(cells.Cell(1, 70, 1, 2, 16), "training"), group, {}, anchors, measure.Rules(0.0, 0.0, 0.0, 2), "cpu", None)
    assert len(part.failed.split("; ")) == max(1, len(told))
    assert all(one in part.failed for one in told)
    assert bool(part.failed) == bool(told)
    fla = {one.label: one for one in part.entrants if one.who == "fla"}
    assert set(fla) == {plain, *([] if told else [kept])}
    assert all(one.graph_us > 0 and one.wall_us > 0 and not one.failed for one in fla.values())
    assert not told or kept not in {one.label for one in part.contenders}  # so no rule can choose it


@pytest.mark.parametrize(("name", "again"), [("fla", "chunk_gated_delta_rule_fwd_intra"), ("flash_qla", "kkt_solve")])
def test_a_backward_that_was_handed_nothing_computes_it(name: str, again: str, on_cpu: Path) -> None:
    made = contract("gated_delta_rule")
    call = build(made, case(dtype=torch.bfloat16), "cpu", requires_grad=True)
    asked = request(name, training=True, may_save=False)
    pair = planner("gated_delta_rule").plan(call, asked).choice.pair
    assert not pair.forward.saves_states
    seen().clear()
    grads = (torch.ones_like(call.v), None)
    with torch.no_grad():
        planner("gated_delta_rule").plan(call, asked).run_backward(call, grads, None, frozenset({"q", "k"}))
    assert ran() == [again, "chunk_gated_delta_rule_bwd"]


@pytest.mark.parametrize("name", ["fla", "fla without a decay", "flash_qla"])
def test_q_and_k_are_brought_to_unit_length_once_a_step_and_their_gradients_are_right(name: str, on_cpu: Path) -> None:
    made, given = contract("gated_delta_rule"), () if "without" in name else ("g",)
    call = build(made, case(G=2, given=given, options={"qk_l2norm": True}), "cpu", requires_grad=True)
    keywords = {one: getattr(call, one) for one in made.parameters}
    op, leaves = tb.get_op("gated_delta_rule"), [call.q, call.k, call.v, call.beta]
    d_o = torch.randn_like(call.v)
    o, _ = op(**keywords, backend=name.split()[0])
    assert ran().count("l2norm_fwd") == 2
    got = torch.autograd.grad(o, leaves, d_o)
    assert ran().count("l2norm_fwd") == 2
    want = torch.autograd.grad(op(**keywords, backend="eager")[0], leaves, d_o)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=3e-2, atol=3e-2)


def test_flash_qla_plans_a_cut_once_a_step_and_again_where_hooks_give_back_other_tensors(on_cpu: Path) -> None:
    made, op = contract("gated_delta_rule"), tb.get_op("gated_delta_rule")
    planned = importlib.import_module("flash_qla.ops.gated_delta_rule.chunk").PLANNED

    def gradient(call: Any) -> tuple[torch.Tensor, list[Any]]:
        seen().clear()
        planned.clear()
        o, _ = op(**{name: getattr(call, name) for name in made.parameters}, backend="flash_qla")
        found = torch.autograd.grad(o, call.q, torch.ones_like(o))[0]
        return found, [one["plan"] for one in seen() if "plan" in one]

    for lengths in (None, (20, 50), (20, 0, 50)):
        call = build(made, case(lengths=lengths), "cpu", requires_grad=True)
        want, (forward, backward) = gradient(call)
        assert planned == [True], lengths
        assert backward is forward
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach().clone(), lambda x: x):
            got, (forward, backward) = gradient(call)
        assert planned == [True, True], lengths
        assert backward is not forward
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["fla", "flash_qla"])
def test_states_with_the_value_dimension_first_are_right_beside_empty_sequences(name: str, on_cpu: Path) -> None:
    made, op = contract("gated_delta_rule"), tb.get_op("gated_delta_rule")
    call = build(made, case(lengths=(20, 0, 50), given=("g", "initial_state")), "cpu", requires_grad=True)
    given = {one: getattr(call, one) for one in made.parameters}
    turned = call.initial_state.detach().transpose(-1, -2).contiguous().requires_grad_()
    given["initial_state"] = turned.transpose(-1, -2)
    d_state = torch.randn_like(turned).transpose(-1, -2)
    assert not given["initial_state"].is_contiguous()
    assert not d_state.is_contiguous()
    found = []
    for backend in (name, "eager"):
        o, state = op(**given, backend=backend)
        found.append((o, state, *torch.autograd.grad((o, state), (call.q, turned), (torch.ones_like(o), d_state))))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=3e-2, atol=3e-2)


def test_a_peers_module_is_looked_up_by_importlib_only_until_it_is_there(on_cpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, wanted, peers = "flash_qla.ops.gated_delta_rule.chunk", ("kkt_solve",), shared()
    first = importlib.import_module(name)
    asked: list[str] = []
    monkeypatch.setattr(importlib, "import_module", lambda one: (asked.append(one), first)[1])
    assert peers.load("flash_qla", name, wanted) is first
    assert asked == [name]  # for importlib waits where another thread is importing it
    assert peers.load("flash_qla", name, wanted) is first
    assert asked == [name]


# FLA's own dispatch, and ours


def test_flas_switches_are_off_inside_a_call_and_as_they_were_after_it(on_cpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLA_FLASH_QLA", "1")
    monkeypatch.setenv("FLA_INTRACARD_CP", "1")
    made = contract("gated_delta_rule")
    call = build(made, case(), "cpu")
    given = {name: getattr(call, name) for name in made.parameters}
    tb.get_op("gated_delta_rule")(**given, backend="fla")
    assert [one["switches"] for one in seen()] == [{"FLA_FLASH_QLA": "0", "FLA_INTRACARD_CP": "0", "FLA_TILELANG": "0"}]
    found = importlib.import_module("fla.ops.gated_delta_rule.chunk")
    monkeypatch.setattr(found, "chunk_gated_delta_rule_fwd", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tb.get_op("gated_delta_rule")(**given, backend="fla")
    assert {name: os.environ.get(name) for name in ("FLA_FLASH_QLA", "FLA_INTRACARD_CP", "FLA_TILELANG")} == {
        "FLA_FLASH_QLA": "1", "FLA_INTRACARD_CP": "1", "FLA_TILELANG": None,
    }  # fmt: skip


def test_tilelang_gives_the_gradients_where_that_candidate_runs_and_nothing_else(site: Path) -> None:
    rule = adapter("fla.gated_delta_rule")
    call = build(contract("gated_delta_rule"), case(), "cpu")
    backward = {str(dict(one.params)["gradients"]): one for one in rule.backward_candidates(signature(regime="training"), H100)}
    assert set(backward) >= {"tilelang"}
    backward["triton"] = replace(backward["tilelang"], params=(("gradients", "triton"),))
    for kernel, switch in (("tilelang", "1"), ("triton", "0")):
        importlib.import_module("fla")
        importlib.import_module("peer_math").SEEN.clear()
        rule.run_backward(call, (call.v, None), None, frozenset(["q"]), backward[kernel])
        assert {one["switches"]["FLA_TILELANG"] for one in seen()} == {switch}


def test_flas_function_on_us_on_fla_comes_to_an_end(on_cpu: Path) -> None:
    call = build(contract("gated_delta_rule"), case(), "cpu")
    function = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    with register_with_fla(backend="fla") as registration:
        o, state = function(call.q, call.k, call.v, call.g, call.beta, output_final_state=True)
        assert dict(registration.calls) == {"chunk_gated_delta_rule": 1}
    assert ran() == ["chunk_gated_delta_rule_fwd"]  # not the function that asks backends
    assert o.shape == call.v.shape
    assert state.shape == (1, 2, 128, 128)


# which one is chosen


def test_no_peer_is_the_untuned_choice_where_another_serves(site: Path) -> None:
    for regime, changes in (
        ("inference", {}),
        ("training", {}),
        ("inference", {"given": ()}),
        ("inference", {"dtype": torch.float16, "K": 64, "V": 64}),
    ):
        asked = signature(regime=regime, **changes)
        choice = dispatch.choose(asked, H100)
        accepting = {one.backend.name for one in choice.offers if one.verdict}
        assert accepting >= {"fla", "eager"}
        assert choice.pair.forward.backend not in PEERS
        assert [one.backend.name for one in choice.offers if one.backend.rank.get("cuda")][-3:] == sorted(
            PEERS, key=lambda n: registry.get(n).simplicity
        )


def write_row(path: Path, asked: Signature, machine: Machine, label: str) -> None:
    candidate = next(one for o in offers(asked, machine) for one in o.forward if one.label == label)
    source = dispatch.pair_source(dispatch.Pair(candidate), asked.op)
    file.update(
        path,
        device=device_of(machine),
        environment=current_environment(machine.kind),
        changes={bucket_of(asked): Entry(candidate.name, 5.0, 0.01, 0.0, params=candidate.params, source=source)},
        defaults_of=defaults_of,
    )
    plans.invalidate()


@pytest.mark.parametrize(
    ("label", "metadata"),
    [
        ("fla/gated_delta_rule", "fla_core-0.6.0"),
        ("flash_qla/chunked auto_cp=True", "flash_qla-0.1.3"),
        ("flash_qla/chunked auto_cp=True", "tilelang-0.1.15"),
        ("flashinfer/prefill", "flashinfer_python-0.7.2"),
        ("flashinfer/prefill", "nvidia_cutlass_dsl-4.8.1"),
    ],
)
def test_a_tuned_row_chooses_a_peer_until_its_version_changes_or_it_is_gone(label: str, metadata: str, site: Path, tmp_path: Path) -> None:
    asked, backend = signature(), label.partition("/")[0]
    write_row(paths.user_cache_path(H100.slug), asked, H100, label)
    choice = dispatch.choose(asked, H100)
    assert (choice.origin, choice.pair.label) == ("tuned", label)
    assert choice.answered is not None
    assert str(choice.answered.staleness) == "fresh"
    facts = site / f"{metadata}.dist-info" / "METADATA"
    version = metadata.rpartition("-")[2]
    facts.write_text(facts.read_text().replace(version, f"{version}.1"))
    importlib.invalidate_caches()
    forget()
    changed = dispatch.choose(asked, H100)
    assert changed.origin == "default"
    assert f"{label} has changed since" in changed.consulted[0].answer
    shutil.rmtree(site / PEERS[backend][0])
    forget()
    gone = dispatch.choose(asked, H100)
    assert gone.origin == "default"
    assert "is not among the candidates for this call" in gone.consulted[0].answer
    assert f"the package {backend} is not installed" in str(next(one.verdict for one in gone.offers if one.backend.name == backend))


def test_rows_of_other_backends_know_nothing_of_a_peer(site: Path) -> None:
    asked = signature()
    write_row(paths.user_cache_path(H100.slug), asked, H100, next(o.forward[0].label for o in offers(asked, H100) if o.backend.name == "eager"))
    for name in PEERS:
        shutil.rmtree(site / name)
    forget()
    choice = dispatch.choose(asked, H100)
    assert choice.origin == "tuned"
    assert choice.answered is not None
    assert str(choice.answered.staleness) == "fresh"


def test_a_version_is_part_of_a_candidates_hash_in_both_directions(site: Path) -> None:
    for name, pinned in (("fla", {"fla-core==0.6.0"}), ("flash_qla", {"flash-qla==0.1.3", "tilelang==0.1.15"})):
        found = offer(registry.get(name), signature(regime="training"), H100)
        for candidate in (*found.forward, *found.backward):
            assert pinned <= set(source_modules(candidate, "gated_delta_rule"))
    tilelang = [one for one in offer(registry.get("fla"), signature(regime="training"), H100).backward if ("gradients", "tilelang") in one.params]
    assert [set(one.sources) for one in tilelang] == [{"fla-core==0.6.0", "tilelang==0.1.15"}] * 2  # with what the forward kept, and without


# refusals


@pytest.mark.parametrize(
    ("name", "changes", "machine", "says"),
    [
        ("fla", {"dtype": torch.float64}, H100, "dtype float64 is not in {bfloat16, float16, float32}; use backend="),
        ("fla", {"dtype": torch.float32}, H100, "torch.set_float32_matmul_precision('high') allows that"),
        ("fla", {"K": 300}, H100, "head_dim K=300 is not in 1 to 256; use backend='eager'"),
        ("fla", {}, replace(H100, name="T4", sm=75), "it needs compute capability 8.0, and T4 has 7.5"),
        ("fla", {"lengths": (3, 4), "launch": "graph"}, H100, "it reads cu_seqlens on the host, which a captured graph cannot; use backend='triton'"),
        ("flash_qla", {"lengths": (3, 4), "launch": "graph"}, H100, "it reads cu_seqlens on the host"),
        ("flash_qla", {"K": 64, "V": 64}, H100, "head_dim K=64, V=64: it takes K = V = 128 alone; use backend='triton'"),
        ("flash_qla", {"dtype": torch.float32}, H100, "dtype float32 is not in {bfloat16, float16}"),
        ("flash_qla", {}, A100, "it runs on compute capability 9.0, 10.0 and 10.3, and NVIDIA A100 has 8.0; use backend='triton'"),
        ("flash_qla", {"options": {"scale": 0.0}}, H100, "scale=0 would be taken for K ** -0.5"),
        ("flash_qla", {"T": 0}, H100, "T=0: an empty call; use backend='eager'"),
        ("flashinfer", {"K": 128, "V": 64}, H100, "head_dim K=128, V=64: it takes K = V = 128 alone"),
        ("flashinfer", {}, A100, "it runs on compute capability 9.0, 10.0, 10.3, 12.0 and 12.1, and NVIDIA A100 has 8.0"),
        ("flashinfer", {"options": {"scale": 0.0}}, H100, "scale=0 would be taken for K ** -0.5"),
    ],
)
def test_a_refusal_says_what_was_found_and_what_to_do(name: str, changes: dict[str, Any], machine: Machine, says: str, site: Path) -> None:
    assert says in refusal(name, machine, **changes)
    assert refusal(name) == "accepted"


def test_flashinfer_takes_a_packed_call_in_a_graph_and_trains_with_anothers_backward(site: Path) -> None:
    assert refusal("flashinfer", lengths=(3, 4), launch="graph") == "accepted"
    assert labels("flashinfer", regime="training") == (["flashinfer/prefill"], [])
    with pytest.raises(tb.BackendRefusedError, match="it must have both directions, but it has only forward"):
        dispatch.choose(signature(regime="training"), H100, dispatch.Forced("flashinfer", "backend="))


def test_flas_decode_refuses_a_pool(site: Path) -> None:
    step = {"T": 1, "G": 2, "options": {}}
    assert "it takes no state_indices: a state for each sequence alone" in refusal("fla", op="gated_delta_step", given=("g", "state_indices"), **step)
    assert refusal("fla", op="gated_delta_step", dtype=torch.float32, **step) == "accepted"


def test_context_parallelism_is_offered_where_it_can_cut(site: Path) -> None:
    both = ["flash_qla/chunked auto_cp=True", "flash_qla/chunked auto_cp=False"]
    kept = [label.replace("chunked", "kept") for label in both]
    assert labels("flash_qla", regime="training") == ([*kept, *both], [*kept, *both])
    assert labels("flash_qla", lengths=(3, 4)) == (both, [])
    assert labels("flash_qla", B=2) == (both[1:], [])


@pytest.mark.parametrize(
    ("triton", "machine", "kernels"),
    [("3.6.0", H100, ["tilelang"]), ("3.7.1", H100, ["triton", "tilelang"]), ("3.3.0", H100, ["triton", "tilelang"]), ("3.6.0", A100, ["triton"])],
)
def test_flas_backward_takes_the_kernels_that_are_right(
    triton: str, machine: Machine, kernels: list[str], site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving = adapter("fla.serving")
    monkeypatch.setattr(serving, "version_of", lambda name: triton if name == "triton" else shared().version_of(name))
    assert labels("fla", machine, regime="training")[1] == [
        f"fla/gated_delta_rule{kept} gradients={one}" for kept in ("_kept", "") for one in kernels
    ]
    assert labels("fla", machine, regime="training", G=2, given=()) == (["fla/delta_rule_kept", "fla/delta_rule"],) * 2
    assert labels("fla", machine) == (["fla/gated_delta_rule"], [])


def test_fla_refuses_to_train_on_hopper_with_a_triton_that_compiles_it_wrong(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serving = adapter("fla.serving")
    monkeypatch.setattr(serving, "version_of", lambda name: "3.6.0" if name == "triton" else shared().version_of(name))
    shutil.rmtree(site / "tilelang")
    monkeypatch.setattr(serving, "missing_nvcc", lambda: "no nvcc was found in PATH")
    monkeypatch.setenv("FLA_DISABLE_BACKEND_DISPATCH", "1")
    told = refusal("fla", regime="training")
    assert "it refuses its own backward on NVIDIA H100 with Triton 3.6.0" in told
    for part in (
        "the package tilelang is not installed",
        "no nvcc was found in PATH",
        "FLA_DISABLE_BACKEND_DISPATCH=1 keeps it",
        "Triton 3.7.1 or later",
    ):
        assert part in told
    assert refusal("fla") == "accepted"
    assert refusal("fla", A100, regime="training") == "accepted"


@pytest.mark.parametrize(
    ("home", "path", "on_path", "wheel", "says"),
    [
        ("toolkit", None, False, None, ""),
        (None, "toolkit", False, None, ""),
        ("empty", "toolkit", True, "13.0.1", "there is no bin/nvcc in {empty}, which CUDA_HOME names, and it looks nowhere else then"),
        (None, "empty", True, None, "there is no bin/nvcc in {empty}, which CUDA_PATH names"),
        (None, None, True, None, ""),
        (None, None, False, "13.0.1", ""),
        (None, None, False, "12.9.86", "no nvcc was found in PATH, /usr/local/cuda or the wheel nvidia-cuda-nvcc 13, and neither CUDA_HOME nor"),
        ("", "", False, None, "no nvcc was found in PATH"),
    ],
)
def test_nvcc_is_looked_for_where_tilelang_does(
    home: str | None, path: str | None, on_path: bool, wheel: str | None, says: str, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {"toolkit": tmp_path / "cuda", "empty": tmp_path}
    for name, given in (("CUDA_HOME", home), ("CUDA_PATH", path)):
        monkeypatch.delenv(name, raising=False)
        if given is not None:
            monkeypatch.setenv(name, str(folders.get(given, "")))
    monkeypatch.setattr(shared().shutil, "which", lambda name: "/somewhere/nvcc" if on_path else None)
    monkeypatch.setattr(shared(), "Path", lambda given: tmp_path / "none" if given == "/usr/local/cuda" else Path(given))
    real = shared().version_of
    monkeypatch.setattr(shared(), "version_of", lambda name: wheel if name == "nvidia-cuda-nvcc" else real(name))
    wanted = f"TileLang compiles its kernels with nvcc, and {says.format(empty=tmp_path)}" if says else "accepted"
    assert refusal("flash_qla").startswith(wanted), refusal("flash_qla")
    kernels = labels("fla", replace(H100, sm=90), regime="training")[1] if not says else []
    assert bool(says) or "fla/gated_delta_rule gradients=tilelang" in kernels


@pytest.mark.parametrize("name", PEERS)
def test_another_version_is_refused_with_the_one_that_is_known(name: str, site: Path) -> None:
    folder = next(one for one in site.glob("*.dist-info") if one.name.startswith({"fla": "fla_core", "flashinfer": "flashinfer"}.get(name, name)))
    (folder / "METADATA").write_text((folder / "METADATA").read_text().replace("Version: 0.", "Version: 9."))
    importlib.invalidate_caches()
    forget()
    told = refusal(name)
    assert re.search(r"[a-z-]+ 9\.[\d.]+ is installed, and its functions are known from [\d.]+ or later, below [\d.]+: pip install '", told), told
    shutil.rmtree(folder)
    importlib.invalidate_caches()
    forget()
    assert "so that its version is not known" in refusal(name)


def test_a_driver_that_is_too_old_for_cutes_libraries_is_refused(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serving = adapter("flashinfer.serving")
    monkeypatch.setattr(serving, "current_environment", lambda kind: replace(current_environment("cuda"), driver="570.86.15"))
    assert refusal("flashinfer") == "accepted"
    monkeypatch.setattr(serving, "version_of", lambda name: "4.8.1")
    assert "want driver 580 or later, and this one is 570.86.15" in refusal("flashinfer")


def test_blackwell_wants_torch_for_cuda_13(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blackwell = replace(H100, name="NVIDIA B200", sm=100)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "its kernels for NVIDIA B200 want torch for CUDA 13, and this one is for CUDA 12.8" in refusal("flashinfer", blackwell)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert refusal("flashinfer", blackwell) == "accepted"


# imports


_ASKING = """
import sys, torch
import titans_backends as tb
from titans_backends.contracts import contract
from titans_backends.contracts.case import Case, build
from titans_backends.contracts.validate import validate
from titans_backends.facts import signature_of
from titans_backends.offers import offers
made = contract("gated_delta_rule")
call = build(made, Case("a", T=8, K=128, V=128, dtype=torch.bfloat16, given=("g",)))
peers = ("fla", "flash_qla", "flashinfer")
found = offers(signature_of(made, call, validate(made, call)), tb.Machine("cuda", "NVIDIA H100", "nvidia_h100", sm=90), peers)
verdicts = {one.backend.name: str(one.verdict) for one in found}
assert [verdicts[name] for name in peers] == ["accepted"] * 3, verdicts
assert not {*peers, "tilelang", "cutlass", "einops"} & set(sys.modules)
"""


def test_a_choice_imports_no_peer_and_the_library_none_either(site: Path) -> None:
    done = fresh.run(_ASKING, env={**os.environ, "PYTHONPATH": f"{Path(__file__).parents[1]}{os.pathsep}{site}"})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", PEERS)
def test_a_broken_package_disables_its_backend_and_nothing_else(name: str, on_cpu: Path) -> None:
    (on_cpu / PEERS[name][0] / "__init__.py").write_text("raise OSError('libcuda.so.1: no such file')")
    made = contract("gated_delta_rule")
    call = build(made, case(), "cpu")
    given = {one: getattr(call, one) for one in made.parameters}
    op = tb.get_op("gated_delta_rule")
    with pytest.raises(
        tb.BackendError, match=rf"backend '{name}' is installed and cannot be used: .*OSError: libcuda\.so\.1.*doctor --traceback {name}"
    ):
        op(**given, backend=name)
    with pytest.raises(tb.BackendRefusedError, match=r"OSError: libcuda\.so\.1"):
        op(**given, backend=name)
    for other in {*PEERS, "eager"} - {name}:
        o, _ = op(**given, backend=other)
        assert o.isfinite().all()


def given_and_op() -> tuple[dict[str, Any], Any]:
    made = contract("gated_delta_rule")
    call = build(made, case(), "cpu")
    return {one: getattr(call, one) for one in made.parameters}, tb.get_op("gated_delta_rule")


MODULES = {
    "fla": ("fla.ops.delta_rule.chunk", "chunk_delta_rule_bwd, chunk_delta_rule_fwd, prepare_wy_repr_fwd"),
    "flash_qla": ("flash_qla.ops.gated_delta_rule.chunk", "CHUNK_SIZE, _auto_intra_cp_context, chunk_gated_delta_rule_bwd"),
    "flashinfer": ("flashinfer.gdn_prefill", "chunk_gated_delta_rule"),
}


@pytest.mark.parametrize("name", PEERS)
def test_a_module_without_the_functions_that_are_called_disables_its_backend(name: str, on_cpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, lacks = MODULES[name]
    monkeypatch.setitem(sys.modules, module, type(sys)(module))  # as an uninstall leaves it, or another version
    given, op = given_and_op()
    if name == "fla":
        given["g"] = None
        given["q"], given["k"] = (x.repeat_interleave(2, 2) for x in (given["q"], given["k"]))
    told = rf"backend '{name}' is installed and cannot be used: {module} \(a folder without __init__.py.*\) lacks {lacks}.*; install it again: pip install "
    with pytest.raises(tb.BackendError, match=told):
        op(**given, backend=name)
    with pytest.raises(tb.BackendRefusedError, match=rf"{module} \(.*lacks {lacks}"):
        op(**given, backend=name)


@pytest.mark.parametrize(("raised", "told"), [("SystemExit(3)", "raised SystemExit: 3. It"), ("AssertionError", "raised AssertionError. It")])
def test_an_import_that_would_end_the_process_or_says_nothing_is_a_reason(raised: str, told: str, on_cpu: Path) -> None:
    (on_cpu / "flash_qla" / "__init__.py").write_text(f"raise {raised}")
    given, op = given_and_op()
    with pytest.raises(tb.BackendError, match=rf"importing flash_qla\.ops\.gated_delta_rule\.chunk {told}"):
        op(**given, backend="flash_qla")
    with pytest.raises(tb.BackendRefusedError, match=told.partition(".")[0]):
        op(**given, backend="flash_qla")


def test_what_flashinfer_swallowed_when_it_imported_its_kernels_is_told(on_cpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, op = given_and_op()
    prefill = importlib.import_module("flashinfer.gdn_prefill")

    def unavailable(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("SM90 GDN prefill DSL kernel is unavailable")

    monkeypatch.setattr(prefill, "chunk_gated_delta_rule", unavailable)
    with pytest.raises(NotImplementedError, match="SM90 GDN prefill DSL kernel is unavailable"):  # no card to know of: what it says stands
        op(**given, backend="flashinfer")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    kernels = on_cpu / "flashinfer" / "gdn_kernels" / "delta_rule_dsl"
    kernels.mkdir(parents=True)
    (kernels / "delta_rule_sm90.py").write_text("raise ImportError('libcuda.so.1: cannot open shared object file')")
    importlib.invalidate_caches()
    for error in (tb.BackendError, tb.BackendRefusedError):
        with pytest.raises(error, match=r"importing flashinfer\.gdn_kernels\.delta_rule_dsl\.delta_rule_sm90 raised ImportError: libcuda\.so\.1"):
            op(**given, backend="flashinfer")
    (kernels / "delta_rule_sm90.py").write_text("delta_rule_prefill_dsl_sm90 = None")
    importlib.invalidate_caches()
    forget()
    with pytest.raises(NotImplementedError, match="SM90 GDN prefill DSL kernel is unavailable"):  # they are there: what it says is all that is known
        op(**given, backend="flashinfer")


def test_flashinfer_is_handed_nothing_that_wants_a_gradient(on_cpu: Path) -> None:
    made, adapted = contract("gated_delta_rule"), adapter("flashinfer.gated_delta_rule")
    for view in ("contiguous", "transposed"):
        call = build(made, case(given=("g", "initial_state"), view=view), "cpu", requires_grad=True)
        turned = call.initial_state.detach().transpose(-1, -2).contiguous().requires_grad_().transpose(-1, -2)
        call.initial_state = turned  # with the value dimension first it is FlashInfer's own layout, and no copy
        with torch._C._AutoDispatchBelowAutograd():  # as in a training call's forward, where a view of a leaf still says so
            o, _ = adapted.run(call, adapted.candidates(signature(), H100)[0])
        assert torch.isfinite(o).all()
    assert set(ran()) == {"chunk_gated_delta_rule"}


def test_the_probe_runs_the_smallest_case_and_says_broken_with_a_traceback(on_cpu: Path) -> None:
    machine = tb.detect("cpu")
    for name in PEERS:
        assert registry.probe(registry.get(name), machine).state == "usable"
    sys.modules["flashinfer.gdn_prefill"].chunk_gated_delta_rule = lambda q, **_: (torch.zeros_like(q), torch.zeros(1, 1, 128, 128))
    wrong = registry.probe(registry.get("flashinfer"), machine)
    assert wrong.state == "refused"
    assert "the smallest case is wrong: o:" in str(wrong.verdict)
    for module in [one for one in sys.modules if one.partition(".")[0] == "fla"]:
        del sys.modules[module]
    (on_cpu / "fla" / "__init__.py").write_text("import a_module_that_nobody_has")
    broken = registry.probe(registry.get("fla"), machine)
    assert broken.state == "broken"
    assert "a_module_that_nobody_has" in broken.trace


def test_offsets_that_change_in_place_are_read_again(on_cpu: Path) -> None:
    made, op = contract("gated_delta_rule"), tb.get_op("gated_delta_rule")
    call = build(made, case(lengths=(20, 50)), "cpu")
    given = {name: getattr(call, name) for name in made.parameters}
    for backend in ("fla", "flash_qla"):
        given["cu_seqlens"].copy_(torch.tensor([0, 20, 70]))
        for _ in range(2):
            op(**given, backend=backend)
        first, again = (one["offsets"] for one in seen()[-2:])
        assert first is again  # so that the peer reads it once
        given["cu_seqlens"].copy_(torch.tensor([0, 41, 70]))
        o, _ = op(**given, backend=backend)
        assert seen()[-1]["offsets"] is not first
        assert torch.equal(o, op(**given, backend="eager")[0]) or (o - op(**given, backend="eager")[0]).abs().max() < 2e-2


def test_offsets_on_the_cpu_are_taken_to_the_operands_device(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = contract("gated_delta_rule")
    call = build(made, case(lengths=(20, 50)), "cpu")
    call = made.with_tensors(call, {name: x.to("meta") for name, x in made.tensors(call).items() if name != "cu_seqlens"})
    assert call.cu_seqlens.device.type == "cpu"
    given: list[torch.Tensor] = []
    modules = {"fla": "fla.ops.gated_delta_rule.chunk", "flash_qla": "flash_qla.ops.gated_delta_rule.chunk", "flashinfer": "flashinfer.gdn_prefill"}
    for name, module in modules.items():
        found = importlib.import_module(module)

        def function(cu_seqlens: torch.Tensor, v: torch.Tensor, name: str = name, **_: Any) -> Any:
            given.append(cu_seqlens)
            return (v, v) if name == "flashinfer" else (None, v, None, v, None, None) if name == "fla" else (None, None, v, None, v, None)

        monkeypatch.setattr(found, "prepare_chunk_indices", lambda offsets, chunk: offsets, raising=False)
        monkeypatch.setattr(found, "chunk_gated_delta_rule" if name == "flashinfer" else "chunk_gated_delta_rule_fwd", function)
        adapted = adapter(f"{name}.gated_delta_rule")
        if name == "flash_qla":
            monkeypatch.setattr(adapter("flash_qla.inputs"), "_without_empty", lambda offsets: (offsets, None))
        adapted.run(call, adapted.candidates(signature(lengths=(20, 50)), H100)[0])
    assert [(x.device.type, x.shape) for x in given] == [("meta", (3,))] * 3


# the real FLA


def test_the_real_flas_functions_take_our_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {}
    try:
        for name in ("gated_delta_rule.chunk", "delta_rule.chunk", "gated_delta_rule.fused_recurrent"):
            modules[name] = importlib.import_module(f"fla.ops.{name}")
    except ImportError:
        pytest.skip("flash-linear-attention is not installed")
    if not hasattr(modules["gated_delta_rule.chunk"], "FLACPContext"):
        pytest.skip("this is not the real FLA")
    asked: list[str] = []

    def bound(module: Any, name: str, answer: Callable[..., Any]) -> None:
        shape = inspect.signature(inspect.unwrap(getattr(module, name)))

        def function(*args: Any, **kwargs: Any) -> Any:
            shape.bind(*args, **kwargs)
            asked.append(name)
            return answer(**shape.bind(*args, **kwargs).arguments)

        monkeypatch.setattr(module, name, function)

    def outputs(q: Any = None, v: Any = None, **_: Any) -> Any:
        return v, v, v

    chunk, delta, step = modules.values()
    bound(chunk, "l2norm_fwd", lambda x, **_: (x, x[..., 0]))
    bound(chunk, "l2norm_bwd", lambda y, **_: y)
    bound(chunk, "prepare_chunk_indices", lambda cu_seqlens, chunk_size, **_: cu_seqlens)
    bound(chunk, "chunk_local_cumsum", lambda g, **_: g)
    bound(chunk, "chunk_gated_delta_rule_fwd_intra", outputs)
    bound(chunk, "chunk_gated_delta_rule_fwd", lambda v, **_: (v, v, v, v, None, None))
    bound(chunk, "chunk_gated_delta_rule_bwd", lambda q, k, v, beta, g, **_: (q, k, v, beta, g, v, None, None))
    bound(delta, "prepare_wy_repr_fwd", lambda k, **_: (k, k, k))
    bound(delta, "chunk_delta_rule_fwd", outputs)
    bound(delta, "chunk_delta_rule_bwd", lambda q, k, v, beta, **_: (q, k, v, beta, v))
    bound(step, "fused_recurrent_gated_delta_rule_fwd", lambda v, initial_state, **_: (v, initial_state))
    rule, made = adapter("fla.gated_delta_rule"), contract("gated_delta_rule")
    options = {"output_final_state": True, "qk_l2norm": True}
    for given, lengths in ((("g", "initial_state", "gate"), (3, 4)), (("g",), None), ((), None), (("gate",), None)):
        call = build(made, case(given=given, lengths=lengths, G=2, options=options), "cpu")
        variant = "delta_rule" if "g" not in given else "gated_delta_rule"
        forward = Candidate("fla", variant)
        rule.run(call, forward)
        rule.run_backward(call, (call.v, None), None, frozenset(["q", "beta"]), replace(forward, direction="backward"))
        keeping = adapter("fla.inputs").keeping(forward)
        _, _, *kept = rule.run(call, keeping)
        rule.run_backward(call, (call.v, None), tuple(kept), frozenset(["q", "beta"]), replace(keeping, direction="backward"))
    op = contract("gated_delta_step")
    adapter("fla.gated_delta_step").run(build(op, case(T=1, G=2, options={}), "cpu"), Candidate("fla", "fused_recurrent"))
    assert set(asked) == {
        "l2norm_fwd", "l2norm_bwd", "prepare_chunk_indices", "chunk_local_cumsum", "chunk_gated_delta_rule_fwd_intra", "chunk_gated_delta_rule_fwd",
        "chunk_gated_delta_rule_bwd", "prepare_wy_repr_fwd", "chunk_delta_rule_fwd", "chunk_delta_rule_bwd", "fused_recurrent_gated_delta_rule_fwd",
    }  # fmt: skip
    assert isinstance(chunk.RCP_LN2, float)
