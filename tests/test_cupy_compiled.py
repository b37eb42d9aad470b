"""Every kernel of the CuPy backend compiles with NVRTC for four architectures, without a GPU, and no default spills more than a number or two.

What is compiled is what the ops' candidates would launch: each op's default for production sizes on every architecture, every other candidate on Hopper.
The compiler is the package nvidia-cuda-nvrtc through cuda.core; CuPy is not needed.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch
from titans_backends.backends.cupy import compile as cubins
from titans_backends.backends.cupy import sources
from titans_backends.backends.cupy.ahead import collected
from titans_backends.backends.cupy.launch import Form

from tests.triton_machines import CARDS
from titans_backends.backend import Candidate
from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.case import Case, build
from titans_backends.contracts.contract import Call
from titans_backends.contracts.validate import validate
from titans_backends.facts import signature_of

OPS = tuple(import_module("titans_backends.backends.cupy").BACKEND.ops)
MOST_SPILLED = 16
"""Bytes a thread: NVRTC 13.0 puts a pair of numbers into local memory here and there where 13.5 does not."""


def _missing() -> str | None:
    """Why nothing can be compiled here; None where it can."""
    if find_spec("cuda") is None or find_spec("cuda.core") is None:
        return "the package cuda-core is not installed: pip install -c constraints.txt -e '.[test]'"
    from cuda.bindings import nvrtc

    try:
        nvrtc.nvrtcVersion()
    except RuntimeError as error:
        return f"NVRTC cannot be loaded ({str(error).splitlines()[0]}): pip install -c constraints.txt -e '.[test]'"
    return None


pytestmark = [pytest.mark.slow, pytest.mark.skipif(_missing() is not None, reason=str(_missing()))]


@dataclass(frozen=True, slots=True)
class Usage:
    """What a compiled kernel takes: registers and spilled bytes of a thread, the worst kernel of its file."""

    registers: int
    spilled: int


def production(op: str) -> Iterator[Case]:
    """The sizes that an op is for: each variant with 128 in bfloat16, then narrow heads and the other dtypes."""
    made, tokens = CONTRACTS[op], 1 if op == "gated_delta_step" else 2048
    base = Case("", B=1, T=tokens, G=32, H=32, K=128, V=128, dtype=torch.bfloat16)
    for variant in made.variants:
        yield replace(base, name=variant.name, options=variant.options, given=variant.given)
    first = replace(base, options=made.variants[0].options, given=made.variants[0].given)
    yield replace(first, name="32 in bfloat16", K=32, V=32)
    yield replace(first, name="128 in float32", dtype=torch.float32)
    yield replace(first, name="64 in float16", K=64, V=64, dtype=torch.float16)


def offered(op: str, call: Call, sm: int) -> list[Candidate]:
    """What an op offers a card."""
    made, module = CONTRACTS[op], import_module(f"titans_backends.backends.cupy.{op}")
    signature = signature_of(made, call, validate(made, call))
    assert module.supports(signature, CARDS[sm])
    return list(module.candidates(signature, CARDS[sm]))


def forms(op: str, case: Case, sm: int, *, every: bool = False) -> dict[Form, None]:
    """What an op's default, or every candidate, launches for a case, each once."""
    call, module = build(CONTRACTS[op], case, "meta"), import_module(f"titans_backends.backends.cupy.{op}")
    chosen = offered(op, call, sm)
    return {form: None for candidate in (chosen if every else chosen[:1]) for form in collected(module.run, call, candidate)}


def compiled(form: Form, sm: int) -> Usage:
    """NVRTC's work on a form; what it refuses fails the test with its log."""
    from cuda.core import Program, ProgramOptions

    log = io.StringIO()
    macros = [(name, str(int(value)) if isinstance(value, bool) else str(value)) for name, value in form.macros]
    options = ProgramOptions(
        arch=cubins.architecture(sm), std="c++17", include_path=[str(sources.FOLDER)], define_macro=macros, ptxas_options=["-v"], name=form.source
    )
    program = Program(sources.closure(form.source)[form.source], "c++", options)
    program.compile("cubin", logs=log)
    said = log.getvalue()
    registers, spilled = re.findall(r"Used (\d+) registers", said), re.findall(r"(\d+) bytes spill stores", said)
    assert registers, f"the compiler's log has no registers: {said[:1000]}"
    return Usage(max(map(int, registers)), max(map(int, spilled), default=0))


@pytest.mark.parametrize("sm", CARDS)
@pytest.mark.parametrize("op", OPS)
def test_the_defaults_compile_and_keep_to_registers(op: str, sm: int, record_property: Callable[[str, object], None]) -> None:
    for case in production(op):
        for form in forms(op, case, sm):
            used = compiled(form, sm)
            record_property(f"{op} {case.name} {form.kernel} sm_{sm}", f"{used.registers} registers")
            assert used.spilled <= MOST_SPILLED, (
                f"{case.name}: {form.kernel} {dict(form.macros)} spills {used.spilled} bytes a thread with {used.registers} registers"
            )


@pytest.mark.parametrize("op", OPS)
def test_every_candidate_compiles(op: str) -> None:
    case = next(production(op))
    for form in forms(op, case, 90, every=True):
        compiled(form, 90)


@pytest.mark.parametrize("op", OPS)
def test_no_default_asks_for_more_shared_memory_than_a_card_has(op: str) -> None:
    for sm, machine in CARDS.items():
        for case in production(op):
            for form in forms(op, case, sm, every=True):
                assert form.shared <= (machine.shared_memory_bytes or 0), f"{case.name} on sm_{sm}: {form}"
