"""Is a backend right? Every case of every op that it declares, against the float64 reference; for our tests and for a plugin's own.

    import pytest
    from titans_backends.conformance import examine, items

    @pytest.mark.parametrize("item", items("my_backend"), ids=str)
    def test_conformance(item):
        result = examine(item)
        if result.status == "refused":
            pytest.skip(result.detail)
        assert result.status == "passed", result.detail

Nothing here is timed, and nothing is chosen: an item names its backend.
"""

from __future__ import annotations

from titans_backends.conformance.examine import Result, examine
from titans_backends.conformance.items import Item, items

__all__ = ["Item", "Result", "examine", "items"]
