"""What the documents show works: README's snippet runs, CONTRIBUTING's backend passes conformance, links and tables are true."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

import titans_backends as tb
from titans_backends import registry
from titans_backends.buckets import defaults_of
from titans_backends.cache.table_text import parse_table
from titans_backends.cli import app
from titans_backends.conformance import examine, items
from titans_backends.contracts import CONTRACTS
from titans_backends.machine import detect
from titans_backends.offers import offers
from titans_backends.switches import PREFIX, SWITCHES
from titans_backends.tuning.problem import signature_of_bucket

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: str, language: str) -> list[str]:
    """The fenced code blocks of one language, without the indentation of the list that they stand in."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", text, flags=re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", body, flags=re.MULTILINE) for indent, body in found]


def test_the_readmes_snippet_runs(capsys: pytest.CaptureFixture[str]) -> None:
    snippet = blocks("README.md", "python")[0]  # the second, accelerate, wants a model
    scope: dict[str, object] = {}
    exec(compile(snippet, "README.md", "exec"), scope)
    assert "slow_core on" in capsys.readouterr().out
    one = tb.get_op("slow_core")(*(scope[n] for n in "qkuw"), g=scope["g"])[0]
    assert torch.allclose(one, scope["o"], atol=1e-4)  # the snippet's second way computes the same


def test_contributings_backend_passes_conformance(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    manifest, module, suite = blocks("CONTRIBUTING.md", "python")
    (tmp_path / "my_backend").mkdir()
    (tmp_path / "my_backend" / "__init__.py").write_text(manifest)
    (tmp_path / "my_backend" / "fused_uw.py").write_text(module)
    assert "examine(item)" in suite
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        patch.setenv(f"{PREFIX}PLUGINS", "my_backend")
        tb.reset()
        assert "mine" in registry.known(), registry.broken()
        results = [examine(item) for item in items("mine", regimes=("inference",))]
        assert {r.status for r in results} == {"passed", "refused"}  # float32 passes, the rest is refused with its sentence
        assert all("it takes float32 only" in r.detail for r in results if r.status == "refused")
    for name in ("my_backend", "my_backend.fused_uw"):
        sys.modules.pop(name, None)
    tb.reset()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_point_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in [*re.findall(r"\]\(([^)#]+)", text), *re.findall(r'<\w+ [^>]*?src(?:set)?="([^"]+)"', text)]:
        assert "://" in target or (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_switch_op_and_command_is_documented() -> None:
    switches, readme, verbs = ((ROOT / page).read_text(encoding="utf-8") for page in ("docs/switches.md", "README.md", "docs/command-line.md"))
    assert [name for name in SWITCHES if f"`{PREFIX}{name}`" not in switches] == []
    assert [name for name in CONTRACTS if f"`{name}`" not in readme] == []
    commands = [str(command.name) for command in app.registered_commands] + [str(group.name) for group in app.registered_groups]
    assert [name for name in commands if not re.search(rf"^\| `{name}\b|also `{name}`", verbs, flags=re.MULTILINE)] == []
    assert [name for name in re.findall(r"^\| `([a-z-]+)\b", verbs, flags=re.MULTILINE) if name not in commands] == []


def test_every_page_has_its_place_in_the_sites_navigation() -> None:
    """And every place its page; the strict build says the same, where mkdocs is installed."""
    listed = set(re.findall(r"^ +- (?:.+: )?([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.MULTILINE))
    written = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert written - listed == set()
    made = {"index.md", "contributing.md", "changelog.md", "benchmarks.md", "reference/commands.md", "reference/api.md", "reference/backends.md"}
    assert listed - written - made == set()


def test_every_result_and_every_benchmark_is_in_the_contents_of_what_was_measured() -> None:
    page = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8")
    contents = page.partition("## All measurements\n")[2].partition("\n## ")[0]
    named = {name for line in contents.splitlines()[2:] for name in re.findall(r"`([\w.]+\.(?:json|txt|yaml))`", line)}
    kept = {path.name for path in (ROOT / "benchmarks" / "results").iterdir()}
    linked = {name for path in PAGES for name in re.findall(r"benchmarks/results/([\w.]+)\)", path.read_text(encoding="utf-8"))}
    assert kept - named - linked == set(), "a line for each under docs/measured.md, All measurements"
    assert named - kept <= {"recorded.json"}, "not there"
    for command in re.findall(r"python ((?:benchmarks|examples)/\w+\.py)", page):
        assert (ROOT / command).exists(), command


def test_the_sample_of_a_table_is_one_and_names_candidates_that_there_are() -> None:
    (sample,) = blocks("docs/cache.md", "yaml")
    table = parse_table(sample, "docs/cache.md", defaults_of, None)
    assert table.rows
    for bucket, entry in table.rows.items():
        labels = [one.label for offer in offers(signature_of_bucket(bucket), detect("cpu"), ["eager"]) for one in offer.forward]
        assert {entry.label, entry.next} <= set(labels)


def test_no_page_has_a_placeholder() -> None:
    for page in PAGES:
        assert "@@" not in page.read_text(encoding="utf-8"), page.name


def test_no_docstring_of_the_library_points_to_a_text_that_is_not_here() -> None:
    """`help`, the site and `titans-backends ops` show them. What backends say in theirs is for their own readers."""
    pages = {
        path: re.findall(r"\bSPEC\b(?: \d|\.md| of)", path.read_text(encoding="utf-8"))
        for path in [*(ROOT / "titans_backends").rglob("*.py"), *PAGES]
    }
    assert {str(path.relative_to(ROOT)): named for path, named in pages.items() if named} == {}
    assert [backend.name for backend in registry.known().values() if "SPEC" in backend.summary] == []
