"""The gate on candidates that are wrong in one way each: what it rejects, and the sentence that it gives."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from titans_backends import registry
from titans_backends.backend import Candidate, TrainableOpModule
from titans_backends.buckets import Bucket, defaults_of
from titans_backends.cache.schema import WhenValue, canonical_when
from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.case import Case
from titans_backends.contracts.fused_uw import FusedUW
from titans_backends.contracts.tolerance import tolerance
from titans_backends.machine import detect
from titans_backends.signature import Signature
from titans_backends.tuning import guarded_run
from titans_backends.tuning.gate import GateResult, check_backward, gate
from titans_backends.tuning.ledger import Ledger, Rejected
from titans_backends.tuning.suite import Exam
from titans_backends.verdict import ACCEPTED, refused

Run = Callable[..., GateResult]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run(variant, direction)` gates one of the faulty candidates."""
    monkeypatch.syspath_prepend(Path(__file__).parent / "plugins")
    for name in [name for name in sys.modules if name.split(".")[0] == "faulty"]:
        monkeypatch.delitem(sys.modules, name)
    module = importlib.import_module("faulty.gated_delta_rule")

    def gated(variant: str, direction: str = "forward", module: ModuleType = module, seq_len: int = 20, **fields: WhenValue) -> GateResult:
        monkeypatch.setenv("FAULTY_VARIANTS", variant if direction == "forward" else f"backward:{variant}")
        values: dict[str, WhenValue] = {"dtype": "float32", "head_dim": (8, 4), "streams": 2, "g": True, **fields}
        if direction == "backward":
            values["regime"] = "training"
        bucket = Bucket("gated_delta_rule", canonical_when(values, defaults_of("gated_delta_rule")), seq_len)
        candidate = Candidate("faulty", variant, direction=direction)  # type: ignore[arg-type]
        found: TrainableOpModule = module  # type: ignore[assignment]
        return gate(bucket, candidate, found, detect("cpu"), "cpu")

    return gated


def test_a_right_candidate_passes_with_its_errors_and_no_case_left_out(run: Run) -> None:
    result = run("good")
    assert (result.reason, result.skipped) == ("", ())
    assert set(dict(result.errors)) == {"o", "final_state"}
    assert all(0 <= error < 5e-6 for error in dict(result.errors).values())


@pytest.mark.parametrize(
    ("variant", "said"),
    [
        ("nan", "o is not finite on strided"),
        ("wrong", "o is off by"),
        ("wrong_state", "final_state is off by"),
        ("shape", "o has shape"),
        ("dtype", "o has dtype torch.float64"),
        ("writes", "it changed its input k"),
        ("shares", "o shares the memory of v"),
        ("restless", "two runs differ"),
        ("raises", "raised on strided: ValueError: no such instruction"),
        ("memory_error", "out of memory on strided: MemoryError"),
        ("huge", "out of memory on strided: RuntimeError"),
    ],
)
def test_a_wrong_candidate_is_rejected_with_what_is_wrong(run: Run, variant: str, said: str) -> None:
    result = run(variant)
    assert not result.ok
    assert said in result.reason
    assert "\n" not in result.reason


def test_an_error_is_kept_with_its_size(run: Run) -> None:
    assert dict(run("wrong_state").errors)["final_state"] == pytest.approx(1e-3, rel=0.2)


def test_a_right_backward_passes_and_a_wrong_one_names_its_gradient(run: Run) -> None:
    assert run("good", "backward").reason == ""
    assert "dk is off by" in run("wrong", "backward").reason


def test_a_backward_must_bear_that_an_output_brings_no_gradient(run: Run) -> None:
    result = run("needs_all", "backward")
    assert "dv is off by" in result.reason
    assert "with a gradient of o alone" in result.reason


def test_packed_and_misaligned_buckets_are_gated_as_such(run: Run) -> None:
    assert "packed with empty sequences" in run("wrong", packed=True, streams=4).reason
    assert (run("good", aligned=False).reason, run("good", aligned=False).skipped) == ("", ())


def test_a_candidate_that_writes_to_its_inputs_spoils_nothing_for_the_next(run: Run) -> None:
    assert not run("writes").ok
    assert run("good").ok


def test_a_case_that_the_backend_refuses_is_skipped_and_said(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run("good")
    faulty = sys.modules["faulty.gated_delta_rule"]

    def supports(signature: object, machine: object) -> object:
        v = signature.tensor("v")  # type: ignore[attr-defined]
        return refused("v is strided") if v.stride[-2] != v.shape[-1] else ACCEPTED

    monkeypatch.setattr(faulty, "supports", supports)
    result = run("good")
    assert result.ok
    assert result.skipped == ("strided",)


def test_what_pays_at_many_tokens_alone_is_examined_on_few(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A candidate that no hostile case is offered takes those it would be offered for at the bucket's own sizes."""

    def candidates(signature: Signature, machine: object) -> list[Candidate]:
        return [Candidate("faulty", name) for name in ("good", "wrong") if signature.dim("T") >= 4096]

    def gated(variant: str, seq_len: int) -> GateResult:
        return run(variant, seq_len=seq_len)

    gated("good", 20)
    monkeypatch.setattr(sys.modules["faulty.gated_delta_rule"], "candidates", candidates)
    assert gated("good", 4096) == GateResult("", gated("good", 4096).errors, ())
    assert gated("good", 4096).errors
    assert "o is off by" in gated("wrong", 4096).reason
    assert len(gated("wrong", 2048).skipped) == 4  # nobody offers it there
    assert gated("wrong", 2048).ok


def test_what_pays_at_many_tokens_alone_is_not_asked_for_what_its_backend_refuses(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run("good")
    faulty = sys.modules["faulty.gated_delta_rule"]
    monkeypatch.setattr(faulty, "candidates", lambda signature, machine: [Candidate("faulty", "wrong")] * (signature.dim("T") >= 4096))
    monkeypatch.setattr(faulty, "supports", lambda signature, machine: ACCEPTED if signature.dim("T") >= 4096 else refused("too few tokens"))
    assert len(run("wrong", seq_len=4096).skipped) == 4


def test_what_pays_at_large_sizes_alone_is_asked_for_with_the_heads_and_lengths_of_the_timed_call(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same key is of two sequences of four heads, and of eight of one; packed, the cases' own lengths are of other sequences."""
    run("good")
    faulty = sys.modules["faulty.gated_delta_rule"]
    met = list[tuple[int, int]]()

    def candidates(signature: Signature, machine: object) -> list[Candidate]:
        met.append((signature.dim("N"), signature.dim("H")))
        return [Candidate("faulty", "wrong")] * (signature.dim("T") >= 4096 and met[-1] == (8, 1))

    monkeypatch.setattr(faulty, "candidates", candidates)
    for packed in (False, True):
        values: dict[str, WhenValue] = {"dtype": "float32", "head_dim": (8, 4), "streams": 8, "g": True, "packed": packed}
        bucket = Bucket("gated_delta_rule", canonical_when(values, defaults_of("gated_delta_rule")), 4096)
        asked = (bucket, Candidate("faulty", "wrong"), faulty, detect("cpu"), "cpu")
        assert "o is off by" in gate(*asked, heads=1).reason  # type: ignore[arg-type]
        assert met[-1] == (8, 1)
        assert gate(*asked, heads=4).ok  # type: ignore[arg-type]
        assert met[-1] == (2, 4)


def test_what_pays_at_many_tokens_alone_takes_the_residual_of_what_pays_there(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its maker is no more offered for the cases' few tokens than it is."""
    run("good", "backward")
    faulty = sys.modules["faulty.gated_delta_rule"]
    handed, forward = list[object](), faulty.run
    kept = {"saves_states": True, "residual": "kept"}

    def run_backward(
        call: object, grads: object, states: object, needs: object, candidate: Candidate, real: Callable[..., object] = faulty.run_backward
    ) -> object:
        handed.append(states)
        return real(call, grads, states, needs, candidate)

    monkeypatch.setattr(faulty, "candidates", lambda signature, machine: [Candidate("faulty", "good", **kept)] * (signature.dim("T") >= 4096))
    monkeypatch.setattr(
        faulty,
        "backward_candidates",
        lambda signature, machine: [Candidate("faulty", "good", direction="backward", **kept)] * (signature.dim("T") >= 4096),
    )
    monkeypatch.setattr(faulty, "run", lambda call, candidate: (*forward(call, candidate), torch.ones(3)))
    monkeypatch.setattr(faulty, "run_backward", run_backward)
    values: dict[str, WhenValue] = {"dtype": "float32", "head_dim": (8, 4), "streams": 2, "g": True, "regime": "training"}
    bucket = Bucket("gated_delta_rule", canonical_when(values, defaults_of("gated_delta_rule")), 4096)
    result = gate(bucket, Candidate("faulty", "good", direction="backward", **kept), faulty, detect("cpu"), "cpu")  # type: ignore[arg-type]
    assert (result.reason, result.skipped) == ("", ())
    assert handed
    assert all(isinstance(one, tuple) and len(one) == 1 for one in handed)


def test_what_a_module_remembered_runs_on_poisoned_memory_and_not_on_its_first_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    contract, done = CONTRACTS["fused_uw"], list[str]()
    call = contract.make_call(torch.eye(4), torch.ones(4, 4), torch.ones(4, 4))

    class Module:
        def run(self, call: FusedUW, candidate: Candidate) -> tuple[torch.Tensor, ...]:
            done.append("run")
            return call.attn_const @ call.v_beta, call.attn_const @ call.k_beta

        def remember(self, call: FusedUW, candidate: Candidate) -> object:
            return self.run(call, candidate), lambda later: self.run(FusedUW(*later), candidate)

    monkeypatch.setattr(guarded_run, "_poison", lambda shapes, like: done.append("poison"))
    guarded_run.run_forward(contract, Candidate("any", "any"), Module(), call, "here", repeated=True)  # type: ignore[arg-type]
    assert done == ["run", "poison", "run"]


def test_what_repeats_its_first_outputs_whatever_comes_is_rejected(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("good").ok
    faulty = sys.modules["faulty.gated_delta_rule"]

    def remember(call: object, candidate: Candidate) -> object:
        first = faulty.run(call, candidate)
        return first, lambda later: first

    monkeypatch.setattr(faulty, "remember", remember, raising=False)
    result = run("good")
    assert not result.ok
    assert "two runs differ" in result.reason


def test_what_repeats_its_first_gradients_is_rejected_also_where_bits_may_differ() -> None:
    made = CONTRACTS["fused_uw"]
    call = made.make_call(torch.eye(4), torch.ones(4, 4), torch.ones(4, 4))
    grads = (torch.ones(4, 4), None)
    exam = Exam(
        Case("any", B=1, T=4, G=1, H=1, K=4, V=4),
        call,
        made.reference(call),
        None,
        ((grads, (torch.full((4, 4), 4.0), torch.ones(4, 4), torch.zeros(4, 4))),),
    )

    class Module:
        def run_backward(self, call: FusedUW, grads: tuple[torch.Tensor, None], states: None, needs: frozenset[str], candidate: Candidate) -> object:
            return grads[0] @ call.v_beta.T, call.attn_const.T @ grads[0], torch.zeros(4, 4)

        def remember_backward(self, *arguments: object) -> object:
            first = self.run_backward(*arguments)  # type: ignore[arg-type]
            return first, lambda later, arriving, states: first

    for deterministic in (True, False):
        candidate = Candidate("any", "any", direction="backward", deterministic=deterministic)
        with pytest.raises(Rejected, match="two runs differ" if deterministic else "called again"):
            check_backward(made, candidate, Module(), exam, tolerance(torch.float32), Ledger(), "here")  # type: ignore[arg-type]


def test_a_gradient_below_what_float32_holds_may_be_zero_but_not_anything_else() -> None:
    values: dict[str, WhenValue] = {"dtype": "float32", "head_dim": (8, 8), "streams": 2, "g": True, "initial_state": True, "regime": "training"}
    bucket = Bucket("deep_core", canonical_when(values, defaults_of("deep_core")), 40)
    module, _ = registry.module(registry.get("eager"), "deep_core")
    assert module is not None
    candidate = Candidate("eager", "blocks", direction="backward")

    class Spoiled:
        def __getattr__(self, name: str) -> object:
            return getattr(module, name)

        def run_backward(self, *arguments: object) -> object:
            found = module.run_backward(*arguments)  # type: ignore[attr-defined]
            return (*found[:-1], found[-1] + 1e-3)

    assert gate(bucket, candidate, module, detect("cpu"), "cpu").reason == ""
    assert "is off by" in gate(bucket, candidate, Spoiled(), detect("cpu"), "cpu").reason  # type: ignore[arg-type]
