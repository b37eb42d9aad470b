"""token_flux's properties, on whatever dispatch chooses; the original's numbers where they are at hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import titans_backends as tb
from tests.golden_table import Ledger


@pytest.mark.golden("lam_after_T33_*", "lam_before_T64_*", "lam_after_T200_K32_V64")
def test_the_originals_flux(golden_file: Path) -> None:
    x = {name: t.double() for name, t in load_file(golden_file).items()}
    k = torch.nn.functional.normalize(x["k"], dim=-1)
    network = [x[f"flux.token_flux_proj.{name}"] for name in ("0.weight", "0.bias", "2.weight", "2.bias")]
    ledger = Ledger.of("float64 inside", torch.float64)
    ledger.add("flux", tb.get_op("token_flux")(k, x["v"], x["beta"], *network)[0], x["token_flux"])
    ledger.settle()


def given(bias: float) -> list[torch.Tensor]:
    """All arguments; the second bias decides the flux."""
    sizes = ((1, 3, 2, 4), (1, 3, 2, 4), (1, 3, 2), (2, 8), (2,), (1, 2))
    return [*(torch.ones(size) for size in sizes), torch.tensor([bias])]


@pytest.mark.parametrize(("bias", "value"), [(-1e3, 0.01), (1e3, 0.99)])
def test_a_clamped_flux_has_no_gradient(bias: float, value: float) -> None:
    arguments = [x.requires_grad_() for x in given(bias)]
    (flux,) = tb.get_op("token_flux")(*arguments)
    assert torch.equal(flux, torch.full_like(flux, value))
    assert not any(grad.any() for grad in torch.autograd.grad(flux.sum(), arguments))


def test_a_network_that_does_not_fit_is_refused() -> None:
    k, v, beta, w1, b1, w2, b2 = given(0.0)
    with pytest.raises(ValueError, match=r"w1 has 7 inputs; it must have K \+ V = 4 \+ 4 = 8"):
        tb.get_op("token_flux")(k, v, beta, w1[:, :7].contiguous(), b1, w2, b2)
    with pytest.raises(ValueError, match="must have one row, got 2; all heads share one network"):
        tb.get_op("token_flux")(k, v, beta, w1, b1, torch.ones(2, 2), torch.ones(2))
