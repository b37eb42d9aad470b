"""The command line's words: what they become, and that each error says what would do."""

from __future__ import annotations

import pytest
import torch

from titans_backends.cli import words
from titans_backends.cli.failures import MisuseError
from titans_backends.contracts import contract
from titans_backends.errors import UnknownNameError


def test_an_option_may_be_repeated_or_hold_commas() -> None:
    assert words.names(["a,b", " c ", "a"]) == ["a", "b", "c"]
    assert words.names(None) is None
    assert words.integers("--seq-lens", ["512,2048", "64"]) == [512, 2048, 64]
    with pytest.raises(MisuseError, match="empty name"):
        words.names(["a,,b"])


@pytest.mark.parametrize(("text", "pair"), [("16", (16, 16)), ("16/32", (16, 32)), ("1/1", (1, 1))])
def test_heads_are_of_q_and_k_then_of_v(text: str, pair: tuple[int, int]) -> None:
    assert words.heads(text) == pair


@pytest.mark.parametrize("text", ["", "0", "16/", "16/24", "a", "-1", "16/32/64", "16.0", "²"])
def test_heads_that_are_none_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(MisuseError, match="16/32"):
        words.heads(text)


@pytest.mark.parametrize(("text", "pair"), [("128", (128, 128)), ("128x64", (128, 64)), ("128X64", (128, 64))])
def test_head_dim_is_k_then_v(text: str, pair: tuple[int, int]) -> None:
    assert words.head_dim(text) == pair


def test_head_dims_with_commas_are_several() -> None:
    assert words.head_dims(["128,64x32"]) == [(128, 128), (64, 32)]
    with pytest.raises(MisuseError, match="128x64"):
        words.head_dims(["128/64"])


@pytest.mark.parametrize("text", ["0", "-5", "1e3", "x", "1.5"])
def test_lengths_that_are_no_positive_integers_are_refused(text: str) -> None:
    with pytest.raises(MisuseError, match="--seq-lens"):
        words.integers("--seq-lens", [text])


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match="gated_delta_rule"):
        words.op_names(["gated_delta"])
    with pytest.raises(MisuseError, match="float32, float64, bfloat16, float16"):
        words.dtype_named("float8")
    with pytest.raises(MisuseError, match="inference or training"):
        words.one_of("--regime", ["both"], ("inference", "training"))
    assert words.dtype_named("bfloat16") is torch.bfloat16


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(MisuseError, match="cpu, cuda"):
        words.device_named("gpu!")
    with pytest.raises(MisuseError, match="CUDA devices here"):
        words.device_named("cuda:99")


def test_options_of_an_op_are_read_by_their_kind() -> None:
    rule, core = contract("gated_delta_rule"), contract("slow_core")
    assert words.options_of(rule, ["chunk_size=32", "qk_l2norm=true", "scale=0.5"]) == {"chunk_size": 32, "qk_l2norm": True, "scale": 0.5}
    assert words.options_of(rule, ["chunk_size=none"]) == {"chunk_size": None}
    with pytest.raises(MisuseError, match="whole number"):
        words.options_of(core, ["chunk_size=none"])
    with pytest.raises(MisuseError, match="Did you mean chunk_size"):
        words.options_of(core, ["chunksize=3"])
    with pytest.raises(MisuseError, match="name=value"):
        words.options_of(core, ["chunk_size"])
    with pytest.raises(MisuseError, match="true or false"):
        words.options_of(core, ["delta=maybe"])
