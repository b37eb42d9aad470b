"""The Triton backend's kernels compile ahead of time, without a GPU, and fit the card: shared memory, registers, spills.

Each op's default for production calls on four architectures, that of its backward on Hopper, and of the shipped tables one row of every variant and
dtype that no default has, on their own card, where all of them ran when they were measured; a row whose source has changed since is not used. A card is
described in `triton_machines.py`; what a candidate launches is found by `triton_forms.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol

import pytest
import torch

from tests.triton_forms import (
    AROUND,
    PRODUCTION,
    TRAINED,
    TRAINING,
    Compilation,
    Usage,
    compilations,
    compiled,
    compiler_pool,
    module_of,
    offered,
    production,
    signature,
)
from tests.triton_machines import CARDS
from tests.triton_tables import candidates_of, machine_of, named, rows, shipped
from titans_backends.backend import Candidate
from titans_backends.cache.schema import Table
from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.case import build
from titans_backends.contracts.contract import Call
from titans_backends.tuning.problem import case_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None, reason="the package triton is not installed: pip install -c constraints.txt -e '.[test]'"),
]

MOST_REGISTERS = 255
SPILLED_ELSEWHERE = 1100
"""Bytes a thread that the compiler may put into local memory where we do not tune: on other cards, and for float32, whose products are three each."""
SPILLED_HERE = 48
"""The same for 16-bit operands on the card that we measure on; what Triton 3.7.1 spills of the shipped defaults, 3.6.0 keeps in registers."""

SPILLED_BACK: Mapping[tuple[str, str], int] = {
    ("fast_core", "long"): 8,
    ("fast_core", "medium heads"): 24,
    ("fast_core", "small heads"): 16,
    ("uw_transform", "long"): 40,
    ("slow_core", "small heads"): 40,
    ("dual_core", "long"): 80,
}
"""What the worst kernel of a backward's default spills there, by op and call; where nothing stands it is 0. `python tests/triton_forms.py --backward`."""
MARGIN = 8

CASES = {case.name: case for case in (*PRODUCTION, *TRAINING)}


@dataclass(frozen=True, slots=True)
class Default:
    """An op's default for a production call on a card."""

    op: str
    case: str
    sm: int
    float32: str = "highest"

    def __str__(self) -> str:
        return f"{self.op}-{self.case}-{self.float32}-sm_{self.sm}"

    @property
    def tuned_for(self) -> bool:
        """Whether next to nothing may spill: 16-bit operands on the card that we measure on."""
        return self.sm == 90 and CASES[self.case].dtype != torch.float32


def defaults() -> Iterator[Default]:
    """All of them: every op at two head sizes on Hopper, one elsewhere; float32 where it asks for most, on Hopper and on a small card, whose 16-bit code is sm_80's."""
    for op in import_module("titans_backends.backends.triton").BACKEND.ops:
        if op == "coupled_core":  # heads of up to 64 alone
            yield Default(op, "small heads", 90)
            yield Default(op, "float32", 90)
            continue
        if CONTRACTS[op].experimental:
            yield from (Default(op, case, 90) for case in ("long", "small heads"))
            continue
        if op in AROUND:
            yield Default(op, "long", 90)
            continue
        for sm in sorted(CARDS.keys() - {89}):
            yield Default(op, "long", sm)
        yield Default(op, "small heads", 90)
        for sm in (90, 89):
            yield Default(op, "float32", sm)
    yield Default("dual_core", "float32", 90, "high")
    yield Default("gated_delta_rule", "short", 90)


class _Compile(Protocol):
    def __call__(self, one: Compilation) -> Usage: ...


@pytest.fixture(scope="module")
def usage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Compile]:
    """What a compiled form takes. Everything that the selected tests want is compiled side by side.

    A worker of pytest-xdist compiles what it comes to, and finds what another has compiled in the cache that they share.
    """
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    cache = (tmp_path_factory.getbasetemp() if alone else tmp_path_factory.getbasetemp().parent) / "triton_compiled"
    started: dict[Compilation, Future[Usage]] = {}
    with compiler_pool(cache, os.cpu_count() if alone else 1) as pool:

        def start(one: Compilation) -> Future[Usage]:
            if one not in started:
                started[one] = pool.submit(compiled, one)
            return started[one]

        for item in request.session.items:
            if alone and item.path == request.path:
                wanted: Callable[[], list[Compilation]] = item.callspec.params["wanted"]  # type: ignore[attr-defined]
                try:
                    for one in wanted():
                        start(one)
                except Exception:  # the test itself will say so
                    continue
        yield lambda one: start(one).result()
        for future in started.values():
            future.cancel()


@dataclass(frozen=True, slots=True)
class OfDefault:
    """What a default launches."""

    default: Default

    def candidate(self) -> tuple[Call, Candidate]:
        """A production call and what the card is offered first for it."""
        asked = self.default
        call, facts = signature(asked.op, production(asked.op, CASES[asked.case]), asked.float32)
        card = CARDS[asked.sm]
        verdict = module_of(asked.op).supports(facts, card)
        assert verdict, verdict
        return call, module_of(asked.op).candidates(facts, card)[0]

    def __call__(self) -> list[Compilation]:
        return compilations(self.default.op, *self.candidate(), self.default.sm)

    def __str__(self) -> str:
        return str(self.default)


@dataclass(frozen=True, slots=True)
class OfBackward:
    """What the default of a backward launches on Hopper, where every input wants its gradient."""

    op: str
    case: str

    def candidate(self) -> tuple[Call, Candidate]:
        """A production call and what Hopper is offered first for its backward."""
        call, facts = signature(self.op, production(self.op, CASES[self.case]), regime="training")
        card = CARDS[90]
        verdict = module_of(self.op).supports(facts, card)
        assert verdict, verdict
        return call, offered(self.op, facts, card)[0]

    def __call__(self) -> list[Compilation]:
        return compilations(self.op, *self.candidate(), 90)

    def __str__(self) -> str:
        return f"{self.op}-{self.case}"


def _compiled_back(op: str, case: str) -> bool:
    """All but one of `dual_core`, which runs the other ops' kernels; one of the ops around the memory, of which two run short_conv's kernel."""
    return case == "small heads" and op != "qkv_prepare" if op in AROUND else (op, case) != ("dual_core", "medium heads")


BACKWARDS = [OfBackward(op, case.name) for op in TRAINED for case in TRAINING if _compiled_back(op, case.name)]


def _kinds_of_defaults(op: str, sm: int | None) -> Iterator[tuple[str, str, str]]:
    """Direction, variant and dtype of what the two tests of defaults compile of an op for a card."""
    ahead = [OfDefault(one) for one in defaults() if (one.op, one.sm) == (op, sm)]
    back = [one for one in BACKWARDS if (one.op, 90) == (op, sm)]
    for one in (*ahead, *back):
        _, candidate = one.candidate()
        case = one.default.case if isinstance(one, OfDefault) else one.case
        yield candidate.direction, candidate.variant, str(CASES[case].dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class OfTable:
    """What an op's rows of a shipped table launch on their card: the first of every variant and dtype that no default has; the other rows differ in tiles and sizes."""

    table: Table
    op: str

    def __call__(self) -> list[Compilation]:
        machine = machine_of(self.table)
        found: dict[Compilation, None] = {}
        seen = set[tuple[object, ...]](_kinds_of_defaults(self.op, machine.sm))
        for bucket, entry in rows(self.table):
            if bucket.op != self.op:
                continue
            made = CONTRACTS[bucket.op]
            for candidate in candidates_of(bucket, entry, machine):
                assert candidate is not None, f"gone: {named(bucket, entry)}"
                kind = (candidate.direction, candidate.variant, dict(bucket.when)["dtype"])
                if kind in seen:
                    continue
                seen.add(kind)
                found.update(dict.fromkeys(compilations(bucket.op, build(made, case_of(bucket), "meta"), candidate, machine.sm or 0)))
        return list(found)

    def __str__(self) -> str:
        return f"{self.table.device.slug}-{self.op}"


def tables() -> Iterator[OfTable]:
    """Every op of every shipped table that has rows of ours."""
    for table in shipped():
        yield from (OfTable(table, op) for op in dict.fromkeys(bucket.op for bucket, _ in rows(table)))


def wrong(one: Compilation, found: Usage, shared: int, spilled: int) -> list[str]:
    """What a compiled form takes too much of."""
    limits = (
        ("shared memory", found.shared, shared),
        ("registers", found.registers, MOST_REGISTERS),
        ("bytes spilled", found.spilled, spilled),
        ("lanes that reach into others", found.wrong_lanes, 0),
    )
    return [f"{one}: {name} {value}, at most {limit}" for name, value, limit in limits if value > limit]


@pytest.mark.parametrize("wanted", [OfDefault(one) for one in defaults()], ids=str)
def test_a_default_compiles_and_fits_the_card(wanted: OfDefault, usage: _Compile) -> None:
    jobs = wanted()
    assert jobs, "it launches nothing"
    shared = CARDS[wanted.default.sm].shared_memory_bytes
    assert shared is not None
    spilled = SPILLED_HERE if wanted.default.tuned_for else SPILLED_ELSEWHERE
    lines = [line for one in jobs for line in wrong(one, usage(one), shared, spilled)]
    if lines:
        pytest.fail("\n".join(lines), pytrace=False)


@pytest.mark.parametrize("wanted", BACKWARDS, ids=str)
def test_a_backwards_default_compiles_and_fits_the_card(wanted: OfBackward, usage: _Compile) -> None:
    jobs = wanted()
    assert jobs, "it launches nothing"
    shared = CARDS[90].shared_memory_bytes
    assert shared is not None
    spilled = SPILLED_BACK.get((wanted.op, wanted.case), 0) + MARGIN
    lines = [line for one in jobs for line in wrong(one, usage(one), shared, spilled)]
    if lines:
        pytest.fail("\n".join(lines), pytrace=False)


@pytest.mark.parametrize("wanted", list(tables()) if find_spec("triton") else [], ids=str)
def test_a_shipped_tables_kernels_compile_and_fit_its_card(wanted: OfTable, usage: _Compile) -> None:
    shared = machine_of(wanted.table).shared_memory_bytes
    assert shared is not None, f"what a block of {wanted.table.device.name} may have of shared memory is not in triton_machines.CARDS"
    lines = [line for one in wanted() for line in wrong(one, usage(one), shared, SPILLED_ELSEWHERE)]
    if lines:
        pytest.fail("\n".join(lines), pytrace=False)
