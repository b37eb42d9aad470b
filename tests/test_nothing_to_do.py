"""Calls of no sequences, no tokens or no heads give empty results in eager torch; a default scale of no keys is asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest

import titans_backends as tb
from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.case import Case, build

SIZES = {"B=0": {"B": 0}, "T=0": {"T": 0}, "H=0": {"G": 0, "H": 0}}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("op", CONTRACTS)
def test_an_empty_call_has_an_empty_result(op: str, size: str) -> None:
    made = CONTRACTS[op]
    if made.max_tokens is not None and size == "T=0":
        return  # refused: a step has a token
    first = made.variants[0]
    call = build(made, replace(Case(op, T=3 if made.max_tokens else 65, options=first.options, given=first.given), **SIZES[size]))  # type: ignore[arg-type]
    wanted = made.reference(call)
    found = tb.get_op(op)(**{name: getattr(call, name) for name in made.parameters}, backend="eager")
    assert [None if x is None else x.shape for x in found] == [None if x is None else x.shape for x in wanted]


@pytest.mark.parametrize("op", ["gated_delta_rule", "gated_delta_step"])
def test_the_scale_of_no_keys_is_asked_for(op: str) -> None:
    made = CONTRACTS[op]
    call = build(made, Case(op, T=3, K=0))
    given = {name: getattr(call, name) for name in made.parameters}
    with pytest.raises(ValueError, match=f"{op}: scale=None stands for K \\*\\* -0.5, and K is 0 in q and k; pass a number, such as scale=1.0"):
        tb.get_op(op)(**given)
    assert not tb.get_op(op)(**{**given, "scale": 1.0})[0].any()  # type: ignore[union-attr]
