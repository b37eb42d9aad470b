"""Every case of every op that sliced declares, against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from titans_backends.conformance import Item, examine, items

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("item", items("sliced", device=DEVICE), ids=str)
def test_conformance(item: Item) -> None:
    result = examine(item)
    if result.status == "refused":
        pytest.skip(result.detail)
    assert result.status == "passed", result.detail
