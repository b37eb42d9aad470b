"""gated_rms_norm's properties, on whatever dispatch chooses."""

from __future__ import annotations

import pytest
import torch

import titans_backends as tb


def test_a_wide_open_gate_leaves_torchs_rms_norm() -> None:
    x, weight = torch.randn(2, 5, 3, 8, dtype=torch.float64), torch.rand(8, dtype=torch.float64)
    (y,) = tb.get_op("gated_rms_norm")(x, torch.full_like(x, 40.0), weight)
    torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (8,), weight, 1e-5))


def test_a_row_of_zeros_stays_zero_and_its_gradient_finite() -> None:
    x = torch.zeros(1, 2, 1, 4, requires_grad=True)
    (y,) = tb.get_op("gated_rms_norm")(x, torch.ones_like(x), torch.ones(4))
    assert not y.any()
    y.sum().backward()
    assert x.grad.isfinite().all()


def test_an_eps_of_zero_is_refused() -> None:
    x = torch.ones(1, 2, 1, 4)
    with pytest.raises(ValueError, match=r"eps must be above 0, got 0\.0"):
        tb.get_op("gated_rms_norm")(x, x, torch.ones(4), eps=0.0)
