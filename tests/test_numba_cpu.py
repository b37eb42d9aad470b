"""The Numba backend for processors: its own kernels run, cuts and threads change no bit, the cache on disk never breaks a call."""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import titans_backends as tb
from tests import fresh
from titans_backends import registry
from titans_backends.contracts import CONTRACTS, contract
from titans_backends.contracts.case import Case, build
from titans_backends.contracts.contract import Call
from titans_backends.contracts.tolerance import compare, tolerance
from titans_backends.contracts.validate import validate
from titans_backends.facts import signature_of
from titans_backends.machine import detect
from titans_backends.offers import offer
from titans_backends.signature import Signature

PACKAGE = "titans_backends.backends.numba_cpu"
OPS = ("fast_core", "uw_transform", "slow_core", "gated_delta_rule", "gated_delta_step", "dual_core")
WORKERS = {"_token_scan", "_chunk_scan", "_uw", "_step"}
numba = pytest.importorskip("numba", reason="numba is not installed: pip install 'titans-backends[numba]'")


def module(name: str) -> object:
    return import_module(f"{PACKAGE}.{name}")


launches, threads, jit, lanes, disk_cache, exponential = (
    import_module(f"{PACKAGE}.{name}") for name in ("launches", "threads", "jit", "lanes", "disk_cache", "exponential")
)


def call_of(op: str, **changes: object) -> Call:
    made = contract(op)
    first = made.variants[0]
    base = Case("numba_cpu", T=3 if op == "gated_delta_step" else 70, options=first.options, given=first.given)
    return build(made, replace(base, **changes))  # type: ignore[arg-type]


def signature(op: str, **changes: object) -> Signature:
    made, call = contract(op), call_of(op, **changes)
    return signature_of(made, call, validate(made, call))


def outputs_of(op: str, call: Call, candidate: object = None) -> tuple[Tensor | None, ...]:
    if candidate is not None:
        found: tuple[Tensor | None, ...] = module(op).run(call, candidate)  # type: ignore[attr-defined]
        return found
    return tb.get_op(op)(**{name: getattr(call, name) for name in contract(op).parameters}, backend="numba_cpu")


def assert_right(op: str, call: Call, outputs: tuple[Tensor | None, ...]) -> None:
    made = contract(op)
    for spec, got, want in zip(made.outputs, outputs, made.reference(made.to(call, torch.float64)), strict=True):
        assert (got is None) == (want is None)
        if got is not None and want is not None:
            difference = compare(spec.name, got, want)
            assert difference.within(tolerance(torch.float32).outputs), difference


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """The workers that were launched, with their threads, after each has been compiled to machine code."""
    seen: list[tuple[str, int]] = []

    def spy(worker: object, row: np.ndarray, workers: int) -> None:
        threads.launch(worker, row, workers)
        assert worker._compiled.native_name  # type: ignore[attr-defined]
        seen.append((worker.function.__name__, workers))  # type: ignore[attr-defined]

    monkeypatch.setattr(launches, "launch", spy)
    tb.reset()
    yield seen
    tb.reset()


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two threads for every call, however small."""
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("Numba has one thread here")
    monkeypatch.setattr(threads, "_SMALL_FLOP", 0.0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("op", OPS)
def test_compiled_kernels_of_numba_run_and_no_other_backend(op: str, launched: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("eager ran")

    monkeypatch.setattr(import_module(f"titans_backends.backends.eager.{op}"), "run", refuse)
    call = call_of(op)
    assert_right(op, call, outputs_of(op, call))
    assert launched
    assert {name for name, _ in launched} <= WORKERS


@pytest.mark.parametrize("op", [op for op in OPS if op != "gated_delta_step"])
@pytest.mark.parametrize("lengths", [None, (33, 0, 37)])
def test_two_threads_and_their_cuts_give_the_bits_of_one(
    op: str, lengths: tuple[int, ...] | None, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = call_of(op, lengths=lengths, V=40)
    candidates = module(op).candidates(signature(op, lengths=lengths, V=40), detect("cpu"))  # type: ignore[attr-defined]
    for candidate in candidates:
        monkeypatch.setattr(threads, "_SMALL_FLOP", 0.0)
        cut = outputs_of(op, call, candidate)
        monkeypatch.setattr(threads, "_SMALL_FLOP", math.inf)
        whole = outputs_of(op, call, candidate)
        for one, other in zip(whole, cut, strict=True):
            assert (one is None and other is None) or torch.equal(one, other), candidate.label  # type: ignore[arg-type]


@pytest.mark.parametrize("dim", [8, 80])
@pytest.mark.parametrize("op", [op for op in OPS if op != "gated_delta_step"])
def test_under_batch_invariance_a_rows_bits_depend_on_neither_company_nor_length(op: str, dim: int, two_threads: None) -> None:
    made, call = contract(op), call_of(op, B=3, T=150, K=dim, V=dim, given=("g",) if op != "slow_core" else (), options={})
    given = {name: getattr(call, name) for name in made.parameters}
    with tb.policy(batch_invariant=True):
        whole = tb.get_op(op)(**given, backend="numba_cpu")
        for tokens in (1, 17, 64, 100):
            part = {name: tensor[1:2, :tokens] for name, tensor in made.tensors(call).items()}
            found = tb.get_op(op)(**{**given, **part}, backend="numba_cpu")
            for index in range(2 if op == "uw_transform" else 1):
                one, other = found[index], whole[index]
                assert one is not None
                assert other is not None
                assert torch.equal(one, other[1:2, :tokens]), tokens


def test_a_parallel_call_takes_torchs_threads_and_leaves_numbas_setting(two_threads: None, launched: list[tuple[str, int]]) -> None:
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        outputs_of("gated_delta_rule", call_of("gated_delta_rule"))
        assert launched[-1][1] == 2
        assert numba.get_num_threads() == 1
    finally:
        numba.set_num_threads(before)


def test_a_bound_call_follows_torchs_threads(two_threads: None, launched: list[tuple[str, int]]) -> None:
    call = call_of("gated_delta_rule")
    given = {name: getattr(call, name) for name in contract("gated_delta_rule").parameters}
    bound = tb.get_op("gated_delta_rule").bind(**given, backend="numba_cpu")
    for count in (2, 1, 2):
        torch.set_num_threads(count)
        bound(**given)
        assert launched[-1][1] == count


def test_one_decode_step_stays_on_its_thread(launched: list[tuple[str, int]]) -> None:
    outputs_of("gated_delta_step", call_of("gated_delta_step", B=1, T=1, H=12, G=12, K=32, V=32))
    assert launched == [("_step", 1)]


def test_calls_from_several_python_threads_are_right(two_threads: None) -> None:
    call = call_of("gated_delta_rule")
    want, found = outputs_of("gated_delta_rule", call)[0], list[Tensor]()
    assert want is not None

    def run() -> None:
        for _ in range(5):
            o = outputs_of("gated_delta_rule", call)[0]
            assert o is not None
            found.append(o)

    running = [threading.Thread(target=run) for _ in range(4)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert len(found) == 20
    assert all(torch.equal(want, o) for o in found)


_AFTER_A_FORK = """
import os, torch
import titans_backends as tb
from importlib import import_module
threads = import_module("titans_backends.backends.numba_cpu.threads")
threads._SMALL_FLOP = 0.0
torch.set_num_threads(2)
q, k, v = (torch.randn(1, 40, 4, 8) for _ in range(3))
op = tb.get_op("fast_core", backend="numba_cpu")
want = op(q, k, v)[0]
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(op(q, k, v)[0], want) else 1)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_goes_on_without_the_parents_threads(two_threads: None) -> None:
    done = fresh.run(_AFTER_A_FORK)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("keys", "values"), [(1, 1), (3, 5), (17, 33), (64, 16), (32, 48)])
@pytest.mark.parametrize("op", ["gated_delta_rule", "fast_core", "gated_delta_step"])
def test_any_head_dim_is_right_by_every_candidate(op: str, keys: int, values: int) -> None:
    call = call_of(op, K=keys, V=values)
    for candidate in module(op).candidates(signature(op, K=keys, V=values), detect("cpu")):  # type: ignore[attr-defined]
        assert_right(op, call, outputs_of(op, call, candidate))


def test_long_chunks_run_token_by_token() -> None:
    options = {"chunk_size": 700, "output_final_state": True}
    call = call_of("fast_core", T=705, B=1, H=1, G=1, options=options)
    found = module("fast_core").candidates(signature("fast_core", T=705, B=1, H=1, G=1, options=options), detect("cpu"))  # type: ignore[attr-defined]
    assert [candidate.variant for candidate in found] == ["tokens"]
    assert_right("fast_core", call, outputs_of("fast_core", call))


def test_states_with_any_strides_are_read_and_written_in_place() -> None:
    call = call_of("gated_delta_step", options={"inplace": True}, K=8, V=32)
    flipped = call.state.transpose(-1, -2).contiguous().transpose(-1, -2)  # type: ignore[attr-defined]
    made = contract("gated_delta_step")
    strided = made.with_tensors(call, {"state": flipped})
    want = made.reference(made.to(call, torch.float64))
    o, state = outputs_of("gated_delta_step", strided)
    assert state is flipped
    for got, wanted in zip((o, state), want, strict=True):
        assert got is not None
        assert wanted is not None
        assert compare("output", got, wanted).within(tolerance(torch.float32).outputs)


def test_torchs_defaults_change_nothing() -> None:
    call = call_of("gated_delta_rule")
    want = outputs_of("gated_delta_rule", call)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = outputs_of("gated_delta_rule", call)
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(want, found, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


def test_other_dtypes_are_refused_with_what_to_type() -> None:
    verdict = module("gated_delta_rule").supports(signature("gated_delta_rule", dtype=torch.bfloat16), detect("cpu"))  # type: ignore[attr-defined]
    assert not verdict
    assert "q is bfloat16" in str(verdict)
    assert ".float()" in str(verdict)


def test_a_chunk_that_needs_too_large_a_matrix_is_refused_with_what_to_type() -> None:
    asked = signature("slow_core", T=600, options={"chunk_size": 600})
    verdict = module("slow_core").supports(asked, detect("cpu"))  # type: ignore[attr-defined]
    assert "chunk_size=600" in str(verdict)
    assert "chunk_size=512 or less" in str(verdict)


def test_without_numba_the_backend_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    answer = offer(registry.get("numba_cpu"), signature("gated_delta_rule"), detect("cpu"))
    assert "pip install 'titans-backends[numba]'" in str(answer.verdict)


def test_importing_the_library_and_reading_every_manifest_leaves_numba_alone() -> None:
    program = (
        "import sys, titans_backends; from titans_backends import registry; assert 'numba_cpu' in registry.known(); assert 'numba' not in sys.modules"
    )
    done = fresh.run(program)
    assert done.returncode == 0, done.stderr


def test_the_probe_runs_the_smallest_case_and_a_wrong_result_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = import_module(f"{PACKAGE}.probe")
    assert probe.probe(detect("cpu"))
    monkeypatch.setattr(probe, "run", lambda call, candidate: (torch.zeros_like(call.v), call.state))
    assert "the smallest case is wrong" in str(probe.probe(detect("cpu")))


def test_every_op_of_the_manifest_is_a_contract_and_has_candidates() -> None:
    backend = registry.get("numba_cpu")
    assert set(backend.ops) == set(OPS) <= set(CONTRACTS)
    for op in OPS:
        answer = offer(backend, signature(op), detect("cpu"))
        assert answer.forward, str(answer.verdict)


def _exponentials(row: int, worker: int) -> None:
    exponential.exponentials(lanes.integer(row, 0), lanes.integer(row, 1), lanes.integer(row, 2), lanes.integer(row, 3))


def test_the_exponential_is_within_two_units_and_keeps_zero_and_nan() -> None:
    x = np.concatenate([np.linspace(-87, 3, 4001), [0.0, -0.0, -1e-8, -88.0, -1e4, -math.inf, math.nan]]).astype(np.float32)
    found = np.full(len(x) + lanes.WIDTH, np.nan, dtype=np.float32)
    row = np.array([found.ctypes.data, x.ctypes.data, 1, len(x)], dtype=np.int64)
    jit.serial(jit.Worker(_exponentials).address, row, 0)
    want = np.exp(x.astype(np.float64))
    with np.errstate(invalid="ignore"):
        ulps = np.abs(found[: len(x)] - want)[:-4] / np.spacing(want[:-4].astype(np.float32))
    assert ulps.max() <= 2.0
    assert found[4001] == found[4002] == 1.0
    assert (found[len(x) - 4 : len(x) - 1] == 0).all()
    assert np.isnan(found[len(x) - 1])


def _nothing(row: int, worker: int) -> None:
    pass


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    disk_cache._warn.cache_clear()
    return tmp_path


def test_kernels_are_kept_where_numba_keeps_its_own(cache_folder: Path) -> None:
    assert jit.Worker(_nothing).address
    assert [path.suffix for path in sorted(cache_folder.rglob("*_nothing*"))] == [".nbc", ".nbi"]
    again = jit.Worker(_nothing)
    assert again.address
    assert again._compiled.cache_hits == 1


def test_a_kept_kernel_is_stale_when_any_file_of_the_backend_changes(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert jit.Worker(_nothing).address
    monkeypatch.setattr(disk_cache, "_digest", lambda: "another source")
    again = jit.Worker(_nothing)
    assert again.address
    assert again._compiled.cache_hits == 0


def test_a_damaged_cache_is_said_once_and_the_call_goes_on(cache_folder: Path) -> None:
    assert jit.Worker(_nothing).address
    for path in cache_folder.rglob("*.nbi"):
        path.write_bytes(b"damaged")
    with pytest.warns(RuntimeWarning, match="NUMBA_CACHE_DIR"):
        assert jit.Worker(_nothing).address


def test_a_folder_that_went_away_is_said_and_the_call_goes_on(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(disk_cache.FunctionCache, "save_overload", full)
    with pytest.warns(RuntimeWarning, match="no space left on device"):
        assert jit.Worker(_nothing).address


def test_no_folder_at_all_is_said_and_the_call_goes_on(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_cache._StampedImpl, "_locator_classes", [])
    with pytest.warns(RuntimeWarning, match="no folder"):
        assert jit.Worker(_nothing).address
