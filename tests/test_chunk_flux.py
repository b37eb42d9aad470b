"""chunk_flux's properties, on whatever dispatch chooses; the original's numbers where they are at hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import titans_backends as tb
from tests.golden_table import Ledger
from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.case import Case, build
from titans_backends.contracts.contract import Call


@pytest.mark.golden("lam_after_T256_K32_V32", "lam_before_T64_*", "lam_after_T200_K32_V64")
def test_the_originals_resonance(golden_file: Path) -> None:
    x = {name: t.double() for name, t in load_file(golden_file).items()}
    k = torch.nn.functional.normalize(x["k"], dim=-1)
    chunk = k.shape[1] // x["psi"].shape[1]
    u, _ = tb.get_op("uw_transform")(k, x["v"], x["beta"], transform="lam", chunk_size=chunk)
    network = [x[f"flux.{name}"] for name in ("W_bilinear", "temp", *(f"flux_net.{part}" for part in ("0.weight", "0.bias", "2.weight", "2.bias")))]
    ledger = Ledger.of("float64 inside", torch.float64)
    ledger.add("psi", tb.get_op("chunk_flux")(k, u, *network, chunk_size=chunk)[0], x["psi"])
    ledger.settle()


def arguments(**changes: object) -> tuple[Call, dict[str, object]]:
    """A call and its arguments."""
    made = CONTRACTS["chunk_flux"]
    call = build(made, Case("chunk_flux", B=1, G=1, H=2, K=4, V=6, dtype=torch.float64, **changes))  # type: ignore[arg-type]
    return call, {name: getattr(call, name) for name in made.parameters}


def test_packed_rows_are_the_sequences_chunks_and_then_zeros() -> None:
    _, given = arguments(lengths=(5, 0, 9), options={"chunk_size": 4})
    (packed,) = tb.get_op("chunk_flux")(**given)
    k, u = given.pop("k"), given.pop("u")
    assert isinstance(k, torch.Tensor)
    assert isinstance(u, torch.Tensor)
    given["cu_seqlens"] = None
    alone = [tb.get_op("chunk_flux")(k[:, part], u[:, part], **given)[0] for part in (slice(0, 5), slice(5, 14))]
    assert packed.shape == (1, 14 // 4 + 3, 2)
    torch.testing.assert_close(packed[:, :5], torch.cat(alone, 1))
    assert not packed[:, 5:].any()


def test_rows_without_a_chunk_have_no_gradient() -> None:
    _, given = arguments(lengths=(5, 0, 9), options={"chunk_size": 4})
    leaves = {name: x.requires_grad_() for name, x in given.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
    (psi,) = tb.get_op("chunk_flux")(**given)
    assert not any(grad.any() for grad in torch.autograd.grad(psi[:, 5:].sum(), list(leaves.values())))


def test_its_shape_is_known_to_a_tracer() -> None:
    _, given = arguments(lengths=(5, 0, 9), options={"chunk_size": 4})
    op = tb.get_op("chunk_flux")
    torch.compiler.reset()
    compiled = torch.compile(lambda **named: op(**named)[0] * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**given), op(**given)[0] * 2)


def test_a_network_that_does_not_fit_is_refused() -> None:
    _, given = arguments(T=8)
    w1 = given.pop("w1")
    assert isinstance(w1, torch.Tensor)
    with pytest.raises(ValueError, match=r"w1 has 10 inputs; it must have K \+ V \+ 1 = 4 \+ 6 \+ 1 = 11"):
        tb.get_op("chunk_flux")(**given, w1=w1[:, :10].contiguous())
