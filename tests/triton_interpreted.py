"""The Triton backend's forward kernels in Triton's interpreter, on CPU tensors in float32: right, complete, and nothing else touched.

Triton decides at import whether it interprets, so this file runs in a process of its own: `TRITON_INTERPRET=1 pytest tests/triton_interpreted.py`,
for one op with `-k fused_uw`. `test_triton_interpreter.py` starts it; plain `pytest` does not collect it. The registry serves GPUs only, so
the op modules are called directly. An op's default candidate runs every conformance case and the sizes that tiles care about; every other
candidate that differs in more than warps, stages, registers and rounding runs a few. The backward: `triton_interpreted_gradients.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from typing import Protocol, cast

import pytest
import torch
from torch import Tensor

from tests.triton_forms import AROUND
from tests.triton_machines import H100
from titans_backends.backend import Candidate, OpModule
from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.case import Case, build, cases
from titans_backends.contracts.contract import Call, Contract
from titans_backends.contracts.tolerance import tolerance
from titans_backends.contracts.validate import validate
from titans_backends.facts import signature_of
from titans_backends.tuning.gate import check_forward, failure
from titans_backends.tuning.ledger import Ledger
from titans_backends.tuning.suite import exam_of

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("triton_interpreted.py wants the interpreter: TRITON_INTERPRET=1 pytest tests/triton_interpreted.py")
pytest.importorskip("triton")

from tests.triton_interpreter_once import hasten

hasten()

OPS = tuple(import_module("titans_backends.backends.triton").BACKEND.ops)
LIMIT = tolerance(torch.float32)
NOT_INTERPRETED = ("warps", "stages", "registers", "dot")
"""What a parameter's name ends in when the interpreter does not see it: how a kernel is scheduled, how float32 products are rounded."""

CHOSEN: Mapping[str, frozenset[str]] = {
    "coupled_core": frozenset(
        ["no delta", "coupled, K != V, odd", "coupled, T=0", "lam, packed with empty sequences", "K 64, V 160", "plain, chunk 20", "odd",
         "grouped heads, strided", "K != V, odd, misaligned", "grouped heads"]
    ),
}  # fmt: skip
"""The ops of which the interpreter runs no other cases, for time; on a card `titans-backends verify` runs all."""


class _Empty(Protocol):
    def __call__(self, *args: object, **kwargs: object) -> Tensor: ...


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory holds NaN, and whole numbers that no index survives: what a kernel leaves out, or reads before it wrote it, shows."""

    def poisoned(make: _Empty) -> Callable[..., Tensor]:
        def made(*args: object, **kwargs: object) -> Tensor:
            tensor = make(*args, **kwargs)
            if tensor.device.type == "meta":
                return tensor
            if tensor.is_floating_point():
                return tensor.fill_(float("nan"))
            return tensor.fill_(0x55555555) if tensor.dtype in (torch.int32, torch.int64) else tensor

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """coupled_core's kernels are right at sizes, too, that are refused until a card has examined them."""
    module = import_module("titans_backends.backends.triton.coupled_core")
    monkeypatch.setattr(module, "EXAMINED", {"K": 128, "V": 256})
    monkeypatch.setattr(module, "EXAMINED_TRAINED", {})


def around(made: Contract, tokens: int = 21) -> Iterator[Case]:
    """What the kernels of an op around the memory tell apart: every variant, dense and packed, sizes and strides of every kind, nothing at all."""
    first = made.variants[0]
    base = Case("", B=1, T=tokens, G=1, H=2, options=first.options, given=first.given)
    for variant in made.variants:
        case = replace(base, name=variant.name, options=variant.options, given=variant.given)
        yield case
        if "cu_seqlens" in made.argument_by_name:
            yield replace(case, name=f"{variant.name}, packed with empty sequences", lengths=(tokens // 2, 0, 1, 3, tokens, 0))
    yield replace(base, name="odd, strided", B=2, T=9, K=20, V=36, view="transposed")
    yield replace(base, name="wide, misaligned", T=5, K=80, V=48, view="misaligned")
    yield replace(base, name="expanded", T=5, view="expanded")
    yield from (replace(base, name=name, **changes) for name, changes in (("B=0", {"B": 0}), ("T=0", {"T": 0}), ("T=1", {"T": 1})))  # type: ignore[arg-type]


def sizes(made: Contract) -> Iterator[Case]:
    """Cases beyond conformance: head sizes of several tiles and of odd ones, chunks of any length, long memory, many short sequences."""
    base = Case("", B=1, G=1, H=1)
    if made.name in AROUND:
        return
    if made.name == "fused_uw":
        yield replace(base, name="chunk 20, K 80, V 48", T=50, K=80, V=48, options={"_chunk": 20})
        yield replace(base, name="chunk 128, K 64, V 160", T=128, K=64, V=160, options={"_chunk": 128})
        return
    first = made.variants[0]
    base = replace(base, options=first.options, given=first.given)
    if made.max_tokens:
        yield replace(base, name="K 80, V 48", T=2, K=80, V=48)
        yield replace(base, name="K 256, V 256", T=1, K=256, V=256)
        return
    yield replace(base, name="K 80, V 48", T=70, K=80, V=48)
    yield replace(base, name="K 64, V 160", T=130, K=64, V=160)
    yield replace(base, name="K 256, V 256", T=20, K=256 if made.name != "coupled_core" else 128, V=256)
    if made.experimental:
        return
    yield replace(base, name="long memory", T=300, decay="zero", G=1, H=2)
    yield replace(base, name="many short sequences", lengths=(1, 1, 1, 64, 1, 65, 0, 63, 1, 128))
    for variant in made.variants:
        if "chunk_size" not in made.option_by_name or "chunk_offset" in variant.options:
            continue
        for chunk in (20, 256):
            tokens = 65 if chunk == 20 else 300
            case = replace(
                base, name=f"{variant.name}, chunk {chunk}", T=tokens, options={**variant.options, "chunk_size": chunk}, given=variant.given
            )
            yield case if chunk == 20 or variant == first else replace(case, T=130)


def few(made: Contract) -> Iterator[Case]:
    """Cases for every candidate: each of the first kind, one odd in all sizes, one packed."""
    base = Case("", T=3 if made.max_tokens else 70 if made.experimental else 130, B=1, G=1, H=1 if made.experimental else 2)
    if made.name in AROUND:
        yield replace(base, name="odd", T=70, K=36, V=20, view="transposed", options=made.variants[0].options, given=made.variants[0].given)
        return
    if made.name == "fused_uw":
        yield replace(base, name="odd", K=20, V=36, options={"_chunk": 50})
        yield replace(base, name="wide", K=64, V=160)
        yield replace(base, name="small", options={"_chunk": 20})
        return
    for variant in made.variants:
        yield replace(base, name=variant.name, options=variant.options, given=variant.given)
    first = made.variants[0]
    odd = replace(base, name="odd", K=36, V=20, view="transposed", options=first.options, given=first.given)
    yield odd
    if not made.max_tokens:
        yield replace(odd, name="odd, packed", lengths=(33, 0, 1, 66, 0))


def module_of(op: str) -> OpModule:
    """The op's module, its kernels interpreted."""
    return cast(OpModule, import_module(f"titans_backends.backends.triton.{op}"))


def offered(made: Contract, call: Call) -> list[Candidate]:
    """What the op offers an H100 for a call; a refusal is a failure here."""
    module, signature = module_of(made.name), signature_of(made, call, validate(made, call))
    verdict = module.supports(signature, H100)
    assert verdict, f"refused: {verdict}"
    found = list(module.candidates(signature, H100))
    assert found, "no candidate"
    return found


def distinct(candidates: list[Candidate]) -> list[Candidate]:
    """The first of all that differ in nothing that the interpreter sees."""
    kept: dict[object, Candidate] = {}
    for candidate in candidates:
        params = tuple((name, value) for name, value in candidate.params if not name.endswith(NOT_INTERPRETED))
        kept.setdefault((candidate.variant, params), candidate)
    return list(kept.values())


def problems(made: Contract, case: Case, choose: Callable[[Call], list[Candidate]], *, again: bool = False) -> list[str]:
    """What is wrong with the chosen candidates on a case, a line each. `again`: also when called again, as a plan's second call is.

    The interpreter records no launches and repeats all bits, so that a second call tells little: an op's first case is called again, no other.
    """
    call = build(made, case)
    exam = exam_of(made, case, call, training=False)
    found = []
    for candidate in choose(call):
        try:
            check_forward(made, candidate, module_of(made.name), exam, LIMIT, Ledger(), candidate.label, again=again)
        except Exception as error:
            found.append(failure(error, candidate.label) if type(error).__name__ != "Rejected" else str(error))
    return found


def expect_none(found: list[str]) -> None:
    """Fails with the lines alone."""
    if found:
        pytest.fail("\n".join(found), pytrace=False)


def listed(generate: Callable[[Contract], Iterator[Case]]) -> list[object]:
    """Every op's cases as parameters."""
    return [pytest.param(op, case, id=f"{op}-{case.name}") for op in OPS for case in generate(CONTRACTS[op]) if is_chosen(op, case)]


def is_chosen(op: str, case: Case) -> bool:
    """Whether the interpreter runs it."""
    return op not in CHOSEN or case.name in CHOSEN[op]


@pytest.mark.parametrize(("op", "case"), listed(lambda made: around(made, 70) if made.name in AROUND else cases(made, torch.float32)))
def test_the_default_keeps_the_contract(op: str, case: Case) -> None:
    made = CONTRACTS[op]
    expect_none(problems(made, case, lambda call: offered(made, call)[:1], again=case.name == made.variants[0].name))


@pytest.mark.parametrize(("op", "case"), listed(sizes))
def test_the_default_tiles_any_size(op: str, case: Case) -> None:
    made = CONTRACTS[op]
    expect_none(problems(made, case, lambda call: offered(made, call)[:1]))


@pytest.mark.parametrize(("op", "case"), listed(few))
def test_every_other_candidate_keeps_the_contract(op: str, case: Case) -> None:
    made = CONTRACTS[op]

    def others(call: Call) -> list[Candidate]:
        """Those for this call, and for long ones with few and with many heads: a candidate must be right wherever it is run."""
        known = offered(made, call)
        if made.name != "fused_uw" and not made.max_tokens and case.lengths is None:
            for heads in (2, 64):
                known += offered(made, build(made, replace(case, T=16384, G=heads, H=heads), "meta"))
        return distinct(known)[1:]

    expect_none(problems(made, case, others))


@pytest.mark.parametrize(
    "alpha", [torch.tensor([0.9, 0.5, 0.2, 0.7])[::2], torch.rand(2, 6, 2)[:, ::2]], ids=["dual_core_step-H", "dual_core_step-B T H"]
)
@pytest.mark.parametrize("inplace", [False, True])
def test_one_products_views_and_states_of_any_strides_are_stepped(alpha: Tensor, inplace: bool) -> None:
    made = CONTRACTS["dual_core_step"]
    joint, rates = torch.randn(2, 3, 2 * 16 + 2 * 16 + 2 * 20), torch.rand(2, 3, 4 * 2)
    q, k, v = (x.view(2, 3, 2, -1) for x in joint.split((32, 32, 40), -1))
    beta, g, fast_gate, slow_gate = rates.split(2, -1)
    state, fast_state = torch.randn(4, 20, 2, 16).permute(0, 2, 3, 1), torch.randn(2, 4, 16, 21).transpose(0, 1)[..., :20]
    call = made.make_call(
        q, torch.nn.functional.normalize(k, dim=-1), v, beta, -g, fast_gate=fast_gate, slow_gate=slow_gate, alpha=alpha, state=state, fast_state=fast_state,
        position=torch.tensor([5, 0, 7, 0], dtype=torch.int32)[::2], state_indices=torch.tensor([3, 1]), inplace=inplace, chunk_size=4,
    )  # fmt: skip
    wanted = made.reference(call)
    for candidate in distinct(offered(made, call)):
        own = made.with_tensors(call, {name: x.clone() for name, x in made.tensors(call).items() if name in made.rewritten})
        for got, want in zip(module_of(made.name).run(own, candidate), wanted, strict=True):
            assert got is not None
            torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)


def laid(state: Tensor, layout: str) -> Tensor:
    """The same state with keys or values contiguous, in memory of its own or in a wider one, or with neither."""
    if layout == "neither":
        return state.new_empty(*state.shape, 2)[..., 0].copy_(state)
    turned = layout.startswith("V-first")
    x = state.transpose(2, 3) if turned else state
    if "strided" in layout:  # one number more a row, one head more a sequence
        x = x.new_empty(x.shape[0], x.shape[1] + 1, x.shape[2], x.shape[3] + 1)[:, 1:, :, 1:].copy_(x)
    else:
        x = x.clone(memory_format=torch.contiguous_format)
    return x.transpose(2, 3) if turned else x


@pytest.mark.parametrize("layout", ["V-first", "V-first, strided", "K-first, strided", "neither"])
@pytest.mark.parametrize("variant", ["gated", "pool", "in place"])
def test_a_state_is_stepped_as_it_lies(variant: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64, on poisoned memory, without a copy but of what is contiguous nowhere, or of a pool whole."""
    made = CONTRACTS["gated_delta_step"]
    module = module_of(made.name)
    options, given = next((each.options, each.given) for each in made.variants if each.name == variant)
    for T, K, V in ((1, 32, 32), (3, 36, 20), (1, 16, 1), (1, 1, 8)):
        call = build(made, Case("", T=T, B=3, G=1, H=2, K=K, V=V, options=options, given=given))
        wanted = made.reference(made.to(call, torch.float64))
        turned = layout.startswith("V-first") and K > 1 < V
        for candidate in distinct(offered(made, call)):
            own = made.with_tensors(call, {"state": laid(made.tensors(call)["state"], layout)})
            state = made.tensors(own)["state"]
            with monkeypatch.context() as patched:
                if layout != "neither":
                    patched.setattr(Tensor, "contiguous", lambda x, **_: pytest.fail(f"a copy of {tuple(x.shape)}, strides {x.stride()}"))
                found = module.run(own, candidate)
            for name, got, want in zip(("o", "state"), found, wanted, strict=True):
                assert got is not None
                told = f"{name}, {candidate.label}, K {K}, V {V}, strides {got.stride()}"
                torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-6, msg=told)
            after = found[1]
            if variant == "in place":
                assert after is state
            else:
                assert after is not None
                assert (after.transpose(2, 3) if turned else after).is_contiguous(), f"K {K}, V {V}: {after.stride()}"
                assert torch.equal(state, made.tensors(call)["state"]), "the given state changed"


@pytest.mark.parametrize("name", [f"{op}-{case}" for op, case in (("deep_core", "continued"), ("deep_core", "plain"), ("deep_core_step", "gated"))])
def test_a_block_after_one_that_forgot_all_is_right(name: str) -> None:
    """g of -inf, and what underflows: a block's log decay begins at nought, whatever that of the block before was."""
    op, variant = name.split("-")
    made, module = CONTRACTS[op], cast(OpModule, import_module(f"titans_backends.backends.triton.{op}"))
    case = next(case for case in cases(made, torch.float32) if case.name == variant)
    call = build(made, replace(case, T=8 if made.max_tokens else 65, given=tuple({*case.given, "g"})))
    gone = made.tensors(call)["g"]
    gone[:, 1], gone[:, 5], gone[:, 7:9] = -torch.inf, -200.0, -1e38
    wanted = made.reference(made.to(call, torch.float64))
    assert wanted[0] is not None
    assert wanted[0].isfinite().all()
    for candidate in module.candidates(signature_of(made, call, validate(made, call)), H100):
        for got, want in zip(module.run(call, candidate), wanted, strict=True):
            if got is not None and want is not None:
                torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5, msg=lambda told, label=candidate.label: f"{label}: {told}")
