"""FLA's own Triton kernels in Triton's interpreter, on CPU tensors, through our adapter and through FLA's autograd: the same bits, and right against float64.

Triton decides at import whether it interprets, so this file runs in a process of its own: `TRITON_INTERPRET=1 pytest tests/fla_interpreted.py`.
`test_fla_interpreter.py` starts it where FLA is installed; plain `pytest` does not collect it. In float16 and float32, since the interpreter does arithmetic on
bfloat16 as on whole numbers. TileLang's kernels, which give some gradients on Hopper, are not among these.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("fla_interpreted.py wants the interpreter: TRITON_INTERPRET=1 pytest tests/fla_interpreted.py")
pytest.importorskip("triton")
pytest.importorskip("fla.ops.gated_delta_rule.chunk", reason="FLA is not installed: pip install 'fla-core>=0.6,<0.7'")

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.autotuner import Autotuner

from tests.triton_interpreter_once import hasten
from titans_backends.backend import Candidate
from titans_backends.contracts import contract
from titans_backends.contracts.case import Case, build
from titans_backends.contracts.gated_delta_rule import GatedDeltaRule, reference
from titans_backends.contracts.tolerance import compare, tolerance
from titans_backends.contracts.validate import validate
from titans_backends.facts import signature_of
from titans_backends.machine import Machine

hasten()

CONTRACT = contract("gated_delta_rule")
RULE: Any = importlib.import_module("titans_backends.backends.fla.gated_delta_rule")
INPUTS = ("q", "k", "v", "beta", "g", "gate", "initial_state")
CPU = Machine("cpu", "a CPU", "cpu")
Found = dict[str, Tensor | None]


class _Counted(int):
    """What a loop counts, with the conversion that a compiled loop's has."""

    def to(self, dtype: Any) -> Any:
        return tl.core.tensor(interpreter.TensorHandle(np.array([int(self)], interpreter._get_np_dtype(dtype)), dtype), dtype)


def _counting(*bounds: Any) -> Iterator[_Counted]:
    return (_Counted(index) for index in range(*(int(bound) for bound in bounds)))


@pytest.fixture(autouse=True)
def interpretable(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the interpreter cannot do: time configurations, where the first is taken here, and convert a loop's counter. New memory holds NaN."""

    def first(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.fn.run(*args, **kwargs, **self.configs[0].all_kwargs())

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            x = make(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return made

    monkeypatch.setattr(Autotuner, "run", first)
    monkeypatch.setattr(importlib.import_module("fla.ops.common.chunk_delta_h"), "range", _counting, raising=False)
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


_STATES = ("g", "initial_state")
_FINAL: dict[str, Any] = {"output_final_state": True}
_UNIT: dict[str, Any] = {**_FINAL, "qk_l2norm": True, "scale": 0.3}
_ONE = Case("", B=1, T=70, G=2, H=2, given=_STATES, options=_FINAL)
CASES = (
    replace(_ONE, name="two sequences, transposed", B=2, T=66, view="transposed", given=("g",)),
    replace(_ONE, name="K 72, V 100, q and k of unit length", G=1, H=1, K=72, V=100, options=_UNIT),
    replace(_ONE, name="grouped heads, packed with empty sequences, unit length", G=1, lengths=(0, 3, 66, 0, 1), options=_UNIT),
    replace(_ONE, name="correlated keys, beta 0 1 2, g 0 and -20", decay="hard", beta="extreme", keys="correlated"),
    replace(_ONE, name="an output gate", T=9, given=(*_STATES, "gate")),
    replace(_ONE, name="no decay, K 24, V 40", K=24, V=40, given=("initial_state",)),
    replace(_ONE, name="no decay, packed with empty sequences, unit length", lengths=(5, 0, 65), given=("initial_state",), options=_UNIT),
    replace(_ONE, name="no decay, grouped heads", G=1, T=9, given=("initial_state",)),
    replace(_ONE, name="float32, K 36, V 20", K=36, V=20, dtype=torch.float32),
)


def pair(call: GatedDeltaRule, keeps: bool) -> tuple[Candidate, Candidate]:
    """Our adapter's candidates of both directions that hand on what FLA keeps, or nothing."""
    asked = signature_of(CONTRACT, call, validate(CONTRACT, call), regime="training")
    forward = next(one for one in RULE.candidates(asked, CPU) if one.saves_states == keeps)
    return forward, next(one for one in RULE.backward_candidates(asked, CPU) if forward.agrees(one))


def ours(call: GatedDeltaRule, grads: tuple[Tensor | None, Tensor | None], keeps: bool) -> Found:
    """Outputs and gradients by the adapter."""
    forward, backward = pair(call, keeps)
    needs = frozenset(name for name in INPUTS if getattr(call, name) is not None)
    with torch.no_grad():
        o, state, *kept = RULE.run(call, forward)
        found = RULE.run_backward(call, grads, tuple(kept) if keeps else None, needs, backward)
    assert bool(kept) == keeps
    return {"o": o, "final_state": state, **{f"d{name}": x for name, x in zip(INPUTS, found, strict=True) if name in needs}}


def differentiated(
    function: Callable[..., tuple[Tensor | None, ...]], call: GatedDeltaRule, grads: tuple[Tensor | None, Tensor | None], to: Any
) -> Found:
    """Outputs and gradients by autograd, of a function of the call's tensors in a dtype."""
    leaves = {name: x.detach().to(to or x.dtype).requires_grad_() for name, x in CONTRACT.tensors(call).items() if name != "cu_seqlens"}
    o, state = function(leaves)
    assert o is not None
    assert state is not None
    given = [(x, grad.to(x.dtype)) for x, grad in zip((o, state), grads, strict=True) if grad is not None]
    found = torch.autograd.grad([x for x, _ in given], list(leaves.values()), [grad for _, grad in given], allow_unused=True)
    return {"o": o.detach(), "final_state": state.detach(), **{f"d{name}": x for name, x in zip(leaves, found, strict=True)}}


def theirs(call: GatedDeltaRule, grads: tuple[Tensor | None, Tensor | None]) -> Found:
    """Outputs and gradients by FLA's own function and its autograd."""

    def function(x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        options = {"scale": call.scale, "initial_state": x.get("initial_state"), "output_final_state": True, "cu_seqlens": call.cu_seqlens}
        given = (x["q"], x["k"], x["v"])
        if pair(call, True)[0].variant == "delta_rule_kept":
            module = importlib.import_module("fla.ops.delta_rule.chunk")
            o, state = module.chunk_delta_rule(*given, x["beta"], use_qk_l2norm_in_kernel=call.qk_l2norm, **options)
        else:
            module = importlib.import_module("fla.ops.gated_delta_rule.chunk")
            g = x.get("g", torch.zeros(x["beta"].shape))
            o, state = module.chunk_gated_delta_rule(*given, g, x["beta"], use_qk_l2norm_in_kernel=call.qk_l2norm, **options)
        return (o * x["gate"].unsqueeze(-1)).to(o.dtype) if "gate" in x else o, state

    return differentiated(function, call, grads, None)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_adapter_runs_what_flas_autograd_runs(case: Case) -> None:
    call: Any = build(CONTRACT, case if case.dtype is torch.float32 and "float32" in case.name else replace(case, dtype=torch.float16))
    source = torch.Generator().manual_seed(0)
    states = call.v.shape[0] if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
    d_o = torch.randn(call.v.shape, generator=source).to(call.v.dtype)
    d_state = torch.randn(states, call.v.shape[2], call.k.shape[3], call.v.shape[3], generator=source)
    limit = tolerance(call.v.dtype)
    for grads in ((d_o, d_state), (None, d_state)) if case.T == 9 else ((d_o, d_state),):
        found, again, own = ours(call, grads, True), ours(call, grads, False), theirs(call, grads)
        exact = differentiated(lambda x: reference(CONTRACT.with_tensors(call, x)), call, grads, torch.float64)  # type: ignore[arg-type]
        for name, got in found.items():
            assert got is not None
            its, made, want = (
                torch.zeros_like(got) if x is None else x for x in (own[name], again[name], exact[name])
            )  # None: what arrived knows it not
            assert torch.equal(got, its), f"{name} is not FLA's, bit for bit"
            assert torch.equal(got, made), f"{name} is another where nothing was kept"
            difference = compare(name, got, want)
            assert difference.within(limit.gradients if name.startswith("d") else limit.outputs), difference
