"""What a backend's forward hands on to its own backward in place of chunk-start states: it arrives there, and nowhere else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import titans_backends as tb
from tests.loopback import install
from tests.test_autograd import Seen
from titans_backends import library, registry
from titans_backends.backend import Candidate
from titans_backends.buckets import bucket_of, defaults_of
from titans_backends.cache.schema import canonical_when
from titans_backends.cli import app
from titans_backends.conformance import examine, items
from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.case import Case, build
from titans_backends.contracts.contract import Call
from titans_backends.errors import BackendError, BackendRefusedError
from titans_backends.library import planner
from titans_backends.machine import detect
from titans_backends.offers import offers, pairs, unpaired
from titans_backends.request import request
from titans_backends.tuning import events
from titans_backends.tuning.gate import gate
from titans_backends.tuning.plan import plan
from titans_backends.tuning.run import TuneRequest, tune
from titans_backends.tuning.session import Session

Handed = list[tuple[Tensor, ...] | None]
OP, NAME = CONTRACTS["gated_delta_rule"], "keeper's norms"


def case() -> Case:
    return Case("small", B=1, T=20, G=1, H=2, K=8, V=4, dtype=torch.float32, given=("g",))


def norms(call: Call) -> tuple[Tensor, ...]:
    return call.k.norm(dim=-1), call.v.new_full((1, 1, 2, 8, 4), float("nan"))  # type: ignore[attr-defined]


@pytest.fixture
def keeper(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Handed]]:
    """`keeper()` installs a backend whose forward keeps the keys' norms, and returns what its backwards were handed; `residual` is what it keeps instead."""

    def make(residual: Callable[[Call], tuple[Tensor, ...]] = norms, *, plain: bool = True) -> list[tuple[Tensor, ...] | None]:
        install(monkeypatch, "keeper", ops=(OP.name,))
        module: ModuleType = registry.module(registry.get("keeper"), OP.name)[0]  # type: ignore[assignment]
        run, run_backward, handed = module.run, module.run_backward, list[tuple[Tensor, ...] | None]()

        def offered(direction: str) -> list[Candidate]:
            kept = Candidate("keeper", "kept", direction=direction, saves_states=True, residual=NAME)  # type: ignore[arg-type]
            return [kept, *[Candidate("keeper", "loop", direction=direction)] * plain]  # type: ignore[arg-type]

        def backward(call: Call, grads: object, states: tuple[Tensor, ...] | None, needs: frozenset[str], candidate: Candidate) -> object:
            handed.append(states)
            assert (states is None) == (candidate.variant == "loop")
            assert states is None or torch.equal(states[0], residual(call)[0]), "what another call kept"
            return run_backward(call, grads, states, needs, candidate)

        monkeypatch.setattr(module, "candidates", lambda signature, machine: offered("forward"))
        monkeypatch.setattr(module, "backward_candidates", lambda signature, machine: offered("backward"))
        monkeypatch.setattr(
            module, "run", lambda call, candidate: (*run(call, candidate), *residual(call)) if candidate.residual else run(call, candidate)
        )
        monkeypatch.setattr(module, "run_backward", backward)
        return handed

    yield make
    monkeypatch.undo()
    tb.reset()


def step(call: Call, **options: object) -> None:
    o = tb.get_op(OP.name)(**{name: getattr(call, name) for name in OP.parameters}, **options)[0]
    o.sum().backward()


def test_a_backward_is_handed_what_its_own_forward_kept(keeper: Callable[..., Handed]) -> None:
    handed = keeper()
    for seed in (0, 1):
        call = build(OP, replace(case(), seed=seed), "cpu", requires_grad=True)
        step(call, backend="keeper")
        assert torch.equal(handed[-1][0], norms(call)[0])  # type: ignore[index]
    assert len(handed) == 2


def test_no_other_backends_backward_gets_it(keeper: Callable[..., Handed]) -> None:
    keeper()
    call = build(OP, case(), "cpu", requires_grad=True)
    signature = planner(OP.name).plan(call, request(None, training=True)).choice.signature
    found = pairs(offers(signature, detect("cpu"), ["keeper", "eager"]), signature)
    kept = [pair for pair in found if NAME in (pair.forward.residual, pair.backward.residual if pair.backward else "")]
    assert [(pair.forward.backend, pair.backward.backend) for pair in kept if pair.backward] == [("keeper", "keeper")]
    assert {(pair.forward.saves_states, pair.forward.residual) for pair in found} == {(False, ""), (True, ""), (True, NAME)}


def test_a_backward_is_chosen_by_what_arrives(keeper: Callable[..., Handed]) -> None:
    handed = keeper(plain=False)
    call = build(OP, case(), "cpu", requires_grad=True)
    eager = offers(planner(OP.name).plan(call, request(None, training=True)).choice.signature, detect("cpu"), ["eager"])[0]
    with torch.no_grad():
        states = registry.module(eager.backend, OP.name)[0].run(call, next(one for one in eager.forward if one.saves_states))[-1]  # type: ignore[union-attr]
        grads, values = (torch.ones_like(call.v), None), [getattr(call, name) for name in OP.parameters]  # type: ignore[attr-defined]
        for saved, residual, count in (((states,), "", 0), (norms(call), NAME, 1), ((), "", 1)):
            found = library.gradients(OP, grads, values, saved, [True] * len(OP.differentiable), None, False, residual)
            assert len(handed) == count
            assert found[0] is not None


def test_a_backward_that_reads_something_else_is_not_taken_for_it(keeper: Callable[..., Handed], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the forward's own partner is gone by the time of the backward, another residual's backward must not read what it kept."""
    keeper(plain=False)
    module = registry.module(registry.get("keeper"), OP.name)[0]
    call = build(OP, case(), "cpu", requires_grad=True)
    o = tb.get_op(OP.name)(**{name: getattr(call, name) for name in OP.parameters}, backend="keeper")[0]
    for side, direction in (("candidates", "forward"), ("backward_candidates", "backward")):
        other = Candidate("keeper", "kept", direction=direction, saves_states=True, residual="keeper's other")  # type: ignore[arg-type]
        monkeypatch.setattr(module, side, lambda signature, machine, other=other: [other])
    planner(OP.name).clear()
    with pytest.raises(BackendRefusedError, match=r"the forward kept .* but no backward that reads it"):
        o.sum().backward()


@pytest.mark.parametrize("wrong", [lambda call: (), lambda call: (None,), lambda call: ([call.k],)])
def test_a_call_refuses_a_residual_that_is_no_tensor(keeper: Callable[..., Handed], wrong: Callable[[Call], tuple[Tensor, ...]]) -> None:
    handed = keeper(wrong)
    with pytest.raises(BackendError, match=r"tensors of its residual .* but returned (none|NoneType|list)"):
        step(build(OP, case(), "cpu", requires_grad=True), backend="keeper")
    assert handed == []


def test_the_gate_names_a_residual_that_is_an_input(keeper: Callable[..., Handed]) -> None:
    keeper(lambda call: (call.k,))  # type: ignore[attr-defined]
    module = registry.module(registry.get("keeper"), OP.name)[0]
    result = gate(bucket(), module.candidates(None, None)[0], module, detect("cpu"), "cpu")  # type: ignore[union-attr, arg-type]
    assert "its residual shares the memory of k" in result.reason


def test_a_residual_without_saving_is_no_candidate() -> None:
    with pytest.raises(ValueError, match="without saves_states=True"):
        Candidate("keeper", "kept", residual=NAME)


def bucket() -> object:
    values = {"dtype": "float32", "head_dim": (8, 4), "streams": 2, "g": True, "regime": "training"}
    return bucket_of(planner(OP.name).plan(build(OP, case(), "cpu", requires_grad=True), request(None, training=True)).choice.signature)._replace(
        when=canonical_when(values, defaults_of(OP.name))
    )


def test_the_gate_hands_a_backward_what_its_backends_forward_makes(keeper: Callable[..., Handed]) -> None:
    handed = keeper()
    module = registry.module(registry.get("keeper"), OP.name)[0]
    backward = module.backward_candidates(None, None)[0]  # type: ignore[union-attr]
    result = gate(bucket(), backward, module, detect("cpu"), "cpu")  # type: ignore[arg-type]
    assert result.reason == ""
    assert handed
    assert all(one is not None for one in handed)


def test_the_gate_refuses_a_residual_with_a_hole(keeper: Callable[..., Handed]) -> None:
    keeper(lambda call: (call.k.norm(dim=-1), None))  # type: ignore[attr-defined, arg-type, return-value]
    module = registry.module(registry.get("keeper"), OP.name)[0]
    result = gate(bucket(), module.candidates(None, None)[0], module, detect("cpu"), "cpu")  # type: ignore[union-attr, arg-type]
    assert "a tensor of its residual is None" in result.reason


@pytest.fixture
def misnamed(keeper: Callable[..., Handed], monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend, whose backward wants what its forward calls otherwise."""
    keeper()
    offered = [Candidate("keeper", "kept", direction="backward", saves_states=True, residual="keeper's norm")]
    plain = Candidate("keeper", "loop", direction="backward")
    module = registry.module(registry.get("keeper"), OP.name)[0]
    monkeypatch.setattr(module, "backward_candidates", lambda signature, machine: [*offered, plain])


WANTS, MAKES = "it wants keeper's norm, but no forward of its backend makes that", f"it makes {NAME}, but no backward of its backend wants that"


def test_directions_that_name_it_otherwise_are_told_once_by_a_tune_in_the_words_of_verify(misnamed: None, tmp_path: Path) -> None:
    buckets = plan("cpu", ops=[OP.name], seq_lens=[8, 16], heads=[(1, 1)], head_dims=[(8, 8)], regimes=["training", "inference"])
    said: list[events.Event] = []
    tune(TuneRequest(buckets, backends=("keeper",), output=tmp_path / "t.yaml", budget_s=1e-9), said.append)
    assert [one for one in said if isinstance(one, events.Unpaired)] == [
        events.Unpaired(OP.name, "keeper/kept", "forward", MAKES), events.Unpaired(OP.name, "keeper/kept", "backward", WANTS)
    ]  # fmt: skip
    assert isinstance(said[0], events.Planned)
    (first, *_) = items("keeper", ops=[OP.name], dtypes=[torch.float32], regimes=["training"], device="cpu")
    examined = examine(first)
    assert (examined.status, WANTS in examined.detail) == ("failed", True)


def test_a_dry_run_tells_it_and_does_not_count_them(misnamed: None) -> None:
    words = [
        "tune",
        "--op",
        OP.name,
        "--seq-lens",
        "8",
        "--heads",
        "1",
        "--head-dim",
        "8",
        "--regime",
        "training",
        "--backend",
        "keeper",
        "--device",
        "cpu",
    ]
    (row,) = json.loads(CliRunner().invoke(app, [*words, "--dry-run", "--json"]).stdout)
    assert row["candidates"] == ["keeper/loop", "keeper/loop (backward)"]
    assert {(one["backend"], one["reason"]) for one in row["refusals"]} >= {
        ("keeper", f"keeper/kept (forward): {MAKES}"), ("keeper", f"keeper/kept (backward): {WANTS}")
    }  # fmt: skip
    shown = CliRunner().invoke(app, [*words, "--dry-run"], env={"COLUMNS": "300"}).stdout
    assert "keeper 2" in shown
    assert shown.count(WANTS) == 1


def test_directions_that_agree_and_a_forward_alone_are_not_told(keeper: Callable[..., Handed], monkeypatch: pytest.MonkeyPatch) -> None:
    keeper()
    call = build(OP, case(), "cpu", requires_grad=True)
    signature = planner(OP.name).plan(call, request(None, training=True)).choice.signature
    assert unpaired(offers(signature, detect("cpu"))) == []
    module = registry.module(registry.get("keeper"), OP.name)[0]
    monkeypatch.setattr(module, "backward_candidates", lambda signature, machine: [])
    assert unpaired(offers(signature, detect("cpu"))) == []


def test_the_registered_op_has_no_place_for_it_and_computes_again(keeper: Callable[..., Handed]) -> None:
    handed = keeper()
    call = build(OP, case(), "cpu", requires_grad=True)
    with Seen():
        step(call, backend="keeper")
    assert handed == [None]


def test_a_session_keeps_states_and_residuals_apart(keeper: Callable[..., Handed]) -> None:
    keeper()
    session = Session(bucket(), "cpu", 2)  # type: ignore[arg-type]
    given = offers(planner(OP.name).plan(session.call, request(None, training=True)).choice.signature, session.machine, ["keeper", "eager"])
    forward, backward = ([c for offer in given for c in getattr(offer, side) if c.saves_states] for side in ("forward", "backward"))
    for candidate in backward:
        maker = next(one for one in forward if one.agrees(candidate))
        assert session.check(candidate, maker).result.reason == ""
    assert set(session._saved) == {"", NAME}
    session.close()


def remembers(monkeypatch: pytest.MonkeyPatch, *, stale: bool = False) -> list[str]:
    """The keeper's backward remembered, and what it was asked; `stale`: what repeats it goes on with the residual of its first call."""
    module: ModuleType = registry.module(registry.get("keeper"), OP.name)[0]  # type: ignore[assignment]
    said: list[str] = []

    def remember_backward(call: Call, grads: object, states: tuple[Tensor, ...] | None, needs: frozenset[str], candidate: Candidate) -> object:
        def again(values: tuple[object, ...], arriving: object, saved: tuple[Tensor, ...] | None) -> object:
            said.append("again")
            later = OP.make_call(**dict(zip(OP.parameters, values, strict=True)))
            return module.run_backward(later, arriving, states if stale else saved, needs, candidate)

        said.append("remember")
        return module.run_backward(call, grads, states, needs, candidate), again

    monkeypatch.setattr(module, "remember_backward", remember_backward, raising=False)
    return said


def test_a_backward_of_a_residual_is_repeated_with_what_arrives(keeper: Callable[..., Handed], monkeypatch: pytest.MonkeyPatch) -> None:
    handed = keeper()
    said = remembers(monkeypatch)
    calls = [build(OP, replace(case(), seed=seed), "cpu", requires_grad=True) for seed in (0, 1)]
    for call in calls:
        step(call, backend="keeper")
        assert torch.equal(handed[-1][0], norms(call)[0])  # type: ignore[index]
    assert said == ["remember", "again"]


def test_a_residual_of_other_strides_is_remembered_apart(keeper: Callable[..., Handed], monkeypatch: pytest.MonkeyPatch) -> None:
    turned: list[bool] = []

    def residual(call: Call) -> tuple[Tensor, ...]:
        made = norms(call)
        return (made[0].transpose(0, 1).contiguous().transpose(0, 1), *made[1:]) if turned else made

    keeper(residual)
    said = remembers(monkeypatch)
    call = build(OP, replace(case(), B=2), "cpu", requires_grad=True)
    step(call, backend="keeper")
    turned.append(True)
    step(call, backend="keeper")
    step(call, backend="keeper")
    assert said == ["remember", "remember", "again"]


@pytest.mark.parametrize("stale", [False, True])
def test_the_gate_examines_what_repeats_a_backward_of_a_residual(keeper: Callable[..., Handed], monkeypatch: pytest.MonkeyPatch, stale: bool) -> None:
    keeper()
    said = remembers(monkeypatch, stale=stale)
    module = registry.module(registry.get("keeper"), OP.name)[0]
    backward = module.backward_candidates(None, None)[0]  # type: ignore[union-attr]
    result = gate(bucket(), backward, module, detect("cpu"), "cpu")  # type: ignore[arg-type]
    assert "again" in said
    assert result.ok != stale, result.reason
