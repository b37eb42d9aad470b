"""The delta rule's gradients of q, k and w by one kernel instead of three: where it is offered, when it is launched, what it takes of a card, and that its machine
code is right. Its values: `triton_interpreted_gradients.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from itertools import product

import pytest
import torch
from torch import Tensor

if find_spec("triton") is None:
    pytest.skip("the package triton is not installed: pip install -c constraints.txt -e '.[test]'", allow_module_level=True)

from titans_backends.backends.triton.grid import strides

from tests.hopper_emulator import assembled
from tests.hopper_emulator import run as emulate
from tests.hopper_emulator.__main__ import error
from tests.triton_forms import module_of, offered, production, signature
from tests.triton_machines import CARDS, H100
from titans_backends.backend import Candidate
from titans_backends.contracts.case import Case
from titans_backends.machine import Machine

LONG = Case("long", B=1, T=8192, G=16, H=32, K=128, V=128, dtype=torch.bfloat16)
INPUTS = {"gated_delta_rule": ("q", "k", "v", "beta", "g", "gate", "initial_state"), "slow_core": ("q", "k", "u", "w", "g", "gate", "initial_state")}
BLOCK = 64
TOLERANCE = 5e-3
"""bfloat16's, of norms."""


def plans(op: str, machine: Machine = H100, **changes: object) -> list[Candidate]:
    """What an op offers for its backward."""
    facts = signature(op, production(op, replace(LONG, **changes)), regime="training")[1]  # type: ignore[arg-type]
    return offered(op, facts, machine)


def is_one(candidate: Candidate) -> bool:
    """Whether a single kernel makes the gradients; dual_core's parameters have a prefix."""
    return any(name.endswith("gradients") and value == "one" for name, value in candidate.params)


def shapes(found: list[Candidate]) -> set[tuple[object, ...]]:
    """The tiles of those that do, in whatever way the states come."""
    names = ("block", "gradient_keys", "gradient_tile", "gradient_warps", "gradient_stages")
    return {tuple(one.param(name) for name in names) for one in found if is_one(one)}


@pytest.mark.parametrize("op", ["gated_delta_rule", "slow_core"])
@pytest.mark.parametrize(
    ("changes", "tiles"),
    [
        ({}, {(64, 128, 32, 8, 3), (64, 128, 32, 8, 5)}),
        ({"K": 128, "V": 64}, {(64, 128, 32, 8, 3), (64, 128, 32, 8, 5)}),
        ({"K": 64, "V": 64}, {(64, 64, 32, 4, 3), (64, 64, 32, 8, 3)}),
        ({"K": 64, "V": 128}, {(64, 64, 32, 4, 3), (64, 64, 32, 8, 3)}),
        ({"K": 32, "V": 128}, set()),
        ({"K": 32, "V": 32}, {(32, 32, 32, 2, 1)}),
        ({"K": 160, "V": 128}, set()),
        ({"K": 60, "V": 100}, set()),
    ],
    ids=str,
)
def test_where_it_is_offered_it_is_never_first(op: str, changes: dict[str, object], tiles: set[tuple[object, ...]]) -> None:
    found = plans(op, **changes)
    if op == "slow_core":  # whose blocks are its chunks
        tiles = {one for one in tiles if one[0] == 64}
    assert shapes(found) == tiles
    if tiles:  # with every way to the states, each behind others with three kernels
        assert not is_one(found[0])
        assert {(one.variant, one.saves_states) for one in found if is_one(one)} >= {("again", False), ("split", False)}
        for variant in ("again", "split"):
            assert not is_one(next(one for one in found if one.variant == variant))


@pytest.mark.parametrize(("variant", "transform"), [("exact", "exact"), ("recurrent", "lam")])
@pytest.mark.parametrize("heads", [128, 64, 32])
def test_dual_core_is_offered_one_of_them_behind_as_many_of_the_others(variant: str, transform: str, heads: int) -> None:
    case = replace(LONG, K=heads, V=heads, options={"transform": transform, "chunk_size": 64}, given=("g", "fast_gate", "slow_gate"))
    found = offered("dual_core", signature("dual_core", case, regime="training")[1], H100)
    assert {one.variant for one in found} == {variant}
    ones = [is_one(one) for one in found]
    assert ones == [False] * 4 + [True] if heads > 32 or variant == "exact" else not any(ones)  # blocks of 64 for chunks of 64


def test_three_kernels_with_more_on_their_way_are_offered_behind_those_that_were_first() -> None:
    deep = [
        index
        for index, one in enumerate(plans("gated_delta_rule"))
        if not is_one(one) and (one.param("gradient_tile"), one.param("gradient_stages")) == (64, 3)
    ]
    assert deep
    assert min(deep) > 4


def test_a_small_card_is_offered_it_where_its_shared_memory_does() -> None:
    assert not shapes(plans("gated_delta_rule", CARDS[89]))
    assert not shapes(plans("gated_delta_rule", CARDS[80]))  # the scans of such a plan take more
    assert shapes(plans("gated_delta_rule", CARDS[80], K=64, V=64))
    assert shapes(plans("gated_delta_rule", CARDS[89], K=32, V=32))


def test_in_float32_narrow_heads_alone_are_offered_it() -> None:
    assert shapes(plans("gated_delta_rule", K=32, V=32, dtype=torch.float32)) == {(32, 32, 32, 4, 2)}
    assert not shapes(plans("gated_delta_rule", K=64, V=32, dtype=torch.float32))


def launched(op: str, needs: tuple[str, ...], candidate: Candidate) -> list[str]:
    """The kernels behind the scans that a backward launches, on sizes alone."""
    from titans_backends.backends.triton.ahead import arriving, collected

    call = signature(op, replace(LONG, T=300, given=("g", "gate", "initial_state")), regime="training")[0]
    grads, states, _ = arriving(op, call, candidate)
    names = [
        kernel.name
        for kernel, _ in collected(lambda *_: module_of(op).run_backward(call, grads, states, frozenset(needs), candidate), call, candidate)
    ]  # type: ignore[attr-defined]
    return [name.lstrip("_") for name in names if name in ("_together", "_queries", "_erased", "_written", "_vectors")]


@pytest.mark.parametrize("op", INPUTS)
def test_it_is_launched_where_all_that_it_makes_is_wanted(op: str) -> None:
    one = next(candidate for candidate in plans(op) if is_one(candidate))
    made = ("q", "k", "w") if op == "slow_core" else ("q", "k")
    assert launched(op, INPUTS[op], one) == ["together", "vectors"]
    assert launched(op, made, one) == ["together"]
    for name in made:
        assert "together" not in launched(op, tuple(other for other in INPUTS[op] if other != name), one)
    for name in set(INPUTS[op]) - {*made, "u", "v", "initial_state"}:
        assert launched(op, (*made, name), one) == ["together", "vectors"]
    for name in ("u" if op == "slow_core" else "v", "initial_state"):
        assert launched(op, (*made, name), one) == ["together"]


def gradients(x: Mapping[str, Tensor], scale: float) -> tuple[Tensor, ...]:
    """dq, dk and `gone` in float64, by the formulas of `delta_together`: a block and a v head after the other, for heads that share q and k."""
    x = {name: tensor.double() for name, tensor in x.items()}
    tokens, heads = x["g"].shape[1:]
    dq, dk = torch.zeros_like(x["q"]), torch.zeros_like(x["k"])
    gone = torch.zeros(-(-tokens // BLOCK), heads, BLOCK, dtype=torch.float64)
    for (index, start), head in product(enumerate(range(0, tokens, BLOCK)), range(heads)):
        rows = slice(start, min(start + BLOCK, tokens))
        q, k = x["q"][0, rows, 0], x["k"][0, rows, 0]
        do, u, lost = (x[name][0, rows, head] for name in ("do", "updates", "errors"))
        beta, gate, log = x["beta"][0, rows, head, None], x["gate"][0, rows, head, None], x["g"][0, rows, head].cumsum(0)
        state, leaving = x["states"][index, head], x["leaving"][index, head]
        decay = (log[:, None] - log[None, :]).tril().exp()
        pairs, links = (do @ u.T).tril() * decay * scale, -(lost @ u.T).tril(-1) * decay
        right = (log[-1] - log).exp()[:, None] * (u @ leaving.T)
        dq[0, rows, 0] += gate * (scale * log.exp()[:, None] * (do @ state.T) + pairs @ k)
        dk[0, rows, 0] += beta * (links @ k - log.exp()[:, None] * (lost @ state.T)) + right + pairs.T @ (gate * q) + links.T @ (beta * k)
        gone[index, head, : len(k)] = (k * right).sum(1)
    return dq, dk, gone


def test_its_machine_code_for_hopper_is_right_and_takes_no_more_than_was_reckoned_with() -> None:
    """A launch that asks for more shared memory than the card has is refused there; products that ptxas takes one by one have each a wait of its own."""
    from titans_backends.backends.triton.delta_backward_plans import together_bytes
    from titans_backends.backends.triton.delta_together import TOGETHER

    tokens, heads, keys, values, tile, stages = 70, 2, 128, 64, 32, 5
    source = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, generator=source).to(dtype)

    x = {name: normal(1, tokens, 1, keys) / keys**0.5 for name in "qk"}
    x |= {name: normal(1, tokens, heads, values) for name in ("do", "updates", "errors")}
    x |= {name: normal(2, heads, keys, values) for name in ("states", "leaving")}
    x |= {name: torch.rand(1, tokens, heads, generator=source) for name in ("beta", "gate")}
    x["g"] = -torch.rand(1, tokens, heads, generator=source)
    made = {name: torch.full_like(x[name[1]], float("nan")) for name in ("dq", "dk")}
    made |= {name: torch.full((2, heads, BLOCK), float("nan")) for name in ("told", "past", "seen", "taken", "gone")}
    given: dict[str, Tensor | float | None] = dict.fromkeys(TOGETHER.names)
    given |= {**x, **made, "tokens": tokens, "sequences": 1, "heads": heads, "scale": keys**-0.5}
    for name in ("q", "k", "w", "beta", "g", "gate", "do"):
        given |= dict(zip((f"{name}_b", f"{name}_t", f"{name}_h"), strides(x.get(name)), strict=True))
    args = tuple(given[name] for name in TOGETHER.names)
    form = TOGETHER._form(args, (keys, values, keys, BLOCK, tile, heads, False, "tf32", stages), 8, stages)
    emulate(TOGETHER, 2, args, form)
    wanted = gradients(x, keys**-0.5)
    assert error((made["dq"], made["dk"], made["gone"]), wanted) < TOLERANCE
    assert not any(tensor.isnan().any() for tensor in made.values())
    code, shared = assembled(TOGETHER, form)
    assert shared <= together_bytes(stages, tile, BLOCK, keys, 2)
    names = [instruction.name for instruction in code.instructions]
    assert names.count("HGMMA") > names.count("WARPGROUP")
    assert "HMMA" not in names
