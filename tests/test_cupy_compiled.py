"""The CuPy backend's kernels compile with NVRTC without a GPU, each `.cu` for three architectures, and what its defaults spill is bounded.

What is compiled is what the ops' defaults would launch: for sm_90a with heads of 128 in bfloat16 and float32 and of 32 in bfloat16, and whatever other file a
variant takes; one form of every file for sm_80 and sm_120. The compiler is the package nvidia-cuda-nvrtc through cuda.core; CuPy is not needed.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from itertools import product

import pytest
import torch
from titans_backends.backends.cupy import compile as cubins
from titans_backends.backends.cupy import sources
from titans_backends.backends.cupy.ahead import arriving, collected
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
SPILLING = {"dual_core": 5120, "gated_delta_rule": 96, "slow_core": 32}
"""What these spill at most, heads of 128 in dual_core, float32 in the others: known, slow, and not to grow."""

ALSO = {"dual_core": ("flat",)}
"""Variants that are compiled beside an op's first one: other kernels."""
FEW = {"gated_delta_rule": (2, 8)}
"""Heads so few that long sequences are cut: other kernels, too."""
PARTS = {"dual_core": "dual_"}
"""What an op's own files begin with where it is put together from other ops' kernels, which are compiled for those."""


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


compiles = pytest.mark.skipif(_missing() is not None, reason=str(_missing()))


@dataclass(frozen=True, slots=True)
class Usage:
    """What a compiled kernel takes: registers and spilled bytes of a thread, the worst kernel of its file."""

    registers: int
    spilled: int


def production(op: str) -> Iterator[Case]:
    """The sizes that an op is for, in the variants that its modes need: heads of 128 in bfloat16 and float32, of 32 in bfloat16."""
    made = CONTRACTS[op]
    served = [each for each in made.variants if offered(op, Case("", B=1, T=1, K=32, V=32, options=each.options, given=each.given), 90)]
    also = [each for each in served[1:] if each.name in ALSO.get(op, ())]
    for variant, (size, dtype) in product((served[0], *also), ((128, torch.bfloat16), (128, torch.float32), (32, torch.bfloat16))):
        tokens = 1 if op == "gated_delta_step" else 2048
        case = Case(f"{variant.name}, {size}", B=1, T=tokens, G=32, H=32, K=size, V=size, dtype=dtype, options=variant.options, given=variant.given)
        if offered(op, case, 90):
            yield case
    if op in FEW:
        groups, heads = FEW[op]
        yield Case("few heads", B=1, T=2048, G=groups, H=heads, K=128, V=128, dtype=torch.bfloat16, options=served[0].options, given=served[0].given)


def variants(op: str) -> Iterator[Case]:
    """Every variant with narrow heads: some options take other kernels."""
    for variant in CONTRACTS[op].variants:
        tokens = 1 if op == "gated_delta_step" else 2048
        case = Case(variant.name, B=1, T=tokens, G=32, H=32, K=32, V=32, dtype=torch.bfloat16, options=variant.options, given=variant.given)
        if offered(op, case, 90):
            yield case


def offered(op: str, case: Case, sm: int, *, backward: bool = False) -> list[Candidate]:
    """What an op offers a card for a case, forward or backward; none where it refuses."""
    made, module = CONTRACTS[op], import_module(f"titans_backends.backends.cupy.{op}")
    call: Call = build(made, case, "meta")
    signature = signature_of(made, call, validate(made, call))
    if not module.supports(signature, CARDS[sm]):
        return []
    if backward:
        return list(module.backward_candidates(signature, CARDS[sm])) if hasattr(module, "backward_candidates") else []
    return list(module.candidates(signature, CARDS[sm]))


def forms(op: str, case: Case, sm: int, *, every: bool = False) -> list[Form]:
    """What an op's defaults, forward and backward, or every candidate, launch for a case, each once."""
    call, module = build(CONTRACTS[op], case, "meta"), import_module(f"titans_backends.backends.cupy.{op}")

    def run(call: Call, candidate: Candidate) -> object:
        if candidate.direction == "forward":
            return module.run(call, candidate)
        grads, states, needs = arriving(op, call, candidate)
        return module.run_backward(call, grads, module.residual(call, candidate) if candidate.residual else states, needs, candidate)

    either = [offered(op, case, sm, backward=backward) for backward in (False, True)]
    chosen = [candidate for found in either for candidate in (found if every else found[:1])]
    return list(dict.fromkeys(form for candidate in chosen for form in collected(run, call, candidate)))


def compiled(form: Form, sm: int) -> Usage:
    """NVRTC's work on a form; what it refuses fails the test with its log."""
    return compiled_with_log(form, sm)[0]


def compiled_with_log(form: Form, sm: int) -> tuple[Usage, str]:
    """The same, and what the compiler said."""
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
    return Usage(max(map(int, registers)), max(map(int, spilled), default=0)), said


def files(sm: int) -> dict[str, Form]:
    """For every `.cu` that a default launches on a card, in any variant, one of its forms: the last one, of narrow heads; then those of other candidates."""
    found = {form.source: form for op in OPS for case in (*production(op), *variants(op)) for form in forms(op, case, sm)}
    return {form.source: form for op in OPS for case in production(op) for form in forms(op, case, sm, every=True)} | found


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_the_defaults_compile_and_keep_to_registers(op: str, record_property: Callable[[str, object], None]) -> None:
    chosen = {
        (form.source, form.macros): (case, form) for case in production(op) for form in forms(op, case, 90)
    }  # a file's kernels are compiled together
    common = {source for source, _ in chosen}
    chosen |= {(form.source, form.macros): (case, form) for case in variants(op) for form in forms(op, case, 90) if form.source not in common}
    for case, form in chosen.values():
        if form.source.startswith(PARTS.get(op, "")):
            used = compiled(form, 90)
            record_property(f"{op} {case.name} {case.dtype} {form.source}", f"{used.registers} registers, {used.spilled} bytes spilled")
            assert used.spilled <= SPILLING.get(op, MOST_SPILLED), (
                f"{case.name}: {form.source} {dict(form.macros)} spills {used.spilled} bytes a thread with {used.registers} registers"
            )


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("sm", [80, 120])  # an sm_89 takes what an sm_80 takes
def test_every_file_compiles_for_other_cards(sm: int) -> None:
    for form in files(sm).values():
        compiled(form, sm)


def test_every_cuda_file_is_launched_by_a_candidate_that_is_compiled_here() -> None:
    kernels = {path.name for path in sources.FOLDER.glob("*.cu")}
    assert kernels == set(files(90)), "a .cu that no op's candidate launches would never be compiled in the tests"
    included = {name for kernel in kernels for name in sources.closure(kernel)}
    assert {path.name for path in sources.FOLDER.iterdir() if path.is_file()} == included, "a header that no kernel includes"


@pytest.mark.parametrize("op", OPS)
def test_no_candidate_asks_for_more_shared_memory_than_a_card_has(op: str) -> None:
    for sm, machine in CARDS.items():
        for variant in CONTRACTS[op].variants:
            for (groups, heads), size, dtype in product({(32, 32), FEW.get(op, (32, 32))}, (128, 64, 32), (torch.bfloat16, torch.float32)):
                tokens = 1 if op == "gated_delta_step" else 2048
                case = Case("", B=1, T=tokens, G=groups, H=heads, K=size, V=size, dtype=dtype, options=variant.options, given=variant.given)
                for form in forms(op, case, sm, every=True):
                    assert form.shared <= (machine.shared_memory_bytes or 0), f"{variant.name} on sm_{sm}: {form}"
