"""A backend that ships tables: its rows speak for its own candidates alone, below the user's cache and beside the library's table."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import titans_backends as tb
from titans_backends import dispatch, registry
from titans_backends.buckets import Bucket, bucket_of, defaults_of
from titans_backends.cache import file, paths
from titans_backends.cache.beside import displaces
from titans_backends.cache.lookup import Hit
from titans_backends.cache.schema import Device, Entry, device_of
from titans_backends.cli.cache_check import check_caches
from titans_backends.dispatch import Choice, choose
from titans_backends.offers import Pair
from titans_backends.request import PLAIN
from titans_backends.tables import current_environment

pytestmark = pytest.mark.usefixtures("eager_first")

OP = tb.get_op("fused_uw")
ARGUMENTS = (torch.randn(6, 32, 32), torch.randn(6, 32, 8), torch.randn(6, 32, 8))
MANIFEST = """
from titans_backends import CONTRACT_VERSION, Backend
BACKEND = Backend("tabled", "ships a table", CONTRACT_VERSION, {"fused_uw": "tabled.fused_uw"}, simplicity=9, rank={"cpu": 9}, tables="tables")
"""
MODULE = """
from titans_backends import ACCEPTED, Candidate
def supports(signature, machine):
    return ACCEPTED
def candidates(signature, machine):
    return [Candidate("tabled", "first"), Candidate("tabled", "second")]
def run(call, candidate):
    return call.attn_const @ call.v_beta, call.attn_const @ call.k_beta
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A plugin on the path, with an empty folder for its tables; no shipped table, an empty user's cache."""
    folder = tmp_path / "plugin" / "tabled"
    (folder / "tables").mkdir(parents=True)
    (folder / "__init__.py").write_text(MANIFEST)
    (folder / "fused_uw.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setenv("TITANS_BACKENDS_PLUGINS", "tabled")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(paths, "shipped_paths", lambda: tuple(sorted((tmp_path / "shipped").glob("*.yaml"))))
    tb.reset()
    yield folder / "tables"
    for name in [name for name in sys.modules if name.partition(".")[0] == "tabled"]:
        del sys.modules[name]
    monkeypatch.undo()
    tb.reset()


def signature() -> tb.Signature:
    return OP._planner.signature(OP.contract.make_call(*ARGUMENTS), {"*": 6, "C": 32, "K": 8, "V": 8}, PLAIN)


def decide(**changes: object) -> Choice:
    return choose(signature(), replace(tb.detect(), **changes))  # type: ignore[arg-type]


def write(path: Path, label: str, *, us: float = 5.0, device: Device | None = None, **changes: object) -> None:
    """A table with one row for the call that names a candidate by its label."""
    found = next(Pair(c) for o in decide().offers for c in o.forward if c.label == label)
    entry = Entry(found.forward.name, us, 0.01, 0.0, params=found.forward.params, source=dispatch.pair_source(found, "fused_uw"))
    file.update(
        path,
        device=device or device_of(tb.detect()),
        environment=current_environment("cpu"),
        changes={bucket_of(signature()): replace(entry, **changes)},  # type: ignore[arg-type]
        defaults_of=defaults_of,
    )
    tb.reset()


def eager_label() -> str:
    return next(c.label for o in decide().offers for c in o.forward if c.backend == "eager")


def test_without_another_row_the_backends_row_decides(plugin: Path) -> None:
    assert (decide().origin, decide().pair.forward.backend) == ("default", "eager")
    write(plugin / "here.yaml", "tabled/second")
    made = decide()
    assert (made.origin, made.pair.label) == ("tuned", "tabled/second")
    assert "table of the backend tabled" in made.reason
    assert made.answered is not None
    assert made.answered.source.owner == "tabled"
    assert "tabled/second" in str(OP.explain(*ARGUMENTS))


def test_the_users_row_goes_first_however_slow(plugin: Path) -> None:
    write(plugin / "here.yaml", "tabled/second", us=1.0)
    write(paths.user_cache_path(tb.detect().slug), "tabled/first", us=50.0)
    made = decide()
    assert made.pair.label == "tabled/first"
    assert [asked.source.kind for asked in made.consulted] == ["user"]


@pytest.mark.parametrize(("us", "winner"), [(5.0, "tabled"), (9.6, "tabled"), (9.75, "eager"), (20.0, "eager")])
def test_beside_the_shipped_row_the_clearly_faster_one_decides(us: float, winner: str, plugin: Path, tmp_path: Path) -> None:
    write(tmp_path / "shipped" / "here.yaml", eager_label(), us=10.0)
    write(plugin / "here.yaml", "tabled/second", us=us)
    made = decide()
    assert made.pair.forward.backend == winner
    assert [asked.source.kind for asked in made.consulted] == ["user", "shipped", "backend"]


def test_a_row_for_anothers_candidate_is_told_and_passed_over(plugin: Path) -> None:
    write(plugin / "here.yaml", eager_label())
    made = decide()
    assert made.origin == "default"
    assert "a backend's table speaks for its own candidates alone" in str(OP.explain(*ARGUMENTS))
    write(plugin / "here.yaml", "tabled/first", backward="eager/chunked")
    assert decide().origin == "default"


def test_forced_the_backends_row_names_the_variant(plugin: Path) -> None:
    write(plugin / "here.yaml", "tabled/second")
    with tb.use_backend("tabled"):
        assert OP.explain(*ARGUMENTS).kernel == "tabled/second"


def test_changed_code_leaves_the_row_out(plugin: Path) -> None:
    write(plugin / "here.yaml", "tabled/second", source="000000000000")
    assert decide().origin == "default"
    assert "has changed since" in str(OP.explain(*ARGUMENTS))


def test_a_relatives_table_is_borrowed_below_everything(plugin: Path) -> None:
    machine = tb.detect()
    write(plugin / "relative.yaml", "tabled/second", device=Device(machine.kind, "another", "Another", sm=90, sms=100))
    made = decide(sm=90, sms=132)
    assert (made.origin, made.pair.label) == ("borrowed", "tabled/second")
    assert "borrowed table of the backend tabled" in made.reason
    assert decide(sm=90, sms=201).origin == "default"


def test_doctor_reports_the_backends_table(plugin: Path) -> None:
    write(plugin / "here.yaml", "tabled/second", source="000000000000")
    told = {report.kind: report for report in check_caches(tb.detect())}
    assert told["backend tabled"].rows == 1
    assert told["backend tabled"].renewals[0].kind == "ignored"


def test_a_folder_that_is_not_there_breaks_the_backend_with_its_reason(plugin: Path) -> None:
    plugin.rmdir()
    tb.reset()
    assert "tabled" not in registry.known()
    assert "there is no folder" in registry.broken()["tabled"].reason


def hit(kind: str, seq_len: int, us: float, spread: float = 0.0) -> Hit:
    return Hit(kind, Bucket("fused_uw", (), seq_len), Entry("a/b", us, spread, 0.0))  # type: ignore[arg-type]


def test_rows_of_two_tables_are_compared_within_one_bucket_alone() -> None:
    assert displaces(hit("exact", 512, 9.0), hit("exact", 512, 10.0))
    assert not displaces(hit("exact", 512, 9.8), hit("exact", 512, 10.0))
    assert not displaces(hit("exact", 512, 9.0, 0.08), hit("exact", 512, 10.0, 0.04))  # within the noise of both
    assert displaces(hit("exact", 512, 99.0), hit("nearest", 256, 10.0))
    assert not displaces(hit("nearest", 512, 1.0), hit("exact", 256, 10.0))
    untimed = replace(hit("exact", 512, 9.0), by_sibling=True)  # not the time of what would run
    assert not displaces(untimed, hit("exact", 512, 10.0))
    assert displaces(hit("exact", 512, 99.0), untimed)
    assert displaces(hit("nearest", 512, 9.0), hit("nearest", 512, 10.0))
    assert not displaces(hit("nearest", 512, 9.0), hit("nearest", 256, 10.0))  # of two lengths, no comparison
