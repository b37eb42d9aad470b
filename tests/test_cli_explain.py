"""`explain`: the words make the call that they name, and the answer is the library's own."""

from __future__ import annotations

import importlib
import io
import json

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import titans_backends as tb
from tests.triton_machines import H100
from titans_backends.cli import app
from titans_backends.cli.asked_call import optional_tensors, sized
from titans_backends.contracts import CONTRACTS, contract
from titans_backends.explain import explain_signature

run = CliRunner().invoke


@pytest.mark.parametrize("op", CONTRACTS)
@pytest.mark.parametrize("regime", ["inference", "training"])
def test_every_op_is_explained(op: str, regime: str) -> None:
    result = run(app, ["explain", op, "--regime", regime, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "eager/" in result.stdout
    assert "titans-backends tune --op" in result.stdout


def test_the_words_are_the_call() -> None:
    words = [
        "--seq-len",
        "96",
        "--batch",
        "3",
        "--heads",
        "2/4",
        "--head-dim",
        "32x16",
        "--dtype",
        "bfloat16",
        "--with",
        "g",
        "--option",
        "chunk_size=32",
    ]
    said = json.loads(run(app, ["explain", "gated_delta_rule", *words, "--device", "cpu", "--json"]).stdout)
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator).to(torch.bfloat16)

    q, k, v = drawn(3, 96, 2, 32), drawn(3, 96, 2, 32), drawn(3, 96, 4, 16)
    beta, g = (drawn(3, 96, 4).float() for _ in range(2))
    real = tb.get_op("gated_delta_rule").explain(q, k, v, beta, -g, chunk_size=32).as_dict()
    assert {name: said[name] for name in ("key", "seq_len", "kernel", "work", "backends")} == {
        name: real[name] for name in ("key", "seq_len", "kernel", "work", "backends")
    }


def test_no_memory_is_taken_for_a_call_that_would_not_fit() -> None:
    result = run(app, ["explain", "gated_delta_rule", "--seq-len", "16777216", "--batch", "64", "--device", "cpu"])
    assert result.exit_code == 0, result.output


def test_packed_sequences_are_packed() -> None:
    said = json.loads(run(app, ["explain", "slow_core", "--packed", "--batch", "3", "--seq-len", "100", "--device", "cpu", "--json"]).stdout)
    assert (said["key"]["packed"], said["seq_len"], said["key"]["streams"]) == (True, 100, 48)


def test_the_optional_tensors_are_the_tuners_unless_named() -> None:
    core = contract("slow_core")
    assert optional_tensors(core, None) == ("g", "gate")
    assert optional_tensors(core, ["none"]) == ()
    assert optional_tensors(core, ["chunk_decay,initial_state"]) == ("chunk_decay", "initial_state")


def test_the_default_length_is_one_token_for_decode() -> None:
    asked = sized(
        contract("gated_delta_step"), seq_len=None, batch=2, heads="4", head_dim="16", dtype="float32", regime="inference", device="cpu", options={}, given=()
    )  # fmt: skip
    assert asked.signature().dim("T") == 1


def test_it_fits_80_columns_and_keeps_every_candidate() -> None:
    words = ["explain", "gated_delta_rule", "--regime", "training", "--device", "cpu"]
    said = json.loads(run(app, [*words, "--json"]).stdout)
    result = run(app, words, env={"COLUMNS": "80"})
    text = " ".join(result.stdout.split())
    assert all(label in text for backend in said["backends"] for label in (*backend["forward"], *backend["backward"]))
    assert max(len(line) for line in result.stdout.splitlines() if "titans-backends tune" not in line) <= 80


def test_a_graph_is_asked_about_where_one_can_be_captured() -> None:
    result = run(app, ["explain", "fast_core", "--launch", "graph", "--device", "cpu"])
    assert result.exit_code == 2
    assert "--launch graph is for CUDA, and cpu captures nothing" in " ".join(result.output.split())


def how_to_measure(op: str, **options: str | int) -> str:
    """What `explain` says about it on an H100 without a table."""
    asked = sized(
        contract(op), seq_len=512, batch=1, heads="12", head_dim="32", dtype="float32", regime="inference", device="cuda", options=dict(options),
        given=optional_tensors(contract(op), None),
    )  # fmt: skip
    found, out = explain_signature(asked.signature(), H100, None, asked.work()), io.StringIO()
    importlib.import_module("titans_backends.cli.explain")._show_how_to_measure(Console(file=out, width=200), asked, found)
    return out.getvalue()


def test_the_command_that_it_names_measures_this_call() -> None:
    """On a GPU `tune --op coupled_core` measures the lam transform, as the layer calls it, and no other."""
    command = "  titans-backends tune --op coupled_core --seq-lens 512 --heads 12 --head-dim 32 --dtype float32 --regime inference\n"
    assert how_to_measure("coupled_core", transform="lam") == f"not tuned yet; measure it:\n{command}"
    said = how_to_measure("coupled_core")
    assert "`titans-backends tune` has no words for it (it would measure transform lam, not exact)" in said
    assert 'with tb.autotune(): tb.get_op("coupled_core")(...)' in said
    assert "tune --op" not in said
    assert "titans-backends tune --op dual_core" in how_to_measure("dual_core")
    assert "(it would measure chunk_size 128, not 32; or " in how_to_measure("dual_core", chunk_size=32)


def test_no_tokens_name_a_command_that_tune_takes() -> None:
    out = CliRunner().invoke(app, ["explain", "gated_delta_rule", "--seq-len", "0", "--heads", "2", "--head-dim", "16"]).output
    assert "tune --op gated_delta_rule --seq-lens 1 " in " ".join(out.split())
