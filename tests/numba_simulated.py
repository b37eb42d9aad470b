"""The Numba CUDA backend in Numba's simulator: every op, on CPU tensors, tiny (T to 20, chunks of 8, head_dim 8), against the float64 references.

The simulator is chosen when Numba is imported, so this file runs in a process of its own: `NUMBA_ENABLE_CUDASIM=1 pytest tests/numba_simulated.py`.
`test_numba_cuda.py` starts it; plain `pytest` does not collect it. The registry never serves the simulator, so the op modules are called directly.
It runs each of a block's threads as one of Python's: what it cannot find are typing errors, for which `test_numba_cuda.py` compiles every kernel.
"""

from __future__ import annotations

import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from typing import Any, cast

import numpy as np
import pytest
import torch

from tests.triton_machines import H100
from titans_backends.backend import Candidate, TrainableOpModule
from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.case import Case, build
from titans_backends.contracts.contract import Call, Contract
from titans_backends.contracts.tolerance import tolerance
from titans_backends.contracts.validate import validate
from titans_backends.facts import signature_of
from titans_backends.signature import Regime
from titans_backends.tuning.gate import check_backward, check_forward
from titans_backends.tuning.ledger import Ledger, Rejected
from titans_backends.tuning.suite import exam_of

if os.environ.get("NUMBA_ENABLE_CUDASIM") != "1":
    raise pytest.UsageError("numba_simulated.py wants the simulator: NUMBA_ENABLE_CUDASIM=1 pytest tests/numba_simulated.py")
pytest.importorskip("numba_cuda")

OPS = tuple(import_module("titans_backends.backends.numba").BACKEND.ops)
LIMIT = tolerance(torch.float32)
CHUNK = 8


def held() -> threading.Lock:
    """A lock that the next to take it waits for."""
    lock = threading.Lock()
    lock.acquire()
    return lock


class Block:
    """A block's threads, one at a time, each as far as the next barrier, in an order that changes at every barrier.

    So a missing barrier gives wrong numbers or NaN, and one that a thread does not reach is an error. It stands for the simulator's own `BlockManager`, which
    lets the threads loose and polls them: three times as slow.
    """

    _orders = random.Random(0)

    def __init__(self, function: Callable[..., None], grid_dim: object, block_dim: tuple[int, ...], debug: bool) -> None:
        self._function = function
        self._block_dim = block_dim  # the simulator's threads ask for it

    def run(self, grid_point: tuple[int, ...], *args: object) -> None:
        """Runs the block at `grid_point`; raises what a thread raised first."""
        kernel = import_module("numba.cuda.simulator.kernel")
        back, waiting, failed = held(), set[Any](), list[BaseException]()

        def barrier() -> None:
            me = threading.current_thread()
            waiting.add(me)
            back.release()
            me.turn.acquire()  # type: ignore[attr-defined]
            if failed:
                raise SystemExit

        def thread() -> None:
            threading.current_thread().turn.acquire()  # type: ignore[attr-defined]
            try:
                if not failed:
                    self._function(*args)
            except Exception as error:
                failed.append(error)
            finally:
                back.release()

        threads = [kernel.BlockThread(thread, self, grid_point, place, False) for place in np.ndindex(*self._block_dim)]
        for one in threads:
            one.turn, one.syncthreads = held(), barrier
            one.start()
        while threads:
            self._orders.shuffle(threads)
            waiting.clear()
            for one in threads:
                one.turn.release()
                back.acquire()
            if waiting and len(waiting) < len(threads) and not failed:
                failed.append(RuntimeError(f"{len(waiting)} of {len(threads)} threads wait at a barrier that the others do not reach"))
            threads = [one for one in threads if one in waiting]
        if failed:
            raise failed[0]


@pytest.fixture(scope="module", autouse=True)
def one_thread_at_a_time() -> Iterator[None]:
    """Blocks are run by `Block`, all on one core, since to wake the next thread on another one takes longer than it runs; shared memory is NaN in the beginning."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

    def array(self: Any, shape: object, dtype: object, alignment: None = None) -> object:
        caller = sys._getframe(1)
        return self._allocations.setdefault((caller.f_code, caller.f_lineno), np.full(shape, np.nan, dtype))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("numba.cuda.simulator.kernel.BlockManager", Block)
        patch.setattr("numba.cuda.simulator.kernelapi.FakeCUDAShared.array", array)
        yield


@pytest.fixture(autouse=True)
def admitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The only door for the simulator: `supports` is told that it is not there."""
    monkeypatch.setattr("titans_backends.backends.numba.serving.SIMULATED", False)


def module_of(op: str) -> TrainableOpModule:
    """The op's module, its kernels simulated."""
    return cast(TrainableOpModule, import_module(f"titans_backends.backends.numba.{op}"))


def tiny(made: Contract) -> Iterator[Case]:
    """Every variant once, then what is unpleasant on the first."""
    base = Case("", B=1, T=20, G=1, H=1, K=8, V=8)
    if made.name == "fused_uw":
        yield replace(base, name="plain", options={"_chunk": 8})
        yield replace(base, name="odd", K=3, V=5, options={"_chunk": 8}, view="transposed")
        return
    step = made.name == "gated_delta_step"
    base = replace(base, T=3 if step else 20, B=2 if step else 1)
    for variant in made.variants:
        yield replace(base, name=variant.name, options=_small(made, variant.options), given=variant.given)
    first = made.variants[0]
    base = replace(base, options=_small(made, first.options), given=first.given)
    yield replace(base, name="grouped heads, K != V, transposed", G=1, H=2, K=5, V=6, T=3 if step else 9, view="transposed")
    if step:
        return
    yield replace(base, name="hard decay", T=9, decay="hard")
    yield replace(base, name="B=0", B=0)
    yield replace(base, name="T=0", T=0)
    for variant in made.variants:
        yield replace(base, name=f"{variant.name}, packed", lengths=(9, 0, 3), options=_small(made, variant.options), given=variant.given)


def fast(made: Contract) -> Iterator[Case]:
    """Gates that forget within a token: dg is a small difference of large sums, whose rounding must not be what is left of it."""
    first = next((variant for variant in made.variants if "g" in variant.given), None)
    if first is not None:
        options = _small(made, first.options)
        yield Case(f"{first.name}, g -7 to -3", B=1, T=20, G=1, H=1, K=8, V=8, decay="fast", seed=3, options=options, given=first.given)


def _small(made: Contract, options: object) -> dict[str, object]:
    """The options with chunks of 8, and an offset inside one."""
    found = dict(cast(dict[str, object], options))
    if "chunk_size" in made.option_by_name:
        found["chunk_size"] = CHUNK
    if found.get("chunk_offset"):
        found["chunk_offset"] = 3
    return found


def offered(made: Contract, call: Call, regime: Regime) -> list[Candidate]:
    """What an H100 is offered, on chunks of 8; a refusal is a skip with its reason."""
    module = module_of(made.name)
    needs = frozenset(made.differentiable) if regime == "training" else frozenset[str]()
    signature = replace(signature_of(made, call, validate(made, call)), regime=regime, needs=needs)
    verdict = module.supports(signature, H100)
    if not verdict:
        pytest.skip(str(verdict))
    found = module.candidates(signature, H100) if regime == "inference" else module.backward_candidates(signature, H100)
    small = [replace(one, params=tuple((name, CHUNK if name == "chunk_size" else value) for name, value in one.params)) for one in found]
    return list(dict.fromkeys(small))


@pytest.mark.parametrize(("op", "case"), [pytest.param(op, case, id=f"{op}-{case}") for op in OPS for case in tiny(CONTRACTS[op])])
def test_forward_in_the_simulator(op: str, case: Case) -> None:
    made = CONTRACTS[op]
    call = build(made, case)
    exam = exam_of(made, case, call, training=False)
    for candidate in offered(made, call, "inference"):
        check_forward(made, candidate, module_of(op), exam, LIMIT, Ledger(), f"{candidate.label}, {case}")


@pytest.mark.parametrize(
    ("op", "case"),
    [
        pytest.param(op, case, id=f"{op}-{case}")
        for op in ("fast_core", "fused_uw", "uw_transform", "slow_core")
        for case in (*tiny(CONTRACTS[op]), *fast(CONTRACTS[op]))
    ],
)
def test_backward_in_the_simulator(op: str, case: Case) -> None:
    made = CONTRACTS[op]
    call = build(made, case)
    candidates = offered(made, call, "training")
    exam = exam_of(made, case, call, training=True)
    for candidate in candidates:
        check_backward(made, candidate, module_of(op), exam, LIMIT, Ledger(), f"{candidate.label}, {case}")


@pytest.mark.parametrize("op", OPS)
def test_without_launches_nothing_is_computed(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titans_backends.backends.numba.launch.Kernel.__call__", lambda *_: None)
    made, case = CONTRACTS[op], next(tiny(CONTRACTS[op]))
    call = build(made, case)
    for candidate in offered(made, call, "inference"):
        with pytest.raises(Rejected):
            check_forward(made, candidate, module_of(op), exam_of(made, case, call, training=False), LIMIT, Ledger(), candidate.label)
