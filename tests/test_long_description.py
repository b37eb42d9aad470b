"""What a package index shows of README.md: no link and no picture that leads nowhere there, and nothing else changed."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


@pytest.fixture(scope="module")
def description() -> Callable[[str, str | None], str]:
    """The function of setup.py, which sets nothing up where it is imported."""
    pytest.importorskip("setuptools", reason="setup.py imports it")
    return runpy.run_path(str(ROOT / "setup.py"))["description"]


def test_without_a_repository_a_link_is_its_words_and_its_file(description: Callable[[str, str | None], str]) -> None:
    shown = description(README, None)
    assert [link for link in LINK.findall(shown) if "://" not in link] == []
    named = set(re.findall(r" \(`([^`]+\.md)`\)", shown))
    assert named == {link.partition("#")[0] for link in LINK.findall(README) if ".md" in link}
    assert all((ROOT / name).is_file() for name in named)
    assert "tune.svg" in README
    assert "tune.svg" not in shown


def test_with_a_repository_every_link_leads_into_it(description: Callable[[str, str | None], str]) -> None:
    shown = description(README, "https://example.org/us/it/")
    relative = [link for link in LINK.findall(README) if "://" not in link]
    assert [link.removeprefix("https://example.org/us/it/") for link in LINK.findall(shown)] == [
        f"{'raw' if link.endswith('.svg') else 'blob'}/HEAD/{link}" for link in relative
    ]
    assert all((ROOT / link.partition("#")[0]).is_file() for link in relative)


def test_code_and_what_leads_somewhere_already_stay(description: Callable[[str, str | None], str]) -> None:
    text = "[a](https://x.org/y) [b](#here) [c](mailto:x@y.z)\n```python\n[f](x)\nf[0](x)\n```\n[d](docs/d.md#e)"
    assert description(text, None) == text.replace("[d](docs/d.md#e)", "d (`docs/d.md`)")
