"""Ops as users hold them: memo, bind, policy, threads, fork, batch invariance, capture."""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import os
import pickle
import threading
import traceback
from pathlib import Path

import pytest
import torch

import titans_backends as tb
from tests import fresh
from tests.loopback import install
from titans_backends import library, plans, scope
from titans_backends.contracts import CONTRACTS

pytestmark = pytest.mark.usefixtures("eager_first")


def inputs(batch: int = 1, length: int = 40, heads: int = 2, dim: int = 8) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(length)
    q, k, v = (torch.nn.functional.normalize(torch.randn(batch, length, heads, dim), dim=-1) for _ in range(3))
    return q, k, v, torch.rand(batch, length, heads), -torch.rand(batch, length, heads)


def test_get_op_lists_the_known_ops() -> None:
    with pytest.raises(tb.UnknownNameError, match=r"unknown op 'slow'; known: .*dual_core.*, fast_core"):
        tb.get_op("slow")


def test_get_op_lists_the_known_backends() -> None:
    with pytest.raises(tb.UnknownNameError, match=r"unknown backend 'cuda'; known: .*eager"):
        tb.get_op("slow_core", backend="cuda")


def test_an_unknown_backend_at_the_call_lists_the_known_ones() -> None:
    with pytest.raises(tb.UnknownNameError, match=r"unknown backend 'nope'; known: .*eager"):
        tb.get_op("fast_core")(*inputs()[:3], backend="nope")


def test_a_repeated_shape_is_chosen_once(plugin_backend) -> None:
    asked: list[int] = []
    from titans_backends import Candidate

    def candidates(signature: tb.Signature, machine: tb.Machine) -> list[Candidate]:
        asked.append(signature.dim("T"))
        return [Candidate("counting", "loop")]

    ran = plugin_backend("counting", candidates=candidates)
    op = tb.get_op("fast_core")
    for _ in range(3):
        op(*inputs()[:3])
    assert len(ran) == 3
    assert asked == [40]
    op(*inputs(length=41)[:3])
    assert asked == [40, 41]


def test_strides_dtype_options_and_settings_are_part_of_the_signature() -> None:
    plans.invalidate()
    op, memo = tb.get_op("fast_core"), library.planner("fast_core")._memo
    q, k, v, _, _ = inputs()
    op(q, k, v)
    op(q.transpose(1, 2).contiguous().transpose(1, 2), k, v)
    op(q.double(), k.double(), v.double())
    op(q, k, v, chunk_size=16)
    torch.use_deterministic_algorithms(True)
    try:
        op(q, k, v)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(memo) == 5
    op(q, k, v)
    assert len(memo) == 5


def test_a_wrong_kind_of_option_is_caught_after_the_right_one_was_memoised() -> None:
    q, k, v, _, _ = inputs()
    tb.get_op("fast_core")(q, k, v, chunk_size=16)
    with pytest.raises(TypeError, match=r"chunk_size must be an int, got 16\.0"):
        tb.get_op("fast_core")(q, k, v, chunk_size=16.0)
    with pytest.raises(TypeError, match="output_final_state must be True or False, got 1"):
        tb.get_op("fast_core")(q, k, v, output_final_state=1)


def test_the_default_follows_the_rank_and_skips_what_refuses(plugin_backend) -> None:
    ran = plugin_backend("refusing", supports=lambda signature, machine: tb.refused("not on a Saturday", "nor with two heads"))
    op = tb.get_op("fast_core")
    op(*inputs()[:3])
    assert ran == []
    told = op.explain(*inputs()[:3])
    assert told.choice is not None
    assert told.choice.pair.forward.backend == "eager"
    assert "not on a Saturday; nor with two heads" in str(told)
    assert {"backend": "refusing", "accepted": False}.items() <= next(b for b in told.as_dict()["backends"] if b["backend"] == "refusing").items()


def test_a_forced_backend_that_refuses_raises_with_every_reason(plugin_backend) -> None:
    plugin_backend("refusing", supports=lambda signature, machine: tb.refused("not on a Saturday", "nor with two heads"))
    q, k, v, _, _ = inputs()
    message = (
        r"fast_core: backend 'refusing' was forced \({}\) but refuses this call: refusing: not on a Saturday; nor with two heads. Usable here: eager"
    )
    with pytest.raises(tb.BackendRefusedError, match=message.format("backend=")):
        tb.get_op("fast_core")(q, k, v, backend="refusing")
    with tb.use_backend("refusing"), pytest.raises(tb.BackendRefusedError, match=message.format("use_backend")):
        tb.get_op("fast_core")(q, k, v)
    with pytest.raises(tb.BackendRefusedError, match=message.format("backend=")):
        tb.get_op("fast_core", backend="refusing")(q, k, v)


def test_the_switch_forces_a_backend(plugin_backend, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = plugin_backend("last", rank=99)
    monkeypatch.setenv("TITANS_BACKENDS_FORCE", "last")
    tb.reset()
    tb.get_op("fast_core")(*inputs()[:3])
    assert ran == ["forward"]
    tb.get_op("fast_core")(*inputs()[:3], backend="eager")  # the call's own word weighs more
    with tb.use_backend("eager"):
        tb.get_op("fast_core")(*inputs()[:3])
    assert ran == ["forward"]


def test_a_forced_backend_must_supply_both_directions(plugin_backend) -> None:
    plugin_backend("forward_only", run_backward=None)
    q, k, v, _, _ = inputs()
    with pytest.raises(tb.BackendRefusedError, match="in training it must have both directions, but it has only forward"):
        tb.get_op("fast_core")(q.requires_grad_(), k, v, backend="forward_only")


def test_unforced_training_mixes_backends_where_it_must(plugin_backend) -> None:
    ran = plugin_backend("forward_only", run_backward=None)
    q, k, v, _, _ = inputs()
    told = tb.get_op("fast_core").explain(q.requires_grad_(), k, v)
    assert told.choice is not None
    assert (told.choice.pair.forward.backend, told.choice.pair.backward.backend) == ("eager", "eager")  # unmixed comes first
    with tb.use_backend("eager"):
        tb.get_op("fast_core")(q, k, v)[0].sum().backward()
    assert ran == []
    assert q.grad is not None


def test_deterministic_algorithms_are_respected(plugin_backend) -> None:
    from titans_backends import Candidate

    ran = plugin_backend("dice", candidates=lambda s, m: [Candidate("dice", "loop", deterministic=False)])
    op = tb.get_op("fast_core")
    op(*inputs()[:3])
    assert ran == ["forward"]
    torch.use_deterministic_algorithms(True)
    try:
        op(*inputs()[:3])
        assert ran == ["forward"]
        with pytest.raises(tb.BackendRefusedError, match="it has no deterministic candidate"):
            op(*inputs()[:3], backend="dice")
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["gated_delta_rule", "dual_core"])
def test_batch_invariant_bits_do_not_depend_on_the_company(name: str, threads: int) -> None:
    q, k, v, beta, g = inputs(batch=5, length=150, heads=3, dim=32)
    op, before = tb.get_op(name), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with tb.policy(batch_invariant=True):
            together = op(q, k, v, beta, g, output_final_state=True)
            for row in range(5):
                alone = op(*(x[row : row + 1] for x in (q, k, v, beta, g)), output_final_state=True)
                for a, b in zip(alone, together, strict=True):
                    assert torch.equal(a, b[row : row + 1])
            shorter = op(*(x[:, :64] for x in (q, k, v, beta, g)))[0]
            kinds = {op.explain(*(x[:n, :m] for x in (q, k, v, beta, g))).kernel for n in (1, 5) for m in (1, 17, 64, 150)}
    finally:
        torch.set_num_threads(before)
    assert len(kinds) == 1
    assert torch.equal(shorter, together[0][:, :64])


def test_a_bound_op_runs_its_choice_and_names_what_differs(plugin_backend) -> None:
    q, k, v, _, _ = inputs()
    step = tb.get_op("fast_core").bind(q, k, v, chunk_size=16)
    ran = plugin_backend("newcomer")  # would win a new lookup
    got = step(q, k, v, chunk_size=16)[0]
    assert ran == []
    assert torch.equal(got, tb.get_op("fast_core")(q, k, v, chunk_size=16, backend="eager")[0])
    for changed, message in (
        ({"q": q[:, :20]}, r"q has shape \(1, 20, 2, 8\), but it was bound to \(1, 40, 2, 8\)"),
        ({"q": q.double()}, "q has dtype torch.float64, but it was bound to torch.float32"),
        ({"q": q.transpose(1, 2).contiguous().transpose(1, 2)}, "q has stride"),
        ({"chunk_size": 32}, "chunk_size is 32, but it was bound to 16"),
        ({"gate": torch.ones(1, 40, 2)}, "it was bound without gate"),
    ):
        with pytest.raises(tb.BoundCallMismatchError, match=message):
            step(**{"q": q, "k": k, "v": v, "chunk_size": 16, **changed})
    shifted = torch.empty(q.numel() + 1)[1:].view(q.shape).copy_(q)
    with pytest.raises(tb.BoundCallMismatchError, match="16-byte alignment"):
        step(shifted, k, v, chunk_size=16)
    with pytest.raises(tb.BoundCallMismatchError, match="bound without gradients"):
        step(q.clone().requires_grad_(), k, v, chunk_size=16)


def test_a_bound_op_trains() -> None:
    q, k, v, _, _ = inputs()
    q.requires_grad_()
    step = tb.get_op("fast_core").bind(q, k, v)
    step(q, k, v)[0].sum().backward()
    (want,) = torch.autograd.grad(tb.get_op("fast_core")(q, k, v)[0].sum(), q)
    assert torch.equal(q.grad, want)


def test_a_bound_op_still_checks_cu_seqlens_on_the_cpu() -> None:
    q, k, v, _, _ = inputs()
    step = tb.get_op("fast_core").bind(q, k, v, cu_seqlens=torch.tensor([0, 10, 40]))
    step(q, k, v, cu_seqlens=torch.tensor([0, 20, 40]))
    with pytest.raises(ValueError, match="cu_seqlens must not fall"):
        step(q, k, v, cu_seqlens=torch.tensor([0, 50, 40]))


def test_policies_are_per_thread() -> None:
    seen = []
    with tb.use_backend("eager"):
        thread = threading.Thread(target=lambda: seen.append(scope.current().forced))
        thread.start()
        thread.join()
        assert scope.current().forced == "eager"
    assert seen == [None]
    assert scope.current() is scope.DEFAULT


def test_a_context_may_be_entered_again() -> None:
    """One that a training loop makes once and enters in every step, as people do with autocast; inside itself, and beside others, too."""
    forced, pinned = tb.use_backend("eager"), tb.policy(batch_invariant=True)
    for _ in range(2):
        with forced, pinned, forced:
            assert scope.current() == scope.Policy(forced="eager", batch_invariant=True)
        assert scope.current() is scope.DEFAULT
    together = threading.Barrier(2)

    def enter() -> bool:
        with forced:
            together.wait(10)
            inside = scope.current().forced == "eager"
            together.wait(10)
        return inside and scope.current() is scope.DEFAULT

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert [one.result() for one in [pool.submit(enter), pool.submit(enter)]] == [True, True]
    with pytest.raises(RuntimeError, match="left where it was not entered"):
        forced.__exit__(None, None, None)


def test_tasks_that_share_a_context_keep_their_own() -> None:
    forced = tb.use_backend("eager")

    async def task(before: int, inside: int) -> list[str | None]:
        for _ in range(before):
            await asyncio.sleep(0)
        with forced:
            seen = [scope.current().forced]
            for _ in range(inside):
                await asyncio.sleep(0)
            seen.append(scope.current().forced)
        return [*seen, scope.current().forced]

    async def both() -> list[list[str | None]]:
        return await asyncio.gather(task(0, 3), task(1, 5))  # the first leaves first, though it entered first

    assert asyncio.run(both()) == [["eager", "eager", None]] * 2


def test_threads_agree() -> None:
    arguments = inputs(length=100)
    op = tb.get_op("gated_delta_rule")
    want = op(*arguments)[0]
    plans.invalidate()
    wrong: list[str] = []

    def work() -> None:
        try:
            for _ in range(4):
                assert torch.equal(op(*arguments)[0], want)
                plans.invalidate()
        except Exception:
            wrong.append(traceback.format_exc())

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_a_forked_child_works() -> None:
    code = (
        "import os, sys, torch, titans_backends as tb\n"
        "torch.set_num_threads(1)\n"
        "x = torch.randn(1, 20, 2, 8); op = tb.get_op('fast_core'); want = op(x, x, x)[0]\n"
        "child = os.fork()\n"
        "if child == 0: os._exit(0 if torch.equal(op(x, x, x)[0], want) else 1)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    done = fresh.run(code)
    assert done.returncode == 0, done.stderr


def test_capture_uses_only_what_a_warm_up_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    plans.invalidate()
    op, planner = tb.get_op("fast_core"), library.planner("fast_core")
    planner._warmed.clear()
    monkeypatch.setattr(planner, "_capturing", lambda call: True, raising=False)
    q, k, v, _, _ = inputs(length=33)
    with pytest.raises(tb.BackendRefusedError, match="a graph is being captured, and no kernel for this signature has run on cpu yet"):
        op(q, k, v)
    monkeypatch.undo()
    op(q, k, v)
    plans.invalidate()
    monkeypatch.setattr(planner, "_capturing", lambda call: True, raising=False)
    assert op(q, k, v)[0].shape == v.shape
    longer = inputs(length=40)
    assert op(*longer[:3], scale=0.5)[0].shape == longer[2].shape, "another length or scale runs the same kernels"
    with pytest.raises(tb.BackendRefusedError, match="no kernel for this signature has run"):
        op(q[:, :5], k[:, :5], v[:, :5])  # tiles follow a sequence within one chunk
    with pytest.raises(tb.BackendRefusedError, match="no kernel for this signature has run"):
        op(q.double(), k.double(), v.double())


def test_a_backward_in_autograds_own_thread_is_chosen_for_the_launch_of_its_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's backwards run in a thread that autograd keeps, where no context variable of the caller's is set."""
    plans.invalidate()
    op, planner = tb.get_op("gated_delta_rule"), library.planner("gated_delta_rule")
    q, k, v, beta, g = inputs(length=33)
    monkeypatch.setattr(planner, "_device", lambda call: torch.device("cuda"), raising=False)
    monkeypatch.setattr(planner, "_capturing", lambda call: False, raising=False)
    with tb.policy(launch="graph"):
        o = op(q.clone().requires_grad_(), k, v, beta, g)[0]
        thread = threading.Thread(target=o.sum().backward)
        thread.start()
        thread.join()
    assert {entry.plan.choice.signature.launch for entry in planner._memo.values()} == {"graph"}
    monkeypatch.undo()
    plans.invalidate()


def test_a_policy_asks_for_what_a_captured_graph_would_get(monkeypatch: pytest.MonkeyPatch) -> None:
    plans.invalidate()
    op, planner = tb.get_op("fast_core"), library.planner("fast_core")
    q, k, v, _, _ = inputs(length=33)
    with tb.policy(launch="graph"):
        assert op.bind(q, k, v).choice.signature.launch == "eager", "a CPU captures nothing"
    plans.invalidate()
    monkeypatch.setattr(planner, "_device", lambda call: torch.device("cuda"), raising=False)
    monkeypatch.setattr(planner, "_capturing", lambda call: False, raising=False)
    with tb.policy(launch="graph"):
        assert op.bind(q, k, v).choice.signature.launch == "graph"
        with tb.policy(batch_invariant=True):
            inner = op.bind(q, k, v).choice.signature
            assert inner.launch == "graph"
            assert inner.batch_invariant
        assert not op.bind(q, k, v).choice.signature.batch_invariant
    assert op.bind(q, k, v).choice.signature.launch == "eager"
    with tb.policy(launch="graph"):
        op(q.clone().requires_grad_(), k, v)
    assert {
        entry.plan.choice.signature.launch for entry in planner._memo.values() if entry.plan.ran and entry.plan.choice.signature.regime == "training"
    } == {"graph"}
    with pytest.raises(ValueError, match="launch must be one of eager, graph, got 'cuda'"):
        tb.policy(launch="cuda")  # type: ignore[arg-type]
    monkeypatch.undo()
    plans.invalidate()


def test_a_context_changes_what_is_current_where_it_is_entered() -> None:
    made = tb.policy(batch_invariant=True)
    with tb.use_backend("eager"), made:
        assert scope.current() == scope.Policy(forced="eager", batch_invariant=True)


def test_a_bound_op_does_not_run_first_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    plans.invalidate()
    op, planner = tb.get_op("fast_core"), library.planner("fast_core")
    planner._warmed.clear()
    q, k, v, _, _ = inputs(length=33)
    bound = op.bind(q, k, v)
    with monkeypatch.context() as patched:
        patched.setattr(planner, "_capturing", lambda call: True, raising=False)
        with pytest.raises(tb.BackendRefusedError, match="this bound op has not run yet"):
            bound(q, k, v)
    bound(q, k, v)
    plans.invalidate()
    with monkeypatch.context() as patched:
        patched.setattr(planner, "_capturing", lambda call: True, raising=False)
        assert op(q, k, v)[0].shape == v.shape, "a bound call warms the op up"
    plans.invalidate()


def test_batch_invariance_is_kept_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    plans.invalidate()
    op, planner = tb.get_op("gated_delta_rule"), library.planner("gated_delta_rule")
    planner._warmed.clear()
    x = inputs(length=33)
    op(*x)
    with tb.policy(batch_invariant=True):
        first = op.explain(*x).kernel
    with monkeypatch.context() as patched:
        patched.setattr(
            planner, "_warmed", {key: {pair for pair in pairs if pair.label != first} for key, pairs in planner._warmed.items()}, raising=False
        )
        patched.setattr(planner, "_capturing", lambda call: True, raising=False)
        plans.invalidate()
        with tb.policy(batch_invariant=True), pytest.raises(tb.BackendRefusedError, match="under the same policy"):
            op(*x)
    plans.invalidate()


def test_meta_and_cpu_tensors_do_not_share_a_plan() -> None:
    q, k, v, _, _ = inputs()
    tb.get_op("fast_core")(q, k, v)
    with pytest.raises(ValueError, match="k is on meta, but q is on cpu"):
        tb.get_op("fast_core")(q, k.to("meta"), v)


def test_a_split_sequence_continues_anywhere() -> None:
    q, k, v, beta, g = inputs(length=150)
    op = tb.get_op("dual_core")
    keywords = {"chunk_size": 32, "output_final_state": True}
    whole = op(q, k, v, beta, g, **keywords)
    for cut in (1, 32, 50, 149):
        first = op(*(x[:, :cut] for x in (q, k, v, beta, g)), **keywords)
        second = op(*(x[:, cut:] for x in (q, k, v, beta, g)), initial_state=first[1], initial_fast_state=first[2], chunk_offset=cut % 32, **keywords)
        assert torch.allclose(torch.cat([first[0], second[0]], 1), whole[0], atol=1e-5)
        for a, b in zip(second[1:], whole[1:], strict=True):
            assert torch.allclose(a, b, atol=1e-5)


def test_every_op_says_its_parameters() -> None:
    for name in tb.ops():
        assert all(parameter in (tb.get_op(name).__doc__ or "") for parameter in CONTRACTS[name].parameters)


def test_install_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "visitor")
    assert "visitor" in tb.get_op("fast_core").backends
    monkeypatch.undo()
    tb.reset()
    assert "visitor" not in tb.get_op("fast_core").backends


def test_ops_are_copied_and_pickled_by_name() -> None:
    module = torch.nn.Module()
    module.op = tb.get_op("gated_delta_rule")
    assert copy.deepcopy(module).op is module.op
    forced = tb.get_op("fast_core", backend="eager")
    assert pickle.loads(pickle.dumps(forced)) is forced


def test_an_empty_backend_name_is_not_no_name() -> None:
    with pytest.raises(tb.UnknownNameError, match="unknown backend ''"):
        tb.get_op("fast_core")(*inputs()[:3], backend="")


def test_a_bound_op_names_an_option_or_a_keyword_that_differs() -> None:
    arguments = inputs()
    bound = tb.get_op("dual_core").bind(*arguments, alpha=0.1)
    with pytest.raises(tb.BoundCallMismatchError, match=r"alpha is 0\.2, but it was bound to 0\.1"):
        bound(*arguments, alpha=0.2)
    with pytest.raises(TypeError, match="dual_core: got an unexpected keyword 'foo'; its parameters are q, k"):
        bound(*arguments, alpha=0.1, foo=1)


def test_a_forced_switch_that_names_nobody_names_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("TITANS_BACKENDS_FORCE", "nope")
        tb.reset()
        with pytest.raises(tb.SwitchError, match=r"TITANS_BACKENDS_FORCE names an unknown backend 'nope'; known: .*eager"):
            tb.get_op("fast_core")(*inputs()[:3])
        patch.delenv("TITANS_BACKENDS_FORCE")
        patch.setenv("TITANS_BACKENDS_DISABLE", "zzz")
        tb.reset()
        with pytest.raises(tb.SwitchError, match="TITANS_BACKENDS_DISABLE names an unknown backend 'zzz'"):
            tb.get_op("fast_core")(*inputs()[:3])
    tb.reset()


def test_a_named_cache_that_is_not_there_is_said_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("TITANS_BACKENDS_CACHE", str(tmp_path / "none.yaml"))
        tb.reset()
        with pytest.warns(UserWarning, match=r"names .*none\.yaml, which does not exist, .* titans-backends tune --output"):
            tb.get_op("fast_core")(*inputs()[:3])
    tb.reset()


@pytest.mark.parametrize("budget", [0, -1, True, None, "x"])
def test_autotune_wants_a_positive_budget(budget: object) -> None:
    with pytest.raises(ValueError, match="budget_s must be a positive number of seconds"):
        tb.autotune(budget_s=budget)
