"""What a launch is compiled for: dtypes, alignment, strides, absent arguments; and that a form is what the launch looks up."""

from __future__ import annotations

from importlib import import_module
from typing import cast

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed: pip install -c constraints.txt -e '.[test]'")

import triton

launch = import_module("titans_backends.backends.triton.launch")


@triton.jit
def _copy(x, y, count, x_t, x_b, factor, BLOCK: triton.language.constexpr):
    pass


@triton.jit
def _misordered(x, BLOCK: triton.language.constexpr, y):
    pass


COPY = launch.Kernel(_copy)


def types(*args: object) -> tuple[str | None, ...]:
    """The types that a call of the kernel is compiled for."""
    return cast("tuple[str | None, ...]", COPY._form(args, (16,), 4, 2).types)


def test_pointers_tell_dtype_and_alignment() -> None:
    x = torch.empty(9, dtype=torch.bfloat16)
    assert types(x, x[1:], 1, 1, 1, 1.0)[:2] == ("*bf16!", "*bf16")
    assert types(x.float(), x.long(), 1, 1, 1, 1.0)[:2] == ("*fp32!", "*i64!")


def test_an_absent_tensor_is_a_constant() -> None:
    form = COPY._form((None, torch.empty(1), 1, 1, 1, 1.0), (16,), 4, 2)
    source = launch.source_of(COPY, form)
    assert form.types[0] is None
    assert source.signature["x"] == "constexpr"
    assert source.signature["BLOCK"] == "constexpr"
    assert {value for value in source.constants.values() if value is not None} == {16}


def test_strides_tell_whether_16_divides_them_and_other_numbers_do_not() -> None:
    x = torch.empty(1)
    assert types(x, x, 16, 16, 17, 1.0)[2:] == ("i32", "i32!", "i32", "fp32")
    assert types(x, x, 17, 32, 0, 2.5)[2:] == ("i32", "i32!", "i32!", "fp32")


def test_wide_numbers_are_wide() -> None:
    x = torch.empty(1)
    assert types(x, x, 2**31 - 1, 2**31, -(2**31) - 1, 1.0)[2:5] == ("i32", "i64", "i64")


def test_constants_come_last() -> None:
    with pytest.raises(TypeError, match="must come last"):
        launch.Kernel(_misordered)


def test_no_blocks_are_no_launch() -> None:
    COPY(0, (torch.empty(0), torch.empty(0), 0, 1, 1, 1.0), (16,), 4, 2)
    assert not COPY._forms
