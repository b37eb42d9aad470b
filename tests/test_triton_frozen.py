"""What the Triton backend's backward leaves out where an input is frozen: kernels that only its gradient needs, and the memory of that gradient.

Launches are noted on sizes alone (device "meta"): nothing is run.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import cast

import pytest
import torch
from torch import Tensor

from tests.triton_forms import TRAINED, module_of, offered, signature
from tests.triton_machines import H100
from titans_backends.backend import TrainableOpModule
from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.case import Case

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="the package triton is not installed: pip install -c constraints.txt -e '.[test]'"
)

RULE = ("gated_delta_rule", "slow_core")
SKIPPED = [
    *((op, "q", ("reverse", "erased", "written", "vectors")) for op in RULE),
    *((op, "gate", ("reverse", "erased", "written")) for op in RULE),
    *((op, "initial_state", ("scan", "updates", "queries", "erased", "written", "vectors")) for op in RULE),
    *((op, "k", ("vectors",)) for op in RULE),
    ("gated_delta_rule", "v", ("scan", "queries", "written", "vectors")),
    ("gated_delta_rule", "beta", ("queries", "written")),
    ("slow_core", "u", ("scan", "queries", "erased", "written", "vectors")),
    ("slow_core", "w", ("queries", "written", "vectors")),
    ("fast_core", "q", ("left", "start")),
    ("fast_core", "v", ("held", "start")),
    ("fast_core", "initial_state", ("held", "left", "whole", "blocks", "running")),
    ("deep_core", "q", ("back", "scalars")),
    ("deep_core", "v", ("chain", "scalars")),
    ("deep_core", "initial_state", ("chain", "scalars", "tokens")),
    ("dual_core", "initial_state", ("left", "whole", "blocks", "scan", "queries", "erased", "written", "vectors")),
    ("dual_core", "g", ("left", "whole", "blocks")),
]
"""Where one input alone needs its gradient, kernels that are not launched."""
RICH = {"fast_core": "continued"}
"""The variants with the most tensors, where that is not the first."""
SHARED = {("slow_core", "u")}
"""A gradient that the other gradients read, so that its memory is needed anyway."""


class Call:
    """An op's richest variant with its gate, of a size that makes every kernel worth launching."""

    def __init__(self, op: str) -> None:
        made = CONTRACTS[op]
        chosen = next(variant for variant in made.variants if variant.name == RICH.get(op, made.variants[0].name))
        given = dict.fromkeys((*chosen.given, *(("gate",) if "gate" in made.argument_by_name else ())))
        case = Case("frozen", B=2, T=300, G=2, H=4, K=64, V=64, dtype=torch.bfloat16, options=chosen.options, given=tuple(given))
        self.op, self.made = op, made
        self.call, facts = signature(op, case, regime="training")
        self.candidate = offered(op, facts, H100)[0]
        self.inputs = {name: tensor for name, tensor in made.tensors(self.call).items() if name in made.differentiable}

    def back(self, needs: Iterable[str], monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], int, tuple[Tensor | None, ...]]:
        """The kernels launched, the bytes that `torch.empty` gave, and what came back."""
        from titans_backends.backends.triton.ahead import arriving, collected

        grads, states, _ = arriving(self.op, self.call, self.candidate)
        made, bytes_made, empty = [], [], torch.empty

        def counted(*args: object, **kwargs: object) -> Tensor:
            tensor = empty(*args, **kwargs)  # type: ignore[call-overload]
            bytes_made.append(tensor.numel() * tensor.element_size())
            return tensor

        def run(call: object, candidate: object) -> None:
            module = cast(TrainableOpModule, module_of(self.op))
            made.append(module.run_backward(call, grads, states, frozenset(needs), self.candidate))

        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", counted)
            launched = collected(run, self.call, self.candidate)
        return [kernel.name.lstrip("_") for kernel, _ in launched], sum(bytes_made), made[0]


@pytest.mark.parametrize(("op", "needed", "skipped"), SKIPPED, ids=[f"{op}-{needed}" for op, needed, _ in SKIPPED])
def test_kernels_that_no_needed_gradient_reads_are_not_launched(
    op: str, needed: str, skipped: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched, _, _ = Call(op).back({needed}, monkeypatch)
    assert launched, "nothing is launched at all"
    assert set(launched).isdisjoint(skipped)


@pytest.mark.parametrize("op", TRAINED)
def test_only_what_is_needed_comes_back(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = Call(op)
    for needs in ([], *([name] for name in x.inputs), list(x.inputs)):
        _, _, found = x.back(needs, monkeypatch)
        assert [name for name, grad in zip(x.made.differentiable, found, strict=True) if grad is not None] == needs


@pytest.mark.parametrize("op", TRAINED)
def test_a_frozen_input_takes_no_memory(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """dual_core's gradients are sums of its parts', which torch makes and nobody counts here: there a frozen input takes no more than another."""
    x = Call(op)
    _, whole, _ = x.back(x.inputs, monkeypatch)
    for name, tensor in x.inputs.items():
        _, without, _ = x.back(set(x.inputs) - {name}, monkeypatch)
        own = 0 if (op, name) in SHARED or op == "dual_core" else tensor.numel() * tensor.element_size()
        assert without <= whole - own, name
